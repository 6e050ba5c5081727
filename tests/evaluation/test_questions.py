"""Tables of tasks and datasets, and rows of every kind turned into questions."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from modeling_lsm.evaluation import questions as questions_module
from modeling_lsm.evaluation.answers import find_label
from modeling_lsm.evaluation.checks import CHECKS
from modeling_lsm.evaluation.questions import Records, hash_questions, make_questions, needs_keywords
from modeling_lsm.evaluation.tasks import DatasetEntry, Task, load_dataset_entry, load_task, read_tables


TASKS, DATASETS = read_tables()
ANYWHERE = DatasetEntry("mine", "mine")


@pytest.fixture
def manifest(tmp_path):
    """Writes rows to a manifest and returns it as a dataset."""

    def write(*rows: dict, **settings) -> DatasetEntry:
        path = tmp_path / "metadata.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return DatasetEntry("mine", str(path), **settings)

    return write


def questions_of(dataset: DatasetEntry, task: str, tasks=TASKS, **kwargs) -> tuple[Task, list[dict]]:
    kwargs = {"needs_audio": True, "needs_text": True, **kwargs}
    return make_questions(Records(dataset), load_task(task, tasks, dataset), **kwargs)


# The tables


@pytest.mark.parametrize("name", TASKS)
def test_every_task_of_the_table_loads(name):
    task = load_task(name, TASKS, ANYWHERE)
    assert task.metrics and (task.instructions or task.kind in ("following", "own"))
    assert Task(**json.loads(json.dumps(task.to_dict()))).to_dict() == task.to_dict()


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_of_the_table_loads_with_its_tasks(name):
    dataset = load_dataset_entry(name if DATASETS[name].get("path") else f"{name}=somewhere", DATASETS)
    assert dataset.path and dataset.tasks
    for task in dataset.tasks:
        load_task(task, TASKS, dataset)


def test_datasets_change_their_tasks():
    covost = load_dataset_entry("covost2_en_zh", DATASETS)
    assert (covost.config, covost.columns) == ("en_zh-CN", {"text": "sentence"})
    assert load_task("translation", TASKS, covost).target_language == "Chinese"
    commands = load_dataset_entry("fluent_speech_commands=here.csv", DATASETS)
    assert commands.path == "here.csv" and len(load_task("intent", TASKS, commands).labels) == 31
    changed = load_dataset_entry("covost2_en_de", DATASETS, split="validation", columns={"translation": "de"})
    assert (changed.split, changed.columns) == ("validation", {"text": "sentence", "translation": "de"})


def test_users_add_tasks_and_datasets(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "tasks:\n  tone: {kind: classification, reference: tone, instructions: ['{labels}?'], labels: [calm, angry]}\n"
        "datasets:\n  calls: {path: calls.jsonl, columns: {text: words}, tasks: [tone]}\n"
    )
    tasks, datasets = read_tables(str(file))
    assert "transcription" in tasks and "librispeech_clean" in datasets
    assert load_task("tone", tasks, load_dataset_entry("calls", datasets)).labels == {
        "calm": ["calm"],
        "angry": ["angry"],
    }
    file.write_text("task: {}\n")
    with pytest.raises(ValueError, match="must hold `tasks:` or `datasets:`"):
        read_tables(str(file))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "There is no task 'mine'; expected some of transcription, .*--tasks_file adds tasks"),
        ("wer", "is 'wer'; expected a mapping"),
        ({"kind": "guessing"}, "of the kind 'guessing'; expected one of transcription"),
        ({"kind": "yes_no", "instruction": ["x"]}, r"settings \['instruction'\]; expected some of"),
        ({"kind": "yes_no", "instructions": ["x"]}, "names no `reference`"),
        ({"kind": "yes_no", "reference": "answer"}, "has no instructions"),
        ({"kind": "yes_no", "reference": "a", "instructions": ["x"], "metrics": ["rouge"]}, r"metrics \['rouge'\]"),
        ({"kind": "transcription", "reference": "a", "normalizer": "french"}, "normalizer 'french'; expected one of"),
    ],
)
def test_bad_tasks_are_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        load_task("mine", TASKS if entry is None else {"mine": entry}, ANYWHERE)


def test_dataset_that_is_not_on_the_hub_needs_a_path():
    with pytest.raises(ValueError, match="--dataset mustc_en_de=path/to/manifest"):
        load_dataset_entry("mustc_en_de", DATASETS)


# Questions


def test_transcription(manifest, tmp_path):
    task, (first, second) = questions_of(
        manifest({"audio": "a.wav", "text": "Hello."}, {"audio": "b.wav", "text": ""}), "transcription"
    )
    assert first["reference"] == first["text"] == "Hello." and first["id"] == "transcription/000000"
    assert first["audio"] == {"path": str(tmp_path / "a.wav"), "bytes": None}
    assert first["instruction"] == "Write down the words that follow, exactly as they are."
    assert second["reference"] == ""  # silence has a transcript, which is empty


def test_columns_of_other_names(manifest):
    rows = {"clip": "a.wav", "sentence": "Hello.", "text": "something else", "de": "Hallo."}
    dataset = manifest(rows, columns={"audio": "clip", "text": "sentence", "translation": "de"})
    _, (question,) = questions_of(dataset, "translation")
    assert (question["text"], question["reference"]) == ("Hello.", "Hallo.")
    assert question["instruction"] == "Translate the following into German."


def test_intents_of_fluent_speech_commands(manifest):
    """Action, object and place make an intent, and no wording of one names another."""
    entry = load_dataset_entry("fluent_speech_commands=here.csv", DATASETS)
    labels = load_task("intent", TASKS, entry).labels
    for label, wordings in labels.items():
        for wording in wordings:
            assert find_label(f"The speaker wants to {wording}.", labels) == label
    row = {"path": "a.wav", "transcription": "Kitchen lights, please", "action": "activate", "object": "lights"}
    rows = [{**row, "location": location} for location in ("kitchen", "none", None, "garden")]
    _, questions = questions_of(manifest(*rows, columns=entry.columns, labels=entry.labels), "intent")
    assert [question.get("reference") for question in questions] == [
        *("activate lights kitchen", "activate lights none", None, None)
    ]
    assert questions[2]["unusable"] == "missing intent" and "unknown label" in questions[3]["unusable"]
    assert questions[0]["text"] == "Kitchen lights, please" and questions[0]["audio"]["path"].endswith("a.wav")


def test_classification(manifest):
    rows = [{"audio": "a.wav", "text": "x", "sentiment": label} for label in ("Positive", 1, "mixed", None)]
    task, questions = questions_of(manifest(*rows), "sentiment")
    assert [question.get("reference") for question in questions] == ["positive", "negative", None, None]
    assert questions[0]["instruction"].endswith("nothing else: positive, negative, neutral.")
    assert (
        questions[2]["unusable"].startswith("unknown label 'mixed'")
        and questions[3]["unusable"] == "missing sentiment"
    )

    rows = [{"audio": "a.wav", "text": "x", "intent": label} for label in ("go", "come", "go")]
    task, questions = questions_of(manifest(*rows), "intent")
    assert task.labels == {"come": ["come"], "go": ["go"]} and "{labels}" not in questions[0]["instruction"]


def test_questions_about_speech(manifest):
    row = {"audio": "a.wav", "text": "x", "question": "Is it {so}?", "answer": True, "passage": "A passage."}
    _, (question,) = questions_of(manifest(row), "yes_no")
    assert question["reference"] == "yes" and question["instruction"].endswith("with yes or no: Is it {so}?")
    _, (question,) = questions_of(manifest(row), "spoken_yes_no")
    assert question["instruction"].startswith("A passage.\n\n")

    rows = [
        {"audio": "a.wav", "text": "x", "question": "Who?", "choices": choices, "answer": answer}
        for choices, answer in ((["he", "she"], "B"), ({"text": ["he", "she"]}, 1), ("he\nshe", "she"), ("he", "A"))
    ]
    _, questions = questions_of(manifest(*rows), "multiple_choice")
    for question in questions[:3]:
        assert "Who?\nA. he\nB. she\n" in question["instruction"] and question["choices"] == ["he", "she"]
    assert "not a list of 2 to 26" in questions[3]["unusable"]


def test_keywords_may_have_no_reference(manifest):
    _, (question,) = questions_of(manifest({"audio": "a.wav", "text": "x"}), "keyword")
    assert question["reference"] is None
    _, (question,) = questions_of(manifest({"audio": "a.wav", "keywords": ["a", "b"]}), "keyword", needs_text=False)
    assert question["reference"] == ["a", "b"]


def test_some_rows_have_keywords(manifest):
    rows = [{"audio": "a.wav", "text": "x", "keywords": keywords} for keywords in (["a"], None, "", "a, b", [], [1])]
    records, task = Records(manifest(*rows)), load_task("keyword", TASKS, ANYWHERE)
    assert needs_keywords(records, task) and not needs_keywords(Records(manifest(rows[0])), task)
    _, questions = make_questions(records, task, True, True)
    assert [question.get("reference", "unusable") for question in questions] == [
        *(["a"], None, None, "a, b", "unusable", "unusable")
    ]
    with pytest.raises(ValueError, match="no column 'text', the transcripts, nor 'keywords'"):
        questions_of(manifest({"audio": "a.wav", "keywords": None}), "keyword", needs_text=False)


@pytest.mark.parametrize(
    ("task", "column", "right", "wrong"),
    [
        ("transcription", "text", ["x", ""], [["x"], 3, {"a": 1}]),
        ("translation", "translation", ["x", ["x", "y"]], ["", " ", [], ["x", ""], ["x", None], 3, {"a": "b"}]),
        ("own", "target", ["x", ["x", "y"]], ["", [], [1], 2.5]),
    ],
)
def test_references_are_checked(manifest, task, column, right, wrong):
    shared = {"audio": "a.wav", "text": "x", "instruction": "Say."}
    _, questions = questions_of(manifest(*[{**shared, column: value} for value in [*right, *wrong]]), task)
    assert [question.get("reference") for question in questions] == [*right, *[None] * len(wrong)]
    for question in questions[len(right) :]:
        assert question["unusable"].startswith(f"{column} is "), question


def test_following_draws_a_check_for_each_row(manifest):
    dataset = manifest(*[{"audio": "a.wav", "text": "x"}] * 40)
    _, questions = questions_of(dataset, "following")
    assert len({question["check"]["kind"] for question in questions}) > 10
    assert all(question["check"]["kind"] in CHECKS for question in questions)
    assert questions_of(dataset, "following")[1] == questions
    assert questions_of(dataset, "following", seed=1)[1] != questions


def test_own_instructions(manifest):
    rows = [
        {"audio": "a.wav", "text": "x", "task": "sentiment", "instruction": "Sad?", "target": "No."},
        {"audio": "a.wav", "text": "x", "task": "transcription", "instruction": "Write.", "target": "x"},
    ]
    _, (question,) = questions_of(manifest(*rows), "own")
    assert (question["instruction"], question["reference"]) == ("Sad?", "No.")


def test_wordings_are_drawn_when_asked_to(manifest):
    dataset = manifest(*[{"audio": "a.wav", "text": "x"}] * 30)
    first = {question["instruction"] for question in questions_of(dataset, "transcription")[1]}
    drawn = {question["instruction"] for question in questions_of(dataset, "transcription", draw_wordings=True)[1]}
    assert len(first) == 1 and len(drawn) > 3


def test_rows_of_parquet_and_of_augment(tmp_path):
    clip = {"path": "a.wav", "bytes": b"RIFF"}
    rows = [{"audio": clip, "text": "x", "task": "keyword", "instruction": "Name them.", "target": "x"}]
    (tmp_path / "accepted").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "accepted" / "000000.parquet")
    records = Records(DatasetEntry("mine", str(tmp_path)))
    assert {"instruction", "target"} <= set(records.columns)
    _, (question,) = make_questions(records, load_task("own", TASKS, ANYWHERE), True, True)
    assert question["audio"] == clip and question["instruction"] == "Name them."


def test_rows_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        clip = {"path": Value("string"), "bytes": Value("binary")}  # as `Audio(decode=False)` gives it
        features = Features({"audio": clip, "sentence": Value("string"), "intent": ClassLabel(names=["go", "come"])})
        rows = {"audio": [{"path": "a.wav", "bytes": b"RIFF"}] * 3, "sentence": ["x", "y", "z"], "intent": [1, 0, -1]}
        return Dataset.from_dict(rows, features).to_iterable_dataset()

    monkeypatch.setattr(questions_module, "load_dataset", load_dataset)
    dataset = DatasetEntry("mine", "someone/speech", "en", "validation", "main", {"text": "sentence"})
    task, questions = questions_of(dataset, "intent")
    assert asked == [(("someone/speech", "en"), {"split": "validation", "revision": "main", "streaming": True})]
    assert [question.get("reference") for question in questions] == ["come", "go", None]
    assert questions[0]["audio"] == {"path": "a.wav", "bytes": b"RIFF"} and questions[0]["text"] == "x"
    assert list(task.labels) == ["come", "go"] and questions[2]["unusable"] == "missing intent"


def test_limit_and_hash(manifest):
    dataset = manifest(*[{"audio": f"{i}.wav", "text": str(i)} for i in range(5)])
    assert len(Records(dataset, limit=2).rows) == 2
    _, questions = questions_of(dataset, "transcription")
    assert hash_questions(questions) != hash_questions([{**question, "text": "y"} for question in questions])


def test_hash_is_that_of_what_the_clips_hold(manifest, tmp_path):
    def hash_of(*clips) -> str:
        return hash_questions(questions_of(manifest(*[{"audio": c, "text": "x"} for c in clips]), "transcription")[1])

    (tmp_path / "a.wav").write_bytes(b"one")
    (tmp_path / "b.wav").write_bytes(b"two")
    one = hash_of("a.wav")
    assert one == hash_of("a.wav") == hash_of(str(tmp_path / "a.wav"))  # wherever it lies
    assert len({one, hash_of("b.wav"), hash_of("gone.wav"), hash_of("https://a.example/a.wav")}) == 4
    assert hash_of("gone.wav") == hash_of("lost.wav")
    (tmp_path / "a.wav").write_bytes(b"another")
    assert hash_of("a.wav") != one
    pq.write_table(
        pa.Table.from_pylist([{"audio": {"path": "a", "bytes": b"one"}, "text": "x"}]), tmp_path / "a.parquet"
    )
    records = Records(DatasetEntry("mine", str(tmp_path / "a.parquet")))
    (in_table,) = make_questions(records, load_task("transcription", TASKS, ANYWHERE), True, True)[1]
    (tmp_path / "a.wav").write_bytes(b"one")
    (in_file,) = questions_of(manifest({"audio": "a.wav", "text": "x"}), "transcription")[1]
    assert in_table["audio_hash"] == in_file["audio_hash"]


@pytest.mark.parametrize(
    ("task", "row", "column"),
    [
        ("translation", {"audio": "a.wav", "text": "x"}, "'translation', the reference of the task 'translation'"),
        ("intent", {"audio": "a.wav", "text": "x"}, "'intent', the reference"),
        ("yes_no", {"audio": "a.wav", "text": "x", "answer": "yes"}, "'question', which the instructions"),
        ("multiple_choice", {"audio": "a", "text": "x", "answer": 1, "question": "?"}, "'choices', which the task"),
        ("transcription", {"audio": "a.wav"}, "'text'"),
        ("transcription", {"text": "x"}, "'audio', which has the clips"),
        ("own", {"audio": "a.wav", "text": "x", "target": "y"}, "'instruction', which the task 'own' asks"),
    ],
)
def test_missing_columns_are_named(manifest, task, row, column):
    with pytest.raises(ValueError, match=f"has no column {column}.*it has .*--columns"):
        questions_of(manifest(row), task)


def test_audio_is_not_needed_by_the_text_system(manifest):
    _, (question,) = questions_of(manifest({"text": "x"}), "following", needs_audio=False)
    assert question["problem"] == "missing audio"


def test_rows_that_cannot_be_used(manifest, tmp_path):
    good = {"audio": "a.wav", "text": "x", "translation": "y"}
    dataset = manifest(good, {**good, "translation": None}, {**good, "audio": 3}, {**good, "text": None})
    with open(dataset.path, "a") as file:
        file.write('{"audio": "a.w\n')
    _, questions = questions_of(dataset, "translation")
    assert ["unusable" in question for question in questions] == [False, True, False, True, True]
    assert questions[1]["unusable"] == "missing translation" and questions[4]["unusable"].startswith("broken JSON")
    assert questions[2]["problem"].startswith("audio is not a path: 3")  # it counts, as an empty answer

    with pytest.raises(
        ValueError, match="has no row that can be used in the task 'sentiment'; the first: unknown label"
    ):
        questions_of(manifest({**good, "sentiment": "mixed"}), "sentiment")
    with pytest.raises(ValueError, match="has no rows"):
        Records(manifest())
