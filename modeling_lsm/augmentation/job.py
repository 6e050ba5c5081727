"""The job: corpus → blocks → instructions → targets → filters → durable output."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tqdm import tqdm

from ..data.corpora import Corpus, SeenRows, SourceRow, audio_problem, sentence_case
from .blocks import BlockStore
from .filters import rejection_reason
from .generation import Answer
from .tasks import Task, assign_instructions, row_identity


@dataclass
class JobSettings:
    """
    What a job asks for, besides its corpus and its LLM. `augment.py` explains the fields.
    """

    tasks: list[Task]
    weights: list[float]
    num_targets_per_row: int
    target_language: str
    require_terminal_punctuation: bool
    max_transcript_chars: int
    sentence_case: bool
    check_audio: str
    block_rows: int
    seed: int


def run_job(
    corpus: Corpus, store: BlockStore, backend: Any, settings: JobSettings, shard_index: int = 0, num_shards: int = 1
) -> bool:
    """
    Makes the blocks of a shard that are not done yet.

    Args:
        corpus ([`Corpus`]): The rows.
        store ([`BlockStore`]): Where they go.
        backend: Answers instructions: an object with the method `answer(prompts, on_answer)` of `backends.py`.
        settings ([`JobSettings`]): What to ask for.
        shard_index, num_shards (`int`): Of every `num_shards` blocks, which one to make.

    Returns:
        `bool`: Whether all blocks, of all shards, are done.
    """
    total = corpus.count_rows()
    if total is not None:
        starts = range(shard_index * settings.block_rows, total, num_shards * settings.block_rows)
        total = sum(min(settings.block_rows, total - start) for start in starts) * settings.num_targets_per_row
    blocks = 0
    with tqdm(total=total, desc="targets", unit="row", smoothing=0.05, disable=shard_index > 0) as progress:
        meter = Meter(progress)
        for block, rows in enumerate(split_into_blocks(corpus, settings.block_rows)):
            blocks += 1
            if block % num_shards != shard_index:
                continue
            size = len(rows) * settings.num_targets_per_row
            if store.is_done(block):
                progress.update(size)
                progress.initial += size  # rows of an earlier run do not count as speed
                continue
            before = progress.n
            make_block(block, rows, store, backend, settings, meter)
            progress.update(before + size - progress.n)  # those that needed no answer
    return all(store.is_done(block) for block in range(blocks))


class Meter:
    """Shows tokens per second and the share of accepted rows on a progress bar."""

    def __init__(self, progress: tqdm):
        self.progress = progress
        self.tokens = self.accepted = self.judged = 0

    def on_answer(self, answer: Answer) -> None:
        self.tokens += answer.num_tokens
        self.show()
        self.progress.update()

    def on_block(self, accepted: int, judged: int) -> None:
        self.accepted += accepted
        self.judged += judged
        self.show()

    def show(self) -> None:
        seconds = max(self.progress.format_dict["elapsed"], 1e-9)
        accepted = f"{self.accepted / self.judged:.0%}" if self.judged else "–"
        self.progress.set_postfix({"tokens/s": f"{self.tokens / seconds:.0f}", "accepted": accepted}, refresh=False)


def split_into_blocks(corpus: Corpus, size: int) -> Iterator[list[tuple[str, SourceRow]]]:
    """
    The rows of a corpus with their ids, `size` at a time.

    A row that stood before gets an id of its own and its problem: whichever process looks, the first one counts.
    """
    rows, seen = iter(corpus), SeenRows()
    while block := list(islice(rows, size)):
        with_ids = []
        for row in block:
            if row.problem is not None:
                row_id = hashlib.sha256(row.source.encode()).hexdigest()[:16]
            else:
                row_id = row_identity(row.written_audio, row.text)
                if not seen.is_new(row_id):
                    row.problem = "duplicate"
                    row_id = hashlib.sha256(f"{row_id} {row.source}".encode()).hexdigest()[:16]
            with_ids.append((row_id, row))
        yield with_ids


def make_block(
    block: int,
    sources: list[tuple[str, SourceRow]],
    store: BlockStore,
    backend: Any,
    settings: JobSettings,
    meter: Meter,
) -> None:
    """Makes one block: every row of `sources` ends up in exactly one outcome, once for each target asked of it."""
    outcomes: dict[str, list[dict[str, Any]]] = {"accepted": [], "rejected": [], "unreadable": []}
    drawn: list[tuple[Task, dict[str, Any]]] = []
    for row_id, source in sources:
        text = sentence_case(source.text) if settings.sentence_case else source.text
        row = {"source": source.source, "audio": source.audio, "text": text.encode(errors="replace").decode()}
        problem = source.problem or audio_problem(source.audio, settings.check_audio)
        if problem is None and len(text) > settings.max_transcript_chars:
            problem = f"transcript too long: {len(text)} characters"
        if problem is not None:
            outcome = "rejected" if problem.startswith(("duplicate", "transcript too long")) else "unreadable"
            row["text"] = row["text"][: settings.max_transcript_chars]
            empty = {"task": "", "instruction": "", "target": ""}
            outcomes[outcome].append({"row_id": f"{row_id}-0", **row, **empty, "reason": problem})
            continue
        draws = assign_instructions(
            row_id, settings.tasks, settings.weights, settings.num_targets_per_row, settings.seed
        )
        for draw, (task, instruction) in enumerate(draws):
            target = {"row_id": f"{row_id}-{draw}", **row, "task": task.name, "instruction": instruction}
            drawn.append((task, target))

    prompts = [(row["instruction"], row["text"]) for task, row in drawn if task.generated]
    answers = iter(backend.answer(prompts, meter.on_answer))
    for task, row in drawn:
        answer = next(answers) if task.generated else Answer(row["text"], finished=True, num_tokens=0)
        row["target"] = answer.text
        row["reason"] = rejection_reason(
            task,
            row["instruction"],
            row["text"],
            answer.text,
            answer.finished,
            settings.target_language,
            settings.require_terminal_punctuation,
        )
        outcomes["accepted" if row["reason"] is None else "rejected"].append(row)
    counts = Counter(
        f"{outcome}: {row['task'] or row['reason'].split(':')[0]}" for outcome in outcomes for row in outcomes[outcome]
    )
    store.write(block, outcomes, dict(counts))
    meter.on_block(len(outcomes["accepted"]), sum(map(len, outcomes.values())))


__all__ = ["JobSettings", "run_job"]
