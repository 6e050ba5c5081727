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


def is_of_first_release(saved: dict[str, Any]) -> bool:
    """Whether the config of a checkpoint, as a dictionary, is of the first release."""
    return bool(saved) and "projector_config" not in saved


def name_changes(text_config: PreTrainedConfig) -> dict[str, str]:
    """The names of weights in the first release, as patterns, and what they are today. Needs `whole_models`."""
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


def load_first_release(load: Callable, changes: dict[str, str], name: str, *model_args, **kwargs):
    """
    Loads a whole checkpoint of the first release.

    Args:
        load (`Callable`): `PreTrainedModel.from_pretrained` of the class to load.
        changes (`dict`): The [`name_changes`] of its LLM.
        name, model_args, kwargs: Arguments of `load`.
    """
    kwargs["key_mapping"] = changes | (kwargs.get("key_mapping") or {})
    loaded = load(name, *model_args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    # Saving would go back to the names that were loaded, if it knew of them.
    model._weight_conversions = None
    return loaded


def is_base_of_first_release(base: dict[str, Any]) -> bool:
    """Whether the first release wrote `base`, what a config says of its base LLM, and so a [`first_fingerprint`]."""
    return bool(base.get("fingerprint")) and "vocab_size" not in base


def first_fingerprint(llm: PreTrainedModel) -> str:
    """The hash by which the first release told an LLM, be it that of an LSM or its base, from others."""
    digest = hashlib.sha256()
    body = next(child for child in llm.children() if isinstance(child, PreTrainedModel))
    for name, tensor in sorted(body.named_parameters()):
        if tensor.shape[:1] != (llm.config.vocab_size,):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


__all__ = [
    "first_fingerprint",
    "is_base_of_first_release",
    "is_of_first_release",
    "load_first_release",
    "name_changes",
    "rename",
]
