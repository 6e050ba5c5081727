"""Rows looked through before training begins: what is wrong with them shows now, and how long they are."""

import hashlib
import json
import logging
import math
import os
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from huggingface_hub.utils import httpx  # under the name that the installed version has
from jinja2 import TemplateError

from .. import __version__
from ..processing_lsm import LsmProcessor, load_waveform
from .rows import FEATURES, chat_clips, encodable, render, row_to_chat, tokenize


logger = logging.getLogger(__name__)

MEASURES = Features(
    {
        "num_samples": Value("int64"),
        "audio_hash": Value("string"),
        "length": Value("int64"),
        "problem": Value("string"),
    }
)
UNREADABLE = (ValueError, OSError, TemplateError, httpx.HTTPError)  # what is one row's fault
REPORTED_ROWS = 5
RETRIED_ROWS = 20
JUDGED_ROWS = 100  # of a stream: before that a share means little


def measure(
    row: dict[str, Any], processor: LsmProcessor, slowest_speed: float = 1.0, main_process: int | None = None
) -> dict[str, Any]:
    """What [`prepare_rows`] wants to know of a row: a value for each of `MEASURES`."""
    if main_process not in (None, os.getpid()):
        torch.set_num_threads(1)  # the threads of a process do not survive its fork
    measures = {"num_samples": 0, "audio_hash": None, "length": 0, "problem": row["problem"]}
    if row["problem"] is not None:
        return measures
    timing = processor.timing
    try:
        chat = row_to_chat(row)
        if chat[-1]["role"] != "assistant":
            raise ValueError("the chat does not end in an answer")
        clips = [load_waveform(clip, target_rate=timing.sampling_rate) for clip in chat_clips(chat)]
        counts = [timing.audio_tokens_of_clip(math.ceil(len(clip) / slowest_speed)) for clip in clips]
        (input_ids,) = tokenize(processor, [render(processor, chat, counts)])["input_ids"]
    except UNREADABLE as error:
        return {**measures, "problem": encodable(str(error))}
    return {
        "num_samples": sum(map(len, clips)),
        "audio_hash": hashlib.sha256(clips[0]).hexdigest() if len(clips) == 1 else None,
        "length": len(input_ids),
        "problem": None,
    }


def hash_processor(processor: LsmProcessor) -> str:
    """A hash of what decides how many tokens a row has, the same in every process."""
    tokenizer = processor.tokenizer
    if tokenizer.is_fast:
        vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary = {**vocabulary, "truncation": None, "padding": None}  # these change from call to call
    else:
        vocabulary = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return Hasher.hash(
        json.dumps([vocabulary, tokenizer.special_tokens_map, processor.chat_template, vars(processor.timing)])
    )


def prepare_rows(
    rows: Dataset,
    processor: LsmProcessor,
    max_length: int | None = None,
    max_unreadable: float = 0.01,
    num_proc: int | None = None,
    slowest_speed: float = 1.0,
) -> Dataset:
    """
    Reads every clip once, so that what is wrong with the data shows before training begins, and measures the rows.

    The outcome is cached: only the first of several runs, or of several processes that come one after another, reads
    the clips. A clip that was mended since is read anew.

    Args:
        rows (`datasets.Dataset`): What [`load_rows`] gives. Mix sets after this, as mixing repeats rows.
        processor ([`LsmProcessor`]): Of the model to train.
        max_length (`int`, *optional*): The longest row that is allowed, in tokens.
        max_unreadable (`float`, *optional*, defaults to 0.01): Share of rows that may be unreadable. They are left
            out, with a warning.
        num_proc (`int`, *optional*): Processes that read. Defaults to this one alone.
        slowest_speed (`float`, *optional*, defaults to 1.0): Least factor of speed perturbation: `length` is counted
            at it.

    Returns:
        `datasets.Dataset`: The readable rows with, instead of `problem`, `num_samples` (of all clips, at the encoder's
        sampling rate; 0 for text), `audio_hash` (SHA-256 of the decoded waveform, float32, as 64 hexadecimal digits;
        `None` unless there is exactly one clip) and `length` (tokens that the LLM sees: prompt, audio and answer).

    Raises:
        ValueError: If more rows are unreadable than may be, or a row is longer than `max_length`.
    """
    fingerprint = Hasher.hash([rows._fingerprint, hash_processor(processor), slowest_speed, MEASURES, __version__])

    def measure_rows(**kwargs):
        return rows.map(
            measure,
            fn_kwargs={"processor": processor, "slowest_speed": slowest_speed, "main_process": os.getpid()},
            remove_columns=rows.column_names,
            features=MEASURES,
            num_proc=num_proc and max(1, min(num_proc, len(rows))),
            new_fingerprint=fingerprint,
            desc="Reading clips",
            **kwargs,
        )

    measures = measure_rows()
    unreadable = find_unreadable(measures)
    if any(measure(rows[index], processor)["problem"] is None for index in unreadable[:RETRIED_ROWS]):
        measures = measure_rows(load_from_cache_file=False)
        unreadable = find_unreadable(measures)

    if unreadable:
        first = unreadable[:REPORTED_ROWS]
        reasons = zip(rows.select(first)["source"], measures.select(first)["problem"], strict=True)
        message = describe_unreadable(len(unreadable), len(rows), list(reasons))
        if len(unreadable) > max_unreadable * len(rows):
            raise ValueError(f"{message} That is more than the {max_unreadable:.2%} allowed (--max_unreadable).")
        logger.warning("%s They are left out.", message)
    # Beside each other, as to write the rows anew would copy embedded audio.
    rows = concatenate_datasets([rows.remove_columns("problem"), measures.remove_columns("problem")], axis=1)
    if unreadable:
        rows = rows.select(np.setdiff1d(np.arange(len(rows)), unreadable))

    lengths = np.asarray(rows["length"][:])
    if max_length is not None and (lengths > max_length).any():
        longest = int(lengths.argmax())
        raise ValueError(
            f"{rows[longest]['source']} has {lengths[longest]} tokens, more than max_length={max_length}, as have "
            f"{int((lengths > max_length).sum())} of {len(rows)} rows. Raise --max_length, up to the context of the "
            "LLM, or leave them out."
        )
    return rows


def find_unreadable(measures: Dataset) -> list[int]:
    """Indices of the rows that have a problem."""
    return [index for index, problem in enumerate(measures["problem"][:]) if problem is not None]


def describe_unreadable(count: int, total: int, reasons: list[tuple[str, str]]) -> str:
    """How many rows are unreadable, and why the first of them are."""
    listed = "; ".join(f"{source}: {problem}" for source, problem in reasons)
    return (
        f"{count} of {total} rows cannot be used, {'the first of them' if count > len(reasons) else 'namely'} {listed}"
    )


class ReadableRows:
    """Keeps the readable rows of a stream, counts the others, and stops the stream when they are too many."""

    def __init__(self, max_unreadable: float):
        self.max_unreadable = max_unreadable
        self.total, self.unreadable = 0, 0

    def __call__(self, source: str, problem: str | None) -> bool:
        self.total += 1
        if problem is None:
            return True
        self.unreadable += 1
        if self.total >= JUDGED_ROWS and self.unreadable > self.max_unreadable * self.total:
            message = describe_unreadable(self.unreadable, self.total, [(source, problem)])
            raise ValueError(f"{message} That is more than the {self.max_unreadable:.2%} allowed (--max_unreadable).")
        if self.unreadable <= REPORTED_ROWS or self.unreadable % JUDGED_ROWS == 0:
            logger.warning("Left out, as %d of %d rows: %s: %s", self.unreadable, self.total, source, problem)
        return False


def skip_unreadable(
    rows: IterableDataset, processor: LsmProcessor, max_unreadable: float = 0.01, slowest_speed: float = 1.0
) -> IterableDataset:
    """
    [`prepare_rows`] for streams: rows come with the same columns, unreadable ones are left out, with a warning.

    Args:
        rows (`datasets.IterableDataset`): What [`load_rows`] gives. If it has fewer files than there are nodes, split
            it by node before this, or every node reads all clips.
        processor ([`LsmProcessor`]): Of the model to train.
        max_unreadable (`float`, *optional*, defaults to 0.01): Share of rows that may be unreadable. It is judged by
            every worker for itself, from the hundredth row on, where the stream then ends in a `ValueError`.
        slowest_speed (`float`, *optional*, defaults to 1.0): As in [`prepare_rows`].
    """
    rows = rows.map(
        measure,
        fn_kwargs={"processor": processor, "slowest_speed": slowest_speed},
        features=Features({**FEATURES, **MEASURES}),
    )
    rows = rows.filter(ReadableRows(max_unreadable), input_columns=["source", "problem"])
    return rows.remove_columns("problem")


__all__ = ["prepare_rows", "skip_unreadable"]
