"""
The anchor bias in answers: does the speech decide what is answered, or the instruction?

- *Collapse*: a clip is asked anything but to be transcribed, and is transcribed.
- *Sensitivity*: how far the answers to different instructions on one clip differ, and how many fit their own.
- *Obedience*: a clip speaks a request, the instruction asks for something else. Which of the two is obeyed?
- *Forgetting*: what the LLM, reading, no longer does after training.

The answer to a clip that could not be read is empty. It counts as one that obeys nothing, but not at all in the rates
that are better where they are lower, collapse and spoken requests obeyed: it would make them so.

[`score_bias`] computes every figure from the answers. What was asked is in `questions.py`.
"""

from collections import defaultdict
from itertools import combinations
from typing import Any

import numpy as np

from ...augmentation.filters import normalize
from ..answers import find_label
from ..checks import CHECKS
from ..metrics import edit_counts, share
from ..scoring import Answers, clean
from ..statistics import bootstrap, compare
from .questions import SETTINGS


UNTRAINED = "untrained"
READER_SUFFIX = "-text"  # of the LLM of a system, reading transcripts
OUTCOMES = ("written", "spoken", "both", "neither")
# Figures of `score_bias`: what a person calls them, and whether they grow as the bias shrinks (None: neither).
FIGURES: dict[str, tuple[str, bool | None]] = {
    "collapse": ("collapse rate: answers that are a transcript", False),
    "distance": ("distance between answers to different instructions on a clip", True),
    "fit": ("answers that fit their own instruction", True),
    "clip_distance": ("distance between answers to one instruction on different clips", None),
    "written": ("written instruction obeyed, against a spoken request", True),
    "spoken": ("spoken request obeyed instead or as well", False),
    "repeated": ("request repeated when that was the instruction", True),
}


def are_collapsed(rows: list[dict[str, Any]], normalizer: str, threshold: float | None = None) -> np.ndarray:
    """
    Whether each answer is a transcript instead of what was asked: `(rows,)`. One that passes its check is not: of a
    clip of three words, three words with commas between them are a fit answer, though they are all that was said.
    """
    fits = np.array(["check" in row and holds(row) for row in rows], bool)
    return are_transcripts(rows, normalizer, threshold) & ~fits


def are_transcripts(rows: list[dict[str, Any]], normalizer: str, threshold: float | None = None) -> np.ndarray:
    """Whether each answer is a transcript: `(rows,)`."""
    counts = edit_counts([row["prediction"] for row in rows], [row["text"] for row in rows], normalizer)
    limit = SETTINGS["transcript_threshold"] if threshold is None else threshold
    return counts[:, 0] <= limit * counts[:, 1]


def holds(row: dict[str, Any]) -> bool:
    """Whether an answer passes the check of its instruction."""
    return CHECKS[row["check"]["kind"]].holds(row["prediction"], **row["check"]["parameters"])


def obeys_spoken(row: dict[str, Any], reading: str) -> bool:
    """
    Whether an answer that is no transcript does what the clip asks.

    The data may say what counts. Otherwise the LLM's own answer to the request does: at least half of the longer words
    and the numbers of this answer are among its words, leaving out those of the request and the instruction.

    Args:
        row (`dict`): The answer, of the task `obedience`.
        reading (`str`): What the same LLM answered when it read the request alone.
    """
    spoken = row["spoken"] or {}
    if "check" in spoken:
        return CHECKS[spoken["check"]["kind"]].holds(row["prediction"], **spoken["check"]["parameters"])
    if "answers" in spoken:
        return find_label(row["prediction"], {"right": spoken["answers"]}) == "right"
    given = set(normalize(f"{row['text']} {row['instruction']}").split())
    mine, own = (
        {word for word in normalize(text).split() if len(word) > 3 or word.isdigit()} - given
        for text in (row["prediction"], reading)
    )
    return bool(mine) and 2 * len(mine & own) >= len(mine)


def score_bias(
    systems: Answers, resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> dict[str, dict[str, Any]]:
    """
    Computes what the answers of the suite say. Clips are resampled, each with all of its answers.

    Args:
        systems (`dict`): What [`read_predictions`] gives. Each one's `reader`, in its first line, is the system whose
            LLM is the same and reads the transcript: its ceiling.

    The other arguments are those of [`bootstrap`].

    Returns:
        `dict` as JSON can hold it: `figures[name][system]`, see `FIGURES`, and `gaps`, each system minus its reader;
        `instructions` (share that fits), `outcomes` (of obedience) and `thresholds` (collapse rates by threshold);
        `forgetting[reader]` with `before`, `after` and `forgotten`, if the untrained LLM answered; and `unreadable`,
        the clips that could not be read.

    Raises:
        ValueError: If systems answered different questions.
    """
    options = (resamples, seed, confidence)
    asked: dict[str, Any] = {}
    for system, (meta, _) in systems.items():
        if any(asked.setdefault(task, questions) != questions for task, questions in meta["questions"].items()):
            raise ValueError(f"The system {system!r} answered other questions of the bias suite than the others.")
    results: dict[str, dict[str, Any]] = {key: {} for key in ("instructions", "outcomes", "thresholds", "forgetting")}
    counts: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for system, (meta, rows) in systems.items():
        if system == UNTRAINED:
            continue
        normalizer = meta["normalizer"]
        answers = [row for row in rows.values() if row["task"] == "sensitivity"]
        results["thresholds"][system] = {
            f"{limit:.1f}": clean(bootstrap(count_collapsed(answers, normalizer, limit), share, *options)._asdict())
            for limit in np.arange(11) / 10
        }
        by_instruction: dict[str, list[bool]] = defaultdict(list)
        for row in answers:
            if "check" in row:
                by_instruction[row["name"]].append(holds(row))
        results["instructions"][system] = {
            name: clean(bootstrap(np.array([(hit, 1) for hit in hits], float), share, *options)._asdict())
            for name, hits in by_instruction.items()
        }
        for name, figure in count_sensitivity(answers, normalizer).items():
            counts[name][system] = figure
        requests = [row for row in rows.values() if row["task"] == "obedience"]
        if requests:
            reading = {
                row["clip"]: row["prediction"]
                for row in systems[meta["reader"]][1].values()
                if row["task"] == "request"
            }
            figures, outcomes = count_obedience(requests, reading, normalizer)
            for name, figure in figures.items():
                counts[name][system] = figure
            results["outcomes"][system] = {
                name: {
                    outcome: clean(bootstrap(figure[:, [at, -1]], share, *options)._asdict())
                    for at, outcome in enumerate(OUTCOMES)
                }
                for name, figure in outcomes.items()
            }

    figures, gaps = {}, {}
    for name in FIGURES:
        if name not in counts:
            continue
        figures[name] = {
            system: clean(bootstrap(rows, share, *options)._asdict()) for system, rows in counts[name].items()
        }
        pairs = {system: systems[system][0]["reader"] for system in counts[name]}
        gaps[name] = {
            system: clean(compare(counts[name][system], counts[name][reader], share, *options)._asdict())
            for system, reader in pairs.items()
            if system != reader
        }
    if UNTRAINED in systems:
        before = count_readings(systems[UNTRAINED][1])
        for system in dict.fromkeys(meta["reader"] for name, (meta, _) in systems.items() if name != UNTRAINED):
            after = count_readings(systems[system][1])
            results["forgetting"][system] = {
                "before": clean(bootstrap(before, share, *options)._asdict()),
                "after": clean(bootstrap(after, share, *options)._asdict()),
                "forgotten": clean(compare(before, after, share, *options)._asdict()),
            }
    return {"figures": figures, "gaps": gaps, **results, "unreadable": list_unreadable(systems)}


def list_unreadable(systems: Answers) -> list[dict[str, Any]]:
    """The clips that could not be read: from where, why, by which systems, and how many answers are empty for that."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for system, (_, rows) in systems.items():
        for row in rows.values():
            if "problem" in row:
                found[row["source"], row["problem"]].append(system)
    return [
        {"source": source, "reason": reason, "systems": list(dict.fromkeys(names)), "answers": len(names)}
        for (source, reason), names in found.items()
    ]


def distance(first: str, second: str) -> float:
    """Edits from one answer to another in words, as a share of the longer one: 0 where they are equal, at most 1."""
    first, second = normalize(first), normalize(second)
    longest = max(len(first.split()), len(second.split()))
    return float(edit_counts([first], [second], "none")[0, 0]) / longest if longest else 0.0


def count_collapsed(rows: list[dict[str, Any]], normalizer: str, threshold: float | None = None) -> np.ndarray:
    """Answers that are a transcript, and all answers to clips that could be read, `(clips, 2)`."""
    clips: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for row, is_collapsed in zip(rows, are_collapsed(rows, normalizer, threshold), strict=True):
        heard = "problem" not in row
        clips[row["clip"]] += heard and is_collapsed, heard
    return np.array(list(clips.values())).reshape(-1, 2)


def count_sensitivity(rows: list[dict[str, Any]], normalizer: str) -> dict[str, np.ndarray]:
    """Counts of the figures of the task `sensitivity`, `(clips, 2)` each."""
    clips: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        clips[row["clip"]].append(row)
    answers = list(clips.values())
    counts: dict[str, list[tuple[float, int]]] = {"distance": [], "fit": []}
    for of_clip in answers:
        pairs = [distance(a["prediction"], b["prediction"]) for a, b in combinations(of_clip, 2)]
        counts["distance"].append((sum(pairs), len(pairs)))
        checked = [holds(row) for row in of_clip if "check" in row]
        counts["fit"].append((sum(checked), len(checked)))
    following = [  # each clip with the next
        (sum(distance(a["prediction"], b["prediction"]) for a, b in zip(one, next_one, strict=True)), len(one))
        for one, next_one in zip(answers, answers[1:], strict=False)
    ]
    counts["clip_distance"] = following
    arrays = {name: np.array(of_clips, float).reshape(-1, 2) for name, of_clips in counts.items()}
    return {"collapse": count_collapsed(rows, normalizer), **arrays}


def count_obedience(
    rows: list[dict[str, Any]], reading: dict[int, str], normalizer: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """
    Counts of the task `obedience`.

    Returns:
        Counts of its figures, `(clips, 2)` each, and for each written instruction those of `OUTCOMES` and of all
        answers, `(clips, 5)`.
    """
    figures: dict[str, dict[int, np.ndarray]] = {
        name: defaultdict(lambda: np.zeros(2)) for name in ("written", "spoken", "repeated")
    }
    outcomes: dict[str, list[list[bool]]] = defaultdict(list)
    for row, is_transcript in zip(rows, are_transcripts(rows, normalizer), strict=True):
        written = holds(row) if "check" in row else bool(is_transcript)
        spoken = not is_transcript and obeys_spoken(row, reading[row["clip"]])
        figures["written" if "check" in row else "repeated"][row["clip"]] += written, 1
        figures["spoken"][row["clip"]] += spoken, "problem" not in row
        cases = (written and not spoken, spoken and not written, written and spoken, not written and not spoken)
        outcomes[row["name"]].append([*cases, True])
    return (
        {name: np.array(list(clips.values())) for name, clips in figures.items()},
        {name: np.array(cases, float) for name, cases in outcomes.items()},
    )


def count_readings(rows: dict[str, dict[str, Any]]) -> np.ndarray:
    """Checks passed by reading, `(rows, 2)`."""
    return np.array([(holds(row), 1) for row in rows.values() if row["task"] == "reading"], float).reshape(-1, 2)


__all__ = ["FIGURES", "OUTCOMES", "READER_SUFFIX", "UNTRAINED", "score_bias"]
