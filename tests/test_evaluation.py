"""Metrics against examples computed by hand."""

import pytest

from modeling_lsm.evaluation import normalize_english, word_error_rate


@pytest.mark.parametrize(
    ("predictions", "references", "expected"),
    [
        (["the cat sat"], ["The cat sat."], 0.0),
        (["the dog sat"], ["the cat sat"], 1 / 3),
        (["the cat sat down now"], ["the cat sat"], 2 / 3),
        ([""], ["the cat sat"], 1.0),
        (["the " * 30], ["the cat sat"], 29 / 3),  # a loop: 27 insertions, 2 substitutions
        (["a b", "c"], ["a b", "d"], 1 / 3),  # over all words, not a mean over clips
        (["hello", "a b"], ["", "a b"], 1 / 2),  # words heard in silence are insertions
        (["Mister Smith won't go"], ["mr. smith will not go"], 0.0),
    ],
)
def test_word_error_rate(predictions, references, expected):
    assert word_error_rate(predictions, references) == pytest.approx(expected)


def test_word_error_rate_refuses_what_has_no_rate():
    with pytest.raises(ValueError, match="There are 1 predictions for 2 references"):
        word_error_rate(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="No reference has a word in it"):
        word_error_rate(["a"], ["(laughs)"])


def test_normalizer_is_whispers():
    assert normalize_english("Um, Dr. Jones paid $20!") == "doctor jones paid $20"
