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
from transformers import AutoConfig

from ..assembling_lsm import whole_models
from ..configuration_lsm import LsmConfig
from ..fingerprints import fingerprint, hash_text
from ..first_release_lsm import first_fingerprint, is_base_of_first_release
from ..language_model_lsm import load_language_model
from ..modeling_lsm import LsmForConditionalGeneration


logger = logging.getLogger(__name__)


def fingerprint_llm(model_name_or_path: str) -> str:
    """
    The [`fingerprint`] of a saved LLM, the same for the LLM itself and for an LSM composed from it. The weights are
    loaded.

    Args:
        model_name_or_path (`str`): A causal LM or an LSM checkpoint: a folder or a Hub id.

    Raises:
        ValueError: If the checkpoint is slim and holds LoRA.
    """
    config = AutoConfig.from_pretrained(model_name_or_path)
    with whole_models():
        if not isinstance(config, LsmConfig):
            llm = load_language_model(model_name_or_path)
            return fingerprint(llm, llm.config.vocab_size)
        if config.lora_scaling is not None:
            raise ValueError(
                f"The LLM of {model_name_or_path} is its base model with LoRA, which must be merged to be told from "
                f"others: python -m modeling_lsm.composing --merge {model_name_or_path} --output_dir …"
            )
        base = (config.base_models or {}).get("text") or {}
        is_untrained = not {"llm", "lora"} & {*(config.trained_parts or [])}
        of_first_release = is_base_of_first_release(base)
        if base.get("fingerprint") and is_untrained and (config.slim or of_first_release):
            return base["fingerprint"]
        llm = LsmForConditionalGeneration.from_pretrained(model_name_or_path).lsm.language_model
        if of_first_release:  # so that the targets that it wrote then are still its own
            return first_fingerprint(llm)
        return fingerprint(llm, base.get("vocab_size", llm.config.vocab_size))


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


__all__ = ["check_provenance", "fingerprint_llm"]
