"""
Writes self-powered training data: the model's own LLM follows instructions on the transcripts of an ASR corpus.

    python augment.py --model_name_or_path outputs/lsm --dataset corpus/metadata.jsonl --output_dir outputs/augmented

Rows need `audio` (a path) and `text` (its transcript). The answers become the targets that `train_sft.py` trains on,
with the speech in the transcript's place. Stopped at any moment and started again with the same command, it goes on.
On several GPUs: `torchrun --nproc_per_node 4 augment.py …`.
"""

import collections
import json
import logging
from dataclasses import asdict, dataclass, field

import transformers
from accelerate import PartialState
from tqdm import tqdm
from trl import TrlParser

from modeling_lsm import LsmForConditionalGeneration, LsmProcessor
from modeling_lsm.augmentation import (
    BlockStore,
    Task,
    assign_instruction,
    generate_targets,
    load_tasks,
    rejection_reason,
    row_identity,
    write_atomically,
)
from modeling_lsm.data import load_rows


logger = logging.getLogger(__name__)

ALL_TASKS = ["transcription", "continuation", "repetition", "keyword", "intent", "sentiment", "translation"]
BLOCK_ROWS = 256  # rows of the corpus that are done or not done together


@dataclass
class AugmentArguments:
    """Arguments of `augment.py`."""

    model_name_or_path: str = field(metadata={"help": "LSM checkpoint whose LLM writes the targets."})
    dataset: str = field(metadata={"help": "Rows with `audio` and `text`: a manifest, a folder, or a Hub dataset."})
    output_dir: str = field(metadata={"help": "Folder for accepted/, rejected/ and provenance.json."})
    tasks: list[str] = field(default_factory=lambda: list(ALL_TASKS), metadata={"help": "Tasks to draw from."})
    num_targets_per_row: int = field(default=1, metadata={"help": "Targets per row, each of another task."})
    target_language: str = field(default="French", metadata={"help": "Language of the translation task."})
    instructions_file: str | None = field(default=None, metadata={"help": "YAML file with more tasks."})
    max_new_tokens: int = field(default=225, metadata={"help": "Longest target, in tokens."})
    batch_tokens: int = field(default=8192, metadata={"help": "Tokens per batch, prompts and answers."})
    max_rows: int | None = field(default=None, metadata={"help": "Use only the first rows."})
    dtype: str = field(default="auto", metadata={"help": "dtype that the weights are loaded in."})
    seed: int = field(default=0, metadata={"help": "Seed of the draw of tasks and instructions."})


def main(args: AugmentArguments) -> None:
    tasks = load_tasks(args.tasks, args.target_language, args.instructions_file)
    if not 1 <= args.num_targets_per_row <= len(tasks):
        raise ValueError(
            f"--num_targets_per_row is {args.num_targets_per_row}; expected 1 to {len(tasks)}, the number of tasks."
        )
    corpus = load_rows(args.dataset, columns=("audio", "text"))
    if args.max_rows is not None:
        corpus = corpus.select(range(min(args.max_rows, len(corpus))))
    settings = {key: value for key, value in asdict(args).items() if key != "output_dir"}
    store = BlockStore(args.output_dir, settings)

    state = PartialState()
    processor = LsmProcessor.from_pretrained(args.model_name_or_path)
    model = LsmForConditionalGeneration.from_pretrained(args.model_name_or_path, dtype=args.dtype).to(state.device)
    # Every process takes its share of the blocks; which one does not matter to what is in them.
    blocks = list(enumerate(range(0, len(corpus), BLOCK_ROWS)))[state.process_index :: state.num_processes]
    total = sum(min(BLOCK_ROWS, len(corpus) - start) for _, start in blocks) * args.num_targets_per_row
    with tqdm(total=total, desc="targets", unit="row", disable=not state.is_local_main_process) as progress:
        for block, start in blocks:
            sources = corpus.select(range(start, min(start + BLOCK_ROWS, len(corpus))))
            if store.is_done(block):
                progress.update(len(sources) * args.num_targets_per_row)
                continue
            rows = draw_instructions(sources, tasks, args)
            write_targets(rows, tasks, model, processor, args, progress)
            counts = collections.Counter(f"{row['task']}: {row.get('reason', 'accepted')}" for row in rows)
            accepted = [row for row in rows if "reason" not in row]
            rejected = [row for row in rows if "reason" in row]
            store.write(block, {"accepted": accepted, "rejected": rejected}, counts)

    state.wait_for_everyone()
    if not state.is_main_process:
        return
    provenance = {
        "settings": settings,
        "base_models": model.config.base_models,
        "transformers": transformers.__version__,
        "counts": store.totals(),
    }
    write_atomically(store.output_dir / "provenance.json", (json.dumps(provenance, indent=2) + "\n").encode())
    accepted = sum(count for key, count in provenance["counts"].items() if key.endswith(": accepted"))
    logger.info("%s: %d of %d rows accepted.", store.output_dir, accepted, sum(provenance["counts"].values()))


def draw_instructions(sources: list[dict], tasks: list[Task], args: AugmentArguments) -> list[dict]:
    """The rows to make of `sources`, each with a task and an instruction, still without targets."""
    rows = []
    for source in sources:
        row_id = row_identity(str(source["audio"]), source["text"])
        for draw in range(args.num_targets_per_row):
            task, instruction = assign_instruction(row_id, draw, tasks, args.seed)
            row = {"row_id": f"{row_id}-{draw}", "audio": source["audio"], "text": source["text"]}
            rows.append({**row, "task": task.name, "instruction": instruction})
    return rows


def write_targets(
    rows: list[dict],
    tasks: list[Task],
    model: LsmForConditionalGeneration,
    processor: LsmProcessor,
    args: AugmentArguments,
    progress: tqdm,
) -> None:
    """Gives every row its `target`, and a `reason` if that is not fit to learn from."""
    by_name = {task.name: task for task in tasks}
    to_generate = [row for row in rows if by_name[row["task"]].generated]
    prompts = [(row["instruction"], row["text"]) for row in to_generate]
    answers = generate_targets(model, processor, prompts, args.max_new_tokens, args.batch_tokens, progress.update)
    answers = {row["row_id"]: answer for row, answer in zip(to_generate, answers, strict=True)}
    for row in rows:
        row["target"], finished = answers.get(row["row_id"], (row["text"], True))
        reason = rejection_reason(by_name[row["task"]], row["instruction"], row["text"], row["target"], finished)
        if reason is not None:
            row["reason"] = reason
    progress.update(len(rows) - len(to_generate))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(TrlParser(AugmentArguments).parse_args_and_config()[0])
