"""The anchor-bias suite: that it detects the bias where it is, and only there, and how each figure comes about."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

import eval as script
from modeling_lsm import LsmPipeline
from modeling_lsm.evaluation.bias import suite
from modeling_lsm.evaluation.bias.questions import SETTINGS, is_request, make_bias_questions
from modeling_lsm.evaluation.bias.scores import (
    OUTCOMES,
    UNTRAINED,
    count_obedience,
    distance,
    holds,
    obeys_spoken,
    score_bias,
)
from modeling_lsm.evaluation.checks import CHECKS
from modeling_lsm.evaluation.questions import Records
from modeling_lsm.evaluation.running import to_prediction
from modeling_lsm.evaluation.systems import LsmSystem
from modeling_lsm.evaluation.tasks import DatasetEntry
from tests import tiny


ROOT = Path(__file__).parents[3]
FOUND = "2 clips speak a request; see that they do. The first of them: “What is the capital of France?” · “Name"
REQUESTS = {
    "Name three colors.": "Red, green and yellow.",
    "What is the capital of France?": "It is Paris, a city on the Seine.",
    "How many days are there in a week?": "There are 7.",
}
STATEMENTS = [
    "the river was frozen from bank to bank that winter",
    "nobody had opened the letter",
    "my brother plays chess with his neighbour every Sunday evening",
]


def write_manifest(folder: Path, rows: list[dict]) -> Records:
    """Records of a manifest, whose clips need not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"audio": f"{index}.wav", **row} for index, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Records(DatasetEntry(name="clips", path=str(folder / "metadata.jsonl")))


@pytest.fixture
def records(tmp_path) -> Records:
    return write_manifest(tmp_path / "clips", [{"text": text} for text in [*REQUESTS, *STATEMENTS]])


def follow(row: dict) -> str:
    """Follows an instruction of `questions.yaml` without regard to the speech, which none but `repeat` needs."""
    given = {
        "opening": "In short, all is well.",
        "ending": "Something happens. The end.",
        "questions": "1. Who is it?\n2. When was that?\n3. Why?",
        "letter": "Dear Sir or Madam, I have nothing to say.",
        "json": '{"topic": "nature"}',
        "three_words": "sun, moon, star",
        "one_word": "river river river",
        "sentiment": "Neutral.",
        "translation": "Das ist alles, was ich sagen kann.",
        "repeat": "I cannot tell.",
    }
    return given[row["name"]]


class Constructed:
    """A system whose answers follow a rule, around the model that it shares with its reader."""

    needs_audio, batch_size = True, 4

    def __init__(self, model):
        self.model = model

    def meta(self) -> dict:
        return {"model": type(self).__name__}

    def answer(self, rows, max_new_tokens=0, on_answer=lambda index, answer: None):
        answers = [self.answer_one(row) for row in rows]
        for index, answer in enumerate(answers):
            on_answer(index, answer)
        return answers


class Transcribes(Constructed):
    """Ignores the instruction: writes what it hears."""

    def answer_one(self, row: dict) -> str:
        return row["text"].lower()


class TakesSpeechForTheInstruction(Constructed):
    """Ignores the instruction: does what it hears, or transcribes it if that asks for nothing."""

    def answer_one(self, row: dict) -> str:
        return REQUESTS.get(row["text"], row["text"])


class IgnoresSpeech(Constructed):
    """Follows the instruction, whatever is said."""

    def answer_one(self, row: dict) -> str:
        return follow(row)


class Ideal(Constructed):
    """Reads the transcript and follows the instruction on it; told to do what it says, does that."""

    needs_audio = False

    def answer_one(self, row: dict) -> str:
        words = row["text"].rstrip(".?").split()
        about_speech = {
            "repeat": row["text"],
            "request": REQUESTS.get(row["text"], ""),
            "opening": f"In short, {words[-1]}.",
            "ending": f"It is {words[-1]}. The end.",
            "questions": f"1. What is {words[0]}?\n2. What is {words[1]}?\n3. And {words[-1]}?",
            "letter": f"Dear all, have you heard of {' '.join(words[1:])}?",
            "json": json.dumps({"topic": " ".join(words[-2:])}),
            "three_words": ", ".join(words[-3:]),
            "sentiment": f"Neutral, for {words[-1]} is.",
            "translation": f"Jemand sagt etwas von {words[-1]}.",
        }
        return about_speech[row["name"]] if row["name"] in about_speech else follow(row)


def answer_as_ideal(questions: dict) -> dict:
    """Answers of the ceiling, as `read_predictions` gives them."""
    rows = [row for task in ("sensitivity", "obedience", "request") for row in questions[task]]
    predictions = [to_prediction(row, text) for row, text in zip(rows, Ideal(None).answer(rows), strict=True)]
    meta = {"reader": "text", "normalizer": "english", "questions": {}}
    return {"text": (meta, {row["id"]: row for row in predictions})}


@pytest.fixture(scope="module")
def detected(tmp_path_factory) -> dict:
    """`bias.json` of constructed systems, which went the whole way that models go."""
    folder = tmp_path_factory.mktemp("detected")
    records = write_manifest(folder / "clips", [{"text": text} for text in [*REQUESTS, *STATEMENTS]])
    for index in range(len(records.rows)):
        soundfile.write(folder / "clips" / f"{index}.wav", tiny.noise(0.1, index), tiny.SAMPLING_RATE)
    questions, model = make_bias_questions(records), tiny.make_model()
    questions["reading"] = []
    systems = {"transcribes": Transcribes(model), "answers": TakesSpeechForTheInstruction(model)}
    systems |= {"deaf": IgnoresSpeech(model), "text": Ideal(model)}
    suite.measure_bias(systems, questions, folder, measured_rows=0)
    return suite.report_bias(folder, {}, {}, resamples=50)


def test_bias_of_a_model_that_ignores_its_instruction(detected):
    figures = {name: {system: f["value"] for system, f in row.items()} for name, row in detected["figures"].items()}
    assert figures["collapse"]["transcribes"] >= 0.95
    assert figures["distance"]["transcribes"] == figures["distance"]["answers"] == 0
    for system in ("transcribes", "answers"):
        assert figures["written"][system] <= 0.05
        assert figures["fit"][system] <= 0.05
    # One that takes the speech for the instruction obeys it, even where it should repeat what is said.
    assert figures["spoken"]["answers"] >= 0.95
    assert figures["spoken"]["transcribes"] == 0
    assert figures["repeated"] == {"transcribes": 1, "answers": 0, "deaf": 0, "text": 1}
    assert detected["gaps"]["collapse"]["transcribes"]["difference"] >= 0.95


def test_bias_of_a_model_that_ignores_the_speech(detected):
    figures = {name: row["deaf"]["value"] for name, row in detected["figures"].items()}
    assert figures["collapse"] <= 0.05
    assert figures["written"] >= 0.95
    assert figures["fit"] >= 0.95
    assert figures["spoken"] <= 0.05
    assert figures["repeated"] <= 0.05
    assert figures["clip_distance"] == 0


def test_no_bias_at_the_text_ceiling(detected):
    figures = {name: row["text"]["value"] for name, row in detected["figures"].items()}
    assert figures["collapse"] <= 0.05 and figures["spoken"] <= 0.05
    assert figures["written"] >= 0.95 and figures["fit"] >= 0.95 and figures["repeated"] >= 0.95
    assert figures["clip_distance"] > 0.4 and figures["distance"] > 0.4
    assert "text" not in detected["gaps"]["collapse"]
    for row in detected["figures"].values():
        for figure in row.values():
            assert figure["low"] <= figure["value"] <= figure["high"]
    for outcomes in detected["outcomes"].values():
        for outcome in outcomes.values():
            assert sum(outcome[name]["value"] for name in OUTCOMES) == pytest.approx(1)


def test_bias_instructions_can_be_followed_and_no_transcript_passes():
    for group in ("instructions", "written"):
        for name, entry in SETTINGS[group].items():
            if "check" not in entry:
                continue
            check = {"check": {"kind": entry["check"], "parameters": entry["parameters"]}}
            assert holds({**check, "prediction": follow({"name": name})}), name
            for text in [*REQUESTS, *REQUESTS.values(), *STATEMENTS, "one two three", ""]:
                assert not holds({**check, "prediction": text}), (name, text)
    assert set(SETTINGS["written"]) - {"repeat"} <= {n for n, e in SETTINGS["written"].items() if "check" in e}


def test_bias_figures_by_hand(records):
    questions = make_bias_questions(records, limit=2)
    answers = {row["id"]: to_prediction(row, "") for task in questions for row in questions[task]}
    first, second = ([row for row in answers.values() if row["clip"] == clip] for clip in (0, 1))
    asked = {row["name"]: row for row in first if row["task"] == "sensitivity"}
    asked["json"]["prediction"] = "Name three colors!"  # one transcript
    asked["letter"]["prediction"] = "name me two colors"  # WER 2/3: none
    asked["ending"]["prediction"] = "The end."  # one check passed
    asked["three_words"]["prediction"] = "Name, three, colors"  # another, so it is none
    next(row for row in second if row["name"] == "three_words")["prediction"] = "a, b, c"
    meta = {"reader": "text", "normalizer": "english", "questions": {}}
    results = score_bias({"text": (meta, answers)}, resamples=20)
    figures = {name: row["text"]["value"] for name, row in results["figures"].items()}
    assert figures["collapse"] == 1 / 16
    assert figures["fit"] == 3 / 12
    # Of clip 0 four answers differ from the four empty ones; the two of three words are equal, the one of four differs
    # from them by two words, and "The end." from all three. Of clip 1 one answer differs from seven.
    assert figures["distance"] == pytest.approx((16 + 2 * 2 / 4 + 3 + 7) / 56)
    assert figures["clip_distance"] == 4 / 8
    assert results["instructions"]["text"]["ending"]["value"] == 1 / 2
    by_threshold = results["thresholds"]["text"]
    assert by_threshold["0.6"]["value"] == 1 / 16 and by_threshold["0.7"]["value"] == 2 / 16
    assert by_threshold["0.5"] == results["figures"]["collapse"]["text"] and by_threshold["0.5"]["high"] == 1 / 8
    assert results["forgetting"] == {}


def test_bias_clips_that_could_not_be_read_do_not_lower_it(records):
    answers = answer_as_ideal(make_bias_questions(records, limit=3))
    rows = answers["text"][1]
    for row in rows.values():
        row["prediction"] = row["text"] if row["clip"] == 0 else ""
        if row["clip"] != 0 and row["task"] != "request":
            row["problem"] = "cannot be decoded"
    results = score_bias(answers, resamples=20)
    figures = {name: row["text"]["value"] for name, row in results["figures"].items()}
    assert figures["collapse"] == 1 and results["thresholds"]["text"]["0.5"]["value"] == 1
    assert figures["repeated"] == 1 / 3 and figures["written"] == figures["fit"] == 0
    asked = len(SETTINGS["instructions"]) + len(SETTINGS["written"])
    assert [(row["source"], row["answers"], row["systems"]) for row in results["unreadable"]] == [
        (f"metadata.jsonl:{clip + 1}", asked, ["text"]) for clip in (1, 2)
    ]
    for row in rows.values():
        row["problem"] = "cannot be decoded"
    nothing = score_bias(answers, resamples=20)
    assert nothing["figures"]["collapse"]["text"]["value"] is nothing["thresholds"]["text"]["0.5"]["value"] is None


def test_bias_distance_by_hand():
    assert distance("A b c.", "a b, d e") == 2 / 4
    assert distance("", "") == 0 and distance("", "word") == 1


def test_bias_spoken_requests():
    row = {"text": "What is the capital of France?", "instruction": "Sum it up.", "spoken": None, "prediction": ""}
    reading = "The capital of France is Paris, which lies on the Seine."
    for answer, obeys in (
        ("Paris.", True),
        ("It is Paris, a city.", True),  # one of two longer words
        ("Berlin, surely.", False),
        ("What is the capital of France?", False),
        ("", False),
        ("It is so.", False),
    ):
        assert obeys_spoken({**row, "prediction": answer}, reading) == obeys, answer
    known = {**row, "spoken": {"answers": ["Paris", "Lutetia"]}}
    assert obeys_spoken({**known, "prediction": "lutetia!"}, "") and not obeys_spoken({**known, "prediction": "P"}, "")
    checked = {**row, "spoken": {"check": {"kind": "exact_words", "parameters": {"count": 3}}}}
    assert obeys_spoken({**checked, "prediction": "Paris on Seine"}, "")
    assert not obeys_spoken({**checked, "prediction": "Paris"}, "")


def test_bias_outcomes_by_hand():
    check = {"kind": "exact_words", "parameters": {"count": 3}}
    spoken = {"answers": ["red"]}
    texts = ["one two three", "red", "red green blue", "no", "name a color"]
    rows = [
        {"clip": clip, "name": "words", "text": "Name a color", "instruction": "", "prediction": text}
        for clip, text in enumerate(texts)
    ]
    rows = [{**row, "check": check, "spoken": spoken} for row in rows]
    figures, outcomes = count_obedience(rows, defaultdict(str), "english")
    assert outcomes["words"].tolist() == [
        [1, 0, 0, 0, 1],
        [0, 1, 0, 0, 1],
        [0, 0, 1, 0, 1],
        [0, 0, 0, 1, 1],
        [1, 0, 0, 0, 1],  # a transcript that happens to pass the check obeys no spoken request
    ]
    assert figures["written"][:, 0].tolist() == [1, 0, 1, 0, 1]
    assert figures["spoken"][:, 0].tolist() == [0, 1, 1, 0, 0]


def test_bias_requests_are_found_in_transcripts():
    for text in (
        *("Name three colors", "WHAT IS THE TIME", "It is late, isn't it?", "please, sit down", "tell me a story"),
        *("can you hear me", "where did he go", "what's the weather like today", "how many eggs do we need"),
        *("turn on the light", "Name 3 rivers.", "explain why the sky is blue", "who are you", "why is the sky blue"),
    ):
        assert is_request(text), text
    for text in (
        *("The name of the rose.", "nameless fear", "when he came home", "was the first to arrive"),
        *(
            "who had been there before",
            "set in the valley",
            "have not seen him",
            "had he known it, he would have gone",
        ),
        *("who was the captain of the ship", "which was the only way out", "is the way of the world", "should you go"),
        *(
            "how much he loved her",
            "what he saw was a ship",
            "Count Fosco came in",
            "name of the father",
            "closed the",
        ),
        *(
            "will of his own he had none",
            "do not go gentle into that night",
            "call of the wild",
            "whatever is the case",
        ),
        *(
            "where the river bends",
            "how they laughed",
            "can the leopard",
            "list to port",
            "open country lay before us",
        ),
    ):
        assert not is_request(text), text


def test_bias_questions(records, tmp_path):
    questions = make_bias_questions(records, limit=4)
    assert {task: len(rows) for task, rows in questions.items()} == {
        "sensitivity": 4 * len(SETTINGS["instructions"]),
        "obedience": 3 * len(SETTINGS["written"]),
        "request": 3,
        "reading": 4,
    }
    ids = [row["id"] for rows in questions.values() for row in rows]
    assert len(set(ids)) == len(ids)
    assert questions == make_bias_questions(records, limit=4)
    assert questions["reading"] != make_bias_questions(records, limit=4, seed=1)["reading"]
    # What the data say of the answer goes before the look of the transcript.
    check = {"kind": "exact_words", "parameters": {"count": 3}}
    rows = [
        {"text": "colors three", "spoken_answers": "red"},
        {"text": "say it", "spoken_check": check},
        {"text": "no"},
    ]
    asked = make_bias_questions(records, write_manifest(tmp_path / "requests", rows), limit=4)["obedience"]
    assert [row["spoken"] for row in asked[:: len(SETTINGS["written"])]] == [{"answers": ["red"]}, {"check": check}]


def test_bias_needs_what_it_measures(records, tmp_path):
    statements = write_manifest(tmp_path / "statements", [{"text": text} for text in STATEMENTS])
    with pytest.raises(ValueError, match="has no clip that speaks a request: none has `spoken_answers`"):
        make_bias_questions(records, statements)
    assert make_bias_questions(statements)["obedience"] == []
    with pytest.raises(ValueError, match="has no column 'text', the transcripts, which the bias suite needs"):
        make_bias_questions(write_manifest(tmp_path / "untold", [{"voice": "a"}]))
    with pytest.raises(ValueError, match="has no row with a transcript"):
        make_bias_questions(write_manifest(tmp_path / "silent", [{"text": "?!"}]))
    for wrong in ({"kind": "sing"}, {"kind": "exact_words"}, "exact_words"):
        broken = write_manifest(tmp_path / "broken", [{"text": "say it", "spoken_check": wrong}])
        with pytest.raises(ValueError, match="spoken_check is .* expected a kind of checks.py"):
            make_bias_questions(broken)
    answers = answer_as_ideal(make_bias_questions(records))
    answers["other"] = ({**answers["text"][0], "questions": {"sensitivity": "b"}}, answers["text"][1])
    answers["text"][0]["questions"] = {"sensitivity": "a"}
    with pytest.raises(ValueError, match="'other' answered other questions of the bias suite"):
        score_bias(answers)


def test_bias_forgetting_by_hand(records):
    questions = make_bias_questions(records)
    check = {"kind": "exact_words", "parameters": {"count": 1}}
    rows = {row["id"]: {**row, "check": check, "prediction": "one"} for row in questions["reading"]}
    meta = {"reader": "text", "normalizer": "english", "questions": {}}
    answers = answer_as_ideal(questions)
    answers["text"][1].update(rows)
    answers[UNTRAINED] = ({**meta, "reader": None}, rows)
    same = score_bias(answers, resamples=50)["forgetting"]["text"]
    assert same["forgotten"] == {"difference": 0, "low": 0, "high": 0, "p_value": 1}
    assert same["before"]["value"] == same["after"]["value"] == 1
    two = list(rows)[:2]
    answers["text"][1].update({key: {**rows[key], "prediction": "two words"} for key in two})
    assert score_bias(answers, resamples=50)["forgetting"]["text"]["forgotten"]["difference"] == pytest.approx(2 / 6)


# ---- with a model ----


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder of four clips of noise, two of which speak requests and one of which is damaged."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = ["this is a statement", "What is the capital of France?", "Name three colors.", "one more statement"]
    for index in range(4):
        soundfile.write(folder / f"{index}.wav", tiny.noise(0.3 + 0.2 * index, index), tiny.SAMPLING_RATE)
    (folder / "3.wav").write_bytes(b"RIFF")
    rows = [{"audio": f"{index}.wav", "text": text} for index, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluate(model, dataset, output_dir, **kwargs) -> dict:
    settings = {"max_new_tokens": 6, "resamples": 20, "bias": True, **kwargs}
    script.main(script.EvalArguments(str(output_dir), str(model), str(dataset), **settings))
    return json.loads((output_dir / "bias.json").read_text())


def test_bias_suite_from_end_to_end(tiny_checkpoint, corpus, tmp_path):
    results = evaluate(tiny_checkpoint, corpus, tmp_path, untrained_model=str(tiny_checkpoint), measured_rows=4)
    assert {name: meta["reader"] for name, meta in results["systems"].items()} == {
        "lsm": "text",
        "text": "text",
        "untrained": None,
    }
    assert results["forgetting"]["text"]["forgotten"]["difference"] == 0
    for system, rows in (("lsm", 3), ("text", 4)):  # one clip cannot be heard
        attention = results["attention"][system]
        assert attention["rows"] + attention["empty"] == 4 and attention["rows"] == rows
        value = np.array(attention["by_group"]["value"])
        assert value.shape == (2, 2, 4)
        assert value.sum(-1) == pytest.approx(np.ones((2, 2)), abs=1e-6)
        for name in ("by_group", "by_layer", "in_all"):
            low, middle, high = (np.array(attention[name][key]) for key in ("low", "value", "high"))
            assert (low <= middle + 1e-12).all() and (middle <= high + 1e-12).all()
    divergence = results["divergence"]["lsm"]
    assert divergence["rows"] == 3 and divergence["in_all"]["value"] > 0
    assert sum(line["tokens"] for line in divergence["by_position"]) == divergence["in_all"]["tokens"]
    assert results["settings"]["transcript_threshold"] == 0.5

    report = (tmp_path / "bias_report.md").read_text()
    for part in (
        "collapse rate",
        "| one_word | lsm |",
        "Name three colors.",
        "before training",
        "gap +",
        FOUND,
        "| metadata.jsonl:4 |",
    ):
        assert part in report
    for line in report.splitlines():
        if line.startswith("!["):
            image = tmp_path / line.split("(")[1].rstrip(")")
            assert image.read_bytes().startswith(b"\x89PNG")
    assert report.count("![") == 5

    # Figures are computed from what is on disk.
    (tmp_path / "bias_report.md").unlink()
    script.main(script.EvalArguments(str(tmp_path), recompute=True, resamples=20))
    again = json.loads((tmp_path / "bias.json").read_text())
    for key in ("figures", "gaps", "outcomes", "forgetting", "attention", "divergence"):
        assert again[key] == results[key]
    assert (tmp_path / "bias_report.md").read_text() == report


def test_bias_results_say_where_they_come_from(tiny_checkpoint, corpus, tmp_path, monkeypatch):
    """Also if the bias was measured after all else, and is judged on another day."""
    plain = {"tasks": ["transcription"], "measured_rows": 0}
    settings = {"max_new_tokens": 6, "resamples": 20, **plain}
    script.main(script.EvalArguments(str(tmp_path), str(tiny_checkpoint), str(corpus), **settings))
    results = evaluate(tiny_checkpoint, corpus, tmp_path, bias_rows=1, **plain)
    versions = json.loads((tmp_path / "results.json").read_text())["versions"]
    assert results["versions"] == versions and "transformers" in versions
    for meta in results["systems"].values():
        assert meta["run"]["versions"] == versions and meta["run"]["settings"]["bias_rows"] == 1
        assert meta["model"]["fingerprint"] and meta["questions"]["sensitivity"]
    monkeypatch.setattr(script, "read_versions", lambda: {"python": "4.0"})
    script.main(script.EvalArguments(str(tmp_path), recompute=True, resamples=10))
    again = json.loads((tmp_path / "bias.json").read_text())
    assert again["versions"] == {"python": "4.0"} and again["systems"] == results["systems"]
    judging = {"recompute": True, "resamples": 10}
    assert again["settings"] == results["settings"] | judging


def test_bias_suite_is_taken_up_where_it_stopped(tiny_checkpoint, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "write_report", lambda *args: None)  # plots take most of the time
    monkeypatch.setattr(suite, "write_bias_report", lambda *args: None)
    whole = evaluate(tiny_checkpoint, corpus, tmp_path / "whole", measured_rows=2)
    answer, measure, seen = LsmSystem.answer, suite.measure_divergence, []

    def answer_some(self, rows, max_new_tokens, on_answer):
        answer(self, rows[:5], max_new_tokens, on_answer)
        if len(rows) > 5:
            raise KeyboardInterrupt

    def measure_one(*args):
        seen.append(args)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(LsmSystem, "answer", answer_some)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_checkpoint, corpus, tmp_path / "parts", measured_rows=2)
    monkeypatch.setattr(LsmSystem, "answer", answer)
    monkeypatch.setattr(suite, "measure_divergence", measure_one)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_checkpoint, corpus, tmp_path / "parts", measured_rows=2)
    answers = (tmp_path / "parts" / "bias" / "answers" / "lsm.jsonl").read_text().splitlines()
    assert len(answers) == 1 + 4 * len(SETTINGS["instructions"]) + 2 * len(SETTINGS["written"])
    monkeypatch.setattr(suite, "measure_divergence", measure)
    parts = evaluate(tiny_checkpoint, corpus, tmp_path / "parts", measured_rows=2)
    for key in ("figures", "outcomes", "attention", "divergence"):
        assert parts[key] == whole[key]


def test_bias_of_several_models_side_by_side(tiny_checkpoint, corpus, tmp_path):
    other = tmp_path / "other"
    LsmPipeline(model=tiny.make_model(seed=1), processor=tiny.make_processor(), device="cpu").save_pretrained(other)
    results = evaluate(
        tiny_checkpoint, corpus, tmp_path / "out", systems=["lsm", f"vanilla={other}"], measured_rows=0, bias_rows=1
    )
    readers = {name: meta["reader"] for name, meta in results["systems"].items()}
    assert readers == {"lsm": "text", "vanilla": "vanilla-text", "vanilla-text": "vanilla-text", "text": "text"}
    assert results["attention"] == results["divergence"] == results["forgetting"] == {}
    assert "Not measured" in (tmp_path / "out" / "bias_report.md").read_text()
    with pytest.raises(ValueError, match="holds answers of another model or other settings: model was"):
        evaluate(other, corpus, tmp_path / "out", tasks=["transcription"], measured_rows=0, bias_rows=1)
    with pytest.raises(ValueError, match="A system cannot be called 'untrained'"):
        evaluate(tiny_checkpoint, corpus, tmp_path / "named", systems=[f"untrained={other}"])
    with pytest.raises(ValueError, match="are for --bias. Add it."):
        evaluate(tiny_checkpoint, corpus, tmp_path / "unsaid", bias=False, requests="somewhere")


def test_bias_checks_of_the_suite_exist():
    for group in ("instructions", "written"):
        for entry in SETTINGS[group].values():
            assert entry.get("check") in CHECKS or set(entry) == {"instruction"}


@pytest.mark.slow
def test_bias_suite_in_two_processes_gives_the_figures_of_one(tiny_checkpoint, corpus, tmp_path):
    one = evaluate(tiny_checkpoint, corpus, tmp_path / "one", measured_rows=3)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "eval.py"]
    command += [
        "--model_name_or_path",
        tiny_checkpoint,
        "--dataset",
        corpus,
        "--output_dir",
        tmp_path / "two",
        "--bias",
    ]
    command += ["--max_new_tokens", "6", "--resamples", "20", "--measured_rows", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, check=True, capture_output=True)
    for kind, files in (("answers", 4), ("attention", 4), ("divergence", 2)):
        assert len(list((tmp_path / "two" / "bias" / kind).iterdir())) == files
    two = json.loads((tmp_path / "two" / "bias.json").read_text())
    for key in ("figures", "gaps", "outcomes"):
        assert two[key] == one[key]
    for system in ("lsm", "text"):  # sums of another number of threads differ in their last digits
        for key, figure in one["attention"][system]["in_all"].items():
            assert two["attention"][system]["in_all"][key] == pytest.approx(figure, abs=1e-6)
    assert two["divergence"]["lsm"]["in_all"] == pytest.approx(one["divergence"]["lsm"]["in_all"], abs=1e-5)
