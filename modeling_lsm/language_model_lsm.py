"""The causal LLM of an LSM: loaded alone or as the text part of a multimodal model, and checked."""

import inspect

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)


def load_language_model(name: str, dtype: str | torch.dtype = "auto", **hub_kwargs) -> PreTrainedModel:
    """
    Loads a causal LLM with its head, or that of a multimodal model.

    Args:
        name (`str`): Hub id or folder.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): dtype of the weights.
        hub_kwargs: Arguments for the Hub, like `revision` or `token`.

    Raises:
        ValueError: If the model is not one that an LSM can be composed with.
    """
    # Of a repository's own code an LSM takes no more than the tokenizer's: the LLM's would have to travel with it.
    hub_kwargs["trust_remote_code"] = False
    try:
        config = AutoConfig.from_pretrained(name, **hub_kwargs)
    except ValueError as error:
        raise ValueError(
            f"{name} cannot be the LLM: transformers itself does not have its architecture, and an LSM does not carry "
            "code of others."
        ) from error
    text_config = config.get_text_config(decoder=True)
    refuse_other_architectures(name, config, text_config)
    if text_config is config:
        llm = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **hub_kwargs)
    else:
        model = AutoModelForMultimodalLM.from_pretrained(name, dtype=dtype, **hub_kwargs)
        llm = take_text_part(name, model)
    refuse_other_interfaces(name, llm)
    return llm


def take_text_part(name: str, model: PreTrainedModel) -> PreTrainedModel:
    """The text part of a multimodal `model`, with its weights, as the causal LM of its own."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    # The whole model's config says whether these are tied, whatever its text part's does.
    decoder.config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(decoder.config, dtype=model.dtype)
    if type(decoder) is type(llm):
        return decoder
    attribute, own = next((n, child) for n, child in llm.named_children() if isinstance(child, PreTrainedModel))
    if type(decoder) is not type(own):
        raise ValueError(
            f"The text part of {name} is a {type(decoder).__name__}, but the causal LM of its family, "
            f"{decoder.config.model_type}, has a {type(own).__name__}. Compose with a text-only variant."
        )
    setattr(llm, attribute, decoder)
    llm.set_output_embeddings(head)
    llm.tie_weights()
    on_meta = [key for key, parameter in llm.named_parameters() if parameter.is_meta]
    if on_meta:
        raise ValueError(
            f"{name} has no weights for {on_meta[0]} of its LLM, {decoder.config.model_type}. Compose with a "
            "text-only variant."
        )
    llm.generation_config = model.generation_config
    return llm.eval()


def refuse_other_architectures(name: str, config: PreTrainedConfig, text_config: PreTrainedConfig) -> None:
    """Raises a `ValueError` unless transformers itself has a decoder-only LLM for `text_config`."""
    family = text_config.model_type
    if config.is_encoder_decoder or text_config.is_encoder_decoder:
        raise ValueError(f"{name} ({family}) cannot be the LLM: it is an encoder-decoder model, not a decoder alone.")
    if type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{name} ({family}) cannot be the LLM: transformers has no causal LM of this family, and an LSM does not "
            "carry code of others."
        )


def refuse_other_interfaces(name: str, llm: PreTrainedModel) -> None:
    """Raises a `ValueError` unless `llm` reads embeddings and caches as transformers does."""
    parameters, family = inspect.signature(llm.forward).parameters, llm.config.model_type
    reason = None
    if "inputs_embeds" not in parameters:
        reason = "its forward pass takes no embeddings, of which speech is made"
    elif "past_key_values" not in parameters or not llm._supports_default_dynamic_cache():
        reason = "it keeps a cache of its own kind, not transformers' `Cache`"
    elif "attention_mask" not in parameters:
        reason = "its forward pass takes no attention mask, without which answers depend on their batch"
    elif llm.get_input_embeddings() is None or llm.get_output_embeddings() is None:
        reason = "it does not say which its input embeddings and its head are"
    elif (width := llm.get_input_embeddings().weight.shape[-1]) != llm.config.hidden_size:
        reason = f"its embeddings are {width} wide, its layers {llm.config.hidden_size}"
    if reason is not None:
        raise ValueError(f"{name} ({family}) cannot be the LLM: {reason}.")


def grow_vocabulary(llm: PreTrainedModel, rows: int) -> None:
    """
    Gives embeddings and head of `llm` new rows after their own until there are `rows`.

    A new row says nothing: it is the mean of all others, and so is its logit.
    """
    vocab_size = llm.config.vocab_size
    if rows <= vocab_size:
        return
    grown = {
        name: torch.cat([weight, weight.mean(dim=0, keepdim=True).expand(rows - vocab_size, *weight.shape[1:])])
        for name, weight in llm.named_parameters()
        if weight.shape[:1] == (vocab_size,)
    }
    llm.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for name, weight in llm.named_parameters():
            if name in grown and len(weight) == rows:
                weight.copy_(grown[name])


__all__ = ["grow_vocabulary", "load_language_model"]
