"""What a person wants to know of an evaluation: tables, examples, a plot, and a table for the model card."""

import io
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..augmentation.report import cell
from ..files import write_atomically
from .metrics import METRICS
from .scoring import CEILING


EXAMPLES = 5  # answers shown for each task
LISTED = 50  # clips and rows of no use that are listed
BEGIN, END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
PLOT = "figures.png"


def write_report(folder: Path, results: dict[str, Any], systems: dict[str, Any]) -> None:
    """Writes `report.md` and `figures.png` into `folder`. `systems` is what [`read_predictions`] gives."""
    settings, confidence = results["settings"], results["settings"]["confidence"]
    lines = [
        f"# {settings['model_name_or_path']}",
        "",
        f"Measured on {settings['dataset']}. In brackets: {confidence:.0%} bootstrap intervals over rows.",
        "",
        *figure_table(results),
        "",
        f"![Figures with their intervals]({PLOT})",
    ]
    if results["comparisons"]:
        lines += ["", "## Side by side", "", *comparison_table(results)]
    lines += ["", "## Answers of no use", "", *count_table(results)]
    for title, key in (("Clips that could not be read", "unreadable"), ("Rows that could not be used", "unusable")):
        if results[key]:
            lines += ["", f"**{title}**", "", "| row | from | why |", "| --- | --- | --- |"]
            shown = results[key][:LISTED]
            lines += [f"| {row['id']} | {cell(row['source'])} | {cell(row['reason'])} |" for row in shown]
            if len(shown) < len(results[key]):
                lines += ["", f"{len(results[key]) - len(shown):,} more are in results.json."]
    for task, by_system in results["checks"].items():
        lines += ["", f"## {task}, by kind of instruction", "", *check_table(by_system)]
        passing = results["transcripts_that_pass"][task]
        lines += ["", f"The bare transcript would pass {passing['followed']:,} of the {passing['rows']:,} checks."]
    lines += ["", "## Examples"]
    for task in results["counts"]:
        lines += ["", f"**{task}**", "", *example_table(task, systems)]
    lines += ["", *notes(results)]
    write_atomically(folder / "report.md", ("\n".join(lines) + "\n").encode("utf-8", errors="replace"))
    write_atomically(folder / PLOT, plot_figures(results))


def number(value: float | None, metric: str) -> str:
    """A figure as a table shows it: rates with three decimals, sacreBLEU's scores with one."""
    if value is None:
        return "–"
    return f"{value:.1f}" if METRICS[metric].scale == 100 else f"{value:.3f}"


def figure_cell(figure: dict[str, float | None] | None, metric: str) -> str:
    if figure is None:
        return ""
    low, high = number(figure["low"], metric), number(figure["high"], metric)
    return f"**{number(figure['value'], metric)}** [{low}, {high}]"


def figure_table(results: dict[str, Any]) -> list[str]:
    """Tasks and metrics downwards, systems across."""
    systems = list(results["systems"])
    lines = [
        "| task | metric | rows | " + " | ".join(systems) + " |",
        "| --- | --- | ---: | " + " | ".join("---" for _ in systems) + " |",
    ]
    for task, metrics in results["figures"].items():
        for metric, figures in metrics.items():
            rows = max(count["rows"] for count in results["counts"][task].values())
            arrow = "↑" if METRICS[metric].higher_is_better else "↓"
            cells = " | ".join(figure_cell(figures.get(system), metric) for system in systems)
            lines.append(f"| {task} | {METRICS[metric].name} {arrow} | {rows:,} | {cells} |")
    return lines


def comparison_table(results: dict[str, Any]) -> list[str]:
    """Differences between systems; those to the ceiling are marked."""
    lines = ["| task | metric | first − second | difference | p | better |", "| --- | --- | --- | --- | ---: | --- |"]
    for row in results["comparisons"]:
        metric, pair = row["metric"], f"{row['first']} − {row['second']}"
        if CEILING in (row["first"], row["second"]):
            pair += " (gap to the ceiling)"
        better = "–"
        if row["difference"] and row["p_value"] is not None:
            ahead = (row["difference"] > 0) == METRICS[metric].higher_is_better
            sure = "" if row["p_value"] < 1 - results["settings"]["confidence"] else " (may be chance)"
            better = (row["first"] if ahead else row["second"]) + sure
        p_value = "–" if row["p_value"] is None else f"{row['p_value']:.3f}"
        figure = {"value": row["difference"], "low": row["low"], "high": row["high"]}
        columns = (row["task"], METRICS[metric].name, pair, figure_cell(figure, metric), p_value, better)
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def count_table(results: dict[str, Any]) -> list[str]:
    lines = [
        "| task | system | rows | empty | looping | unreadable clip |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for task, systems in results["counts"].items():
        for system, count in systems.items():
            numbers = " | ".join(f"{count[key]:,}" for key in ("rows", "empty", "looping", "unreadable"))
            lines.append(f"| {task} | {system} | {numbers} |")
    return lines


def check_table(by_system: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    kinds = sorted({kind for kinds in by_system.values() for kind in kinds})
    lines = [
        "| kind | rows | " + " | ".join(by_system) + " |",
        "| --- | ---: | " + " | ".join("---" for _ in by_system) + " |",
    ]
    for kind in kinds:
        rows = max(kinds[kind]["rows"] for kinds in by_system.values())
        cells = " | ".join(figure_cell(kinds[kind], "followed") for kinds in by_system.values())
        lines.append(f"| {kind} | {rows} | {cells} |")
    return lines


def example_table(task: str, systems: dict[str, Any]) -> list[str]:
    """The first rows of a task and what each system answered."""
    answers = {name: rows for name, (meta, rows) in systems.items() if task in meta["tasks"]}
    shown = [key for key, row in next(iter(answers.values())).items() if row["task"] == task and "unusable" not in row]
    lines = [
        "| instruction | transcript | reference | " + " | ".join(answers) + " |",
        "| --- | --- | --- | " + " | ".join("---" for _ in answers) + " |",
    ]
    for key in shown[:EXAMPLES]:
        row = next(iter(answers.values()))[key]
        known = [row["instruction"], row["text"], row["reference"]]
        columns = [*known, *(rows[key]["prediction"] for rows in answers.values())]
        lines.append("| " + " | ".join(cell("" if column is None else str(column)) for column in columns) + " |")
    return lines


def notes(results: dict[str, Any]) -> list[str]:
    """How the figures are to be read."""
    lines = [
        "## How to read this",
        "",
        "- An empty answer is wrong, and so is that of a clip that could not be read: both stay in the denominator.",
        "- The *text* system reads the gold transcript and is the ceiling, *cascade* reads what an ASR model wrote. "
        "Asked for a transcription, they give theirs: that of *text* has no errors by definition.",
        "- *english* normalization of word and character error rates is Whisper's without its table of British "
        "spellings: *colour* for *color* is an error here, and none in published figures.",
        "- Tests are paired permutation tests over rows, without correction for their number.",
    ]
    for task, metrics in results["signatures"].items():
        lines += [f"- {task}, {METRICS[metric].name}: `{text}`" for metric, text in metrics.items()]
    return lines


def plot_figures(results: dict[str, Any]) -> bytes:
    """A PNG with a bar for every figure and its interval, scores of 0 to 100 drawn from 0 to 1."""
    from matplotlib.figure import Figure

    figures = [(t, m, f) for t, metrics in results["figures"].items() for m, f in metrics.items()]
    systems = list(results["systems"])
    figure = Figure(figsize=(max(5, 1.2 * len(figures) * max(1, len(systems) / 2)), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(systems)
    for offset, system in enumerate(systems):
        places, values, errors = [], [], []
        for place, (_, metric, by_system) in enumerate(figures):
            known = by_system.get(system)
            if known is None or known["value"] is None:
                continue
            scale = METRICS[metric].scale
            value = known["value"]
            low, high = (value if known[key] is None else known[key] for key in ("low", "high"))
            places.append(place + (offset - (len(systems) - 1) / 2) * width)
            values.append(value / scale)
            # A skewed bootstrap may leave the figure itself outside of its interval.
            errors.append((max(0.0, value - low) / scale, max(0.0, high - value) / scale))
        axes.bar(places, values, width, yerr=list(zip(*errors, strict=True)) or None, capsize=3, label=system)
    labels = [
        f"{task}\n{METRICS[metric].name} {'↑' if METRICS[metric].higher_is_better else '↓'}"
        for task, metric, _ in figures
    ]
    axes.set_xticks(range(len(figures)), labels, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def update_model_card(model: str, results: dict[str, Any], system: str = "lsm") -> None:
    """
    Puts the figures of `system` into the README of a checkpoint: a table, and the metadata that the Hub shows.

    Args:
        model (`str`): Folder or Hub id of the checkpoint. On the Hub, the card is committed.
        results (`dict`): Contents of `results.json`.
        system (`str`, *optional*, defaults to `"lsm"`): Which system the checkpoint was.
    """
    local = Path(model) / "README.md"
    card = ModelCard.load(local if Path(model).is_dir() else model)
    settings = results["settings"]
    # A folder's name says more to others than where it is on this machine.
    dataset = Path(settings["dataset"]).name if Path(settings["dataset"]).exists() else settings["dataset"]
    new = [
        EvalResult(
            task_type="audio-text-to-text",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=metric,
            metric_name=f"{task}: {METRICS[metric].name}",
            metric_value=figures[system]["value"],
        )
        for task, metrics in results["figures"].items()
        for metric, figures in metrics.items()
        if figures.get(system) and figures[system]["value"] is not None
    ]
    kept = [result for result in card.data.eval_results or [] if not any(map(result.is_equal_except_value, new))]
    card.data.model_name = card.data.model_name or Path(model).resolve().name
    card.data.eval_results = kept + new

    only = {"systems": [system], **{key: results[key] for key in ("figures", "counts")}}
    table = [BEGIN, "## Evaluation", "", f"On {dataset}, with {settings['confidence']:.0%} intervals.", ""]
    table += [*figure_table(only), END]
    before, _, rest = card.text.partition(BEGIN)
    card.text = before.rstrip() + "\n\n" + "\n".join(table) + "\n" + rest.partition(END)[2]
    if Path(model).is_dir():
        write_atomically(local, str(card).encode())
    else:
        card.push_to_hub(model, commit_message="Add evaluation results")


__all__ = ["comparison_table", "figure_table", "update_model_card", "write_report"]
