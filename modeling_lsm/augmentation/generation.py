"""Answers to instructions on transcripts, by the model's own LLM."""

from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedModel

from .decoding import greedy_decode, read_end_tokens
from .prompts import Prompter


class Answer(NamedTuple):
    """
    What an LLM answered.

    Args:
        text (`str`): The answer.
        finished (`bool`): Whether the LLM ended it itself.
        num_tokens (`int`): Tokens that the LLM wrote, the one that ends the answer included.
    """

    text: str
    finished: bool
    num_tokens: int


def generate_targets(
    model: PreTrainedModel,
    prompter: Prompter,
    prompts: list[tuple[str, str]],
    max_new_tokens: int = 225,
    batch_tokens: int = 16384,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> list[Answer]:
    """
    Follows instructions on transcripts, greedily.

    Args:
        model (`PreTrainedModel`): The LSM whose LLM answers, or a causal LM.
        prompter ([`Prompter`]): Writes the prompt that training will use, with the transcript for the speech.
        prompts (`list[tuple[str, str]]`): Instructions and transcripts.
        max_new_tokens (`int`, *optional*, defaults to 225): Longest answer; the paper's figure.
        batch_tokens (`int`, *optional*, defaults to 16384): Tokens to have room for, see [`greedy_decode`].
        on_answer (*optional*): Called with every answer once it is there.

    Returns:
        `list[Answer]`: An answer for every prompt, in order.
    """
    end_tokens = read_end_tokens(model)
    answers: list[Answer | None] = [None] * len(prompts)

    def read(index: int, tokens: list[int]) -> None:
        answers[index] = Answer(prompter.decode(tokens), tokens[-1] in end_tokens, len(tokens))
        on_answer(answers[index])

    greedy_decode(model, prompter.encode(prompts), max_new_tokens, batch_tokens, on_answer=read)
    return answers
