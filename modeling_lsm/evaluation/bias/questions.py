"""What the suite asks: every clip what `questions.yaml` says, and those that speak a request something else."""

import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ...augmentation.filters import normalize
from ...data.manifests import Unparsable
from ..checks import CHECKS, draw_check
from ..questions import Question, Records


logger = logging.getLogger(__name__)

SETTINGS = yaml.safe_load(Path(__file__).with_name("questions.yaml").read_text(encoding="utf-8"))
REQUEST_WORDS = {name: f"(?:{'|'.join(words.split())})" for name, words in SETTINGS["request_words"].items()}
REQUEST = re.compile(rf"(?:{'|'.join(pattern.format(**REQUEST_WORDS) for pattern in SETTINGS['request_patterns'])})\b")


def read_clips(records: Records, limit: int) -> Iterator[tuple[dict[str, Any], Question]]:
    """The first records whose transcript has a word in it, and what all questions about them share."""
    taken = 0
    for index, (source, record) in enumerate(records.rows):
        if taken == limit:
            break
        if isinstance(record, Unparsable) or not normalize(str(record.get("text") or "")):
            continue
        taken += 1
        shared = {"clip": index, "source": source, "text": str(record["text"]), "reference": None}
        yield record, {**shared, **records.find_audio(record)}


def word_instruction(entry: dict[str, Any]) -> dict[str, Any]:
    """The instruction of an entry of `questions.yaml`, with its check if it has one."""
    if "check" not in entry:
        return {"instruction": entry["instruction"]}
    check = {"kind": entry["check"], "parameters": entry["parameters"]}
    wording = entry.get("instruction") or CHECKS[entry["check"]].wording.format(**entry["parameters"])
    return {"instruction": wording, "check": check}


def make_bias_questions(
    records: Records, requests: Records | None = None, limit: int = 100, seed: int = 0
) -> dict[str, list[Question]]:
    """
    What the suite asks.

    Args:
        records ([`Records`]): Clips and their transcripts, columns `audio` and `text`.
        requests ([`Records`], *optional*): Clips that speak requests, with what an answer to them is, if it is known:
            `spoken_answers`, a text or several, one of which stands in it, or `spoken_check`, a kind and parameters
            of `checks.py`. By default those of `records` whose transcript is a request.
        limit (`int`, *optional*, defaults to 100): Clips, and requests, to use: the first.
        seed (`int`, *optional*, defaults to 0): Draws the checks that show what was forgotten.

    Returns:
        `dict`: The questions of `sensitivity`, `obedience`, `request` (what an answer to the spoken request is) and
        `reading` (any of all checks). The last two are for systems that read. Without requests, two are empty.

    Raises:
        ValueError: If there is no transcript, or none of `requests` is one.
    """
    records.require("text", "the transcripts, which the bias suite needs")
    records.require("audio", "which has the clips")
    questions: dict[str, list[Question]] = {task: [] for task in ("sensitivity", "obedience", "request", "reading")}

    def add(task: str, shared: Question, name: str, entry: dict[str, Any]) -> None:
        identity = f"{task}/{shared['clip']:06d}/{name}"
        questions[task].append({"id": identity, "task": task, "name": name, **shared, **entry})

    for _, shared in read_clips(records, limit):
        for name, entry in SETTINGS["instructions"].items():
            add("sensitivity", shared, name, word_instruction(entry))
        check = draw_check(random.Random(f"{seed}:{shared['clip']}"))
        entry = {"instruction": check.pop("instruction"), "check": check}
        add("reading", {**shared, "audio": None, "problem": None}, check["kind"], entry)
    if not questions["sensitivity"]:
        raise ValueError(f"{records.name} has no row with a transcript, which the bias suite needs in `text`.")

    found = 0
    for record, shared in read_clips(requests or records, len((requests or records).rows)):
        spoken = read_spoken(record, shared)
        if found == limit or not (spoken or is_request(shared["text"])):
            continue
        found += 1
        for name, entry in SETTINGS["written"].items():
            add("obedience", shared, name, {**word_instruction(entry), "spoken": spoken})
        add("request", {**shared, "audio": None, "problem": None}, "request", {"instruction": SETTINGS["do_as_told"]})
    if requests is None and not found:
        logger.warning(
            "No transcript of %s is a question or a command, so the bias suite cannot tell whether spoken requests "
            "are obeyed. Give it some with --requests.",
            records.name,
        )
    if requests is not None and not found:
        raise ValueError(
            f"{requests.name} has no clip that speaks a request: none has `spoken_answers` or `spoken_check`, and no "
            "transcript is a question or a command. Give other --requests."
        )
    return questions


def is_request(text: str) -> bool:
    """Whether a transcript asks or tells somebody to do something."""
    return text.rstrip().endswith("?") or REQUEST.match(normalize(text)) is not None


def read_spoken(record: dict[str, Any], shared: Question) -> dict[str, Any] | None:
    """What the data say an answer to a spoken request is."""
    check, answers = record.get("spoken_check"), record.get("spoken_answers")
    if check is not None:
        known = isinstance(check, dict) and check.get("kind") in CHECKS
        if not known or set(check.get("parameters") or {}) != set(CHECKS[check["kind"]].choices):
            raise ValueError(
                f"{shared['source']}: spoken_check is {check!r:.200}; expected a kind of checks.py and its "
                'parameters, like {"kind": "exact_words", "parameters": {"count": 3}}.'
            )
        return {"check": {"kind": check["kind"], "parameters": check.get("parameters") or {}}}
    if answers is None:
        return None
    return {"answers": [answers] if isinstance(answers, str) else list(map(str, answers))}


__all__ = ["SETTINGS", "is_request", "make_bias_questions"]
