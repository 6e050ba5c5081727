"""Answers to instructions on transcripts, by the model's own LLM."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..modeling_lsm import LsmForConditionalGeneration
from ..processing_lsm import LsmProcessor, make_chat


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
    model: LsmForConditionalGeneration,
    processor: LsmProcessor,
    prompts: list[tuple[str, str]],
    max_new_tokens: int = 225,
    batch_tokens: int = 8192,
    on_batch: Callable[[int], None] = lambda size: None,
) -> list[tuple[str, bool]]:
    """
    Follows instructions on transcripts, greedily.

    Args:
        model ([`LsmForConditionalGeneration`]): The model whose LLM answers.
        processor ([`LsmProcessor`]): Renders the prompt that training will use, with the transcript for the speech.
        prompts (`list[tuple[str, str]]`): Instructions and transcripts.
        max_new_tokens (`int`, *optional*, defaults to 225): Longest answer; the paper's figure.
        batch_tokens (`int`, *optional*, defaults to 8192): Tokens per batch, prompts and answers, with padding.
        on_batch (*optional*): Called with the number of prompts of each batch that is done.

    Returns:
        `list[tuple[str, bool]]`: For every prompt the answer, and whether the LLM ended it itself.
    """
    chats = [make_chat(instruction, transcript=transcript) for instruction, transcript in prompts]
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    lengths = [len(ids) + max_new_tokens for ids in processor.tokenizer(texts)["input_ids"]]
    end_tokens = model.generation_config.eos_token_id
    end_tokens = torch.tensor([end_tokens] if isinstance(end_tokens, int) else end_tokens, device=model.device)

    answers: list[tuple[str, bool]] = [("", False)] * len(prompts)
    for batch in batches_under_budget(lengths, batch_tokens):
        inputs = processor.apply_chat_template(
            [chats[index] for index in batch], add_generation_prompt=True, tokenize=True, return_dict=True
        ).to(model.device)
        sequences = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new_tokens = sequences[:, inputs["input_ids"].shape[1] :]
        finished = torch.isin(new_tokens, end_tokens).any(dim=1).tolist()
        decoded = processor.batch_decode(new_tokens, skip_special_tokens=True)
        for index, answer, ended in zip(batch, decoded, finished, strict=True):
            answers[index] = (answer.strip(), ended)
        on_batch(len(batch))
    return answers
