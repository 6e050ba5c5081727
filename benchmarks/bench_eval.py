"""
How much faster answers to speech come in batches than one at a time, and whether they are the same.

    python -m benchmarks.bench_eval

One at a time: `pipeline("audio-text-to-text")` with a clip and its instruction, again and again. The rows are real
recordings, each with several instructions. The two ways take turns, a batch of rows each, so that whatever else the
machine does meets both. Answers may part where two tokens are equally likely up to rounding. The last line on stdout
is a JSON object with the figures.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.models import TIE, load_model
from modeling_lsm import LsmPipeline
from modeling_lsm.augmentation import load_tasks
from modeling_lsm.evaluation.systems import LsmSystem


RECORDINGS = Path(__file__).parent.parent / "tests" / "fixtures" / "librivox"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="LSM checkpoint. Default: the demo's models, composed.")
    parser.add_argument("--rows", type=int, default=64, help="rows to answer, each way")
    parser.add_argument("--batch_size", type=int, default=16, help="clips at a time, as for eval.py")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer, in tokens")
    args = parser.parse_args()

    model, processor = load_model(args.model_name_or_path)
    system = LsmSystem(model, processor, args.batch_size)
    pipe = LsmPipeline(model=model, processor=processor, device=model.device)
    rows = make_rows(args.rows)
    system.answer(rows[:2], 4)  # warm up
    answer_singly(pipe, rows[:1], 4)

    answers, expected, seconds, single_seconds, loads = [], [], 0.0, 0.0, []
    for start in tqdm(range(0, len(rows), args.batch_size), unit="batch"):
        # eval.py gives a system many more rows at a time, of which it makes more even batches.
        part = rows[start : start + args.batch_size]
        started = time.perf_counter()
        answers += system.answer(part, args.max_new_tokens)
        turned = time.perf_counter()
        expected += answer_singly(pipe, part, args.max_new_tokens)
        seconds += turned - started
        single_seconds += time.perf_counter() - turned
        loads.append(round(os.getloadavg()[0], 1))

    differences = [
        explain(system, index, rows[index], answer, other)
        for index, (answer, other) in enumerate(zip(answers, expected, strict=True))
        if answer != other
    ]
    figures = {
        "ratio": round(single_seconds / seconds, 2),
        "answers_per_second": round(len(rows) / seconds, 3),
        "single_answers_per_second": round(len(rows) / single_seconds, 3),
        "rows": len(rows),
        "batch_size": args.batch_size,
        "max_new_tokens": args.max_new_tokens,
        "mean_answer_tokens": round(sum(len(to_tokens(system, answer)) for answer in answers) / len(rows), 1),
        "differing": len(differences),
        "differing_by_more_than_a_tie": sum(not difference["is_tie"] for difference in differences),
        "differences": differences,
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "load_average": loads,
    }
    print(json.dumps(figures))


def make_rows(count: int) -> list[dict]:
    """Recordings and instructions: each recording with all wordings of all tasks, one after the other."""
    clips = [json.loads(line)["audio"] for line in (RECORDINGS / "metadata.jsonl").read_text("utf-8").splitlines()]
    instructions = [wording for task in load_tasks([], "French") for wording in task.instructions]
    pairs = [(clip, instruction) for instruction in instructions for clip in clips]
    return [{"audio": str(RECORDINGS / clip), "instruction": instruction} for clip, instruction in pairs[:count]]


def answer_singly(pipe: LsmPipeline, rows: list[dict], max_new_tokens: int) -> list[str]:
    """The loop that a user would write."""
    outputs = [
        pipe(row["audio"], text=row["instruction"], max_new_tokens=max_new_tokens, do_sample=False) for row in rows
    ]
    return [output[0]["generated_text"].strip() for output in outputs]


def to_tokens(system: LsmSystem, answer: str) -> list[int]:
    return system.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def explain(system: LsmSystem, index: int, row: dict, answer: str, other: str) -> dict:
    """Where two answers part, and by how much the model, asked for this row alone, prefers one token to the other."""
    inputs = system.inputs([row])
    sequence = system.model.generate(**inputs, max_new_tokens=256, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    decode = system.processor.tokenizer.decode
    shared = len(os.path.commonprefix([answer, other]))
    # The token of the answer given alone with which its text goes beyond what both have.
    at = next((n for n in range(len(sequence)) if len(decode(sequence[: n + 1]).lstrip()) > shared), len(sequence) - 1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], sequence[None, :at]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    best = system.model(**inputs, logits_to_keep=1).logits[0, -1].float()
    best[system.model.generation_config.suppress_tokens or []] = -torch.inf
    first, second = best.topk(2).values.tolist()
    return {"row": index, "at_token": at, "gap_of_logits": first - second, "is_tie": first - second < TIE}


if __name__ == "__main__":
    main()
