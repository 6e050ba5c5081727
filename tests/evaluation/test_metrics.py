"""Metrics against independent implementations and examples computed by hand."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import sacrebleu

from modeling_lsm.evaluation import edit_counts, normalize_english, word_error_rate
from modeling_lsm.evaluation.answers import find_choice, find_label, read_choice, read_keywords, read_yes_no
from modeling_lsm.evaluation.metrics import METRICS, NORMALIZERS, signature
from modeling_lsm.evaluation.tasks import Task


SENTIMENT = {"positive": ["positive"], "negative": ["negative"], "very positive": ["very positive", "enthusiastic"]}


def score(metric: str, predictions: list[str], references: list, **settings) -> float:
    task = Task("task", "any", **settings)
    rows = [{"prediction": p, "reference": r} for p, r in zip(predictions, references, strict=True)]
    return float(METRICS[metric].score(METRICS[metric].count(rows, task).sum(0)))


def distance(first: list, second: list) -> int:
    """Levenshtein distance by its recurrence."""
    row = list(range(len(second) + 1))
    for i, item in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (item != other))
    return row[-1]


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
        (["", "a b"], ["", "a b"], 0.0),
        (["Mister Smith won't go"], ["mr. smith will not go"], 0.0),
    ],
)
def test_word_error_rate(predictions, references, expected):
    assert word_error_rate(predictions, references) == pytest.approx(expected)
    assert score("wer", predictions, references) == pytest.approx(expected)


def test_word_error_rate_refuses_what_has_no_rate():
    with pytest.raises(ValueError, match="There are 1 predictions for 2 references"):
        word_error_rate(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="No reference has a word in it"):
        word_error_rate(["a"], ["(laughs)"])
    assert math.isnan(score("wer", ["a"], [""]))  # in a report it is a dash


def test_edit_counts_are_levenshtein_distances():
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["a", "bb", "ccc", "d"], k=draw.randrange(8))) for _ in range(120)]
    predictions, references = texts[:60], texts[60:]
    words = edit_counts(predictions, references, "none")
    characters = edit_counts(predictions, references, "none", characters=True)
    for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        assert words[index].tolist() == [distance(reference.split(), prediction.split()), len(reference.split())]
        assert characters[index].tolist() == [distance(list(reference), list(prediction)), len(reference)]
    assert {0, 1} & set(words[:, 1].astype(int)) and "" in predictions  # the corners are among them


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [("abd", "abc", 1 / 3), ("", "abc", 1.0), ("Café!", "café", 0.0), ("ab " * 10, "ab", 27 / 2)],
)
def test_character_error_rate(prediction, reference, expected):
    assert score("cer", [prediction], [reference], normalizer="basic") == pytest.approx(expected)


def test_normalizers_are_whispers():
    assert normalize_english("Um, Dr. Jones paid $20!") == "doctor jones paid $20"
    assert NORMALIZERS["basic"]("Straße, «Ähm»! [Musik]").split() == ["straße", "ähm"]
    assert NORMALIZERS["none"]("Um,  Dr. ") == "Um, Dr."


# sacreBLEU


def bleu(predictions: list[str], references: list[str]) -> float:
    """Corpus BLEU from its definition, for texts that are tokens already and whose n-grams match at every order."""
    matches, totals = Counter(), Counter()
    for prediction, reference in zip(predictions, references, strict=True):
        hypothesis, truth = prediction.split(), reference.split()
        for n in range(1, 5):
            grams = Counter(zip(*(hypothesis[i:] for i in range(n)), strict=False))
            known = Counter(zip(*(truth[i:] for i in range(n)), strict=False))
            matches[n] += sum(min(count, known[gram]) for gram, count in grams.items())
            totals[n] += max(0, len(hypothesis) - n + 1)
    length = sum(len(p.split()) for p in predictions)
    penalty = min(1.0, math.exp(1 - sum(len(r.split()) for r in references) / length))
    return 100 * penalty * math.exp(sum(math.log(matches[n] / totals[n]) for n in range(1, 5)) / 4)


def chrf(predictions: list[str], references: list[str]) -> float:
    """chrF2 from its definition: mean precision and recall over character n-grams of up to six, spaces left out."""
    precisions, recalls = [], []
    for n in range(1, 7):
        hits = made = known = 0
        for prediction, reference in zip(predictions, references, strict=True):
            first, second = (
                Counter(text[i : i + n] for i in range(len(text) - n + 1))
                for text in (prediction.replace(" ", ""), reference.replace(" ", ""))
            )
            if first and second or not second:
                hits += sum((first & second).values())
            made, known = made + first.total(), known + second.total()
        precisions.append(hits / made)
        recalls.append(hits / known)
    precision, recall = np.mean(precisions), np.mean(recalls)
    return 100 * 5 * precision * recall / (4 * precision + recall)


PREDICTIONS = ["the quick brown fox jumps over a lazy dog", "he went to the market in the morning"]
REFERENCES = ["the quick brown fox jumps over the lazy dog", "he went to the big market in the morning today"]


def test_bleu_and_chrf():
    assert score("bleu", PREDICTIONS, REFERENCES) == pytest.approx(bleu(PREDICTIONS, REFERENCES))
    assert score("chrf", PREDICTIONS, REFERENCES) == pytest.approx(chrf(PREDICTIONS, REFERENCES))


def test_bleu_and_chrf_of_poor_answers_are_those_of_sacrebleu():
    predictions = ["", "the the the the the the the", "he went", "anything"]
    references = ["a sentence", "the cat sat on the mat", "he went", ""]
    expected = sacrebleu.corpus_bleu(predictions, [references]).score
    assert score("bleu", predictions, references) == pytest.approx(expected) and expected > 0
    expected = sacrebleu.corpus_chrf(predictions, [references]).score
    assert score("chrf", predictions, references) == pytest.approx(expected)
    assert score("bleu", ["", ""], REFERENCES) == score("chrf", ["", ""], REFERENCES) == 0

    several = [["he went off", "he went"], ["a cat sat on the mat"]]  # each row as many references as it has
    two = [["he went off", "a cat sat on the mat"], ["he went", None]]
    answers = ["he went", "a cat sat on a mat"]
    assert score("bleu", answers, several) == pytest.approx(sacrebleu.corpus_bleu(answers, two).score)


def test_signature_names_the_tokenizer_of_the_language():
    rows = [{"prediction": "a", "reference": "a"}]
    assert signature("bleu", rows, Task("t", "translation", target_language="German")).startswith("nrefs:1|")
    assert "tok:13a" in signature("bleu", rows, Task("t", "translation"))
    assert "tok:zh" in signature("bleu", rows, Task("t", "translation", target_language="Simplified Chinese"))
    assert "nc:6" in signature("chrf", rows, Task("t", "translation"))
    # four characters, one of them wrong: with the tokenizer for German that is one wrong word
    assert score("bleu", ["我喜欢大猫和狗"], ["我喜欢小猫和狗"], target_language="Chinese") > 30
    assert score("bleu", ["我喜欢大猫和狗"], ["我喜欢小猫和狗"], target_language="German") < 1


# Classification, yes or no, multiple choice, keywords, instructions


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Positive.", "positive"),
        ("The sentiment is **negative**, as the speaker says.", "negative"),
        ("very  Positive", "very positive"),  # the longest wording wins over the one inside it
        ("I would call it enthusiastic!", "very positive"),
        ("positive, negative or very positive", None),  # a list of all is no answer
        ("nonpositive", None),
        ("", None),
        ("negative " * 50, "negative"),
    ],
)
def test_find_label(answer, label):
    assert find_label(answer, SENTIMENT) == label


def test_accuracy():
    answers, truth = ["positive", "negative, I say", "", "both positive and negative"], ["positive"] * 4
    assert score("accuracy", answers, truth, labels=SENTIMENT) == 1 / 4
    assert (
        find_label("这是正面的", {"正面": ["正面"], "负面": ["负面"]}) == "正面"
    )  # words without spaces between them
    assert find_label("anything", {}) is None


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("Yes, he did.", "yes", True),
        ("No. Yes would be wrong.", "no", True),  # the first counts
        ("I do not know.", "no", False),
        ("True", True, True),
        ("False", 0, True),
        ("", "no", False),
        ("no no no no no no", "no", True),
        ("no no no no no no", "yes", False),
        ("It is not true.", "no", True),
        ("That isn’t correct, as he stayed.", "no", True),
        ("This cannot be entirely true", "no", True),
        ("It is not true that " * 20, "no", True),
        ("That is not incorrect.", "yes", True),
        ("If not, true.", "yes", True),  # another clause
        ("Not at all! Yes, he did.", "yes", True),
        ("nothing, untrue", "no", False),
    ],
)
def test_yes_no(answer, reference, right):
    assert score("yes_no_accuracy", [answer], [reference]) == right


def test_yes_no_reference_must_be_one():
    assert [read_yes_no(value) for value in (True, False, 1, 0, "Yes", "n", "false")] == [
        *("yes", "no", "yes", "no", "yes", "no", "no")
    ]
    with pytest.raises(ValueError, match="'perhaps'; expected 'yes' or 'no'"):
        read_yes_no("perhaps")


CHOICES = ["a dog", "a cat", "the moon"]


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("B", 1),
        ("(B)", 1),
        ("b", None),
        ("B. a cat", 1),
        ("**C**", 2),
        ("The answer is B, a cat", 1),
        ("It must be the moon.", 2),
        ("A cat, I think", 1),  # an article, not a letter
        ("a dog or a cat", None),
        ("D", None),
        ("", None),
        ("B\nbecause of the cat", 1),
        ("A. a dog\nB. a cat\nC. the moon", None),  # the list, copied
        ("A. a dog B. a cat", None),
        ("A\nB\nC", None),
        ("A: a dog\nB: a cat\nThe answer is B", None),
        ("A, B or C", None),
        ("option A or option B", None),
        ("I choose B.", 1),
        ("I would pick (C), as I said.", 2),
        ("B, a cat", 1),
        ("B, as A dog would bark", 1),  # an article
        ("The answer is B. A dog would bark.", 1),
        ("B. a cat\n" * 30, 1),
        ("A. a dog\nB. a cat\n" * 30, None),
        ("a cat " * 40, 1),
    ],
)
def test_find_choice(answer, choice):
    assert find_choice(answer, CHOICES) == choice


def test_choice_accuracy():
    rows = [{"prediction": "B", "reference": r, "choices": CHOICES} for r in ("a cat", 1, "B", "b", "1", "the moon")]
    assert METRICS["choice_accuracy"].count(rows, None)[:, 0].tolist() == [1, 1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="The right choice is 'E'"):
        read_choice("E", CHOICES)


@pytest.mark.parametrize(
    ("text", "keywords"),
    [
        ("Cold-hearted, selfish", {"cold hearted", "selfish"}),
        ("The keywords are: man, young man.", {"man", "young man"}),
        ("- man\n- Young man\n", {"man", "young man"}),
        ("1. man\n2. war; peace", {"man", "war", "peace"}),
        ("man, war, and peace", {"man", "war", "peace"}),
        (["Man", "war"], {"man", "war"}),
        ("man, " * 40, {"man"}),
        ("", set()),
    ],
)
def test_read_keywords(text, keywords):
    assert read_keywords(text) == keywords


def test_keyword_scores_over_all_rows():
    # 1 of 2 named is right, of 3; nothing named, of 1; all that is named is wrong, as there is nothing to name.
    predictions, references = ["man, dog", "", "cat"], [["man", "war", "peace"], "sun", ""]
    assert score("precision", predictions, references) == pytest.approx(1 / 3)
    assert score("recall", predictions, references) == pytest.approx(1 / 4)
    assert score("f1", predictions, references) == pytest.approx(2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))
    assert math.isnan(score("precision", [""], ["a"])) and score("f1", [""], ["a"]) == 0


def test_followed():
    check = {"kind": "exact_words", "parameters": {"count": 3}}
    rows = [{"prediction": answer, "reference": None, "check": check} for answer in ("one two three", "one", "")]
    assert METRICS["followed"].count(rows, None).tolist() == [[1, 1], [0, 1], [0, 1]]
