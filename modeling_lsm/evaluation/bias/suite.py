"""
The anchor-bias suite: asks, measures, writes `bias.json`, `bias_report.md` and its plots.

All that needs a model is on disk first, under `bias/` in the output folder, as JSON lines: `answers`, `attention` and
`divergence`. Stopped at any moment and started again, the suite goes on; figures are computed from these files alone.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from ...files import write_atomically
from ..predictions import Predictions, read_predictions
from ..questions import Question, hash_questions
from ..running import answer_questions
from ..statistics import bounds, resample
from ..systems import LsmSystem, TextSystem
from .attention import INSTRUCTION, PARTS, SPEECH, measure_attention
from .divergence import measure_divergence
from .questions import SETTINGS
from .report import write_bias_report
from .scores import READER_SUFFIX, UNTRAINED, score_bias


READ_ONLY = ("request", "reading")  # what only systems that read are asked
POSITIONS = (1, 2, 3, 5, 9, 17, 33, 65)  # tokens of a target at which a line of the table of divergences begins


def add_readers(systems: dict[str, Any]) -> dict[str, str]:
    """
    Adds the text systems that are missing from `systems`: every LLM also reads the transcripts, which is its ceiling.

    Returns:
        The reader of each system.
    """
    readers = {}
    for name, system in list(systems.items()):
        same = [n for n, s in systems.items() if not s.needs_audio and s.model is system.model]
        readers[name] = same[0] if same else "text" if "text" not in systems else name + READER_SUFFIX
        if not same:
            systems[readers[name]] = TextSystem(system.model, system.processor, system.batch_size)
        readers[readers[name]] = readers[name]
    return readers


def measure_bias(
    systems: dict[str, Any],
    questions: dict[str, list[Question]],
    folder: Path,
    untrained: TextSystem | None = None,
    measured_rows: int = 32,
    max_new_tokens: int = 225,
    normalizer: str = "english",
    datasets: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
) -> None:
    """
    Writes to `folder / "bias"` all that the suite needs of models, in as many processes as there are.

    Args:
        systems (`dict`): Name → system. Readers that are missing are added.
        questions (`dict`): What [`make_bias_questions`] gives.
        folder (`Path`): The evaluation's output folder.
        untrained ([`TextSystem`], *optional*): The LLM as it was before training, to see what was forgotten.
        measured_rows (`int`, *optional*, defaults to 32): Clips whose attention and divergence are measured.
        max_new_tokens (`int`, *optional*, defaults to 225): Longest answer, in tokens.
        normalizer (`str`, *optional*, defaults to `"english"`): Of the word error rate.
        datasets (`dict`, *optional*): What tells the clips from others, for the record: see [`DatasetEntry.identity`].
        run (`dict`, *optional*): Settings and versions of the run, for the record.
    """
    if UNTRAINED in systems:
        raise ValueError(f"A system cannot be called {UNTRAINED!r}, which the LLM before training is. Rename it.")
    state = PartialState()
    share_of_work = (state.process_index, state.num_processes)
    readers = add_readers(systems)
    if untrained is not None:
        systems[UNTRAINED] = untrained
    kinds = dict.fromkeys(questions, "following")
    metas = {}
    for name, system in systems.items():
        tasks = [task for task in questions if not (system.needs_audio and task in READ_ONLY)]
        if name == UNTRAINED:
            tasks = ["reading"]
        asked = [question for task in tasks for question in questions[task]]
        metas[name] = {
            "datasets": datasets,
            **system.meta(),
            "reader": readers.get(name),
            "normalizer": normalizer,
            "max_new_tokens": max_new_tokens,
            "dtype": str(system.model.dtype),
            "num_rows": len(asked),
            "questions": {task: hash_questions(questions[task]) for task in tasks},
            "run": run,
        }
        predictions = Predictions(folder / "bias" / "answers", name, metas[name], state.process_index)
        state.wait_for_everyone()  # all have read what there was before one adds to it
        answer_questions(system, asked, predictions, max_new_tokens, kinds, *share_of_work)
        predictions.close()
    state.wait_for_everyone()

    answers = read_predictions(folder / "bias" / "answers")
    measured = choose_measured(questions["sensitivity"], measured_rows)
    for name, system in systems.items() if measured else ():
        if name == UNTRAINED:
            continue
        meta = {**metas[name], "num_rows": len(measured), "measured": hash_questions(measured)}
        predictions = Predictions(folder / "bias" / "attention", name, meta, state.process_index)
        state.wait_for_everyone()
        for question in remaining(measured, predictions, answers[name][1], f"attention of {name}"):
            answer = answers[name][1][question["id"]]
            shares = measure_attention(system, [question], [answer["prediction"]])[0]
            row = {"id": question["id"], "shares": None if shares is None else shares.tolist()}
            predictions.append([row | {key: answer[key] for key in ("problem",) if key in answer}])
        predictions.close()
        if not isinstance(system, LsmSystem):
            continue
        predictions = Predictions(folder / "bias" / "divergence", name, meta, state.process_index)
        state.wait_for_everyone()
        for question in remaining(measured, predictions, answers[name][1], f"divergence of {name}"):
            answer = answers[name][1][question["id"]]
            if "problem" in answer:
                predictions.append([{"id": question["id"], "nats": None, "problem": answer["problem"]}])
                continue
            target = answers[readers[name]][1][question["id"]]["prediction"]
            nats = measure_divergence(system.model, system.processor, [{**question, "target": target}])[0]
            predictions.append([{"id": question["id"], "nats": nats}])
        predictions.close()
    state.wait_for_everyone()


def choose_measured(questions: list[Question], rows: int) -> list[Question]:
    """One question about each of the first clips, each instruction in its turn."""
    size = len(SETTINGS["instructions"])
    return [questions[size * clip + clip % size] for clip in range(min(rows, len(questions) // size))]


def remaining(
    questions: list[Question], predictions: Predictions, answers: dict[str, dict[str, Any]], title: str
) -> Any:
    """The share of `questions` of this process that is left to measure, with a bar: clips read at last among them."""
    state = PartialState()
    left = [
        question
        for question in questions
        if (row := predictions.rows.get(question["id"])) is None
        or ("problem" in row and "problem" not in answers[question["id"]])
    ]
    return tqdm(left[state.process_index :: state.num_processes], desc=title, disable=state.process_index > 0)


def report_bias(
    folder: Path,
    settings: dict[str, Any],
    versions: dict[str, str],
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """
    Computes the figures of the bias from what [`measure_bias`] wrote. Writes `bias.json`, `bias_report.md` and plots.

    Args:
        folder (`Path`): The evaluation's output folder.
        settings, versions (`dict`): Settings of the run and versions of what computes the figures, for the record.
        resamples, seed, confidence: As of [`bootstrap`].

    Returns:
        `dict`: What `bias.json` holds: that of [`score_bias`], `attention[system]` (shares by layer and group of
        heads, by layer, in all, and of the instruction in what it and the speech get), `divergence[system]`, the first
        lines of the answers (`systems`, with settings and versions of the run that gave them), settings and versions.
    """
    answers = read_predictions(folder / "bias" / "answers")
    options = (resamples, seed, confidence)
    results = score_bias(answers, *options)
    results["attention"], results["divergence"] = {}, {}
    for name, (_, rows) in read_measured(folder / "bias" / "attention").items():
        shares = [row["shares"] for row in rows.values() if row["shares"] is not None]
        if shares:
            results["attention"][name] = summarize_attention(np.array(shares), *options)
            results["attention"][name] |= {"rows": len(shares), "empty": len(rows) - len(shares)}
    for name, (_, rows) in read_measured(folder / "bias" / "divergence").items():
        nats = [row["nats"] for row in rows.values() if row["nats"] is not None]
        if nats:
            results["divergence"][name] = {"rows": len(nats), **summarize_divergence(nats, *options)}
    results["systems"] = {name: meta for name, (meta, _) in answers.items()}
    results["settings"] = {**settings, **SETTINGS, "resamples": resamples, "seed": seed, "confidence": confidence}
    results["versions"] = versions
    write_bias_report(folder, results, answers)
    write_atomically(folder / "bias.json", (json.dumps(results, indent=2) + "\n").encode())
    return results


def read_measured(folder: Path) -> dict[str, Any]:
    """What was measured, if anything was."""
    return read_predictions(folder) if folder.is_dir() else {}


def ratio_bounds(
    sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int, confidence: float
) -> dict[str, np.ndarray]:
    """`value`, `low` and `high` of sums ÷ counts, both `(rows, figures)`, rows being resampled."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = sums.sum(0) / counts.sum(0)
        draws = [(drawn @ sums) / (drawn @ counts) for drawn in resample(len(sums), resamples, seed)]
    limits = np.array([bounds(figures, confidence) for figures in np.concatenate(draws).T])
    return {"value": value, "low": limits[:, 0], "high": limits[:, 1]}


def summarize_attention(shares: np.ndarray, resamples: int, seed: int, confidence: float) -> dict[str, Any]:
    """Mean shares, with bounds, of `(rows, layers, groups, parts)`: by group of heads, by layer, and in all."""
    results: dict[str, Any] = {"parts": list(PARTS)}
    for name, values in (
        ("by_group", shares),
        ("by_layer", shares.mean(2)),
        ("in_all", shares.mean((1, 2))),
    ):
        flat = values.reshape(len(values), -1)
        figures = ratio_bounds(flat, np.ones_like(flat), resamples, seed, confidence)
        results[name] = {key: figure.reshape(values.shape[1:]).tolist() for key, figure in figures.items()}
    asked, heard = shares.mean((1, 2))[:, [INSTRUCTION]], shares.mean((1, 2))[:, [SPEECH]]
    ratio = ratio_bounds(asked, asked + heard, resamples, seed, confidence)
    results["instruction_to_both"] = {key: float(figure[0]) for key, figure in ratio.items()}
    return results


def summarize_divergence(nats: list[list[float]], resamples: int, seed: int, confidence: float) -> dict[str, Any]:
    """Mean divergence at a token, in all and by its place in the target, bounded."""
    ends = [*POSITIONS[1:], None]
    spans = [(0, None), *((begin - 1, end and end - 1) for begin, end in zip(POSITIONS, ends, strict=True))]
    sums = np.array([[sum(row[begin:end]) for begin, end in spans] for row in nats])
    counts = np.array([[len(row[begin:end]) for begin, end in spans] for row in nats], float)
    figures = ratio_bounds(sums, counts, resamples, seed, confidence)
    lines = [
        {"from": begin + 1, "to": end, "tokens": int(count)}
        | {key: float(figure[at]) for key, figure in figures.items()}
        for at, ((begin, end), count) in enumerate(zip(spans, counts.sum(0), strict=True))
        if count
    ]
    return {"in_all": lines[0], "by_position": lines[1:]}


__all__ = ["measure_bias", "report_bias"]
