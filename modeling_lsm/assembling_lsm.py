"""A slim checkpoint and its base models make a whole model."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers.integrations.deepspeed as hf_deepspeed
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from .configuration_lsm import LsmConfig
from .fingerprints import fingerprint
from .first_release_lsm import (
    first_fingerprint,
    is_base_of_first_release,
    is_of_first_release,
    name_changes,
    rename,
)
from .language_model_lsm import grow_vocabulary, load_language_model
from .slim_lsm import BASES, LORA_A, LORA_B, merge_lora, merged_config, part_of
from .speech_encoder_lsm import load_speech_encoder


HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")
SOURCE_ARGUMENTS = ("revision", "subfolder")


def read_config(name: str | os.PathLike | None, config: Any = None, **kwargs) -> dict[str, Any]:
    """The config of a checkpoint as it was saved, for the arguments of `from_pretrained`; empty if none is loaded."""
    if name is None or kwargs.get("state_dict") is not None:
        return {}
    known = {key: kwargs[key] for key in (*HUB_ARGUMENTS, *SOURCE_ARGUMENTS) if key in kwargs}
    return LsmConfig.get_config_dict(name, **known)[0]


def load_slim(
    cls: type[PreTrainedModel],
    load: Callable,
    name: str | os.PathLike,
    *model_args,
    config: PreTrainedConfig | str | os.PathLike | None = None,
    base_folders: dict[str, str | os.PathLike] | None = None,
    **kwargs,
):
    """
    Loads a slim checkpoint: its weights and those of its base models, LoRA merged, make a whole model.

    Args:
        cls (`type`): The class to load.
        load (`Callable`): Its `PreTrainedModel.from_pretrained`.
        base_folders (`dict`, *optional*): Where the base models are, see [`LsmPreTrainedModel.from_pretrained`].
        name, model_args, config, kwargs: Arguments of `from_pretrained`.
    """
    hub_kwargs = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
    source = {key: kwargs.pop(key) for key in SOURCE_ARGUMENTS if key in kwargs}
    folder = download_checkpoint(os.fspath(name), **source, **hub_kwargs)
    if not isinstance(config, PreTrainedConfig):
        # A config would take "auto" for a dtype.
        dtype = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
        config, kwargs = LsmConfig.from_pretrained(config or folder, return_unused_kwargs=True, **kwargs)
        kwargs |= dtype
    whole_config = merged_config(config)
    # Under ZeRO-3 the first process hands out the weights; the others need their names and shapes alone.
    handed_out = is_deepspeed_zero3_enabled() and kwargs.get("quantization_config") is None
    if handed_out and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        with whole_models(), torch.device("meta"):
            model = cls(whole_config)
        weights = {key: weight for key, weight in model.state_dict().items() if key not in model.all_tied_weights_keys}
    else:
        weights = assemble(folder, config, base_folders or {}, **hub_kwargs)
        whole_config.base_models = config.base_models
    if "generation_config" not in kwargs:
        kwargs["generation_config"] = GenerationConfig.from_pretrained(folder)
    return_info = kwargs.pop("output_loading_info", False)
    model, info = load(None, *model_args, config=whole_config, state_dict=weights, output_loading_info=True, **kwargs)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"The slim checkpoint {folder} and its base models lack {len(missing)} weights, as {missing[0]}. "
            "Save it anew with `LsmPipeline.save_pretrained(…, slim=True)`."
        )
    if getattr(model, "hf_quantizer", None) is None:
        # These weights were in their form in memory, so that loading converted none; saving them whole has to.
        model._weight_conversions = None
    model.name_or_path = model.config.name_or_path = os.fspath(name)
    return (model, info) if return_info else model


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
    weights = read_tensors(folder)
    saved_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if is_of_first_release(saved_config):
        with whole_models():
            weights = rename(weights, name_changes(config.text_config))
    # The dtype of the model that was saved. A config that was loaded with another `dtype` says that one.
    dtype = getattr(torch, saved_config["dtype"])
    in_file = {part_of(name) for name in weights if not name.endswith((LORA_A, LORA_B))}
    from_bases = {}
    with whole_models():
        if "encoder" not in in_file:
            encoder = load_base(folder, config, "speech", load_speech_encoder, base_folders, **hub_kwargs)
            check_base(folder, config, "speech", fingerprint(encoder))
            from_bases |= {f"lsm.audio_tower.{name}": tensor for name, tensor in encoder.state_dict().items()}
        if "llm" not in in_file:
            llm = load_base(folder, config, "text", load_language_model, base_folders, **hub_kwargs)
            first = is_base_of_first_release(config.base_models["text"])
            check_base(
                folder, config, "text", first_fingerprint(llm) if first else fingerprint(llm, llm.config.vocab_size)
            )
            grow_vocabulary(llm, config.text_config.vocab_size)
            tied = llm.all_tied_weights_keys
            from_bases |= {
                f"lsm.language_model.{name}": tensor for name, tensor in llm.state_dict().items() if name not in tied
            }
    from_bases = {name: t.to(dtype) if t.is_floating_point() else t for name, t in from_bases.items()}
    return merge_lora(from_bases | weights, config.lora_scaling)


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


__all__ = ["load_slim", "read_config", "whole_models"]
