"""
Checkpoints of the first release (0.1), in which the LLM was held without its head and fingerprints counted no
embeddings: `from_pretrained` and slim checkpoints of theirs still work.
"""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .configuration_lsm import LsmConfig


def is_of_first_release(saved: dict[str, Any]) -> bool:
    """Whether the config of a checkpoint, as a dictionary, is of the first release."""
    return bool(saved) and "projector_config" not in saved


def name_changes(text_config: PreTrainedConfig) -> dict[str, str]:
    """The names of weights in the first release, as patterns, and what they are today."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(text_config)
    body = next(name for name, child in llm.named_children() if isinstance(child, PreTrainedModel))
    head = next(name for name, module in llm.named_modules() if module is llm.get_output_embeddings())
    return {
        r"^model\.": "lsm.",
        r"^lsm\.language_model\.": f"lsm.language_model.{body}.",
        r"^lm_head\.": f"lsm.language_model.{head}.",
    }


def rename(weights: dict[str, torch.Tensor], changes: dict[str, str]) -> dict[str, torch.Tensor]:
    """`weights` by today's names."""
    for pattern, name in changes.items():
        weights = {re.sub(pattern, name, old): tensor for old, tensor in weights.items()}
    return weights


def load_first_release(load: Callable, name: str, *model_args, config: Any = None, **kwargs):
    """
    Loads a whole checkpoint of the first release.

    Args:
        load (`Callable`): `PreTrainedModel.from_pretrained` of the class to load.
        name, model_args, config, kwargs: Its arguments.
    """
    saved = config if isinstance(config, PreTrainedConfig) else LsmConfig.from_pretrained(config or name)
    kwargs["key_mapping"] = {**name_changes(saved.text_config), **(kwargs.get("key_mapping") or {})}
    loaded = load(name, *model_args, config=config, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    # Saving would go back to the names that were loaded, if it knew of them.
    model._weight_conversions = None
    return loaded


def first_fingerprint(llm: PreTrainedModel) -> str:
    """The hash that tells the base LLM of a slim checkpoint of the first release from others."""
    digest = hashlib.sha256()
    body = next(child for child in llm.children() if isinstance(child, PreTrainedModel))
    for name, tensor in sorted(body.named_parameters()):
        if tensor.shape[:1] != (llm.config.vocab_size,):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


__all__ = ["first_fingerprint", "is_of_first_release", "load_first_release", "name_changes", "rename"]
