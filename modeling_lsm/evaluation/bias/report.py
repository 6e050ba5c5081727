"""The bias in tables, plots (`plots.py`) and examples: `bias_report.md` and its PNGs."""

from pathlib import Path
from typing import Any

from ...augmentation.report import cell
from ...files import write_atomically
from .attention import PARTS
from .plots import plot_attention, plot_divergence, plot_heads, plot_thresholds
from .scores import FIGURES, OUTCOMES


LISTED = 5  # requests that are named
LISTED_CLIPS = 50  # clips that could not be read
EXAMPLES = 3  # clips, and requests, whose answers are shown
Figure = dict[str, Any]


def write_bias_report(folder: Path, results: dict[str, Any], answers: dict[str, Any]) -> None:
    """Writes `bias_report.md` and plots into `folder`. `answers` is what [`read_predictions`] gives."""
    settings = results["settings"]
    lines = [
        f"# Anchor bias of {settings.get('model_name_or_path') or 'the model'}",
        "",
        "Does the speech decide what is answered, or the instruction? In brackets: "
        f"{settings['confidence']:.0%} bootstrap intervals over clips. *gap*: against the same LLM reading the "
        "transcript, with the p of a paired permutation test.",
        "",
        *headline_table(results),
        "",
        "A model that ignores its instruction has a collapse rate near 1, obeys hardly any written instruction, and "
        "gives one answer to all of them (distance near 0). One that ignores the speech obeys, but cannot repeat what "
        "was said, and answers one instruction alike on all clips. A model without the bias is where its reader is.",
        "",
        f"An answer is a transcript if its word error rate to the transcript is at most "
        f"{settings['transcript_threshold']} and it does not fit its instruction; the plot shows other thresholds. "
        "Answers to clips that could not be read are empty. They count as following nothing, but are in neither the "
        "collapse rate nor that of spoken requests obeyed, which they would make look better. Distance: "
        "edits between two answers in words ÷ words of the longer one.",
        "",
        "![Collapse rate by threshold](bias_collapse.png)",
        "",
        "## Instructions that were followed",
        "",
        *named_table("instruction", results["instructions"]),
        "",
        "## Spoken requests under another written instruction",
        "",
        *obedience_section(results, answers),
    ]
    write_atomically(folder / "bias_collapse.png", plot_thresholds(results))
    if results["attention"]:
        lines += ["", "## Attention of the answers' tokens", "", *attention_section(folder, results)]
    if results["divergence"]:
        lines += ["", "## Gap between speech and text", "", *divergence_section(folder, results)]
    if results["unreadable"]:
        lines += ["", "## Clips that could not be read", "", *unreadable_section(results["unreadable"])]
    lines += ["", "## Forgetting", "", *forgetting_section(results), "", "## Examples", "", *examples(answers)]
    write_atomically(folder / "bias_report.md", ("\n".join(lines) + "\n").encode("utf-8", errors="replace"))


def show(figure: Figure | None) -> str:
    """A figure and its interval."""
    if figure is None or figure["value"] is None:
        return "–"
    if figure["low"] is None:
        return f"**{figure['value']:.3f}**"
    return f"**{figure['value']:.3f}** [{figure['low']:.3f}, {figure['high']:.3f}]"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def headline_table(results: dict[str, Any]) -> list[str]:
    """Figures downwards, systems across, each with its gap."""
    systems = [name for name, meta in results["systems"].items() if meta["reader"]]
    rows = []
    for name, by_system in results["figures"].items():
        title, higher = FIGURES[name]
        cells = []
        for system in systems:
            gap = results["gaps"][name].get(system)
            known = gap is not None and gap["difference"] is not None
            text = f"<br>gap {gap['difference']:+.3f}, p {gap['p_value']:.3f}" if known else ""
            cells.append(show(by_system[system]) + text)
        rows.append([f"{title} {'' if higher is None else '↑' if higher else '↓'}".rstrip(), *cells])
    return table(["", *systems], rows)


def named_table(title: str, by_system: dict[str, dict[str, Figure]]) -> list[str]:
    """What was named downwards, systems across."""
    names = list(next(iter(by_system.values())))
    return table([title, *by_system], [[name, *(show(f[name]) for f in by_system.values())] for name in names])


def obedience_section(results: dict[str, Any], answers: dict[str, Any]) -> list[str]:
    if not results["outcomes"]:
        return ["No transcript was a question or a command, so this was not measured. Give spoken `--requests`."]
    rows = [
        [name, system, *(show(outcomes[outcome]) for outcome in OUTCOMES)]
        for name in next(iter(results["outcomes"].values()))
        for system, by_name in results["outcomes"].items()
        for outcomes in [by_name[name]]
    ]
    _, answered = answers[next(iter(results["outcomes"]))]
    requests = {row["clip"]: row["text"] for row in answered.values() if row["task"] == "obedience"}
    first = " · ".join(f"“{cell(text)}”" for text in list(requests.values())[:LISTED])
    return [
        f"{len(requests)} clips speak a request; see that they do. The first of them: {first}",
        "",
        *table(["written instruction", "system", *(f"obeyed: {outcome}" for outcome in OUTCOMES)], rows),
        "",
        "*written*: the answer passes the check of the instruction; told to `repeat`, it is a transcript. *spoken*: "
        "it is no transcript, and passes the check or holds an answer that the data give; where they give none, at "
        "least half of its longer words and numbers are among those that the same LLM answered when it read the "
        "request alone, words of request and instruction left out, which misses answers in other words. A model that "
        "transcribes whatever it is told passes `repeat`, which therefore has a line of its own in the first table.",
    ]


def attention_section(folder: Path, results: dict[str, Any]) -> list[str]:
    attention = results["attention"]
    rows = []
    for system, figures in attention.items():
        in_all = figures["in_all"]
        cells = [show({key: in_all[key][at] for key in in_all}) for at in range(len(PARTS))]
        rows.append([system, str(figures["rows"]), *cells, show(figures["instruction_to_both"])])
    write_atomically(folder / "bias_attention.png", plot_attention(attention))
    lines = [
        *table(["system", "answers", *PARTS, "instruction ÷ (instruction + speech)"], rows),
        "",
        "Mean over tokens of the answer, heads and layers, of the systems' own answers. *speech* is the transcript "
        "for systems that read. *template* is the rest of the prompt with its first token, on which LLMs rest "
        "attention they have no use for; the ratio leaves it out. *answer* is the answer up to the token itself. "
        "Groups of heads, those that share keys and values, are in bias.json and in the lower half of the plots.",
        "",
        "![Attention of all systems](bias_attention.png)",
    ]
    for system, figures in attention.items():
        write_atomically(folder / f"bias_attention_{system}.png", plot_heads(figures))
        lines += ["", f"![Attention of {system}](bias_attention_{system}.png)"]
    return lines


def divergence_section(folder: Path, results: dict[str, Any]) -> list[str]:
    rows = []
    for system, figures in results["divergence"].items():
        for figure in (figures["in_all"], *figures["by_position"]):
            span = f"{figure['from']}–{figure['to'] or 'end'}" if figure["from"] != figure["to"] else figure["from"]
            span = "all" if figure is figures["in_all"] else str(span)
            rows.append([system, span, f"{figure['tokens']:,}", show(figure)])
    write_atomically(folder / "bias_divergence.png", plot_divergence(results["divergence"]))
    return [
        *table(["system", "tokens of the target", "of them in all", "KL in nats per token ↓"], rows),
        "",
        "KL(reading ‖ hearing) of the LSM's distribution of the next token, along what its own LLM answered to the "
        "instruction when it read the transcript.",
        "",
        "![Divergence along the target](bias_divergence.png)",
    ]


def unreadable_section(unreadable: list[dict[str, Any]]) -> list[str]:
    shown = [
        [cell(row["source"]), cell(row["reason"]), ", ".join(row["systems"]), str(row["answers"])]
        for row in unreadable[:LISTED_CLIPS]
    ]
    lines = [f"{len(unreadable)} in all.", "", *table(["from", "why", "systems", "answers"], shown)]
    if len(shown) < len(unreadable):
        lines += ["", f"{len(unreadable) - len(shown):,} more are in bias.json."]
    return lines


def forgetting_section(results: dict[str, Any]) -> list[str]:
    if not results["forgetting"]:
        return ["Not measured. `--untrained_model` says which LLM, or LSM, it was before training."]
    rows = []
    for system, figures in results["forgetting"].items():
        forgotten = figures["forgotten"]
        change = show({"value": forgotten["difference"], "low": forgotten["low"], "high": forgotten["high"]})
        p_value = "–" if forgotten["p_value"] is None else f"{forgotten['p_value']:.3f}"
        rows.append([system, show(figures["before"]), show(figures["after"]), change, p_value])
    return [
        *table(["LLM", "before training", "after", "forgotten ↓", "p"], rows),
        "",
        "Instructions followed on transcripts that are read, one of all that a program can check for each clip.",
    ]


def examples(answers: dict[str, Any]) -> list[str]:
    """The answers to the first clips, and to the first requests."""
    systems = {name: rows for name, (meta, rows) in answers.items() if meta["reader"]}
    lines = []
    for task, title in (("sensitivity", "transcript"), ("obedience", "spoken request")):
        rows = [row for row in next(iter(systems.values())).values() if row["task"] == task]
        clips = list(dict.fromkeys(row["clip"] for row in rows))[:EXAMPLES]
        shown = [row for row in rows if row["clip"] in clips]
        if shown:
            lines += table(
                [title, "instruction", *systems],
                [
                    [cell(row["text"]), cell(row["instruction"])]
                    + [cell(by_id[row["id"]]["prediction"]) for by_id in systems.values()]
                    for row in shown
                ],
            )
            lines.append("")
    return lines[:-1]


__all__ = ["write_bias_report"]
