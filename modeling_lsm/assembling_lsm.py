"""A slim checkpoint and its base models make a whole model."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers.integrations.deepspeed as hf_deepspeed
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from .configuration_lsm import LsmConfig
from .fingerprints import fingerprint
from .slim_lsm import BASES, LORA_A, LORA_B, merge_lora, part_of
from .speech_encoder_lsm import load_speech_encoder


def add_rows(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """
    Embeddings or a head, `(known rows, width)`, with new rows after its own until there are `rows`.

    A new row says nothing: it is the mean of all others, and so is its logit.
    """
    new = matrix.mean(dim=0, keepdim=True).expand(max(0, rows - len(matrix)), -1)
    return torch.cat([matrix, new])


@contextmanager
def whole_models() -> Iterator[None]:
    """Models made in here are whole in every process, although ZeRO-3 partitions all others."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference


def download_checkpoint(name: str, subfolder: str = "", **hub_kwargs) -> Path:
    """The folder of a checkpoint, fetched from the Hub if `name` is not a folder itself."""
    if os.path.isdir(name):
        return Path(name, subfolder)
    return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"], **hub_kwargs), subfolder)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint in safetensors files."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if not (folder / files[0]).is_file() and index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def assemble(
    folder: Path,
    config: LsmConfig,
    base_folders: dict[str, str | os.PathLike],
    **hub_kwargs,
) -> dict[str, torch.Tensor]:
    """
    The weights of a slim checkpoint and those of its base models: what a whole checkpoint would have held.

    Args:
        folder (`Path`): The slim checkpoint.
        config ([`LsmConfig`]): Its config.
        base_folders (`dict`): Where the base models are, `"speech"` and `"text"`, if not where the config says.
        hub_kwargs: Arguments for the Hub, like `token`.

    Raises:
        OSError: If a base model is nowhere to be found.
        ValueError: If a base model is not the one that the checkpoint belongs to.
    """
    unknown = set(base_folders) - set(BASES.values())
    if unknown:
        raise ValueError(f"`base_folders` has {sorted(unknown)}; expected 'speech' or 'text', each with a folder.")
    saved = read_tensors(folder)
    # The dtype of the model that was saved. A config that was loaded with another `dtype` says that one.
    dtype = getattr(torch, json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"])
    in_file = {part_of(name) for name in saved if not name.endswith((LORA_A, LORA_B))}
    state_dict = {}
    with whole_models():
        if "encoder" not in in_file:
            encoder = load_base(folder, config, "speech", load_speech_encoder, base_folders, **hub_kwargs)
            check_base(folder, config, "speech", fingerprint(sorted(encoder.named_parameters())))
            state_dict |= {f"model.audio_tower.{name}": tensor for name, tensor in encoder.state_dict().items()}
        if "llm" not in in_file:
            load_llm = AutoModelForCausalLM.from_pretrained
            llm = load_base(folder, config, "text", load_llm, base_folders, **hub_kwargs)
            base, vocab_size = llm.base_model, config.text_config.vocab_size
            check_base(folder, config, "text", fingerprint(sorted(base.named_parameters()), llm.config.vocab_size))
            state_dict |= {f"model.language_model.{name}": tensor for name, tensor in base.state_dict().items()}
            embeddings = llm.get_input_embeddings()
            name = next(name for name, module in base.named_modules() if module is embeddings)
            state_dict[f"model.language_model.{name}.weight"] = add_rows(embeddings.weight.detach(), vocab_size)
            if not config.tie_word_embeddings:
                state_dict["lm_head.weight"] = add_rows(llm.get_output_embeddings().weight.detach(), vocab_size)
    state_dict = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state_dict.items()}
    return merge_lora(state_dict | saved, config.lora_scaling)


def load_base(
    folder: Path, config: LsmConfig, key: str, load: Callable, base_folders: dict, **hub_kwargs
) -> PreTrainedModel:
    """The base model `key` of the checkpoint in `folder`: from `base_folders`, from where it was, or from the Hub."""
    base = config.base_models[key]
    name = base["id"]
    if base_folders.get(key):
        name = os.fspath(base_folders[key])
        if base.get("path"):
            base["path"] = os.path.abspath(name)
    elif base.get("path") and os.path.isdir(base["path"]):
        name = base["path"]
    elif base.get("revision"):
        hub_kwargs["revision"] = base["revision"]
    try:
        # In the dtype that composing used, whose rounding is part of what has trained.
        return load(name, dtype=getattr(torch, base["dtype"]), **hub_kwargs)
    except OSError as error:
        where = f", which was in {base['path']}" if base.get("path") else ""
        raise OSError(
            f"{folder} is a slim checkpoint. It needs its base model {base['id']} (revision {base.get('revision')})"
            f"{where}, but {name} cannot be loaded: {error} "
            f'Say where it is: from_pretrained(…, base_folders={{"{key}": "path/to/{base["id"].split("/")[-1]}"}}).'
        ) from error


def check_base(folder: Path, config: LsmConfig, key: str, found: str) -> None:
    """Raises a `ValueError` unless `found` is the fingerprint of the base model `key`."""
    base = config.base_models[key]
    if found != base["fingerprint"]:
        raise ValueError(
            f"The {key} model that was found is not the {base['id']} that the slim checkpoint {folder} was trained "
            f"with, or it has changed: the fingerprint of its weights is {found[:12]}, expected "
            f'{base["fingerprint"][:12]}. Name the right one with base_folders={{"{key}": …}}.'
        )


__all__ = ["add_rows", "assemble", "download_checkpoint", "whole_models"]
