"""
ASR corpora as streams: whatever the corpus is and however large, its rows come one at a time, in order.

A row that cannot be used does not stop the stream. It comes with the reason, and where it stands.
"""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import load_dataset

from ..processing_lsm import load_waveform
from .hub_paths import check_hub_path
from .manifests import PEEKED_ROWS, READERS, Unparsable, find_files, read_dataset


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
        named = audio if isinstance(audio, str) else None if audio.get("bytes") else audio.get("path")
        if not self.files and named:
            try:
                check_hub_path(named, self.name)
            except ValueError as error:
                row.problem = str(error)
                return row
        row.audio, row.written_audio = audio, written
        if not isinstance(text, str):
            row.problem = f"{self.text_column} is not a string: {text!r:.80}"
        elif not text.strip():
            row.problem = "empty transcript"
        return row

    def _resolve(self, path: str) -> str:
        return str((self.files[0].parent / path).resolve()) if self.files and "://" not in path else path


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
