"""
Slim checkpoints: the weights that trained, and which base models all others come from.

Weights go by their names here, not by modules: those of a model that DeepSpeed has partitioned are no longer in it.
"""

import copy
import os

import torch
from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .configuration_lsm import LsmConfig
from .fingerprints import saved_form


PREFIXES = {
    "encoder": ("lsm.audio_tower.",),
    "projector": ("lsm.projector.",),
    "llm": ("lsm.language_model.",),
}
BASES = {"encoder": "speech", "llm": "text"}  # the keys of `config.base_models`; a projector has no base
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


def part_of(name: str) -> str:
    """The part, `"encoder"`, `"projector"` or `"llm"`, that a weight called `name` belongs to."""
    return next(part for part, prefixes in PREFIXES.items() if name.startswith(prefixes))


def plain_name(name: str) -> str:
    """The name in a checkpoint of a weight that PEFT has renamed."""
    name = name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")
    return name.replace(".base_layer.", ".")


def parts_from_bases(config: LsmConfig) -> list[str]:
    """The parts that a slim checkpoint leaves out: they are their base models', perhaps with LoRA."""
    return [part for part in BASES if part not in (config.trained_parts or [])]


def obstacle_to_slim(config: LsmConfig) -> str | None:
    """Why a model cannot be saved slim, in words, or `None` if it can."""
    parts = parts_from_bases(config)
    if not parts:
        return "all of its parts have been trained"
    for part in parts:
        base = (config.base_models or {}).get(BASES[part]) or {}
        missing = [key for key in ("id", "fingerprint", "dtype") if not base.get(key)]
        if missing:
            return f"its config does not say of the {part}'s base model: {', '.join(missing)}"
    if "llm" not in parts and getattr(config, "quantization_config", None) is not None:
        return "its LLM has been trained and then quantized, so that its weights are lost"
    return None


def can_be_slim(model: PreTrainedModel) -> bool:
    """
    Whether a slim checkpoint of `model` would be smaller than a whole one, and could be loaded.

    Args:
        model ([`LsmForConditionalGeneration`]): The model; its config says what has trained, in this run and before.
    """
    return obstacle_to_slim(model.config) is None


def trained_state_dict(
    model: PreTrainedModel, state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """
    What a slim checkpoint holds: projector, parts that were trained at any time, and LoRA.

    Args:
        model ([`LsmForConditionalGeneration`]): The model.
        state_dict (`dict[str, torch.Tensor]`, *optional*):
            Its weights by name, if they are elsewhere (DeepSpeed). What is not saved need not be there.

    Returns:
        `dict[str, torch.Tensor]`: Weights by name: `….lora_A.weight` and `….lora_B.weight` for LoRA on an LLM that is
        otherwise its base model; a tied head only once.

    Raises:
        ValueError: If the model cannot be saved slim, or weights that would have to be saved are not there.
    """
    obstacle = obstacle_to_slim(model.config)
    if obstacle is not None:
        raise ValueError(f"The model cannot be saved slim: {obstacle}. Save it whole, with `slim=False`.")
    own = model.state_dict()
    names = {plain_name(name) for name in own}
    tensors = {plain_name(name): tensor for name, tensor in (own if state_dict is None else state_dict).items()}
    from_bases = parts_from_bases(model.config)
    names = {name for name in names if name.endswith((LORA_A, LORA_B)) or part_of(name) not in from_bases}
    names -= model.all_tied_weights_keys.keys()
    missing = sorted(names - tensors.keys())
    if missing:
        raise ValueError(
            f"`state_dict` lacks {len(missing)} weights that no base model has, as {missing[0]}. Gather those of all "
            "parts that were ever trained, and of the projector, whether they train in this run or not."
        )
    tensors = {name: tensors[name] for name in sorted(names)}
    return tensors if "llm" in from_bases else merge_lora(tensors, model.config.lora_scaling)


def merged_state_dict(
    model: PreTrainedModel, state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """
    The weights of a whole model, LoRA added to the weights that it belongs to.

    Args:
        model ([`LsmForConditionalGeneration`]): The model.
        state_dict (`dict[str, torch.Tensor]`, *optional*): Its weights by name, if they are elsewhere (DeepSpeed).

    Returns:
        `dict[str, torch.Tensor]`: Weights by the names that they have without LoRA.

    Raises:
        ValueError: If the weights to add to are quantized.
    """
    state_dict = model.state_dict() if state_dict is None else state_dict
    plain = {plain_name(name): tensor for name, tensor in state_dict.items()}
    return merge_lora(plain, model.config.lora_scaling)


@torch.no_grad()
def merge_lora(state_dict: dict[str, torch.Tensor], scaling: float | None) -> dict[str, torch.Tensor]:
    """`state_dict` with `W + scaling * B @ A`, computed in float32, for every `W` that has LoRA."""
    merged = {name: tensor for name, tensor in state_dict.items() if not name.endswith((LORA_A, LORA_B))}
    for name, lora_a in state_dict.items():
        if name.endswith(LORA_A):
            module = name.removesuffix(LORA_A)
            weight = merged[f"{module}.weight"]
            if not weight.is_floating_point():
                raise ValueError(
                    f"LoRA cannot be merged into {module}: its weights are quantized ({weight.dtype}). Save the model "
                    "slim: its LoRA is merged into the base model's own weights when it is loaded."
                )
            update = scaling * (state_dict[f"{module}{LORA_B}"].float() @ lora_a.float())
            merged[f"{module}.weight"] = (weight.float() + update.to(weight.device)).to(weight.dtype)
    return merged


def merged_config(config: LsmConfig) -> LsmConfig:
    """A copy of `config` for a model that is whole, its LoRA merged."""
    config = copy.deepcopy(config)
    parts = ["llm" if part == "lora" else part for part in config.trained_parts or []]
    config.slim, config.lora_scaling = False, None
    config.trained_parts = None if config.trained_parts is None else list(dict.fromkeys(parts))
    return config


def save_slim(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    state_dict: dict[str, torch.Tensor] | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """
    Saves weights (see [`trained_state_dict`]), config, generation config and code of a slim checkpoint.

    Args:
        model ([`LsmForConditionalGeneration`]): The model.
        folder (`str` or `os.PathLike`): An existing folder to save to.
        state_dict (`dict[str, torch.Tensor]`, *optional*): Its weights by name, if they are elsewhere (DeepSpeed).
        max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): The most bytes in a file.
    """
    trained = trained_state_dict(model, state_dict)
    # Converted ones are parts of larger tensors, which would be saved whole.
    tensors = {n: t if n in trained else t.clone() for n, t in saved_form(model, trained).items()}
    config = copy.deepcopy(model.config) if "llm" in parts_from_bases(model.config) else merged_config(model.config)
    config.slim = True
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is saved is not quantized, nor need the base model be
    custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)


__all__ = ["can_be_slim", "merged_state_dict", "save_slim", "trained_state_dict"]
