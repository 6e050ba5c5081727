"""
What the alignment warm-up brings to training with the LLM, and what it costs.

    python -m benchmarks.bench_align

Speaks the demo's sentences (or takes clips of yours: --dataset, --held_out), aligns a projector on them, and then
trains projector and LLM to transcribe them, once from the aligned ("warm") and once from the random ("cold")
projector: the same clips in the same order, the same seeds, the same settings. The losses and what they were measured
with go to docs/warm_vs_cold.json and, as a plot, to docs/warm_vs_cold.png. To compare speeds, steps of the alignment
and steps with the LLM take turns, both with the encoder's output from the cache. The last line on stdout is a JSON
object.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from peft import LoraConfig
from torch import nn
from tqdm import tqdm
from trl import SFTConfig

from demo.fetch_models import fetch_speech_model, fetch_text_model
from demo.synthesize import read_sentences, synthesize
from modeling_lsm import LsmForConditionalGeneration, LsmProcessor
from modeling_lsm.augmentation import load_tasks
from modeling_lsm.composing import compose
from modeling_lsm.data.collating import SpeechTextCollator, predicts_label
from modeling_lsm.data.loading import ask_for_transcriptions, load_rows
from modeling_lsm.data.preparing import prepare_rows
from modeling_lsm.evaluation import word_error_rate
from modeling_lsm.processing_lsm import make_chat
from modeling_lsm.training import FeatureCache, LsmTrainer, add_lora, align, encoder_key, set_trained_parts
from modeling_lsm.training.alignment import draw_batches
from modeling_lsm.training.ctc import Aligner, AlignmentCollator, make_vocabulary, tokenize_transcripts


PROJECTOR = {"projector_type": "mlp", "projector_hidden_size": 1024, "projector_num_layers": 2, "window_size": 6}
LORA = {"r": 8, "lora_alpha": 16}
HELD_OUT_EVERY = 10  # of the demo's sentences
NUM_ANSWERS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="speech and its words, anything load_rows takes. Default: the demo's")
    parser.add_argument("--held_out", help="the same, to measure on; --dataset needs it")
    parser.add_argument("--limit_held_out", type=int, default=64, help="clips to measure on")
    parser.add_argument("--align_steps", type=int, default=200, help="batches of the warm-up")
    parser.add_argument("--align_batch_size", type=int, default=32, help="its clips per batch")
    parser.add_argument("--steps", type=int, default=60, help="batches of training with the LLM")
    parser.add_argument("--batch_size", type=int, default=8, help="its clips per batch")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="of projector and LoRA, both times")
    parser.add_argument("--turns", type=int, default=10, help="steps of each kind whose speed is compared")
    parser.add_argument("--work_dir", type=Path, help="folder for clips, features and the warm-up. Default: a new one")
    parser.add_argument("--output_dir", type=Path, default=Path("docs"), help="folder for the figures and the plot")
    args = parser.parse_args()
    if (args.dataset is None) != (args.held_out is None):
        parser.error("--dataset and --held_out go together")
    work_dir = args.work_dir or Path(tempfile.mkdtemp(prefix="bench_align-"))

    model, processor = compose_small()
    sources = (args.dataset, args.held_out) if args.dataset else speak_sentences(work_dir)
    rows, held_out = (read_rows(source, processor) for source in sources)
    held_out = held_out.select(range(min(args.limit_held_out, len(held_out))))
    cache = FeatureCache(work_dir / "features", encoder_key(model, processor))
    for clips in (rows, held_out):
        cache.build(clips, model, processor)

    aligned = align(
        model,
        processor,
        rows,
        work_dir,
        args.align_steps,
        args.align_batch_size,
        held_out_rows=held_out,
        eval_steps=max(1, args.align_steps // 4),
        feature_cache=cache,
    )
    log = [json.loads(line) for line in (work_dir / "alignment" / "log.jsonl").read_text().splitlines()]
    timed = [entry for entry in log if "clips_per_second" in entry]
    counts = [entry["step"] - before["step"] for before, entry in zip([{"step": 0}, *timed], timed, strict=False)]
    seconds = [
        count * args.align_batch_size / entry["clips_per_second"] for count, entry in zip(counts, timed, strict=True)
    ]
    answers = answer(model, processor, held_out.select(range(min(NUM_ANSWERS, len(held_out)))))

    curves = {
        "warm": train(model, processor, rows, held_out, cache, args),
        "cold": train(compose_small()[0], processor, rows, held_out, cache, args),
    }
    speeds = compare_speeds(processor, rows, cache, args)
    figures = {
        "ratio": round(speeds["align_clips_per_second"] / speeds["llm_clips_per_second"], 1),
        **speeds,
        "warm": curves["warm"],
        "cold": curves["cold"],
        "alignment": {
            "steps": args.align_steps,
            "batch_size": args.align_batch_size,
            "seconds": round(sum(seconds), 1),
            "held_out_wer_at_steps": {entry["step"]: round(entry["wer"], 3) for entry in log if "wer" in entry},
            "held_out_wer": round(aligned["wer"], 3),
            "held_out_tokens_unknown": round(aligned["unknown_held_out_tokens"], 3),
            "llm_answers_after_it_alone": answers,
            "held_out_examples": aligned["examples"],
        },
        "clips": len(rows),
        "held_out_clips": len(held_out),
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "projector": PROJECTOR,
        "lora": LORA,
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "warm_vs_cold.json").write_text(
        json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    plot(curves, args.output_dir / "warm_vs_cold.png")
    print(json.dumps(figures, ensure_ascii=False))


def compose_small() -> tuple[LsmForConditionalGeneration, LsmProcessor]:
    """The demo's models with a random projector, always the same."""
    return compose(str(fetch_speech_model()), str(fetch_text_model()), dtype="float32", **PROJECTOR)


def speak_sentences(folder: Path) -> tuple[str, str]:
    """Speaks the demo's sentences, four times each for training; returns the two manifests."""
    sentences = read_sentences()
    held_out = sentences[::HELD_OUT_EVERY]
    trained = [sentence for sentence in sentences if sentence not in held_out]
    lines = []
    for seed in range(4):
        manifest = synthesize(trained, folder / f"speech-{seed}", seed=seed)
        for line in manifest.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            lines.append(json.dumps({**row, "audio": str((manifest.parent / row["audio"]).resolve())}))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path), str(synthesize(held_out, folder / "speech-held-out", seed=4))


def read_rows(source: str, processor: LsmProcessor) -> Dataset:
    """Rows that ask for their transcripts."""
    wordings = load_tasks(["transcription"], target_language="")[0].instructions
    return prepare_rows(ask_for_transcriptions(load_rows(source, columns=("audio", "text")), wordings), processor)


def train(
    model: LsmForConditionalGeneration,
    processor: LsmProcessor,
    rows: Dataset,
    held_out: Dataset,
    cache: FeatureCache,
    args: argparse.Namespace,
) -> dict:
    """Trains projector and LoRA to transcribe; returns the losses: of every step, and held-out before and after."""
    torch.manual_seed(0)
    add_lora(model, LoraConfig(**LORA))
    set_trained_parts(model, ["projector", "llm"])
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=5,
            lr_scheduler_type="constant_with_warmup",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.accelerator.is_available(),
            seed=0,
            train_sampling_strategy="group_by_length",
            length_column_name="length",
        )
        trainer = LsmTrainer(
            model=model,
            args=settings,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=processor,
            data_collator=SpeechTextCollator(
                processor, end_tokens=model.generation_config.eos_token_id, feature_cache=cache
            ),
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    answers = answer(model, processor, held_out.select(range(min(NUM_ANSWERS, len(held_out)))))
    return {
        "losses": losses,
        "held_out_loss_before": round(before, 3),
        "held_out_loss_after": round(after, 3),
        "answers_after": answers,
    }


@torch.no_grad()
def answer(model: LsmForConditionalGeneration, processor: LsmProcessor, rows: Dataset) -> dict:
    """What the model writes when it is asked to write down each clip, and its word error rate."""
    model.eval()
    pairs = []
    for row in rows:
        chat = make_chat("Write down what is said.", audio=row["audio"])
        inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
        length = inputs["input_ids"].shape[1]
        tokens = model.generate(**inputs.to(model.device), max_new_tokens=32, do_sample=False)[0, length:]
        pairs.append([row["text"], processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()])
    said, written = zip(*pairs, strict=True)
    return {"wer": round(word_error_rate(list(written), list(said)), 3), "pairs": pairs}


def compare_speeds(processor: LsmProcessor, rows: Dataset, cache: FeatureCache, args: argparse.Namespace) -> dict:
    """Clips per second of a step of each kind, the two taking turns, reading of the cache included."""
    model, _ = compose_small()
    tokens = tokenize_transcripts(processor.tokenizer, rows["text"][:])
    vocabulary = make_vocabulary(processor.tokenizer, tokens)
    label_of = {token: label for label, token in enumerate(vocabulary)}
    labels = [[label_of[token] for token in sequence] for sequence in tokens]
    aligner = Aligner(model, vocabulary, with_encoder=False, bf16=False)
    collate_clips = AlignmentCollator(processor, rows, labels, cache)

    add_lora(model, LoraConfig(**LORA))
    set_trained_parts(model, ["projector", "llm"])
    model.train()
    collate_chats = SpeechTextCollator(processor, end_tokens=model.generation_config.eos_token_id, feature_cache=cache)

    def llm_loss(indices: list[int]) -> torch.Tensor:
        batch = collate_chats([rows[index] for index in indices])
        return model(**batch, logits_to_keep=predicts_label(batch["labels"]), use_cache=False).loss

    step_aligner = make_step(aligner, lambda indices: aligner.loss(collate_clips(indices)))
    step_llm = make_step(model, llm_loss)
    lengths = rows["num_samples"][:]
    aligner_batches = draw_batches(lengths, args.align_batch_size, args.turns + 1, seed=1)
    llm_batches = draw_batches(lengths, args.batch_size, args.turns + 1, seed=1)
    seconds = {"align": 0.0, "llm": 0.0}
    turns = tqdm(zip(aligner_batches, llm_batches, strict=True), total=args.turns + 1, desc="Comparing speeds")
    for turn, (aligner_batch, llm_batch) in enumerate(turns):
        for name, step, batch in (("align", step_aligner, aligner_batch), ("llm", step_llm, llm_batch)):
            started = time.perf_counter()
            step(batch)
            if turn > 0:  # the first one warms up
                seconds[name] += time.perf_counter() - started
    return {
        "align_clips_per_second": round(args.turns * args.align_batch_size / seconds["align"], 2),
        "llm_clips_per_second": round(args.turns * args.batch_size / seconds["llm"], 2),
    }


def make_step(module: nn.Module, loss_of: Callable[[list[int]], torch.Tensor]) -> Callable[[list[int]], None]:
    """A whole training step of what requires gradients in `module`."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step(indices: list[int]) -> None:
        optimizer.zero_grad()
        loss_of(indices).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def plot(curves: dict[str, dict], path: Path) -> None:
    """Draws the losses of both runs."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, curve), color in zip(curves.items(), ("tab:orange", "tab:blue"), strict=True):
        steps = range(1, len(curve["losses"]) + 1)
        axes.plot(steps, curve["losses"], color=color, alpha=0.9, label=f"{name} projector")
        ends = [curve["held_out_loss_before"], curve["held_out_loss_after"]]
        axes.plot([0, len(curve["losses"])], ends, "o", color=color, label=f"{name}, held-out clips")
    axes.set_xlabel("steps of training with the LLM")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
