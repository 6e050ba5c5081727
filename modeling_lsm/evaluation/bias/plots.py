"""The plots of `bias_report.md`, as PNGs."""

import io
from typing import Any

from .attention import PARTS
from .scores import READER_SUFFIX


def to_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def make_figure(rows: int = 1) -> Any:
    """A figure of matplotlib, drawn without a screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(7, 4 * rows), layout="constrained")


def plot_thresholds(results: dict[str, Any]) -> bytes:
    figure = make_figure()
    axes = figure.subplots()
    for system, rates in results["thresholds"].items():
        limits = [float(limit) for limit in rates]
        value, low, high = (
            [float("nan") if rate[key] is None else rate[key] for rate in rates.values()]
            for key in ("value", "low", "high")
        )
        axes.plot(limits, value, marker=".", label=system)
        axes.fill_between(limits, low, high, alpha=0.2)
    axes.axvline(results["settings"]["transcript_threshold"], color="gray", linestyle=":")
    axes.set(xlabel="highest word error rate of a transcript", ylabel="collapse rate", ylim=(-0.02, 1.02))
    axes.legend()
    return to_png(figure)


def plot_attention(attention: dict[str, Any]) -> bytes:
    """A panel for each part of the sequence: its share by layer, with bounds, of every system."""
    figure = make_figure(rows=2)
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    readers = [system.removesuffix(READER_SUFFIX) for system in attention]
    colours = {system: f"C{index}" for index, system in enumerate(dict.fromkeys(readers))}
    for at, (panel, part) in enumerate(zip(panels, PARTS, strict=True)):
        for system, figures in attention.items():
            style = "--" if system.endswith(READER_SUFFIX) else "-"
            plot_layers(panel, figures, at, style, color=colours[system.removesuffix(READER_SUFFIX)], label=system)
        panel.set_title(part)
    panels[0].legend(fontsize=7)
    figure.supxlabel("layer")
    figure.supylabel("share of attention")
    return to_png(figure)


def plot_heads(figures: dict[str, Any]) -> bytes:
    """One system: shares by layer, with bounds; below, by head, the instruction's share of it and the speech."""
    from matplotlib.ticker import MaxNLocator

    figure = make_figure(rows=2)
    above, below = figure.subplots(2)
    for at, part in enumerate(PARTS):
        plot_layers(above, figures, at, label=part)
    above.set(xlabel="layer", ylabel="share of attention", ylim=(-0.02, 1.02))
    above.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    ratios = [[group[0] / ((group[0] + group[1]) or 1) for group in layer] for layer in figures["by_group"]["value"]]
    image = below.imshow(list(zip(*ratios, strict=True)), aspect="auto", vmin=0, vmax=1, origin="lower")
    image.set_extent((0.5, len(ratios) + 0.5, 0.5, len(ratios[0]) + 0.5))
    below.set(xlabel="layer", ylabel="group of heads", title="instruction ÷ (instruction + speech)")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=below)
    return to_png(figure)


def plot_layers(axes: Any, figures: dict[str, Any], part: int, *style: str, **line: Any) -> None:
    """The share of one part by layer, as a line in its bounds."""
    from matplotlib.ticker import MaxNLocator

    value, low, high = ([layer[part] for layer in figures["by_layer"][key]] for key in ("value", "low", "high"))
    layers = range(1, len(value) + 1)
    (drawn,) = axes.plot(layers, value, *style, marker=".", **line)
    axes.fill_between(layers, low, high, color=drawn.get_color(), alpha=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_divergence(divergence: dict[str, Any]) -> bytes:
    figure = make_figure()
    axes = figure.subplots()
    for system, figures in divergence.items():
        lines = figures["by_position"]
        begin = [line["from"] for line in lines]
        axes.plot(begin, [line["value"] for line in lines], marker=".", label=system)
        axes.fill_between(begin, [line["low"] for line in lines], [line["high"] for line in lines], alpha=0.2)
    axes.set(xlabel="token of the target", ylabel="KL(reading ‖ hearing), nats", xscale="log")
    axes.set_ylim(bottom=0)
    axes.legend()
    return to_png(figure)


__all__ = ["plot_attention", "plot_divergence", "plot_heads", "plot_thresholds"]
