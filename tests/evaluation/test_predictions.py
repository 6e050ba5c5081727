"""Answers on disk: appended, resumed after whatever stopped a run, and never mixed up."""

import json

import pytest
import soundfile

from modeling_lsm.evaluation.predictions import Predictions, read_predictions
from modeling_lsm.evaluation.running import answer_questions
from modeling_lsm.evaluation.scoring import score_predictions
from modeling_lsm.evaluation.tasks import Task
from tests import tiny


META = {"model": {"id": "a", "fingerprint": "1"}, "num_rows": 3, "tasks": {}}
ROWS = [{"id": f"t/{index}", "task": "t", "source": f"m:{index}", "prediction": "é\u2028\ud83d"} for index in range(3)]


def write(folder, rows, process_index=0, meta=META, system="lsm"):
    predictions = Predictions(folder, system, meta, process_index)
    predictions.append(rows)
    predictions.close()
    return predictions


def test_answers_of_several_processes_are_one_system(tmp_path):
    write(tmp_path, ROWS[1:2], process_index=1)
    write(tmp_path, ROWS[:1])
    again = write(tmp_path, ROWS[2:], process_index=1)
    assert again.rows.keys() == {"t/0", "t/1", "t/2"}  # those of the others, too
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["lsm.1.jsonl", "lsm.jsonl"]
    ((system, (meta, rows)),) = read_predictions(tmp_path).items()
    assert (system, meta) == ("lsm", {"system": "lsm", **META})
    assert list(rows.values()) == ROWS  # in order


@pytest.mark.parametrize("kept", [0, 1, 20])
def test_a_torn_line_is_dropped(tmp_path, kept):
    path = write(tmp_path, ROWS).path
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for torn in (lines[:-1], lines[:0]):  # the last row, or the first line of all
        path.write_bytes(b"".join(torn) + lines[len(torn)][:kept])
        again = Predictions(tmp_path, "lsm", META)
        assert list(again.rows.values()) == ROWS[: max(0, len(torn) - 1)]
        again.append(ROWS[max(0, len(torn) - 1) :])
        again.close()
        assert path.read_bytes() == whole


def test_damage_elsewhere_is_not_passed_over(tmp_path):
    path = write(tmp_path, ROWS).path
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:10], *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match="lsm.jsonl:2 is damaged"):
        Predictions(tmp_path, "lsm", META)
    path.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(ValueError, match="does not begin with the line that says which system"):
        read_predictions(tmp_path)


def test_answers_of_another_model_are_refused(tmp_path):
    write(tmp_path, ROWS[:1])
    other = {**META, "model": {"id": "a", "fingerprint": "2"}}
    with pytest.raises(
        ValueError, match="another model or other settings: model was .*'1'.*, now .*'2'.*--output_dir"
    ):
        Predictions(tmp_path, "lsm", other)
    with pytest.raises(ValueError, match="max_new_tokens was None, now 5"):
        Predictions(tmp_path, "lsm", {**META, "max_new_tokens": 5}, process_index=1)
    write(tmp_path, ROWS, meta=other, system="text")  # another system is another matter


def test_the_record_of_a_run_is_not_compared(tmp_path):
    """Versions may differ between a run and the one that goes on with it: the first is on record."""
    for version in ("1", "2"):
        write(tmp_path, ROWS[:1] if version == "1" else ROWS[1:], meta={**META, "run": {"versions": version}})
    assert read_predictions(tmp_path)["lsm"][0]["run"] == {"versions": "1"}


def test_unfinished_answers_are_not_scored(tmp_path):
    with pytest.raises(ValueError, match="holds no predictions"):
        read_predictions(tmp_path)
    write(tmp_path, ROWS[:2])
    with pytest.raises(ValueError, match="2 of the 3 answers of the system 'lsm'.*without --recompute"):
        read_predictions(tmp_path)


def test_the_ceiling_comes_last(tmp_path):
    for system in ("text", "vanilla", "cascade", "lsm", "a"):
        write(tmp_path, ROWS, system=system)
    assert list(read_predictions(tmp_path)) == ["lsm", "a", "vanilla", "cascade", "text"]


# Running and scoring


class Echo:
    """A system that repeats the transcript, and is stopped after some answers."""

    needs_audio, batch_size = True, 2

    def __init__(self, stop_after: int | None = None):
        self.stop_after, self.asked = stop_after, 0

    def answer(self, rows, max_new_tokens, on_answer):
        for index, row in enumerate(rows):
            if self.asked == self.stop_after:
                raise KeyboardInterrupt
            assert row["audio"][1] == 16_000 and len(row["audio"][0]) > 0
            self.asked += 1
            on_answer(index, row["text"])


def make_questions(count: int = 8) -> list[dict]:
    return [
        {"id": f"t/{i}", "task": "t", "source": "m", "audio": (tiny.noise(0.1), 16_000), "text": f"words {i}"}
        | {"instruction": "Write.", "reference": f"words {i}", "problem": None}
        for i in range(count)
    ]


TASK = Task("t", "transcription", ("Write.",), "text", ("wer",))


def run(folder, system, questions, processes=1, name="lsm"):
    meta = {"num_rows": len(questions), "tasks": {"t": {**TASK.to_dict(), "questions": "hash"}}}
    files = [Predictions(folder, name, meta, process) for process in range(processes)]
    for process, predictions in enumerate(files):  # all have read what there was before one adds to it
        answer_questions(system, questions, predictions, 4, {"t": "transcription"}, process, processes)
        predictions.close()


def test_only_what_is_left_is_answered(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Echo(stop_after=3), make_questions())
    system = Echo()
    run(tmp_path, system, make_questions(), processes=2)  # with more processes than before
    assert system.asked == 5
    run(tmp_path, system, make_questions())
    assert system.asked == 5
    ((_, rows),) = read_predictions(tmp_path).values()
    assert [row["prediction"] for row in rows.values()] == [f"words {i}" for i in range(8)]
    assert all(row.keys().isdisjoint({"audio", "kind", "problem"}) for row in rows.values())


def test_unreadable_clips_stay_in_the_denominator(tmp_path):
    questions = make_questions(4)
    (tmp_path / "noise.wav").write_bytes(b"not audio")
    questions[0]["audio"] = {"path": str(tmp_path / "noise.wav"), "bytes": None}
    questions[1]["audio"] = {"path": str(tmp_path / "gone.wav"), "bytes": None}
    questions[2] |= {"audio": None, "problem": "missing audio"}
    questions.append({"id": "t/9", "task": "t", "source": "m:9", "unusable": "missing text"})
    system = Echo()
    run(tmp_path / "predictions", system, questions)
    assert system.asked == 1
    results = score_predictions(read_predictions(tmp_path / "predictions"), resamples=20)
    assert results["figures"]["t"]["wer"]["lsm"]["value"] == 6 / 8
    assert results["counts"]["t"]["lsm"] == {"rows": 4, "empty": 3, "looping": 0, "unreadable": 3}
    reasons = {row["id"]: (row["reason"], row["systems"]) for row in results["unreadable"]}
    assert "cannot be decoded" in reasons["t/0"][0] or "noise.wav" in reasons["t/0"][0]
    assert "There is no audio file" in reasons["t/1"][0] and reasons["t/2"] == ("missing audio", ["lsm"])
    assert results["unusable"] == [{"id": "t/9", "source": "m:9", "reason": "missing text", "systems": ["lsm"]}]


def test_unreadable_clips_are_tried_again(tmp_path):
    questions = make_questions(4)
    for index in (0, 1):
        questions[index]["audio"] = {"path": str(tmp_path / f"{index}.wav"), "bytes": None}
        (tmp_path / f"{index}.wav").write_bytes(b"not audio")
    run(tmp_path / "out", Echo(), questions)
    path = tmp_path / "out" / "lsm.jsonl"
    before = path.read_bytes()
    run(tmp_path / "out", Echo(), questions)
    assert path.read_bytes() == before  # nothing new to say

    soundfile.write(tmp_path / "0.wav", tiny.noise(0.1), tiny.SAMPLING_RATE)
    path.rename(tmp_path / "out" / "lsm.1.jsonl")  # whichever process wrote, and whichever file comes first
    run(tmp_path / "out", Echo(), questions)
    for _ in range(2):
        ((_, rows),) = read_predictions(tmp_path / "out").values()
        assert [row["prediction"] for row in rows.values()] == ["words 0", "", "words 2", "words 3"]
        assert ["problem" in row for row in rows.values()] == [False, True, False, False]
        path.rename(tmp_path / "out" / "lsm.0.jsonl")
        path = tmp_path / "out" / "lsm.0.jsonl"


def test_systems_are_compared_on_the_same_questions(tmp_path):
    questions = make_questions(3)
    run(tmp_path, Echo(), questions)
    run(tmp_path, Echo(), [{**question, "text": "words"} for question in questions], name="text")
    results = score_predictions(read_predictions(tmp_path), resamples=50)
    (comparison,) = results["comparisons"]
    assert (comparison["first"], comparison["second"], comparison["difference"]) == ("lsm", "text", -0.5)
    assert json.loads(json.dumps(results, allow_nan=False)) == results

    (path,) = tmp_path.glob("text.jsonl")
    path.write_text(path.read_text().replace('"hash"', '"other"', 1))
    with pytest.raises(ValueError, match="'text' answered other questions in the task 't'"):
        score_predictions(read_predictions(tmp_path))


def test_a_figure_of_nothing_is_null(tmp_path):
    run(tmp_path, Echo(), [{**question, "reference": ""} for question in make_questions(2)])
    results = score_predictions(read_predictions(tmp_path), resamples=20)
    assert results["figures"]["t"]["wer"]["lsm"] == {"value": None, "low": None, "high": None}


def test_keywords_of_the_text_system_are_the_reference():
    task = {**Task("k", "keywords", ("Name them.",), "keywords", ("precision", "recall")).to_dict(), "questions": "x"}
    said = {"lsm": ["man, dog", "sun"], "text": ["man", "moon, sun"]}
    answers = {
        system: (
            {"tasks": {"k": task}},
            {f"k/{i}": {"id": f"k/{i}", "task": "k", "source": "m", "reference": given, "prediction": text}
             for i, (text, given) in enumerate(zip(texts, (None, ["star"]), strict=True))},
        )
        for system, texts in said.items()
    }  # fmt: skip
    figures = score_predictions(answers, resamples=20)["figures"]["k"]
    assert figures["precision"].keys() == {"lsm"}
    assert figures["precision"]["lsm"]["value"] == pytest.approx(1 / 3)  # man, but not dog, nor sun for star
    assert figures["recall"]["lsm"]["value"] == 1 / 2
    with pytest.raises(ValueError, match="the text system has not answered them"):
        score_predictions({"lsm": answers["lsm"]})
