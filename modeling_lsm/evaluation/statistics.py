"""How sure a figure is: bootstrap intervals, and paired tests between two systems that answered the same rows."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np


CELLS = 20_000_000  # of the matrix of draws that is in memory at a time


class Interval(NamedTuple):
    """A figure and the bounds of its confidence interval; nan where there is nothing to measure."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """
    The difference between two systems, first minus second.

    Args:
        difference, low, high (`float`): The difference and its paired bootstrap interval.
        p_value (`float`): Chance of one at least as large, either way, if it did not matter which system gave which of
            the two answers to a row: a permutation test.
    """

    difference: float
    low: float
    high: float
    p_value: float


def portions(rows: int, resamples: int) -> list[int]:
    """Sizes of the parts in which resamples are drawn, so that they fit into memory."""
    size = max(1, CELLS // max(rows, 1))
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def resample(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row is drawn in each resample, `(resamples, rows)` in all, some resamples at a time."""
    generator = np.random.default_rng(seed)
    for size in portions(rows, resamples):
        yield generator.multinomial(rows, np.full(rows, 1 / rows), size=size)


def bounds(figures: np.ndarray, confidence: float) -> tuple[float, float]:
    """The percentile interval of resampled figures. Resamples without anything to measure do not count."""
    figures = figures[~np.isnan(figures)]
    if len(figures) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(figures, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap(
    counts: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray],
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """
    A figure with its percentile bootstrap interval, rows being resampled and the figure computed from their totals.

    Args:
        counts (`np.ndarray` of shape `(rows, counts)`): What each row adds.
        score (`Callable`): Totals `(…, counts)` → figures `(…)`.
        resamples (`int`, *optional*, defaults to 1000): Number of resamples.
        seed (`int`, *optional*, defaults to 0): Seed.
        confidence (`float`, *optional*, defaults to 0.95): Share of the resampled figures in the interval.
    """
    value = float(score(counts.sum(0)))
    if len(counts) == 0:
        return Interval(value, float("nan"), float("nan"))
    figures = np.concatenate([score(draws @ counts) for draws in resample(len(counts), resamples, seed)])
    return Interval(value, *bounds(figures, confidence))


def compare(
    first: np.ndarray,
    second: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray],
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Comparison:
    """
    How far two systems differ that answered the same rows.

    Args:
        first, second (`np.ndarray` of shape `(rows, counts)`): What each row adds, in the same order of rows.

    The other arguments are those of [`bootstrap`].

    Raises:
        ValueError: If the two have different shapes.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"A paired test needs the same rows twice, but got counts of {first.shape} and {second.shape}."
        )
    difference = float(score(first.sum(0)) - score(second.sum(0)))
    if len(first) == 0 or np.isnan(difference):
        return Comparison(difference, *[float("nan")] * 3)
    resampled = np.concatenate(
        [score(draws @ first) - score(draws @ second) for draws in resample(len(first), resamples, seed)]
    )
    # Where a system's answer went to the other, their totals exchange the difference of that row.
    generator = np.random.default_rng(seed)
    swapped = []
    for size in portions(len(first), resamples):
        moved = generator.integers(0, 2, size=(size, len(first))) @ (second - first)
        swapped.append(score(first.sum(0) + moved) - score(second.sum(0) - moved))
    # A hair's breadth for rounding. The observed difference is one of the permutations: p is never 0.
    as_large = np.abs(np.concatenate(swapped)) >= abs(difference) - 1e-12
    return Comparison(difference, *bounds(resampled, confidence), float((as_large.sum() + 1) / (resamples + 1)))


__all__ = ["Comparison", "Interval", "bootstrap", "compare"]
