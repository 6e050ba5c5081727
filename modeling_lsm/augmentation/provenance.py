"""Which LLM wrote a set of targets, with which prompt: recorded with the data, and checked before training on it."""

import json
from pathlib import Path
from typing import Any

from ..configuration_lsm import LsmConfig
from ..fingerprints import fingerprint_llm, hash_text


def check_provenance(dataset: str, config: LsmConfig, model_name_or_path: str, chat_template: str) -> None:
    """
    Makes sure that a model trains on targets that its own LLM wrote.

    The LLM that the model was composed from counts as its own, also after training has changed it.

    Args:
        dataset (`str`): A folder of `augment.py`; anything else has no provenance and passes.
        config ([`LsmConfig`]): Config of the model to train.
        model_name_or_path (`str`): The model to train.
        chat_template (`str`): Its processor's template.

    Raises:
        ValueError: If the targets are of another LLM or another template.
    """
    path = Path(dataset) / "provenance.json"
    if not path.is_file():
        return
    llm: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["llm"]
    mend = "Generate them with this model (augment.py), or pass --allow_foreign_targets."
    composed_from = ((config.base_models or {}).get("text") or {}).get("fingerprint")
    if llm["fingerprint"] not in (composed_from, fingerprint_llm(model_name_or_path)):
        raise ValueError(
            f"The targets in {dataset} were written by {llm['id']} (weights {llm['fingerprint'][:12]}), which is not "
            f"the LLM of {model_name_or_path}. {mend}"
        )
    if llm["template_hash"] != hash_text(chat_template):
        raise ValueError(
            f"The targets in {dataset} were written with another chat template than that of {model_name_or_path}. "
            f"{mend}"
        )


__all__ = ["check_provenance"]
