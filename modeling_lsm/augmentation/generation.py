"""Answers to instructions on transcripts, by the model's own LLM."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from .prompts import Prompter


class Answer(NamedTuple):
    """
    What an LLM answered.

    Args:
        text (`str`): The answer.
        finished (`bool`): Whether the LLM ended it itself.
        num_tokens (`int`): Tokens that the LLM wrote.
    """

    text: str
    finished: bool
    num_tokens: int


def batches_under_budget(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """
    Indices of `lengths` in batches of similar length, longest first, each at most `budget` tokens with padding.

    A length above the budget makes a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def generate_targets(
    model: PreTrainedModel,
    prompter: Prompter,
    prompts: list[tuple[str, str]],
    max_new_tokens: int = 225,
    batch_tokens: int = 8192,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> list[Answer]:
    """
    Follows instructions on transcripts, greedily.

    Args:
        model (`PreTrainedModel`): The LSM whose LLM answers, or a causal LM.
        prompter ([`Prompter`]): Writes the prompt that training will use, with the transcript for the speech.
        prompts (`list[tuple[str, str]]`): Instructions and transcripts.
        max_new_tokens (`int`, *optional*, defaults to 225): Longest answer; the paper's figure.
        batch_tokens (`int`, *optional*, defaults to 8192): Tokens per batch, prompts and answers, with padding.
        on_answer (*optional*): Called with every answer once it is there.

    Returns:
        `list[Answer]`: An answer for every prompt, in order.
    """
    token_ids = prompter.encode(prompts)
    end_tokens = model.generation_config.eos_token_id
    end_tokens = {end_tokens} if isinstance(end_tokens, int) else set(end_tokens)
    answers: list[Answer | None] = [None] * len(prompts)
    for batch in batches_under_budget([len(ids) + max_new_tokens for ids in token_ids], batch_tokens):
        inputs = prompter.tokenizer.pad(
            {"input_ids": [token_ids[index] for index in batch]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        sequences = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        for index, tokens in zip(batch, sequences[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            length = next((i + 1 for i, token in enumerate(tokens) if token in end_tokens), None)
            finished, tokens = length is not None, tokens[:length]
            answers[index] = Answer(prompter.decode(tokens), finished, len(tokens))
            on_answer(answers[index])
    return answers
