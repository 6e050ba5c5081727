"""Sets of rows, wherever they are: opened in one form, mixed, or turned into the baseline's."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.compute as pc
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from .. import __version__
from ..fetching_lsm import is_fetched
from ..signals_lsm import AudioLimits
from .hub_paths import check_hub_path
from .manifests import PEEKED_ROWS, READERS, Unparsable, find_files, undecoded
from .rows import FEATURES, REPLACED_BY_MESSAGES, chat_clips, to_row, with_usual_names


logger = logging.getLogger(__name__)

ASKED_COLUMNS = ("task", "instruction", "target", "messages")
MAX_BYTES = AudioLimits.max_bytes
WRITTEN_ROWS = 100  # held in memory at a time, maybe with their audio


def load_rows(
    source: str | os.PathLike,
    split: str = "train",
    config_name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    columns: tuple[str, ...] = (),
) -> Dataset | IterableDataset:
    """
    Opens a set of rows. All sets have the same columns, so that they can be mixed.

    Args:
        source (`str` or `os.PathLike`):
            A JSONL, JSON, CSV, Parquet or webdataset tar file, a folder with a `metadata.jsonl`, a `metadata.csv`,
            Parquet or tar files, a folder that `augment.py` wrote, or the id of a dataset on the Hub. Audio paths may
            be relative to the manifest.
        split, config_name, revision (`str`, *optional*):
            Of a dataset on the Hub.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows as they are needed. Files are what is divided among the workers of a `DataLoader`.
        columns (`tuple[str, ...]`, *optional*):
            Columns that must be there. `messages` takes the place of `instruction` and `target`.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Rows with the columns `audio` (a `{"path", "bytes"}` dict,
        not decoded, or `None` for rows of text), `text`, `task`, `instruction`, `target`, `messages` (a chat, as
        JSON), `source` (where the row stands) and `problem` (why it cannot be used, see [`prepare_rows`]). What a set
        does not have is `None`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the kind of file is unknown, there are no rows, or a column is missing.
    """
    name, columns = str(source), tuple(columns)
    files = find_files(name)
    if not files:
        return load_hub_rows(name, split, config_name, revision, streaming, columns)
    records = chain.from_iterable(READERS[file.suffix](file) for file in files)
    check_columns(name, [record for _, record in islice(records, PEEKED_ROWS)], columns)
    kwargs = {"files": [str(file) for file in files], "columns": columns}
    if streaming:
        return IterableDataset.from_generator(read_rows, features=FEATURES, gen_kwargs=kwargs)
    stats = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    try:
        return Dataset.from_generator(
            read_rows,
            features=FEATURES,
            gen_kwargs=kwargs,
            fingerprint=Hasher.hash([kwargs, stats, FEATURES, __version__]),
            writer_batch_size=WRITTEN_ROWS,
        )
    except DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, ValueError) else error from None


def load_hub_rows(
    name: str, split: str, config_name: str | None, revision: str | None, streaming: bool, columns: tuple[str, ...]
) -> Dataset | IterableDataset:
    """The rows of a dataset on the Hub, as [`load_rows`] gives them."""
    records = undecoded(load_dataset(name, config_name, split=split, revision=revision, streaming=streaming))
    first = list(islice(records, PEEKED_ROWS))
    check_columns(name, first, columns)
    known = records.column_names or {column for record in first for column in record}
    kwargs = {
        "with_indices": True,
        "fn_kwargs": {"name": name, "columns": columns},
        "features": FEATURES,
        "remove_columns": list(known),
    }
    if streaming:
        return records.map(read_hub_record, **kwargs)
    fingerprint = Hasher.hash([records._fingerprint, name, columns, FEATURES, __version__])
    return records.map(
        read_hub_record,
        new_fingerprint=fingerprint,
        writer_batch_size=WRITTEN_ROWS,
        desc=f"Reading {name}",
        **kwargs,
    )


def read_rows(files: list[str], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of manifests, in order."""
    for file in map(Path, files):
        for source, record in READERS[file.suffix](file):
            yield to_row(record, f"{file.parent / source}", file.parent, columns)


def read_hub_record(record: dict[str, Any], index: int, name: str, columns: tuple[str, ...]) -> dict[str, Any]:
    """The row that a record of a dataset on the Hub makes."""
    row = to_row(record, f"{name}[{record.get('__key__', index)}]", columns=columns)
    own = row["audio"]["path"] if row["audio"] and row["audio"]["bytes"] is None else None
    named = [own] if own is not None else []
    for clip in chat_clips(json.loads(row["messages"])) if row["messages"] else []:
        named.append(clip[0] if isinstance(clip, tuple) else clip)
    try:
        for path in filter(None, named):
            check_hub_path(path, name)
    except ValueError as error:
        return {**row, "problem": str(error)}
    if own is not None and "://" in own and not is_fetched(own):  # of a stream
        try:
            with fsspec.open(own, "rb") as file:  # of an archive, it may be larger than all of the dataset
                row["audio"]["bytes"] = file.read(MAX_BYTES + 1)
            if len(row["audio"]["bytes"]) > MAX_BYTES:
                row["audio"]["bytes"] = None
                raise ValueError(f"it has more than {MAX_BYTES} bytes")
        except (OSError, ValueError) as error:
            row["problem"] = f"{own} cannot be fetched: {error}"
    return row


def check_columns(name: str, records: list[dict[str, Any] | Unparsable], columns: tuple[str, ...]) -> None:
    """Raises a `ValueError` unless the first `records` of a set have the `columns` that it must have."""
    if not records:
        raise ValueError(f"{name} holds no rows.")
    named = [with_usual_names(record) for record in records if not isinstance(record, Unparsable)]
    there = {str(column) for record in named for column in record}
    replaced = REPLACED_BY_MESSAGES if "messages" in there else ()
    missing = [column for column in columns if column not in there and column not in replaced]
    if named and missing:
        instead = " (or `messages`)" if set(missing) & set(REPLACED_BY_MESSAGES) else ""
        raise ValueError(f"{name} lacks the column(s) {missing}{instead}; it has {sorted(there)}.")


def mix_rows(
    datasets: list[Dataset] | list[IterableDataset], weights: list[float] | None = None, seed: int = 0
) -> Dataset | IterableDataset:
    """
    Makes one set of several.

    Args:
        datasets (`list[datasets.Dataset]` or `list[datasets.IterableDataset]`):
            Sets with the same columns.
        weights (`list[float]`, *optional*):
            How often rows come from each set: of weights 3 and 1, three rows in four come from the first. The mixture
            ends when every row of every set has come; sets that end before begin anew. Without weights, every row
            comes once.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.

    Raises:
        ValueError: If the number of weights is not that of the sets, or a weight is not positive.
    """
    if weights is None:
        return concatenate_datasets(datasets)
    if len(weights) != len(datasets):
        raise ValueError(f"There are {len(datasets)} datasets, but {len(weights)} weights: {weights}. Give one each.")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(
            f"The weights of the datasets are {weights}; expected numbers above 0. Leave a set out instead."
        )
    probabilities = [weight / sum(weights) for weight in weights]
    return interleave_datasets(datasets, probabilities, seed=seed, stopping_strategy="all_exhausted")


def ask_for_transcriptions(
    rows: Dataset | IterableDataset, instructions: tuple[str, ...]
) -> Dataset | IterableDataset:
    """
    The baseline on the same audio: every row asks for its transcript. A clip that has several targets stands as often
    as it did; rows of text alone are left out.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): What [`load_rows`] gives.
        instructions (`tuple[str, ...]`): Ways to ask for a transcript.

    Raises:
        ValueError: If a row with audio has no `text`. From a stream it comes when the row does.
    """
    kwargs = {"fn_kwargs": {"instructions": instructions}}
    if isinstance(rows, IterableDataset):
        rows = rows.filter(may_hear, input_columns=["audio", "problem"])
        return rows.map(ask_for_transcription, features=FEATURES, **kwargs)
    kept = []
    for table in rows.with_format("arrow").select_columns(["audio", "problem"]).iter(WRITTEN_ROWS):
        kept += pc.or_(table["audio"].is_valid(), table["problem"].is_valid()).to_pylist()
    if not all(kept):
        logger.info("%d rows of text alone are left out.", len(kept) - sum(kept))
        rows = rows.select(np.flatnonzero(kept))
    asked = rows.map(
        ask_for_transcription,
        features=Features({column: FEATURES[column] for column in ASKED_COLUMNS}),
        remove_columns=rows.column_names,
        new_fingerprint=Hasher.hash([rows._fingerprint, instructions, __version__]),
        desc="Asking for transcripts",
        **kwargs,
    )
    # Beside each other, as to write the rows anew would copy embedded audio.
    rows = concatenate_datasets([rows.remove_columns(list(ASKED_COLUMNS)), asked], axis=1)
    return rows.select_columns(list(FEATURES))


def may_hear(audio: dict[str, Any] | None, problem: str | None) -> bool:
    """Whether a row has audio, or may have had it."""
    return audio is not None or problem is not None


def ask_for_transcription(row: dict[str, Any], instructions: tuple[str, ...]) -> dict[str, Any]:
    """What changes in a row to ask for its transcript; which of `instructions` it gets depends on where it stands."""
    if row["problem"] is None and row["text"] is None:
        raise ValueError(
            f"{row['source']} has audio, but no transcript in `text`: the vanilla recipe cannot use it. Leave it out, "
            "or train with --recipe self_powered."
        )
    draw = int(hashlib.sha256(row["source"].encode()).hexdigest(), 16) % len(instructions)
    return dict(zip(ASKED_COLUMNS, ("transcription", instructions[draw], row["text"], None), strict=True))


__all__ = ["ask_for_transcriptions", "load_rows", "mix_rows"]
