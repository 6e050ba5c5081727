"""LoRA on the LLM of an LSM, and on nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import peft
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..modeling_lsm import LsmForConditionalGeneration


# Settings that `W + scaling * B @ A` covers, with one scaling for the whole model.
MERGEABLE = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"}
DESCRIPTIVE = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}


def add_lora(model: LsmForConditionalGeneration, lora_config: peft.LoraConfig) -> None:
    """
    Puts LoRA into the LLM of `model` and freezes the LLM's own weights. Encoder and projector stay as they are.

    Call it before [`set_trained_parts`], which then takes `"llm"` to mean its LoRA.

    Args:
        model ([`LsmForConditionalGeneration`]): The model, changed in place.
        lora_config ([`peft.LoraConfig`]):
            Settings, as `trl.get_peft_config` makes them. Without `target_modules` every linear layer of the LLM's
            blocks gets LoRA.

    Raises:
        ValueError: If the settings ask for what cannot be merged into the LLM's weights afterwards.
    """
    check_mergeable(model, lora_config)
    llm = model.lsm.language_model
    if lora_config.target_modules in (None, "all-linear"):
        lora_config.target_modules = linear_layers(llm)
    # The LLM without its config, by which PEFT would put LoRA for layers of an expert into tensors of all experts.
    parts = nn.Module()
    parts._modules = llm._modules
    # The LLM is what is quantized. Of a model that is, as a whole, trainers expect no weights to train, or cast those
    # that do to bfloat16; and PEFT asks the module that it is given.
    for flag in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        for module in (llm, parts):
            setattr(module, flag, getattr(model, flag, False))
        setattr(model, flag, False)
    peft.inject_adapter_in_model(lora_config, parts)
    cast_adapter_dtype(llm, "default")  # small steps would be lost in bfloat16

    for name, parameter in llm.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    model.config.lora_scaling = next(lora_layers(model)).scaling["default"]
    model.config.trained_parts = [*(model.config.trained_parts or []), "lora"]


def check_mergeable(model: LsmForConditionalGeneration, lora_config: peft.LoraConfig) -> None:
    """Raises a `ValueError` unless LoRA of these settings is `W + scaling * B @ A` of linear layers, and the first."""
    if model.config.lora_scaling is not None:
        raise ValueError("The LLM has LoRA already. Save the model and load it again: that merges it.")
    plain = peft.LoraConfig(r=lora_config.r, lora_alpha=lora_config.lora_alpha)
    for name in sorted({field.name for field in fields(plain)} - MERGEABLE - DESCRIPTIVE):
        value = getattr(lora_config, name)
        if name == "init_lora_weights" and value in (True, False, "gaussian", "orthogonal"):
            continue  # of the others some change the LLM's own weights
        # TRL says `modules_to_save=[]` or `None` where there is nothing.
        if value != getattr(plain, name) and (value or getattr(plain, name)):
            raise ValueError(
                f"LoRA takes no {name}={value!r} here: what is saved must merge into the LLM's linear layers as "
                f"`W + scaling * B @ A`. Leave `{name}` at {getattr(plain, name)!r}; the projector trains whole "
                "beside LoRA in any case."
            )
    llm = model.lsm.language_model
    if any(isinstance(module, Conv1D) for module in llm.modules()):
        raise ValueError(
            f"The LLM ({llm.config.model_type}) keeps its weights in Conv1D layers, transposed: LoRA would not be "
            "merged into them. Train it whole, or take an LLM with linear layers."
        )
    targets = lora_config.target_modules
    if targets in (None, "all-linear"):
        return
    names = [targets] if isinstance(targets, str) else targets
    wrong = [name for name in names if "lm_head" in name]
    for name, module in llm.named_modules():
        if name and not isinstance(module, nn.Linear) and check_target_module_exists(lora_config, name):
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"`target_modules` names {', '.join(sorted(wrong))}: LoRA goes into linear layers of the LLM's blocks, "
            "not into embeddings, head or whole blocks. Name layers like q_proj, or 'all-linear'."
        )


def linear_layers(llm: PreTrainedModel) -> list[str]:
    """Names of the linear layers of the LLM's blocks that LoRA goes into where none are named."""
    names = []
    for name, module in llm.named_modules():
        # Routers of experts may be linear layers, but give more than a product.
        is_router = "router" in type(module).__name__.lower()
        if isinstance(module, nn.Linear) and not is_router and module is not llm.get_output_embeddings():
            parent, _, leaf = name.rpartition(".")
            # State-space mixers multiply by weights of these themselves, past what LoRA adds to the layers.
            if leaf not in ("x_proj", "dt_proj", "out_proj") or not hasattr(llm.get_submodule(parent), "conv1d"):
                names.append(name)
    return names


def lora_layers(model: LsmForConditionalGeneration) -> Iterator[LoraLayer]:
    """The layers that have LoRA."""
    return (module for module in model.lsm.language_model.modules() if isinstance(module, LoraLayer))


@contextmanager
def without_lora(model: LsmForConditionalGeneration) -> Iterator[None]:
    """The LLM as it was before LoRA, in here: a teacher. It is for use without gradients."""
    layers = list(lora_layers(model))
    # Not `enable_adapters`: that changes `requires_grad`, too, under the feet of DeepSpeed and DDP.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


__all__ = ["add_lora", "without_lora"]
