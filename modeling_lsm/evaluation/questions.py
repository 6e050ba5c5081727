"""Rows of a dataset → the questions of a task, each with its instruction and the right answer."""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Any

from datasets import ClassLabel, load_dataset

from ..augmentation.filters import normalize
from ..data.manifests import READERS, Unparsable, find_files, read_dataset
from ..data.rows import to_audio, with_usual_names
from ..fingerprints import hash_text
from .answers import read_choice, read_yes_no
from .checks import draw_check
from .tasks import DatasetEntry, Task


# id, task, source, audio (or else its problem), audio_hash, text, instruction, reference, maybe choices or check; or
# unusable.
Question = dict[str, Any]
FILLED_IN = ("labels", "choices", "target_language")  # placeholders that are not columns
REFERENCE_FREE = ("keywords", "following")  # kinds whose rows need no reference


class Records:
    """
    The rows of a dataset, read whole, under our names of columns.

    Args:
        dataset ([`DatasetEntry`]): Where they are.
        limit (`int`, *optional*): Read only the first rows.
    """

    def __init__(self, dataset: DatasetEntry, limit: int | None = None):
        self.name = dataset.path
        path = Path(dataset.path)
        files = find_files(str(path / "accepted" if (path / "accepted").is_dir() else path))
        self.folder = files[0].parent if files else None
        parts = {ours: [names] if isinstance(names, str) else names for ours, names in dataset.columns.items()}
        theirs = {name for names in parts.values() for name in names}
        self.rows: list[tuple[str, dict[str, Any] | Unparsable]] = []
        self.columns: dict[str, None] = {}
        self._hashes: dict[str, str] = {}  # by path: several tasks ask about the same clip
        for source, record in islice(read_records(dataset, files), limit):
            if not isinstance(record, Unparsable):
                record = with_usual_names(record)
                # A column that has one of our names but stands for something else gives way.
                record = {n: v for n, v in record.items() if n not in parts or n in theirs} | {
                    ours: join_values([record[name] for name in names])
                    for ours, names in parts.items()
                    if all(name in record for name in names)
                }
                self.columns |= dict.fromkeys(record)
            self.rows.append((source, record))
        if not self.rows:
            raise ValueError(f"{self.name} has no rows.")

    def find_audio(self, record: dict[str, Any]) -> dict[str, Any]:
        """The `audio` of a record, or else the `problem` that it has, and `audio_hash`, of what the file holds."""
        try:
            audio = to_audio(record.get("audio"), self.folder)
        except ValueError as error:
            audio, problem = None, str(error)
        else:
            problem = None if audio else "missing audio"
        return {"audio": audio, "problem": problem, "audio_hash": self._hash_audio(audio)}

    def _hash_audio(self, audio: dict[str, Any] | None) -> str:
        if audio is None:
            return "missing"
        if audio["bytes"] is not None:
            return hashlib.sha256(audio["bytes"]).hexdigest()
        path = audio["path"]
        if "://" in path:
            return path  # not fetched for its hash alone
        if path not in self._hashes:
            try:
                with open(path, "rb") as file:
                    self._hashes[path] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError:  # answering says what is wrong with it
                self._hashes[path] = "missing"
        return self._hashes[path]

    def require(self, column: str, why: str) -> None:
        """Raises a `ValueError` if no row has `column`."""
        if column not in self.columns:
            raise ValueError(
                f"{self.name} has no column {column!r}, {why}; it has {list(self.columns)}. Name the right one with "
                f"--columns {column}=THEIRS, or leave this out."
            )


def join_values(values: list[Any]) -> Any:
    """What one column holds that is made of these: a text, where there are several; nothing, if one is missing."""
    if len(values) == 1:
        return values[0]
    return None if None in values else " ".join(map(str, values))


def read_records(dataset: DatasetEntry, files: list[Path]) -> Iterator[tuple[str, dict[str, Any] | Unparsable]]:
    """Records under the names they were given, each with where it stands."""
    for file in files:
        yield from READERS[file.suffix](file, ["*"])  # no table has this column, so all of them are read
    if not files:
        rows = load_dataset(
            dataset.path, dataset.config, split=dataset.split, revision=dataset.revision, streaming=True
        )
        classes = {key: feature for key, feature in (rows.features or {}).items() if isinstance(feature, ClassLabel)}
        for source, record in read_dataset(rows, dataset.path):
            yield source, {**record, **{key: name_of_label(record[key], classes[key]) for key in classes}}


def name_of_label(index: int | None, labels: ClassLabel) -> str | None:
    """The name of a label; -1 stands for one that is not told."""
    return None if index is None or index < 0 else labels.int2str(index)


def make_questions(
    records: Records, task: Task, needs_audio: bool, needs_text: bool, seed: int = 0, draw_wordings: bool = False
) -> tuple[Task, list[Question]]:
    """
    The questions of a task.

    Args:
        records ([`Records`]): The rows.
        task ([`Task`]): What to ask.
        needs_audio, needs_text (`bool`): Whether a system will hear the clips, or read their transcripts.
        seed (`int`, *optional*, defaults to 0): Seed of whatever is drawn for a row: it does not depend on other rows.
        draw_wordings (`bool`, *optional*, defaults to `False`): Whether to draw a wording for each row.

    Returns:
        The task, with the labels of the rows if it had none, and its questions. One that is `unusable`, for the
        reason it gives, cannot be asked or judged: it counts nowhere.

    Raises:
        ValueError: If a column is missing.
    """
    check_columns(records, task, needs_audio, needs_text)
    if task.kind == "classification" and not task.labels:
        found = {
            str(record[task.reference])
            for _, record in records.rows
            if not isinstance(record, Unparsable) and record.get(task.reference) is not None
        }
        task = replace(task, labels={label: [label] for label in sorted(found)})
    questions = []
    for index, (source, record) in enumerate(records.rows):
        identity = f"{task.name}/{index:06d}"
        question = {"id": identity, "task": task.name, "source": source}
        try:
            if isinstance(record, Unparsable):
                raise ValueError(str(record))
            if task.kind == "own" and record.get("task") == "transcription":
                continue  # the task of that name asks for it
            question |= ask(record, task, random.Random(f"{seed}:{identity}"), draw_wordings)
            if needs_text and question["text"] is None:
                raise ValueError("missing text")
        except ValueError as error:
            question["unusable"] = str(error)
        else:
            question |= records.find_audio(record)
        questions.append(question)
    if all("unusable" in question for question in questions):
        reason = f"the first: {questions[0]['unusable']}" if questions else "they ask for transcriptions only"
        raise ValueError(f"{records.name} has no row that can be used in the task {task.name!r}; {reason}.")
    return task, questions


def needs_keywords(records: Records, task: Task) -> bool:
    """Whether the text LLM has to name the keywords of a row, as the row does not have them."""
    return task.kind == "keywords" and any(
        record.get(task.reference) in (None, "") for _, record in records.rows if not isinstance(record, Unparsable)
    )


def check_columns(records: Records, task: Task, needs_audio: bool, needs_text: bool) -> None:
    """Raises a `ValueError` if a column is missing that the task or a system needs."""
    if needs_audio:
        records.require("audio", "which has the clips")
    if needs_text:
        records.require("text", "the transcripts, which the text system or the task needs")
    if task.kind not in REFERENCE_FREE:
        records.require(task.reference, f"the reference of the task {task.name!r}")
    if needs_keywords(records, task):
        records.require("text", f"the transcripts, nor {task.reference!r}, one of which the task {task.name!r} needs")
    if task.kind == "own":
        records.require("instruction", f"which the task {task.name!r} asks")
    if task.kind == "multiple_choice":
        records.require("choices", f"which the task {task.name!r} needs")
    for wording in task.instructions:
        for _, column, _, _ in Formatter().parse(wording):
            if column and column not in FILLED_IN:
                records.require(column, f"which the instructions of the task {task.name!r} name")


def ask(record: dict[str, Any], task: Task, generator: random.Random, draw_wordings: bool) -> Question:
    """What a record asks in a task, and the right answer."""
    text = record.get("text")
    question: Question = {"text": None if text is None else str(text)}
    reference = record.get(task.reference) if task.reference else None
    if reference is None and task.kind not in REFERENCE_FREE:
        raise ValueError(f"missing {task.reference}")
    if task.kind == "following":
        check = draw_check(generator)
        return {**question, "instruction": check.pop("instruction"), "reference": None, "check": check}
    if task.kind == "own":
        if not isinstance(record.get("instruction"), str):
            raise ValueError("missing instruction")
        check_reference(reference, task)
        return {**question, "instruction": record["instruction"], "reference": reference}

    values = {**record, "target_language": task.target_language}
    if task.kind == "classification":
        values["labels"] = ", ".join(wordings[0] for wordings in task.labels.values())
        reference = read_label(reference, task.labels)
    elif task.kind == "multiple_choice":
        question["choices"] = read_choices(record.get("choices"))
        values["choices"] = "\n".join(f"{chr(65 + at)}. {choice}" for at, choice in enumerate(question["choices"]))
        read_choice(reference, question["choices"])
    elif task.kind == "yes_no":
        reference = read_yes_no(reference)
    elif task.kind == "keywords" and reference in (None, ""):  # a table has no other way to leave it out
        reference = None
    else:
        check_reference(reference, task)
    wording = generator.choice(task.instructions) if draw_wordings else task.instructions[0]
    for _, column, _, _ in Formatter().parse(wording):
        if column and values.get(column) is None:
            raise ValueError(f"missing {column}")
    return {**question, "instruction": wording.format_map(values), "reference": reference}


def check_reference(reference: Any, task: Task) -> None:
    """Raises a `ValueError` for a reference that no answer can be compared with."""
    if task.kind == "transcription" or not {"wer", "cer"}.isdisjoint(task.metrics):
        if not isinstance(reference, str):  # an empty one is that of silence
            raise ValueError(f"{task.reference} is not a text: {reference!r:.80}")
        return
    texts = [reference] if isinstance(reference, str) else reference
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(
            f"{task.reference} is neither a text nor a list of texts, none of them empty: {reference!r:.80}"
        )


def read_label(reference: Any, labels: dict[str, list[str]]) -> str:
    """The label that a reference stands for: its name, one of its wordings, or its index."""
    names = {normalize(wording): label for label, wordings in labels.items() for wording in (label, *wordings)}
    if normalize(str(reference)) in names:
        return names[normalize(str(reference))]
    if isinstance(reference, int) and 0 <= reference < len(labels):
        return list(labels)[reference]
    raise ValueError(f"unknown label {reference!r}, not one of {', '.join(labels)}")


def read_choices(choices: Any) -> list[str]:
    """Choices as a list, which a table may hold as one, as lines of a text, or under "text" as sets on the Hub do."""
    if isinstance(choices, dict):
        choices = choices.get("text")
    if isinstance(choices, str):
        choices = [line.strip() for line in choices.splitlines() if line.strip()]
    if not isinstance(choices, list) or not 2 <= len(choices) <= 26:
        raise ValueError(f"choices are not a list of 2 to 26: {choices!r:.80}")
    return list(map(str, choices))


def hash_questions(questions: list[Question]) -> str:
    """A hash of what is asked, what the clips hold included: the same wherever they lie."""
    asked = [{key: question[key] for key in question if key not in ("audio", "problem")} for question in questions]
    return hash_text(json.dumps(asked, sort_keys=True, ensure_ascii=True, default=str))


__all__ = ["Question", "Records", "hash_questions", "make_questions", "needs_keywords"]
