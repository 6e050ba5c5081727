"""Intervals and tests against loops that resample rows themselves, and against all permutations."""

import itertools

import numpy as np
import pytest

from modeling_lsm.evaluation import statistics
from modeling_lsm.evaluation.metrics import METRICS, share
from modeling_lsm.evaluation.statistics import bootstrap, compare
from modeling_lsm.evaluation.tasks import Task


COUNTS = np.array([[1, 4], [0, 3], [5, 5], [2, 8], [0, 1]], dtype=float)


def test_bootstrap_scores_resampled_corpora_not_rows():
    interval = bootstrap(COUNTS, share, resamples=400, seed=3)
    assert interval.value == pytest.approx(8 / 21)
    generator = np.random.default_rng(3)
    figures = []
    for _ in range(400):  # one resample after the other, its rows written out
        rows = np.repeat(COUNTS, generator.multinomial(5, [1 / 5] * 5), axis=0)
        figures.append(rows[:, 0].sum() / rows[:, 1].sum())
    assert interval[1:] == pytest.approx(tuple(np.quantile(figures, [0.025, 0.975])))
    assert bootstrap(COUNTS, share, resamples=400, seed=3) == interval
    assert bootstrap(COUNTS, share, resamples=400, seed=4) != interval


def test_bootstrap_does_not_depend_on_how_much_is_in_memory(monkeypatch):
    whole = bootstrap(COUNTS, share, resamples=50), compare(COUNTS, COUNTS[::-1] + [1, 0], share, resamples=50)
    monkeypatch.setattr(statistics, "CELLS", 12)
    assert (bootstrap(COUNTS, share, resamples=50), compare(COUNTS, COUNTS[::-1] + [1, 0], share, 50)) == whole


def test_bootstrap_of_a_known_distribution():
    """The interval of a share is about that of the binomial: 0.3 ± 1.96 · √(0.3 · 0.7 / 400)."""
    rows = np.stack([np.arange(400) % 10 < 3, np.ones(400)], 1).astype(float)
    value, low, high = bootstrap(rows, share, resamples=4000)
    assert value == pytest.approx(0.3)
    assert (low, high) == pytest.approx((0.3 - 0.0449, 0.3 + 0.0449), abs=0.005)


def test_bootstrap_where_there_is_nothing_to_measure():
    assert np.isnan(bootstrap(np.zeros((3, 2)), share)).all()
    assert np.isnan(bootstrap(np.zeros((0, 2)), share)).all()
    value, low, high = bootstrap(np.array([[1.0, 2.0], [0.0, 0.0]]), share)  # some resamples have nothing
    assert (value, low, high) == (0.5, 0.5, 0.5)


def test_bootstrap_of_sacrebleu():
    task = Task("t", "translation")
    rows = [{"prediction": "a b c d e", "reference": r} for r in ("a b c d e", "a b c d f", "g h i j k", "b c d e a")]
    metric = METRICS["bleu"]
    value, low, high = bootstrap(metric.count(rows, task), metric.score, resamples=200)
    assert low < value < high and high <= 100


def test_permutation_test_against_all_permutations():
    generator = np.random.default_rng(0)
    first = np.stack([generator.integers(0, 4, 8), np.full(8, 4)], 1).astype(float)
    second = np.stack([generator.integers(1, 5, 8), np.full(8, 4)], 1).astype(float)
    observed = share(first.sum(0)) - share(second.sum(0))
    as_large = 0
    for swaps in itertools.product([False, True], repeat=8):
        swap = np.array(swaps)[:, None]
        one, other = np.where(swap, second, first), np.where(swap, first, second)
        as_large += abs(share(one.sum(0)) - share(other.sum(0))) >= abs(observed) - 1e-12
    result = compare(first, second, share, resamples=8000)
    assert result.difference == pytest.approx(observed)
    assert result.p_value == pytest.approx(as_large / 256, abs=0.02) and 0.01 < as_large / 256 < 0.9


def test_paired_difference():
    """Rows differ much from each other and systems little: what is paired is sure, what is not would not be."""
    hard = np.tile([0.0, 10.0], 50)
    second = np.stack([hard, np.full(100, 10.0)], 1)
    first = second + np.stack([np.where(np.arange(100) % 2, -1.0, 1.0) ** 2, np.zeros(100)], 1) * 0.5
    result = compare(first, second, share, resamples=500)
    assert (result.difference, result.low, result.high) == pytest.approx((0.05, 0.05, 0.05))
    assert result.p_value == pytest.approx(1 / 501)
    low, high = bootstrap(first, share, resamples=500)[1:]
    assert high - low > 0.15
    reverse = compare(second, first, share, resamples=500)
    assert reverse.difference == pytest.approx(-0.05) and reverse.p_value == result.p_value


def test_equal_systems_do_not_differ():
    result = compare(COUNTS, COUNTS, share, resamples=100)
    assert (result.difference, result.low, result.high, result.p_value) == (0, 0, 0, 1)


def test_compare_needs_the_same_rows():
    with pytest.raises(ValueError, match="the same rows twice"):
        compare(COUNTS, COUNTS[:-1], share)
    assert np.isnan(compare(np.zeros((2, 2)), np.zeros((2, 2)), share).p_value)
