"""
ASR corpora as streams: whatever the corpus is and however large, its rows come one at a time, in order.

A row that cannot be used does not stop the stream. It comes with the reason, and where it stands.
"""

import csv
import json
import re
import sqlite3
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Audio, load_dataset

from ..processing_lsm import load_waveform


PEEKED_ROWS = 20  # a column that none of the first rows has is misnamed rather than missing


@dataclass
class SourceRow:
    """
    A row of the corpus.

    Args:
        source (`str`): Where it stands, like `"metadata.jsonl:17"`.
        audio (`str` or `dict`, *optional*): A path, or a `{"path", "bytes"}` dict where the corpus embeds its audio.
        text (`str`): Its transcript.
        problem (`str`, *optional*): Why it cannot be used.
        written_audio (`str` or `dict`, *optional*): Its audio as the corpus writes it: the same on every machine.
    """

    source: str
    audio: str | dict[str, Any] | None = None
    text: str = ""
    problem: str | None = None
    written_audio: str | dict[str, Any] | None = None


class Unparsable(str):
    """Why a row could not be read, in the place of the row."""


class Corpus:
    """
    Opens a corpus.

    Args:
        name (`str`):
            A JSONL, JSON, CSV, Parquet or webdataset tar file, a folder with `metadata.jsonl`, `metadata.csv`, Parquet
            or tar files, or the id of a dataset on the Hub. JSON is read whole, everything else as a stream.
        audio_column, text_column (`str`): Names of the columns. In a tar, the file name endings: `flac`, `txt`.
        config_name (`str`, *optional*): Configuration of a dataset on the Hub.
        split (`str`): Split of a dataset on the Hub.
        max_rows (`int`, *optional*): Use only the first rows.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the kind of file is unknown, or the columns are not there.
    """

    def __init__(
        self,
        name: str,
        audio_column: str = "audio",
        text_column: str = "text",
        config_name: str | None = None,
        split: str = "train",
        max_rows: int | None = None,
    ):
        self.name, self.config_name, self.split, self.max_rows = name, config_name, split, max_rows
        self.audio_column, self.text_column = audio_column, text_column
        self.files = find_files(name)
        first = [record for _, record in islice(self._records(), PEEKED_ROWS) if not isinstance(record, Unparsable)]
        self._check_columns(first)
        self.embeds_audio = any(isinstance(record.get(audio_column), dict) for record in first)

    def count_rows(self) -> int | None:
        """How many rows there are, if that can be told without reading them all."""
        if not self.files or not {file.suffix for file in self.files} <= {".jsonl", ".parquet"}:
            return self.max_rows
        count = 0
        for file in self.files:
            if file.suffix == ".parquet":
                count += pq.ParquetFile(file).metadata.num_rows
            else:
                with open(file, "rb") as lines:
                    count += sum(1 for line in lines if line.strip())
        return count if self.max_rows is None else min(count, self.max_rows)

    def __iter__(self) -> Iterator[SourceRow]:
        for source, record in islice(self._records(), self.max_rows):
            if isinstance(record, Unparsable):
                yield SourceRow(source, problem=record)
            else:
                yield self._to_row(source, record)

    def _records(self) -> Iterator[tuple[str, dict[str, Any] | Unparsable]]:
        if not self.files:
            rows = load_dataset(self.name, self.config_name, split=self.split, streaming=True)
            yield from read_dataset(rows, self.name)
        for file in self.files:
            yield from READERS[file.suffix](file, [self.audio_column, self.text_column])

    def _check_columns(self, records: list[dict[str, Any]]) -> None:
        for option, column in (("audio", self.audio_column), ("text", self.text_column)):
            if records and not any(column in record for record in records):
                raise ValueError(
                    f"{self.name} has no column {column!r}; it has {sorted(records[0])}. Name the right one with "
                    f"--{option}_column."
                )

    def _to_row(self, source: str, record: dict[str, Any]) -> SourceRow:
        audio, text = record.get(self.audio_column), record.get(self.text_column)
        written = audio
        if isinstance(audio, str):
            audio = self._resolve(audio)
        elif isinstance(audio, dict) and not audio.get("bytes") and audio.get("path"):
            audio = {"path": self._resolve(audio["path"]), "bytes": None}
        row = SourceRow(source, None, text if isinstance(text, str) else "")
        for column, value in ((self.audio_column, audio), (self.text_column, text)):
            if value is None or value == {"path": None, "bytes": None}:
                row.problem = f"missing {column}"
                return row
        if self.embeds_audio and isinstance(audio, str):
            audio = {"path": audio, "bytes": None}
        if not isinstance(audio, dict if self.embeds_audio else str):
            row.problem = f"{self.audio_column} is not a path: {audio!r:.80}"
            return row
        row.audio, row.written_audio = audio, written
        if not isinstance(text, str):
            row.problem = f"{self.text_column} is not a string: {text!r:.80}"
        elif not text.strip():
            row.problem = "empty transcript"
        return row

    def _resolve(self, path: str) -> str:
        return str((self.files[0].parent / path).resolve()) if self.files and "://" not in path else path


def find_files(name: str) -> list[Path]:
    """The files of a corpus, in order; none if `name` is a dataset on the Hub."""
    path = Path(name)
    if path.is_dir():
        for pattern in ("metadata.jsonl", "metadata.csv", "*.parquet", "*.tar"):
            if files := sorted(path.glob(pattern)):
                return files
        raise ValueError(f"The folder {name} has no metadata.jsonl, metadata.csv, Parquet or tar files.")
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"{name} is a {path.suffix!r} file; expected one of {', '.join(READERS)}.")
        return [path]
    if path.suffix in READERS or path.is_absolute():
        raise FileNotFoundError(f"There is no file {name}. Relative paths start at {Path.cwd()}.")
    return []


def read_jsonl(file: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any] | Unparsable]]:
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


def read_json(file: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any] | Unparsable]]:
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


def read_csv(file: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any] | Unparsable]]:
    # Bytes that are not UTF-8 come as lone surrogates, so that the row they stand in can be told from the others.
    csv.field_size_limit(2**31 - 1)  # a field that is too long is one row's problem
    with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        reader = csv.DictReader(lines)
        for record in reader:
            text = "".join(value for value in record.values() if isinstance(value, str))
            broken = any("\udc80" <= character <= "\udcff" for character in text)
            yield f"{file.name}:{reader.line_num}", Unparsable("invalid UTF-8") if broken else record


def read_parquet(file: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any] | Unparsable]]:
    table = pq.ParquetFile(file)
    # All columns if one is missing, so that the error can name what there is.
    wanted = columns if set(columns) <= set(table.schema_arrow.names) else None
    number = 0
    for batch in table.iter_batches(batch_size=1024, columns=wanted):
        for record in batch.to_pylist():
            yield f"{file.name}[{number}]", record
            number += 1


def read_tar(file: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any] | Unparsable]]:
    """
    Rows of a webdataset: files of one name, put one after another, are a row, and their endings its columns. Text
    files hold strings, the fields of a JSON file are columns too, everything else is audio.
    """
    # Not with `datasets`, which needs torchcodec to open one that holds audio.
    with tarfile.open(file, "r|*") as tar:
        members = (member for member in tar if member.isfile())
        for key, group in groupby(members, lambda member: re.match(r"(.*/)?[^.]*", member.name)[0]):
            tar.members = []  # it would remember them all
            record: dict[str, Any] | Unparsable = {}
            for member in group:
                ending, content = member.name[len(key) + 1 :], tar.extractfile(member).read()
                try:
                    if ending == "json":
                        record |= json.loads(content.decode("utf-8"))
                    elif ending in ("txt", "text"):
                        record[ending] = content.decode("utf-8")
                    else:
                        record[ending] = {"path": member.name, "bytes": content}
                except (ValueError, TypeError) as error:
                    record = Unparsable(f"broken {member.name}: {error}")
                    break
            yield f"{file.name}[{key}]", record


def read_dataset(rows: Iterable[dict[str, Any]], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a streamed dataset, with their audio undecoded."""
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, Audio):
            rows = rows.cast_column(column, Audio(decode=False))
    for number, record in enumerate(rows):
        yield f"{name}[{record.get('__key__', number)}]", record


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet, ".tar": read_tar}


def audio_problem(audio: Any, check: str) -> str | None:
    """What is wrong with an audio file, as far as `check` looks: `"exists"`, `"decode"` or `"none"`."""
    if check == "decode":
        try:
            load_waveform(audio)
        except (ValueError, OSError) as error:
            return str(error)
        return None
    if isinstance(audio, dict) and not audio.get("bytes"):
        audio = audio["path"]
    if check == "exists" and isinstance(audio, str) and "://" not in audio and not Path(audio).is_file():
        return f"missing audio file: {audio}"
    return None


def sentence_case(text: str) -> str:
    """
    Lower-cases a transcript that is all capitals, as LibriSpeech's are, but for its beginning and the word "I".

    LLMs take capitals for shouting. Names stay lower-case: to tell them needs more than the transcript.
    """
    if not text.isupper():
        return text
    words = [word if word in ("I", "I'M", "I'LL", "I'VE", "I'D") else word.lower() for word in text.split()]
    words = [word[0] + word[1:].lower() if word.startswith("I'") else word for word in words]
    text = " ".join(words)
    return text[0].upper() + text[1:]


class SeenRows:
    """Remembers row ids, on disk, so that memory does not grow with the corpus."""

    def __init__(self):
        self.database = sqlite3.connect("")  # a private temporary file, which vanishes with the connection
        self.database.execute("CREATE TABLE seen (id TEXT PRIMARY KEY) WITHOUT ROWID")

    def is_new(self, row_id: str) -> bool:
        """Whether this is the first time that `row_id` is asked about."""
        return self.database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (row_id,)).rowcount == 1


__all__ = ["Corpus", "SeenRows", "SourceRow", "audio_problem", "sentence_case"]
