"""Which LLM wrote a set of targets, with which prompt: recorded with the data, and checked before training on it."""

import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from ..configuration_lsm import LsmConfig
from ..fingerprints import fingerprint_llm, hash_text


logger = logging.getLogger(__name__)


def check_provenance(dataset: str, config: LsmConfig, model_name_or_path: str, chat_template: str) -> None:
    """
    Makes sure that a model trains on targets that its own LLM wrote.

    The LLM that the model was composed from counts as its own, also after training has changed it.

    Args:
        dataset (`str`): A folder of `augment.py`, a file in it, or a dataset on the Hub that it published. What has no
            provenance passes.
        config ([`LsmConfig`]): Config of the model to train.
        model_name_or_path (`str`): The model to train.
        chat_template (`str`): Its processor's template.

    Raises:
        ValueError: If the targets are of another LLM or another template.
    """
    path = find_provenance(dataset)
    if path is None:
        return
    llm: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["llm"]
    mend = "Generate them with this model (augment.py), or pass --allow_foreign_targets."
    composed_from = ((config.base_models or {}).get("text") or {}).get("fingerprint")
    if llm["fingerprint"] != composed_from and llm["fingerprint"] != fingerprint_llm(model_name_or_path):
        raise ValueError(
            f"The targets in {dataset} were written by {llm['id']} (weights {llm['fingerprint'][:12]}), which is not "
            f"the LLM of {model_name_or_path}. {mend}"
        )
    if llm["template_hash"] is None:
        logger.warning("The targets in %s were written by a server: its chat template cannot be checked.", dataset)
    elif llm["template_hash"] != hash_text(chat_template):
        raise ValueError(
            f"The targets in {dataset} were written with another chat template than that of {model_name_or_path}. "
            f"{mend}"
        )


def find_provenance(dataset: str) -> Path | None:
    """The `provenance.json` of a dataset, if it has one."""
    path = Path(dataset).resolve()
    for folder in (path, path.parent, path.parent.parent):
        if path.exists() and (folder / "provenance.json").is_file():
            return folder / "provenance.json"
    if path.exists():
        return None
    try:
        return Path(hf_hub_download(dataset, "provenance.json", repo_type="dataset"))
    except (EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return None


__all__ = ["check_provenance"]
