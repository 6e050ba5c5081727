"""Gather what an experiment found: `python -m experiments.tiny.publish --run … --scale small --output-dir …`.

Writes `results.json` with every figure and interval, `README.md` with the tables, the plots, and `checkpoint/`, the
self-powered model: what trained, without the two base models.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from safetensors.torch import load_file, save_file

from experiments.tiny.write_sentences import SPLITS
from modeling_lsm.evaluation.metrics import edit_counts, share
from modeling_lsm.evaluation.predictions import read_predictions
from modeling_lsm.evaluation.statistics import bootstrap


ARMS = {"lsm": "self-powered", "vanilla": "vanilla"}
FOLDERS = {"lsm": "self_powered", "vanilla": "vanilla"}
SYSTEMS = {**ARMS, "cascade": "cascade", "text": "text (the ceiling)"}
SETS = {"synthetic": "held-out synthetic voices", "real": "real recordings"}
SOURCES = {"wordnet": "WordNet's examples", "question": "questions", "command": "commands"}
BIAS = {
    "collapse": "collapse rate ↓",
    "fit": "answers that fit their own instruction ↑",
    "written": "written instruction obeyed, against a spoken request ↑",
    "spoken": "spoken request obeyed instead or as well ↓",
    "repeated": "request repeated when that was the instruction ↑",
    "distance": "distance between answers to different instructions ↑",
}
PLOTS = ("bias_collapse.png", "bias_attention.png", "bias_divergence.png")
Figure = dict[str, Any]


def gather(run: Path) -> dict[str, Any]:
    """Every figure of a run.

    Args:
        run: The folder of the experiment.

    Returns:
        `figures[set][task][metric][system]`, `wer_by_source[source][system]`, `bias[name][system]` and
        `attention[system]`, each with `value`, `low` and `high`; `warm_up` and `training`, what they took and came to;
        `data`, the number of clips and targets; `versions`.
    """
    evaluated = {name: read_json(run / name / "results.json") for name in SETS}
    bias = read_json(run / "synthetic" / "bias.json")
    arms = {}
    for folder in FOLDERS.values():
        state = read_json(run / folder / "trainer_state.json")
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        arms[folder] = {"steps": state["global_step"], "loss_first": losses[0], "loss_last": losses[-1]}
    return {
        "figures": {name: results["figures"] for name, results in evaluated.items()},
        "counts": {name: results["counts"] for name, results in evaluated.items()},
        "wer_by_source": wer_by_source(run),
        "bias": bias["figures"],
        "gaps": bias["gaps"],
        "instructions": bias["instructions"],
        "forgetting": bias["forgetting"],
        "attention": {system: figures["instruction_to_both"] for system, figures in bias["attention"].items()},
        "divergence": {system: figures["in_all"] for system, figures in bias["divergence"].items()},
        "warm_up": read_lines(run / "warm" / "alignment" / "log.jsonl")[-1],
        "training": arms,
        "data": {
            **{part: len(read_lines(run / "speech" / part / "metadata.jsonl")) for part in SPLITS},
            "bias": bias["settings"]["bias_rows"],
            "measured": bias["settings"]["measured_rows"],
            "targets": read_json(run / "augmented" / "provenance.json")["counts"],
        },
        "versions": evaluated["synthetic"]["versions"],
    }


def wer_by_source(run: Path) -> dict[str, dict[str, Figure]]:
    """The word error rate by where a sentence is from: training hears the templates, with other fillings."""
    source_of = {row["text"]: row["source"] for row in read_lines(run / "speech" / "test" / "metadata.jsonl")}
    figures = {}
    for system, (_, answers) in read_predictions(run / "synthetic" / "predictions").items():
        for source in SOURCES:
            rows = [r for r in answers.values() if r["task"] == "transcription" and source_of[r["text"]] == source]
            counts = edit_counts([row["prediction"] for row in rows], [row["reference"] for row in rows])
            figures.setdefault(source, {})[system] = bootstrap(counts, share)._asdict()
    return figures


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def show(figure: Figure | None) -> str:
    """A figure and its interval."""
    if figure is None or figure["value"] is None:
        return "–"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def table(results: dict[str, Any]) -> list[str]:
    """The figures downwards, the systems across."""
    lines = [f"| | {' | '.join(SYSTEMS.values())} |", f"|---|{'---|' * len(SYSTEMS)}"]

    def add(title: str, by_system: dict[str, Figure]) -> None:
        lines.append(f"| {title} | {' | '.join(show(by_system.get(system)) for system in SYSTEMS)} |")

    for name, title in SETS.items():
        rows = results["counts"][name]["transcription"]["lsm"]["rows"]
        add(f"WER, {rows} clips of {title} ↓", results["figures"][name]["transcription"]["wer"])
    for source, title in SOURCES.items():
        add(f"WER, {title} of the synthetic clips ↓", results["wer_by_source"][source])
    add("instructions followed ↑", results["figures"]["synthetic"]["following"]["followed"])
    for name, title in BIAS.items():
        if name in results["bias"]:
            add(title, results["bias"][name])
    add("attention of the answer: instruction ÷ (instruction + speech)", results["attention"])
    return lines


def report(results: dict[str, Any], scale: str) -> list[str]:
    """The results as a page."""
    data, targets, training = results["data"], results["data"]["targets"], results["training"]
    accepted = sum(count for key, count in targets.items() if key.startswith("accepted"))
    names = list(next(iter(results["instructions"].values())))
    instructions = [
        "| instruction | " + " | ".join(SYSTEMS.values()) + " |",
        "|---|" + "---|" * len(SYSTEMS),
        *(
            f"| {name} | " + " | ".join(show(results["instructions"][system].get(name)) for system in SYSTEMS) + " |"
            for name in names
        ),
    ]
    return [
        f"# Results of `make experiment SCALE={scale}`",
        "",
        f"{data['train']:,} clips to train on and {data['warm_up'] + data['words']:,} more for the warm-up, "
        f"{accepted:,} targets; {results['warm_up']['step']:,} steps of warm-up, then "
        f"{training['vanilla']['steps']:,} of training for each way, from the same warm-up on the same clips. "
        f"Measured on {data['test']:,} sentences that no training heard, in voices that none heard; the bias on the "
        f"first {data['bias']} of them and the first {data['bias']} that are requests, attention and divergence on "
        f"{data['measured']}. In brackets: 95 % bootstrap intervals.",
        "",
        *table(results),
        "",
        "The *text* system is the LLM before training, reading the transcript; the *cascade* is the Whisper that the "
        "encoder is from, then that LLM. Questions and commands come from templates, of which training hears other "
        "fillings; WordNet's examples are the harder test. What the figures of the bias mean: "
        "`modeling_lsm/evaluation/bias/questions.yaml`. All of them, and those of each LLM reading after training, "
        "are in [results.json](results.json).",
        "",
        "## Instructions on speech, by kind",
        "",
        *instructions,
        "",
        "## Curves",
        "",
        f"The warm-up alone recognizes the validation clips with a WER of {results['warm_up']['wer']:.3f}.",
        "",
        "In the plots *lsm* is the self-powered model, and *-text* the LLM of a model when it reads the transcript.",
        "",
        *(f"![{plot}]({plot})" for plot in ("training.png", *PLOTS)),
        "",
        "`checkpoint/` is the self-powered model: projector and LoRA. `make demo` asks it.",
    ]


def plot_curves(run: Path, path: Path) -> None:
    """The loss of the warm-up, then that of both ways of training."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    warm_up = read_lines(run / "warm" / "alignment" / "log.jsonl")
    left.plot(*zip(*[(entry["step"], entry["loss"]) for entry in warm_up if "loss" in entry], strict=True))
    left.set(title="Warm-up: the projector alone", xlabel="step", ylabel="CTC loss per label + pull")
    wer = left.twinx()
    wer.plot(*zip(*[(e["step"], e["wer"]) for e in warm_up if "wer" in e], strict=True), "o--", color="tab:orange")
    wer.set(ylabel="held-out word error rate", ylim=(0, None))
    for system, folder in FOLDERS.items():
        history = read_json(run / folder / "trainer_state.json")["log_history"]
        points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        right.plot(*zip(*points, strict=True), label=ARMS[system])
    right.set(title="Training with the LLM", xlabel="step", ylabel="loss per token of the target")
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def copy_checkpoint(source: Path, target: Path) -> None:
    """The slim checkpoint in half precision, without code, and without where the base models were on this machine."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        if file.name not in ("run.json", "trainer_state.json"):
            shutil.copyfile(file, target / file.name)
    # The model still computes in the dtype that its config says; a repository should not hold more than it has to.
    weights = {name: weight.half() for name, weight in load_file(source / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(source / "chat_template.jinja", target / "chat_template.jinja")
    config = read_json(target / "config.json")
    for base in config["base_models"].values():
        base.pop("path", None)
    config.pop("auto_map", None)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the experiment")
    parser.add_argument("--scale", required=True, help="how large it was: smoke, small or full")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the results")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = gather(args.run)
    for name in PLOTS:
        shutil.copy(args.run / "synthetic" / name, args.output_dir)
    plot_curves(args.run, args.output_dir / "training.png")
    copy_checkpoint(args.run / "self_powered", args.output_dir / "checkpoint")
    (args.output_dir / "README.md").write_text("\n".join(report(results, args.scale)) + "\n", encoding="utf-8")
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
