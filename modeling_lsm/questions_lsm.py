"""What the pipeline can be given, one question or many, as chats in batches; and a chat with its answer."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from .processing_lsm import make_chat


def is_chat(value: Any) -> bool:
    """Whether `value` is one chat: a list of messages."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def holds_items(value: Any) -> bool:
    """Whether `value` is many questions, be they in memory or yet to come, rather than one."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Real):
        return False  # samples and their rate
    if isinstance(value, (list, tuple)):
        return not is_chat(value) and not (value and isinstance(value[0], Real))
    if isinstance(value, (str, bytes, bytearray, memoryview, os.PathLike, Mapping, np.ndarray, torch.Tensor)):
        return False
    if any(callable(getattr(value, name, None)) for name in ("read", "get_all_samples")):  # a file object, a decoder
        return False
    return isinstance(value, (Iterable, Dataset))


def is_indexable(value: Any) -> bool:
    """Whether the items of `value` can be had in any order, as worker processes need it."""
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, IterableDataset)


def check_lengths(clips: Any, instructions: Any) -> None:
    """Raises a `ValueError` if there are more of the one than of the other, as far as that is known beforehand."""
    sized = all(hasattr(value, "__len__") for value in (clips, instructions))
    if holds_items(clips) and sized and len(clips) != len(instructions):
        raise ValueError(
            f"There are {len(clips)} clips and {len(instructions)} instructions. Pass one instruction, or one "
            "for each clip."
        )


def to_question(
    item: Any, instruction: str | None = None, sampling_rate: int | None = None, is_text: bool = False
) -> dict[str, Any]:
    """
    One question as the pipeline handles it.

    Args:
        item: A chat, a clip, or a dict with a clip under `"audio"` and perhaps its instruction under `"text"`.
        instruction (`str`, *optional*): What to do with the clip.
        sampling_rate (`int`, *optional*): Samples per second of a clip that is a bare array.
        is_text (`bool`, *optional*, defaults to `False`): A `str` is an instruction without a clip, not a path.

    Returns:
        `dict`: Its `chat`, and whether it was `given_as_chat`.
    """
    if is_chat(item):
        if instruction is not None:
            raise ValueError("A chat holds its own instruction: pass either a chat, or `audio` with `text`.")
        return {"chat": list(item), "given_as_chat": True}
    if is_text and isinstance(item, str):
        item = {"text": item}
    clip = item
    if isinstance(item, Mapping) and ("audio" in item or "text" in item):
        if item.get("text") is not None and instruction is not None:
            raise ValueError(
                f"There are two instructions, {instruction!r} for all and {item['text']!r} in an item. If that is the "
                'transcript, pass the clips alone: pipe(KeyDataset(dataset, "audio"), text=…).'
            )
        clip, instruction = item.get("audio"), instruction if item.get("text") is None else item["text"]
        sampling_rate = item.get("sampling_rate", sampling_rate)
    if not isinstance(instruction, str):
        found = "no instruction" if instruction is None else f"an instruction of type {type(instruction).__name__}"
        raise ValueError(f'There is {found}. Say what to do with the audio: pipe(clip, text="Transcribe it.").')
    if clip is None:
        return {"chat": [{"role": "user", "content": instruction}], "given_as_chat": False}
    chat = make_chat(instruction, audio=clip)
    if sampling_rate is not None:
        chat[0]["content"][-1]["sampling_rate"] = sampling_rate
    return {"chat": chat, "given_as_chat": False}


class Batches(Dataset):
    """
    The items of an indexable `source` as batches of questions, read when they are asked for.

    Args:
        source: Anything with a length whose items can be had by their number.
        ask (`Callable`): Makes a question of an item.
        batch_size (`int`): Questions in a batch.
    """

    def __init__(self, source: Any, ask: Callable[[Any], dict[str, Any]], batch_size: int):
        self.source, self.ask, self.batch_size = source, ask, batch_size

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = index * self.batch_size
        numbers = range(start, min(start + self.batch_size, len(self.source)))
        return {"questions": [self.ask(self.source[number]) for number in numbers]}


def read_batches(questions: Iterable[dict[str, Any]], batch_size: int) -> Iterator[dict[str, Any]]:
    """Batches of `questions`, of which no more are read than are asked for."""
    questions = iter(questions)
    while batch := list(islice(questions, batch_size)):
        yield {"questions": batch}


def with_answer(chat: list[dict[str, Any]], answer: str, continues: bool) -> list[dict[str, Any]]:
    """A copy of `chat` with `answer` as a message of its own or, if it `continues` the last one, in that."""
    if not continues:
        return [*chat, {"role": "assistant", "content": answer}]
    content = chat[-1]["content"]
    if isinstance(content, str):
        content += answer
    else:
        last = max(index for index, item in enumerate(content) if item.get("type") == "text")
        content = [*content[:last], {**content[last], "text": content[last]["text"] + answer}, *content[last + 1 :]]
    return [*chat[:-1], {**chat[-1], "content": content}]


__all__ = ["Batches", "check_lengths", "holds_items", "is_indexable", "read_batches", "to_question", "with_answer"]
