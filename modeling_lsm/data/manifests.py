"""
Manifests and datasets as streams of records: whatever the form and however large, rows come one at a time, in order.

A row that cannot be read does not stop the stream: an `Unparsable` comes in its place.
"""

import csv
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Audio, Dataset, IterableDataset


PEEKED_ROWS = 20  # a column that none of the first rows has is misnamed rather than missing
ROWS_PER_READ = 64  # of Parquet: they may hold their audio


class Unparsable(str):
    """Why a row could not be read, in the place of the row."""


def find_files(name: str) -> list[Path]:
    """
    The files of a set of rows, in order.

    Args:
        name (`str`): A file of a kind in `READERS`, a folder with a `metadata.jsonl`, a `metadata.csv`, Parquet or tar
            files, a folder that `augment.py` wrote, or the id of a dataset on the Hub.

    Returns:
        `list[Path]`: The files; none for a dataset on the Hub.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the kind of file is unknown, or a folder has nothing to read.
    """
    path = Path(name)
    if path.is_dir():
        if (path / "accepted").is_dir():
            if files := sorted(path.glob("accepted/*.parquet")):
                return files
            raise ValueError(f"{name} holds no accepted rows. Look into its report.md for why they were rejected.")
        for pattern in ("metadata.jsonl", "metadata.csv", "*.parquet", "*.tar"):
            if files := sorted(path.glob(pattern)):
                return files
        raise ValueError(
            f"The folder {name} has no metadata.jsonl, metadata.csv, Parquet or tar files, nor is it a folder of "
            "augment.py. Name the manifest itself."
        )
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"{name} is a {path.suffix!r} file; expected one of {', '.join(READERS)}.")
        return [path]
    if path.suffix in READERS or path.is_absolute():
        raise FileNotFoundError(f"There is no file {name}. Relative paths start at {Path.cwd()}.")
    return []


def read_jsonl(file: Path, columns: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any] | Unparsable]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                record = Unparsable(f"invalid UTF-8: {error.reason} at byte {error.start}")
            except json.JSONDecodeError as error:
                record = Unparsable(f"broken JSON: {error}")
            if not isinstance(record, (dict, Unparsable)):
                record = Unparsable(f"not an object: {record!r:.80}")
            yield f"{file.name}:{number}", record


def read_json(file: Path, columns: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any] | Unparsable]]:
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # a file of one array cannot be taken up again after an error
        raise ValueError(f"{file} cannot be read: {error}. Mend it, or write it as JSONL, a row a line.") from error
    if not isinstance(records, list):
        raise ValueError(f"{file} holds a {type(records).__name__}; expected a list of rows.")
    for number, record in enumerate(records):
        yield (
            f"{file.name}[{number}]",
            (record if isinstance(record, dict) else Unparsable(f"not an object: {record!r:.80}")),
        )


def read_csv(file: Path, columns: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any] | Unparsable]]:
    # Bytes that are not UTF-8 come as lone surrogates, so that the row they stand in can be told from the others.
    csv.field_size_limit(2**31 - 1)  # a field that is too long is one row's problem
    with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        reader = csv.DictReader(lines)
        for record in reader:
            text = "".join(value for value in record.values() if isinstance(value, str))
            broken = any("\udc80" <= character <= "\udcff" for character in text)
            yield f"{file.name}:{reader.line_num}", Unparsable("invalid UTF-8") if broken else record


def read_parquet(file: Path, columns: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any] | Unparsable]]:
    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} cannot be read: {error} Fetch or write it again.") from error
    # All columns if one is missing, so that the error can name what there is.
    wanted = columns if columns and set(columns) <= set(table.schema_arrow.names) else None
    number = 0
    for batch in table.iter_batches(batch_size=ROWS_PER_READ, columns=wanted):
        for record in batch.to_pylist():
            yield f"{file.name}[{number}]", record
            number += 1


def read_tar(file: Path, columns: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any] | Unparsable]]:
    """
    Rows of a webdataset: files of one name, put one after another, are a row, and their endings its columns. Text
    files hold strings, the fields of a JSON file are columns too, everything else is audio.
    """
    # Not with `datasets`, which needs torchcodec to open one that holds audio.
    key = ""
    try:
        with tarfile.open(file, "r|*") as tar:
            members = (member for member in tar if member.isfile())
            for key, group in groupby(members, lambda member: re.match(r"(.*/)?[^.]*", member.name)[0]):
                tar.members = []  # it would remember them all
                yield f"{file.name}[{key}]", read_sample(tar, key, group)
    except (tarfile.TarError, EOFError) as error:
        yield f"{file.name}[{key}]", Unparsable(f"the tar file is damaged or cut off here: {error}")


def read_sample(tar: tarfile.TarFile, key: str, members: Iterable[tarfile.TarInfo]) -> dict[str, Any] | Unparsable:
    """The row that the files of one name in a webdataset make."""
    record: dict[str, Any] = {}
    for member in members:
        ending, content = member.name[len(key) + 1 :], tar.extractfile(member).read()
        try:
            if ending == "json":
                record |= json.loads(content.decode("utf-8"))
            elif ending in ("txt", "text"):
                record[ending] = content.decode("utf-8")
            else:
                record[ending] = {"path": member.name, "bytes": content}
        except (ValueError, TypeError) as error:
            return Unparsable(f"broken {member.name}: {error}")
    return record


def read_dataset(rows: Dataset | IterableDataset, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a streamed dataset, with their audio undecoded."""
    for number, record in enumerate(undecoded(rows)):
        yield f"{name}[{record.get('__key__', number)}]", record


def undecoded(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """`rows` with audio as `{"path", "bytes"}` dicts: decoding it with `datasets` takes torchcodec."""
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, Audio):
            rows = rows.cast_column(column, Audio(decode=False))
    return rows


# Each gives rows with where they stand. `columns`, if given, are the ones to read, where that saves time.
READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet, ".tar": read_tar}


__all__ = ["PEEKED_ROWS", "READERS", "Unparsable", "find_files", "read_dataset", "undecoded"]
