"""
Where the tokens of an answer look: at the instruction, at the speech, or elsewhere.

A system's own answers go through its LLM once more, after their prompts. The queries are the tokens of the answer,
without the end token; the keys, all tokens up to each of them, are parted into

- *instruction*: its words,
- *speech*: the audio tokens, or the transcript that is read in their place,
- *template*: the rest of the prompt (system prompt, markers of turns, the first token, on which LLMs rest attention
  that they have no use for),
- *answer*: the answer up to the token itself.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ...modeling_lsm import LsmForConditionalGeneration
from ...processing_lsm import load_waveform


PARTS = ("instruction", "speech", "template", "answer")
INSTRUCTION, SPEECH, TEMPLATE, ANSWER = range(len(PARTS))
PADDING = -1


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Has the LLM of `model` compute attention in the open, as faster kernels do not give it."""
    llm = model.lsm.language_model if isinstance(model, LsmForConditionalGeneration) else model
    before = llm.config._attn_implementation
    llm.set_attn_implementation("eager")
    try:
        yield
    finally:
        llm.set_attn_implementation(before)


def encode(system: Any, row: dict[str, Any], answer: str) -> tuple[list[int], list[int], np.ndarray | None]:
    """
    The prompt of a row and the answer after it, in tokens.

    Args:
        system: A system of `systems.py`.
        row (`dict`): `instruction`, and `audio` or `text`.
        answer (`str`): The answer.

    Returns:
        Token ids, the index in `PARTS` of each, and the clip if there is one.

    Raises:
        ValueError: If the chat template does not leave instruction or answer as they are.
    """
    processor = system.processor
    tokenizer = getattr(processor, "tokenizer", processor)
    chat = system.prompt(row)
    before, content = chat[0]["content"]
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    prompt = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    text = processor.apply_chat_template([*chat, turn], tokenize=False)
    clip, spoken = None, content.get("text", "").strip()
    if content["type"] == "audio":
        clip = load_waveform(content["audio"], target_rate=processor.timing.sampling_rate)
        spoken = processor.audio_token * processor.timing.audio_tokens_of_clip(len(clip))
        prompt, text = (string.replace(processor.audio_token, spoken) for string in (prompt, text))
    # Some templates strip the spaces around a message. The last match is it, as examples may stand before.
    found = re.search(rf".*({re.escape(before['text'].strip())})\s*({re.escape(spoken)})", prompt, re.DOTALL)
    if found is None or not text.startswith(prompt):
        raise ValueError(
            "The chat template does not leave the instruction, what it is about and the answer as they are, so their "
            f"tokens cannot be told apart: {text[:300]!r}. Give the processor a template that does."
        )
    part_of = np.full(len(text), TEMPLATE)
    part_of[slice(*found.span(1))] = INSTRUCTION
    part_of[slice(*found.span(2))] = SPEECH
    part_of[len(prompt) :] = ANSWER

    # As in `Prompter.encode`: a template that writes the first token itself is not given another.
    bos = tokenizer.bos_token
    encoding = tokenizer(text, add_special_tokens=bos is None or not text.startswith(bos), return_offsets_mapping=True)
    # A token belongs where its last character does: the first may be the space before a word.
    parts = [int(part_of[end - 1]) if end > begin else TEMPLATE for begin, end in encoding["offset_mapping"]]
    ends = system.model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends or ())}
    length = next(
        (at for at, token in enumerate(encoding["input_ids"]) if parts[at] == ANSWER and token in ends), len(parts)
    )
    return encoding["input_ids"][:length], parts[:length], clip


def attention_shares(attentions: tuple[torch.Tensor, ...], parts: torch.Tensor, groups: int) -> torch.Tensor:
    """
    The share of attention that each part gets from the tokens of the answer, which weigh the same.

    Args:
        attentions (`tuple` of `torch.Tensor` of shape `(batch, heads, tokens, tokens)`): Of every layer.
        parts (`torch.Tensor` of shape `(batch, tokens)`): The index in `PARTS` of each token; `PADDING` may be on
            either side.
        groups (`int`): Groups that neighbouring heads form, over which shares are averaged.

    Returns:
        `torch.Tensor` of shape `(batch, layers, groups, parts)`. Rows without an answer are nan.
    """
    is_part = torch.stack([parts == part for part in range(len(PARTS))], -1).double()  # [batch, tokens, parts]
    is_query = is_part[..., ANSWER, None] / is_part[..., ANSWER].sum(-1)[:, None, None]  # [batch, tokens, 1]
    layers = []
    for attention in attentions:
        by_head = attention.double() @ is_part[:, None]  # [batch, heads, tokens, parts]
        by_head = (by_head * is_query[:, None]).sum(2)  # [batch, heads, parts]
        layers.append(by_head.unflatten(1, (groups, -1)).mean(2))
    return torch.stack(layers, 1)


def head_groups(model: PreTrainedModel) -> int:
    """Groups of heads: those that share keys and values, or every head by itself where none do."""
    config = model.config.get_text_config()
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


@torch.inference_mode()
def measure_attention(
    system: Any, rows: list[dict[str, Any]], answers: list[str], batch_size: int = 1
) -> list[np.ndarray | None]:
    """
    Measures where a system's answers look.

    Args:
        system: A system of `systems.py`.
        rows (`list[dict]`): What was asked: `instruction`, and `audio` or `text`.
        answers (`list[str]`): What the system answered.
        batch_size (`int`, *optional*, defaults to 1): Rows at a time. Every layer's attention is kept, so one of a
            few hundred tokens may take a gigabyte.

    Returns:
        For each row shares of shape `(layers, groups, parts)` that sum to 1 over `PARTS`, or `None` if its answer is
        empty.

    Raises:
        ValueError: If the LLM cannot show its attention.
    """
    model = system.model
    shares: list[np.ndarray | None] = [None] * len(rows)
    order = [index for index, answer in enumerate(answers) if answer.strip()]
    with eager_attention(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            encoded = [encode(system, rows[index], answers[index]) for index in batch]
            width = max(len(parts) for _, parts, _ in encoded)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            parts = torch.full_like(ids, PADDING)
            for at, (tokens, of_tokens, _) in enumerate(encoded):
                ids[at, : len(tokens)] = torch.tensor(tokens)
                parts[at, : len(tokens)] = torch.tensor(of_tokens)
            inputs = {"input_ids": ids, "attention_mask": (parts != PADDING).long()}
            clips = [clip for _, _, clip in encoded if clip is not None]
            if clips:
                audio = system.processor(audio=clips)
                inputs |= {"input_features": audio["input_features"].to(model.dtype)}
                inputs |= {"input_features_mask": audio["input_features_mask"]}
            outputs = model(
                **{name: tensor.to(model.device) for name, tensor in inputs.items()},
                output_attentions=True,
                use_cache=False,
                logits_to_keep=1,
            )
            layers = getattr(outputs, "attentions", None)
            if not layers or any(layer is None or layer.shape[-2:] != (width, width) for layer in layers):
                raise ValueError(
                    f"{type(model).__name__} with {model.config.get_text_config().model_type} does not show the "
                    "attention of all its layers. Leave the measurement out with --measured_rows 0."
                )
            measured = attention_shares(layers, parts.to(model.device), head_groups(model))
            for index, of_row in zip(batch, measured.cpu().numpy(), strict=True):
                shares[index] = of_row
    return shares


__all__ = ["INSTRUCTION", "PADDING", "PARTS", "SPEECH", "attention_shares", "head_groups", "measure_attention"]
