"""Answers on disk → figures, intervals and comparisons. Needs no model."""

import math
from collections import defaultdict
from itertools import combinations
from typing import Any

import numpy as np

from ..augmentation.filters import has_loop
from .metrics import METRICS, signature
from .statistics import bootstrap, compare
from .tasks import Task


CEILING = "text"
Answers = dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]]


def score_predictions(
    systems: Answers, resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> dict[str, Any]:
    """
    Computes every figure.

    Args:
        systems (`dict`): What [`read_predictions`] gives.
        resamples (`int`, *optional*, defaults to 1000): Resamples of bootstrap and permutations of a test.
        seed (`int`, *optional*, defaults to 0): Their seed.
        confidence (`float`, *optional*, defaults to 0.95): Of the intervals.

    Returns:
        `dict` as JSON can hold it. `figures[task][metric][system]` has `value`, `low` and `high`; `comparisons` has a
        paired test for each two systems; `counts[task][system]` has rows, and empty, looping and unreadable answers;
        `checks[task][system][kind]` is the share of a kind of instruction that was followed, with numbers of rows;
        `transcripts_that_pass[task]`, how many checks the bare transcript passes, for which nothing need be followed.
        A figure without anything to measure is `None`.

    Raises:
        ValueError: If systems answered different questions.
    """
    tasks = collect_tasks(systems)
    results: dict[str, Any] = {"figures": {}, "counts": {}, "checks": {}, "signatures": {}, "comparisons": []}
    results["transcripts_that_pass"] = {}
    results |= {"unreadable": list_rows(systems, "problem"), "unusable": list_rows(systems, "unusable")}
    for name, task in tasks.items():
        answers = {system: task_rows(rows, name) for system, (meta, rows) in systems.items() if name in meta["tasks"]}
        results["counts"][name] = {system: count_answers(rows) for system, rows in answers.items()}
        add_keywords_of_the_llm(answers, task)
        for metric_name in task.metrics:
            metric = METRICS[metric_name]
            counts = {system: metric.count(rows, task) for system, rows in answers.items()}
            results["figures"].setdefault(name, {})[metric_name] = {
                system: clean(bootstrap(rows, metric.score, resamples, seed, confidence)._asdict())
                for system, rows in counts.items()
            }
            for first, second in combinations(counts, 2):
                test = compare(counts[first], counts[second], metric.score, resamples, seed, confidence)
                names = {"task": name, "metric": metric_name, "first": first, "second": second}
                results["comparisons"].append(names | clean(test._asdict()))
            if metric_name in ("bleu", "chrf"):
                rows = next(iter(answers.values()), [])
                results["signatures"].setdefault(name, {})[metric_name] = signature(metric_name, rows, task)
        if task.kind == "following":
            results["checks"][name] = {
                system: by_check(rows, task, resamples, seed, confidence) for system, rows in answers.items()
            }
            said = [{**row, "prediction": row["text"] or ""} for row in next(iter(answers.values()))]
            passed, rows = METRICS["followed"].count(said, task).sum(0)
            results["transcripts_that_pass"][name] = {"rows": int(rows), "followed": int(passed)}
    return results


def collect_tasks(systems: Answers) -> dict[str, Task]:
    """The tasks that were answered, which must be the same for all systems."""
    tasks: dict[str, dict[str, Any]] = {}
    for system, (meta, _) in systems.items():
        for name, task in meta["tasks"].items():
            if tasks.setdefault(name, task) != task:
                raise ValueError(
                    f"The system {system!r} answered other questions in the task {name!r} than the others. Answer "
                    "them anew into one --output_dir."
                )
    fields = {name: {key: value for key, value in task.items() if key != "questions"} for name, task in tasks.items()}
    return {
        name: Task(**{key: tuple(value) if isinstance(value, list) else value for key, value in task.items()})
        for name, task in fields.items()
    }


def task_rows(rows: dict[str, dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """The rows of a task that can be judged, in order."""
    return [row for row in rows.values() if row["task"] == task and "unusable" not in row]


def add_keywords_of_the_llm(answers: dict[str, list[dict[str, Any]]], task: Task) -> None:
    """
    Where rows of a keyword task have no reference, the keywords that the text system named are it, and the text system
    itself is not measured.
    """
    if task.kind != "keywords" or all(row["reference"] is not None for rows in answers.values() for row in rows):
        return
    if CEILING not in answers:
        raise ValueError(
            f"Rows of the task {task.name!r} have no keywords, and the text system has not answered them. Run with it "
            "among --systems."
        )
    named = {row["id"]: row["prediction"] for row in answers.pop(CEILING)}
    for system, rows in answers.items():
        answers[system] = [{**row, "reference": named[row["id"]]} if row["reference"] is None else row for row in rows]


def count_answers(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many rows there are, and how many of their answers are of no use."""
    return {
        "rows": len(rows),
        "empty": sum(not row["prediction"].strip() for row in rows),
        "looping": sum(has_loop(row["prediction"]) for row in rows),
        "unreadable": sum("problem" in row for row in rows),
    }


def by_check(
    rows: list[dict[str, Any]], task: Task, resamples: int, seed: int, confidence: float
) -> dict[str, dict[str, Any]]:
    """How many instructions of each kind were followed, and the share of them with its interval."""
    metric = METRICS["followed"]
    kinds: dict[str, list[np.ndarray]] = defaultdict(list)
    for row, counts in zip(rows, metric.count(rows, task), strict=True):
        kinds[row["check"]["kind"]].append(counts)
    return {
        kind: {"rows": len(counts), "followed": int(np.sum(counts, axis=0)[0])}
        | clean(bootstrap(np.array(counts), metric.score, resamples, seed, confidence)._asdict())
        for kind, counts in sorted(kinds.items())
    }


def list_rows(systems: Answers, reason: str) -> list[dict[str, str]]:
    """The rows with a `reason`, and the systems that met it."""
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for system, (_, rows) in systems.items():
        for row in rows.values():
            if reason in row:
                found[row["id"], row["source"], row[reason]].append(system)
    return [{"id": key[0], "source": key[1], "reason": key[2], "systems": names} for key, names in found.items()]


def clean(figures: dict[str, float]) -> dict[str, float | None]:
    """Figures with `None` for nan, which JSON does not have."""
    return {key: None if math.isnan(value) else value for key, value in figures.items()}


__all__ = ["CEILING", "score_predictions"]
