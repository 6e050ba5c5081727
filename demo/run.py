"""From nothing to a speech-text model that has been augmented, trained, evaluated and asked a question: `make demo`.

Every stage is one of the project's own commands, printed before it runs, so that it can be run again with other
settings. What a stage made is reused the next time.
"""

import argparse
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from demo.fetch_models import fetch_speech_model, fetch_text_model
from demo.synthesize import MANIFEST_NAME, read_sentences, synthesize
from modeling_lsm import LsmForConditionalGeneration, LsmPipeline, LsmProcessor
from modeling_lsm.augmentation import load_tasks


ROOT = Path(__file__).parent.parent
RECORDINGS = ROOT / "tests" / "fixtures" / "librivox"
# Windows short enough for the alignment warm-up, which needs a vector for every token of a transcript.
PROJECTOR = ["--projector_type", "mlp", "--projector_hidden_size", "1024", "--window_size", "6"]
NUM_SENTENCES = 140
NUM_HELD_OUT = 8  # synthetic clips that training does not see, besides one real recording
TASKS = ["transcription", "repetition", "sentiment"]
# Trained for longer than a demo takes, see experiments/tiny/README.md; the two base models are those of the demo.
CHECKPOINT = ROOT / "experiments" / "tiny" / "results" / "checkpoint"
QUESTIONS = [
    "Write down the words that follow, exactly as they are.",
    "What is the sentiment of the following, and which words carry it?",
    'Begin your answer with "In short," and say what this is about.',
]
INSTRUCTIONS = Path(__file__).with_name("instructions.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech-model", help="Hub id or folder of a Whisper; default: whisper-tiny.en, fetched")
    parser.add_argument("--text-model", help="Hub id or folder of a chat LLM; default: SmolLM2-135M-Instruct, fetched")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo"), help="where everything goes")
    args = parser.parse_args()
    started = time.monotonic()
    check_settings(args)

    stage(1, "Getting the two pretrained models")
    speech_model = args.speech_model or fetch_speech_model()
    text_model = args.text_model or fetch_text_model()

    composed = args.output_dir / "composed"
    stage(2, "Composing them into one speech-text model, reloaded and checked")
    run(
        composed / "README.md",
        ["-m", "modeling_lsm.composing", "--speech_model", speech_model, "--text_model", text_model, *PROJECTOR],
        composed,
    )

    stage(3, "Collecting speech: real recordings, and sentences read by a synthetic voice")
    train_manifest, heldout_manifest = collect_speech(args.output_dir / "speech")

    augmented = args.output_dir / "augmented"
    stage(4, "Writing self-powered targets: the model's own LLM follows instructions on transcripts")
    run(
        augmented / "provenance.json",
        ["augment.py", "--model_name_or_path", composed, "--dataset", train_manifest, "--tasks", *TASKS]
        + ["--instructions_file", INSTRUCTIONS, "--num_targets_per_row", "2", "--max_new_tokens", "64"],
        augmented,
    )

    trained = args.output_dir / "trained"
    stage(5, "Training on them, with speech in the transcripts' place: the projector alone, then with the LLM")
    run(
        trained / "README.md",
        ["train_sft.py", "--config", ROOT / "recipes" / "demo.yaml"]
        + ["--model_name_or_path", composed, "--dataset", augmented]
        + ["--feature_cache", args.output_dir / "features"],
        trained,
    )

    evaluated = args.output_dir / "evaluated"
    stage(6, "Evaluating on speech that training did not hear")
    run(
        evaluated / "results.json",
        ["eval.py", "--model_name_or_path", trained, "--dataset", heldout_manifest, "--max_new_tokens", "48"],
        evaluated,
    )

    stage(7, "Asking the trained model about recordings, and one that was trained for longer")
    summary = summarize(args.output_dir)
    if args.speech_model is None and args.text_model is None:
        summary["experiment"] = ask_checkpoint(args.output_dir, {"speech": speech_model, "text": text_model})
    summary["seconds"] = round(time.monotonic() - started, 1)
    (args.output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print_summary(args.output_dir, summary)


def check_settings(args: argparse.Namespace) -> None:
    """Refuse to mix the results of two sets of models in one folder."""
    settings = {"speech_model": args.speech_model, "text_model": args.text_model}
    path = args.output_dir / "settings.json"
    if path.is_file() and (before := json.loads(path.read_text(encoding="utf-8"))) != settings:
        sys.exit(
            f"{args.output_dir} was made with {before}, not with {settings}. Set another OUTPUT_DIR or remove it."
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def stage(number: int, what: str) -> None:
    """Say which stage begins."""
    print(f"\n\033[1m[{number}/7] {what}\033[0m", flush=True)


def run(result: Path, arguments: list, output_dir: Path) -> None:
    """Run one of the project's commands, unless its last result is there from an earlier time."""
    if result.is_file():
        print(f"      {output_dir} is there already: reused. Remove it to make it anew.", flush=True)
        return
    arguments = [str(argument) for argument in [*arguments, "--output_dir", output_dir]]
    print(f"      $ python {shlex.join(arguments)}", flush=True)
    # No GPU is needed; where there is one, it is used.
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    if arguments[0] != "-m":
        arguments[0] = str(ROOT / arguments[0])
    process = subprocess.run([sys.executable, *arguments], env=environment)
    if process.returncode != 0:
        sys.exit(f"This stage failed with exit status {process.returncode}; its message stands above.")


def collect_speech(output_dir: Path) -> tuple[Path, Path]:
    """Put real and synthetic clips into one folder and return the manifests for training and for evaluation."""
    sentences = read_sentences()[: NUM_SENTENCES + NUM_HELD_OUT]
    synthetic = read_manifest(synthesize(sentences, output_dir))
    real = read_manifest(RECORDINGS / MANIFEST_NAME)
    for row in real:
        shutil.copy(RECORDINGS / row["audio"], output_dir / row["audio"])
    parts = {
        "train.jsonl": real[:-1] + synthetic[:NUM_SENTENCES],
        "heldout.jsonl": real[-1:] + synthetic[NUM_SENTENCES:],
    }
    for name, rows in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (output_dir / name).write_text(text, encoding="utf-8")
    return output_dir / "train.jsonl", output_dir / "heldout.jsonl"


def read_manifest(path: Path) -> list[dict]:
    """The rows of a JSONL manifest."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ask_checkpoint(output_dir: Path, base_folders: dict[str, Path]) -> dict:
    """What the experiment's model answers, several questions about a recording that it never heard."""
    model = LsmForConditionalGeneration.from_pretrained(CHECKPOINT, base_folders=base_folders)
    pipe = LsmPipeline(model=model, processor=LsmProcessor.from_pretrained(CHECKPOINT))
    row = read_manifest(output_dir / "speech" / "heldout.jsonl")[0]
    clip = str(output_dir / "speech" / row["audio"])
    ask = functools.partial(pipe, clip, max_new_tokens=64, do_sample=False)
    answers = {question: ask(text=question)[0]["generated_text"] for question in QUESTIONS}
    return {"checkpoint": str(CHECKPOINT), "clip": clip, "said": row["text"], "answers": answers}


def summarize(output_dir: Path) -> dict:
    """Ask the trained model about one recording from training and one that it never heard, and gather the figures."""
    trained = output_dir / "trained"
    pipe = LsmPipeline(
        model=LsmForConditionalGeneration.from_pretrained(trained), processor=LsmProcessor.from_pretrained(trained)
    )
    question = load_tasks(["transcription"], target_language="", instructions_file=str(INSTRUCTIONS))[0].instructions[
        0
    ]
    answers = {}
    for part in ("train", "heldout"):
        row = read_manifest(output_dir / "speech" / f"{part}.jsonl")[0]
        clip = output_dir / "speech" / row["audio"]
        answer = pipe(str(clip), text=question, max_new_tokens=48, do_sample=False)[0]["generated_text"]
        answers[part] = {"clip": str(clip), "said": row["text"], "answer": answer}
    state = json.loads((trained / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    results = json.loads((output_dir / "evaluated" / "results.json").read_text(encoding="utf-8"))
    return {
        "checkpoint": str(trained),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "question": question,
        "answer": answers["train"]["answer"],
        "answers": answers,
        "wer_held_out": results["figures"]["transcription"]["wer"]["lsm"]["value"],
    }


def print_summary(output_dir: Path, summary: dict) -> None:
    """Tell what was made, where, and what it says."""
    known, new = summary["answers"]["train"], summary["answers"]["heldout"]
    print(f"""
Done in {summary["seconds"]:.0f} s. In {output_dir}:
  composed/   the two pretrained models with a random projector between them
  speech/     the clips and their manifests
  augmented/  what the LLM wrote: accepted and rejected rows
  trained/    the trained model, loadable with transformers alone
  evaluated/  answers and word error rate on held-out clips

Loss      {summary["loss_first"]:.2f} at the start, {summary["loss_last"]:.2f} at the end.
Question  {summary["question"]}

A recording from the training data
  said    {known["said"]}
  answer  {known["answer"]}
A recording that the model never heard
  said    {new["said"]}
  answer  {new["answer"]}

That is what a few minutes on a hundred and fifty clips teach. On held-out ones the word error rate is
{summary["wer_held_out"]:.2f}.""")
    if experiment := summary.get("experiment"):
        print(f"""
The model of experiments/tiny, which has heard hours of speech, about a recording that it never heard
  said      {experiment["said"]}""")
        for question, answer in experiment["answers"].items():
            print(f"  question  {question}\n  answer    {answer}")


if __name__ == "__main__":
    main()
