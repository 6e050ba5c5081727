"""
How much faster targets are written than by the obvious way, and whether they are the same.

    python -m benchmarks.bench_augment

The obvious way: batches of 32 in the order of the file, padded on the left, `model.generate` until the last row of the
batch has ended. The rows are the demo's sentences, each with all seven tasks, instructions drawn as `augment.py` draws
them. The two ways take turns, a batch of the obvious way for every 32 answers of this package's, so that whatever else
the machine does meets both. The last line on stdout is a JSON object with the figures.
"""

import argparse
import json
import os
import time
from functools import partial

import torch
from tqdm import tqdm

from benchmarks.models import TIE, load_model
from demo.synthesize import read_sentences
from modeling_lsm import LsmForConditionalGeneration
from modeling_lsm.augmentation import assign_instructions, load_tasks, row_identity
from modeling_lsm.augmentation.decoding import greedy_decode, read_end_tokens
from modeling_lsm.augmentation.prompts import Prompter


BASELINE_BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="LSM checkpoint. Default: the demo's models, composed.")
    parser.add_argument("--rows", type=int, default=192, help="targets to generate, each way")
    parser.add_argument("--max_new_tokens", type=int, default=225, help="longest target, in tokens")
    parser.add_argument("--batch_tokens", type=int, default=16384, help="as for augment.py")
    args = parser.parse_args()

    model, processor = load_model(args.model_name_or_path)
    prompts = Prompter(processor.tokenizer, processor.chat_template).encode(draw_prompts(args.rows))
    greedy_decode(model, prompts[:2], 4, args.batch_tokens)  # warm up

    baseline: list[list[int]] = []
    baseline_seconds = 0.0
    loads = []
    bar = partial(tqdm, total=len(prompts), unit="target")
    with bar(desc="this package") as progress, bar(desc="obvious way") as baseline_progress:

        def take_turns(index: int, answer: list[int]) -> None:
            nonlocal baseline_seconds
            progress.update()
            if progress.n % BASELINE_BATCH == 0 or progress.n == len(prompts):
                started = time.perf_counter()
                baseline.extend(decode_plainly(model, prompts[len(baseline) : progress.n], args.max_new_tokens))
                baseline_seconds += time.perf_counter() - started
                baseline_progress.update(progress.n - baseline_progress.n)
                loads.append(round(os.getloadavg()[0], 1))

        started = time.perf_counter()
        answers = greedy_decode(model, prompts, args.max_new_tokens, args.batch_tokens, take_turns)
        seconds = time.perf_counter() - started - baseline_seconds

    differences = [
        explain(model, index, prompt, answer, expected)
        for index, (prompt, answer, expected) in enumerate(zip(prompts, answers, baseline, strict=True))
        if answer != expected
    ]
    num_tokens = sum(map(len, answers))
    figures = {
        "ratio": round(baseline_seconds / seconds, 2),
        "targets_per_second": round(len(prompts) / seconds, 3),
        "baseline_targets_per_second": round(len(prompts) / baseline_seconds, 3),
        "tokens_per_second": round(num_tokens / seconds, 1),
        "baseline_tokens_per_second": round(sum(map(len, baseline)) / baseline_seconds, 1),
        "rows": len(prompts),
        "mean_answer_tokens": round(num_tokens / len(prompts), 1),
        "differing": len(differences),
        "differing_by_more_than_a_tie": sum(not difference["is_tie"] for difference in differences),
        "differences": differences,
        "seats": args.batch_tokens // (max(map(len, prompts)) + args.max_new_tokens),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "load_average": loads,
    }
    print(json.dumps(figures))


def draw_prompts(count: int) -> list[tuple[str, str]]:
    """Instructions and transcripts: each sentence with every task that the LLM writes targets for."""
    tasks = load_tasks([], "French")
    prompts = []
    for sentence in read_sentences():
        draws = assign_instructions(row_identity("", sentence), tasks, [1.0] * len(tasks), len(tasks), seed=0)
        prompts += [(instruction, sentence) for task, instruction in draws if task.generated]
    return prompts[:count]


@torch.inference_mode()
def decode_plainly(model: LsmForConditionalGeneration, batch: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The obvious way, for one batch. Answers end with their end tokens."""
    pad_token, end_tokens = model.generation_config.pad_token_id, read_end_tokens(model)
    width = max(map(len, batch))
    sequences = model.generate(
        input_ids=torch.tensor([[pad_token] * (width - len(row)) + row for row in batch], device=model.device),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    answers = sequences[:, width:].tolist()
    ends = [[at for at, token in enumerate(answer, start=1) if token in end_tokens] for answer in answers]
    return [answer[: end[0] if end else None] for answer, end in zip(answers, ends, strict=True)]


@torch.inference_mode()
def explain(
    model: LsmForConditionalGeneration, index: int, prompt: list[int], answer: list[int], expected: list[int]
) -> dict:
    """Where two answers part, and by how much the model, asked for this row alone, prefers one token to the other."""
    at = len(os.path.commonprefix([answer, expected]))
    input_ids = torch.tensor([prompt + answer[:at]], device=model.device)
    logits = model(input_ids=input_ids, logits_to_keep=1).logits[0, -1].float()
    logits[model.generation_config.suppress_tokens or []] = -torch.inf
    gap = abs(logits[answer[at]] - logits[expected[at]]).item()
    are_best = {answer[at], expected[at]} == set(logits.topk(2).indices.tolist())
    return {"row": index, "at_token": at, "gap_of_logits": gap, "is_tie": are_best and gap < TIE}


if __name__ == "__main__":
    main()
