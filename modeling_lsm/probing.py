"""What composing asks of an LLM: to read words as it always does, and vectors that are no words, as speech is."""

import torch
from transformers import DynamicCache

from .modeling_lsm import LsmForConditionalGeneration


LENGTH, STEPS = 16, 4  # vectors that are read, and of these one by one
TOLERANCE = 0.1  # of the logits' norm: experts and half precision round in other ways every time


@torch.no_grad()
def measure_embedding_scale(name: str, model: LsmForConditionalGeneration) -> float:
    """
    What the LLM multiplies embeddings by where it looks them up itself, but not where it is given them.

    Args:
        name (`str`): What to call the LLM in an error.
        model ([`LsmForConditionalGeneration`]): A composed model; its projector does not matter.

    Returns:
        `float`: `LsmConfig.embedding_scale`, 1.0 for nearly all LLMs.

    Raises:
        ValueError: If the LLM reads its own words otherwise when they come as embeddings.
    """
    llm = model.lsm.language_model
    ids = torch.arange(model.config.text_config.vocab_size)
    ids = ids[ids != model.config.audio_token_id][:: max(1, len(ids) // LENGTH)][None]
    outputs = llm(input_ids=ids, output_hidden_states=True)
    scale = 1.0
    if not is_close(model(input_ids=ids).logits, outputs.logits):
        embeddings, first = llm.get_input_embeddings()(ids).float(), outputs.hidden_states[0].float()
        scale = ((embeddings * first).sum() / embeddings.pow(2).sum()).item()
        model.config.embedding_scale = scale
        if not is_close(model(input_ids=ids).logits, outputs.logits):
            raise ValueError(
                f"{name} ({model.config.text_config.model_type}) cannot be the LLM: it reads its own words otherwise "
                "when they come as embeddings."
            )
    return scale


@torch.no_grad()
def check_reading(name: str, model: LsmForConditionalGeneration) -> None:
    """
    Makes sure that the LLM reads what is no token, as speech is, from left to right, with a cache and beside padding.

    Args:
        name (`str`): What to call the LLM in an error.
        model ([`LsmForConditionalGeneration`]): A composed model; its projector does not matter.

    Raises:
        ValueError: If what it says of a beginning depends on what follows, or on a cache, or on padding before it.
    """
    text_config = model.config.text_config
    noise = torch.randn(LENGTH, text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    vectors = (noise * embedding_rms(model)).to(model.lsm.language_model.dtype)
    ids = torch.full((1, LENGTH), model.config.audio_token_id)

    def read(start: int, end: int, cache: DynamicCache | None = None) -> torch.Tensor:
        mask = torch.ones(1, end, dtype=torch.long)
        cached = {} if cache is None else {"past_key_values": cache, "use_cache": True}
        part = {"input_ids": ids[:, start:end], "audio_embeds": vectors[start:end], "attention_mask": mask}
        return model(**part, **cached).logits

    whole, cache = read(0, LENGTH), DynamicCache(config=text_config)
    parts = [read(0, LENGTH - STEPS, cache), *(read(at, at + 1, cache) for at in range(LENGTH - STEPS, LENGTH))]
    padding = torch.full((1, STEPS), int(model.config.audio_token_id == 0))  # any token but the placeholder
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)], dim=1)
    padded = model(input_ids=torch.cat([padding, ids], dim=1), audio_embeds=vectors, attention_mask=mask).logits
    reason = None
    if not is_close(parts[0], whole[:, :-STEPS]):
        reason = "what it says of a beginning depends on what follows"
    elif not is_close(torch.cat(parts, dim=1), whole):
        reason = "what it says depends on whether it has a cache"
    elif not is_close(padded[:, STEPS:], whole):
        reason = "what it says depends on padding before it, and so on its batch"
    if reason is not None:
        raise ValueError(
            f"{name} ({text_config.model_type}) cannot be the LLM: given vectors that are no tokens, as speech is, "
            f"{reason}."
        )


@torch.no_grad()
def embedding_rms(model: LsmForConditionalGeneration) -> float:
    """The root mean square of the embeddings of words that the LLM reads, which it may scale (Gemma)."""
    vocab_size = model.config.text_config.vocab_size
    ids = torch.arange(0, vocab_size, max(1, vocab_size // 4096))
    return model.lsm.embed_tokens(ids).float().pow(2).mean().sqrt().item()


def is_close(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether `logits` are `expected`, up to rounding."""
    difference = (logits.float() - expected.float()).norm() / expected.float().norm()
    return bool(difference < TOLERANCE)


__all__ = ["check_reading", "embedding_rms", "measure_embedding_scale"]
