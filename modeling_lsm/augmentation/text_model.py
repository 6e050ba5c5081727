"""The LLM that writes the targets: that of an LSM, or one that an LSM will be composed from."""

from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ..composing import read_chat_template
from ..configuration_lsm import LsmConfig
from ..fingerprints import commit_of, hash_text
from ..language_model_lsm import load_language_model
from ..modeling_lsm import LsmForConditionalGeneration
from ..processing_lsm import LsmProcessor
from .prompts import Prompter
from .provenance import fingerprint_llm


class TextModel:
    """
    An LLM with its `config` and [`Prompter`]. Weights are loaded when asked for.

    Args:
        name (`str`): An LSM checkpoint or a causal LM: a folder or a Hub id.
        chat_template (`str`, *optional*): For a causal LM without one, see [`~composing.read_chat_template`].
    """

    def __init__(self, name: str, chat_template: str | None = None):
        self.name = name
        self.config = AutoConfig.from_pretrained(name)
        self.is_lsm = isinstance(self.config, LsmConfig)
        if self.is_lsm:
            processor = LsmProcessor.from_pretrained(name)
            processor.check_matches(self.config)
            self.prompter = Prompter(processor.tokenizer, processor.chat_template)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
            self.prompter = Prompter(tokenizer, read_chat_template(chat_template, tokenizer))

    def load(self, dtype: str, device: torch.device) -> PreTrainedModel:
        """The model with its weights: an LSM, or the causal LM."""
        load = LsmForConditionalGeneration.from_pretrained if self.is_lsm else load_language_model
        return load(self.name, dtype=dtype).to(device)

    def provenance(self) -> dict[str, Any]:
        """What identifies the LLM and its prompt."""
        fingerprint = fingerprint_llm(self.name)
        known = {"id": self.name.rstrip("/").split("/")[-1], "revision": commit_of(self.name)}
        base = (self.config.base_models or {}).get("text", {}) if self.is_lsm else {}
        if base.get("fingerprint") == fingerprint:  # training has not changed it
            known = {"id": base["id"], "revision": base["revision"]}
        return {
            **known,
            "fingerprint": fingerprint,
            "template_hash": hash_text(self.prompter.chat_template),
        }


__all__ = ["TextModel"]
