"""Every kind of instruction with answers that follow it and answers that do not."""

import random
from collections import Counter

import pytest

from modeling_lsm.evaluation.checks import CHECKS, draw_check


# kind → parameters, answers that follow the instruction, answers that do not
EXAMPLES = {
    "exact_words": ({"count": 3}, ["Three words here.", "a — b c"], ["Two words", "these are four words"]),
    "at_most_words": ({"count": 5}, ["A short one.", "one two three four five"], ["one two three four five six"]),
    "at_least_words": ({"count": 30}, ["word " * 30, "word " * 99], ["word " * 29, "a — " * 29]),
    "one_sentence": (
        {},
        ["This is one.", "no end", "Is it 3.5 m?"],
        ["One. Two.", "One\nTwo", 'He said "No." Then not.'],
    ),
    "exact_sentences": ({"count": 2}, ["One. Two!", "One?\nTwo"], ["One.", "One. Two. Three."]),
    "paragraphs": ({"count": 2}, ["One.\n\nTwo.", "One\nstill\n \nTwo"], ["One\nTwo", "One\n\nTwo\n\nThree"]),
    "upper_case": ({}, ["THIS IS LOUD, 3 TIMES!"], ["This is not", "NOT ALl", "123"]),
    "lower_case": ({}, ["this is quiet."], ["This is not", "he said I", "123"]),
    "title_case": ({}, ["A Fine Headline", 'The "Old" House, 1810'], ["A fine Headline", "headline"]),
    "start_with": ({"opening": "In short,"}, ["In short, yes."], ["in short, yes", "Well. In short, yes"]),
    "end_with": ({"ending": "The end."}, ["It is so. The end.", "The end. \n"], ["The end. Or not", "the end"]),
    "no_commas": ({}, ["None at all."], ["One, here", "一，二"]),
    "no_letter": ({"letter": "o"}, ["a tiny bit"], ["one", "Or this"]),
    "numbered_list": (
        {"count": 2},
        ["1. a\n2. b", "1) a\n\n2) b"],
        ["1. a\n2. b\n3. c", "- a\n- b", "Here:\n1. a\n2. b", "2. a\n1. b"],
    ),
    "bullet_list": ({"count": 2}, ["- a\n- b", "* a\n* b"], ["- a", "a\nb", "Here:\n- a\n- b", "-a\n-b"]),
    "comma_list": (
        {"count": 3},
        ["man, dog, sun", "man,dog,sun."],
        ["man, dog", "young man, dog, sun", "man, dog, sun, moon"],
    ),
    "json_object": (
        {"key": "topic"},
        ['{"topic": "a man"}', '```json\n{"topic": 1}\n```'],
        ['{"gist": "a"}', '{"topic": 1, "b": 2}', "topic: a man", '["topic"]', 'Here: {"topic": 1}'],
    ),
    "json_list": ({"count": 2}, ['["a", "b"]', '```\n["a", "b"]\n```'], ['["a"]', "[1, 2]", "a, b", '{"a": "b"}']),
    "use_word": ({"word": "river"}, ["By the River."], ["By the rivers", "driver"]),
    "use_word_times": (
        {"word": "river", "count": 2},
        ["River, river."],
        ["river", "river river river", "rivers and river"],
    ),
    "repeat_word": (
        {"word": "river", "count": 2},
        ["river river", "River\nRIVER"],
        ["river", "river, river", "river river river"],
    ),
    "in_quotes": ({}, ['"All of it."', "“All of it.”"], ['"Some" of it', "'All of it'", '""', '"One" and "two"']),
    "in_brackets": ({}, ["[All of it.]"], ["[Some] of it", "(All)", "[]"]),
    "question": ({}, ["Who was it?"], ["It was he.", "Who? He?", "Tell me. Who?"]),
    "exclamation": ({}, ["So it is! Indeed!", 'He said "Go!"'], ["So it is! Indeed.", "So it is"]),
    "one_line": ({"count": 40}, ["Short.", "x" * 40], ["x" * 41, "two\nlines"]),
    "count_words": ({}, ["12", "12."], ["twelve", "about 12", "12 words"]),
}


def test_every_kind_has_examples():
    assert EXAMPLES.keys() == CHECKS.keys() and len(CHECKS) >= 20


@pytest.mark.parametrize("kind", CHECKS)
def test_check(kind):
    parameters, good, bad = EXAMPLES[kind]
    check = CHECKS[kind]
    assert parameters.keys() == check.choices.keys()
    for answer in good:
        assert check.holds(answer, **parameters), answer
        assert check.holds(f"\n {answer} ", **parameters), answer
    for answer in [*bad, "", "  \n"]:
        assert not check.holds(answer, **parameters), answer


@pytest.mark.parametrize("kind", CHECKS)
def test_parameters_stand_in_the_wording(kind):
    instruction, parameters = CHECKS[kind].draw(random.Random(1))
    assert all(str(value) in instruction for value in parameters.values())
    assert "{" not in instruction


@pytest.mark.parametrize("kind", CHECKS)
def test_a_loop_follows_next_to_nothing(kind):
    """An answer that goes on and on may well have no commas, but it is not a list, nor short, nor JSON."""
    followed_anyway = {"at_least_words", "lower_case", "no_commas", "no_letter", "one_sentence"}
    assert CHECKS[kind].holds("never ending " * 100, **EXAMPLES[kind][0]) == (kind in followed_anyway)


def test_draws_are_seeded_and_cover_all_kinds():
    draws = [draw_check(random.Random(f"0:{row}")) for row in range(1000)]
    assert draws == [draw_check(random.Random(f"0:{row}")) for row in range(1000)]
    counts = Counter(draw["kind"] for draw in draws)
    assert counts.keys() == CHECKS.keys() and min(counts.values()) > 10
    for draw in draws:
        assert draw["parameters"].keys() == CHECKS[draw["kind"]].choices.keys()
    assert len({str(draw["parameters"]) for draw in draws if draw["kind"] == "use_word_times"}) > 8
