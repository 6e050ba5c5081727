"""Hashes that tell one model or chat template from another."""

import hashlib
import os

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash


def hash_text(text: str) -> str:
    """SHA-256 of a text: 64 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def commit_of(name: str | os.PathLike, revision: str | None = None, **hub_kwargs) -> str | None:
    """The commit of a model on the Hub that `revision` names, by default its main branch; `None` for a folder."""
    hub_kwargs.pop("trust_remote_code", None)
    return extract_commit_hash(cached_file(name, "config.json", revision=revision, **hub_kwargs), None)


def fingerprint(model: PreTrainedModel, vocab_size: int | None = None) -> str:
    """
    A hash of all weights of a model: an LLM with embeddings and head, or a speech encoder.

    Weights go by the names and in the form that `save_pretrained` writes, which differ from those in memory for
    mixture-of-experts models. Tied ones count once, and a wider dtype does not count.

    Args:
        model ([`PreTrainedModel`]): The model.
        vocab_size (`int`, *optional*): The LLM's vocabulary before composing added a row for the audio token to
            embeddings and head. Rows after it do not count.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    grown_to = None if vocab_size is None else model.config.get_text_config().vocab_size
    for name, tensor in sorted(saved_form(model).items()):
        if tensor.shape[:1] == (grown_to,):
            tensor = tensor[:vocab_size]
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def saved_form(model: PreTrainedModel, weights: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """`weights` of `model`, by default all but the tied ones, by the names and in the form of `save_pretrained`."""
    if weights is None:
        tied = model.all_tied_weights_keys
        weights = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    # What loading had to convert is the file's affair. `revert_weight_conversion` would revert that instead.
    conversions = model.__dict__.pop("_weight_conversions", None)
    try:
        return revert_weight_conversion(model, weights)
    finally:
        if conversions is not None:
            model._weight_conversions = conversions


__all__ = ["commit_of", "fingerprint", "hash_text", "saved_form"]
