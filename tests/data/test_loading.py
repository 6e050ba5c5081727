"""Sets of rows: opened in one form, mixed, turned into the baseline's."""

import csv
import io
import json
import zipfile
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Audio, Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from torch.utils.data import DataLoader

from modeling_lsm.data import corpora, loading
from modeling_lsm.data.corpora import Corpus
from modeling_lsm.data.loading import ask_for_transcriptions, load_rows, mix_rows
from modeling_lsm.data.rows import FEATURES
from tests import tiny
from tests.data.test_manifests import write_tar


TRAINING = ("instruction", "target")
FORMS = ["jsonl", "json", "csv", "parquet", "embedded", "tar", "folder", "augmented"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Where `datasets` caches: a folder of this test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def wave_bytes(seconds: float = 0.2, seed: int = 0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tiny.noise(seconds, seed), tiny.SAMPLING_RATE, format="WAV")
    return file.getvalue()


def write_form(form: str, folder, records: list[dict]):
    """Writes `records`, whose `audio` is a file's name or `None`, in a form, with the audio; gives what to load."""
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        if record.get("audio"):
            (folder / record["audio"]).write_bytes(wave_bytes())
    names = {"folder": "metadata.jsonl", "augmented": "accepted/000000.parquet", "embedded": "rows.parquet"}
    path = folder / names.get(form, f"rows.{form}")
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    elif form == "tar":
        files = {}
        for index, record in enumerate(records):
            if record["audio"]:
                files[f"{index}.wav"] = wave_bytes()
            files[f"{index}.json"] = json.dumps({key: record[key] for key in TRAINING}).encode()
            files[f"{index}.txt"] = record["text"].encode()
        write_tar(path, files)
    else:
        if form == "embedded":
            records = [{**r, "audio": r["audio"] and {"path": r["audio"], "bytes": wave_bytes()}} for r in records]
        if form == "augmented":  # which writes absolute paths
            records = [{**r, "audio": r["audio"] and str(folder / r["audio"])} for r in records]
        pq.write_table(pa.Table.from_pylist(records), path)
    return folder if form in ("folder", "augmented") else path


RECORDS = [
    {"audio": "a.wav", "text": "one", "instruction": "Write.", "target": "One."},
    {"audio": None, "text": "two", "instruction": "Say it.", "target": "Two."},
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows_read_or_streamed(form, tmp_path):
    source = write_form(form, tmp_path / "set", RECORDS)
    rows = load_rows(source, columns=TRAINING)
    assert rows.features == FEATURES
    for column in ("text", "instruction", "target"):
        assert rows[column][:] == [record[column] for record in RECORDS]
    heard, written = rows
    assert written["audio"] is None
    if form in ("embedded", "tar"):
        assert heard["audio"]["bytes"] == wave_bytes()
    else:
        assert heard["audio"] == {"path": str(tmp_path / "set" / "a.wav"), "bytes": None}
    assert all(row["task"] is row["messages"] is row["problem"] is None for row in rows)
    assert all(row["source"].startswith(str(tmp_path / "set")) for row in rows) and len(set(rows["source"])) == 2

    streamed = load_rows(source, streaming=True, columns=TRAINING)
    assert isinstance(streamed, IterableDataset) and streamed.features == FEATURES
    assert list(streamed) == list(rows)


def test_a_set_of_the_hub_gives_the_same_rows_read_or_streamed(tmp_path, monkeypatch):
    """As the Hub holds most of them: Parquet that knows its `audio` for audio, which `datasets` would decode."""
    records = [
        {"audio": {"path": "a.wav", "bytes": wave_bytes()}, "text": text, "messages": None, "speaker": 1}
        for text in ("one", "two")
    ]
    hub = Dataset.from_list(records).cast_column("audio", Audio())
    hub.to_parquet(tmp_path / "corpus.parquet")
    asked = []

    def load_dataset(*args, streaming, **kwargs):
        asked.append((*args, kwargs))
        data_files = str(tmp_path / "corpus.parquet")
        return datasets.load_dataset("parquet", data_files=data_files, split="train", streaming=streaming)

    monkeypatch.setattr(loading, "load_dataset", load_dataset)
    assert isinstance(load_dataset(streaming=True).features["audio"], Audio)
    asked.clear()
    rows = load_rows("someone/corpus", "test", "clean", "v1", columns=("audio", "text"))
    streamed = load_rows("someone/corpus", "test", "clean", "v1", streaming=True, columns=("audio", "text"))
    assert asked == [("someone/corpus", "clean", {"split": "test", "revision": "v1"})] * 2
    assert rows.features == streamed.features == FEATURES
    assert list(rows) == list(streamed)
    assert rows["audio"][:] == [record["audio"] for record in records] and rows["text"][:] == ["one", "two"]
    assert rows["source"][:] == ["someone/corpus[0]", "someone/corpus[1]"]
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['task'\]; it has \['audio', 'messages', 's"):
        load_rows("someone/corpus", columns=("audio", "task"))


class FakeHub(LocalFileSystem):
    """`hf://` paths, of a folder."""

    protocol = "hf"
    folder = None

    @classmethod
    def _strip_protocol(cls, path):
        return path if path.startswith(str(cls.folder)) else f"{cls.folder}/{path.removeprefix('hf://')}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeHub, "folder", tmp_path)
    monkeypatch.setitem(_registry, "hf", FakeHub)
    folder = tmp_path / "datasets" / "someone" / "corpus@main"
    folder.mkdir(parents=True)
    return folder


def test_files_of_a_stream_from_the_hub_are_fetched(hub, monkeypatch):
    (hub / "a.wav").write_bytes(wave_bytes())
    with zipfile.ZipFile(hub / "clips.zip", "w") as archive:
        archive.writestr("a.wav", wave_bytes())
    own = "hf://datasets/someone/corpus@main"
    paths = [f"{own}/a.wav", f"zip://a.wav::{own}/clips.zip", f"{own}/b.wav", "https://example.org/a.wav"]
    stream = Dataset.from_list([{"audio": path, "text": "one"} for path in paths]).to_iterable_dataset()
    monkeypatch.setattr(loading, "load_dataset", lambda *args, **kwargs: stream)
    there, zipped, missing, url = load_rows("someone/corpus", streaming=True)
    assert there["audio"]["bytes"] == zipped["audio"]["bytes"] == wave_bytes()
    assert there["problem"] is zipped["problem"] is url["problem"] is None
    assert "b.wav cannot be fetched" in missing["problem"]
    assert url["audio"] == {"path": "https://example.org/a.wav", "bytes": None}  # `load_waveform` fetches it, safely


def test_files_of_a_stream_are_fetched_within_limits(hub, monkeypatch):
    with zipfile.ZipFile(hub / "clips.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.wav", bytes(10_000_000))
    path = "zip://bomb.wav::hf://datasets/someone/corpus@main/clips.zip"
    stream = Dataset.from_list([{"audio": path, "text": "one"}]).to_iterable_dataset()
    monkeypatch.setattr(loading, "load_dataset", lambda *args, **kwargs: stream)
    monkeypatch.setattr(loading, "MAX_BYTES", 1_000_000)
    (row,) = load_rows("someone/corpus", streaming=True)
    assert row["problem"] == f"{path} cannot be fetched: it has more than 1000000 bytes"
    assert row["audio"]["bytes"] is None


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_of_the_hub_name_no_other_files(tmp_path, monkeypatch, streaming):
    (tmp_path / "secret.wav").write_bytes(wave_bytes())
    paths = [str(tmp_path / "secret.wav"), f"file://{tmp_path}/secret.wav", "s3://bucket/a.wav", "secret.wav"]
    chat = [{"role": "user", "content": [{"type": "audio"}]}, {"role": "assistant", "content": "A cat."}]
    several = [{"type": "audio", "path": path, "sampling_rate": 8_000} for path in paths[:2]]
    records = [{"audio": {"path": path, "bytes": None}, "messages": json.dumps(chat)} for path in paths]
    records.append({"audio": None, "messages": json.dumps([{"role": "user", "content": several}, chat[1]])})
    records.append({"audio": {"path": paths[0], "bytes": wave_bytes()}, "messages": json.dumps(chat)})
    rows = Dataset.from_list(records)
    rows = rows.to_iterable_dataset() if streaming else rows
    monkeypatch.setattr(loading, "load_dataset", lambda *args, **kwargs: rows)
    monkeypatch.setattr(loading, "fsspec", None)
    *refused, embedded = load_rows("someone/corpus", streaming=streaming)
    for row, path in zip(refused, [*paths, paths[0]], strict=True):
        assert f"{path!r} is not a file of the dataset someone/corpus" in row["problem"]
    assert embedded["problem"] is None and embedded["audio"]["bytes"] == wave_bytes()

    monkeypatch.setattr(
        corpora,
        "load_dataset",
        lambda *args, **kwargs: Dataset.from_list([{"audio": path, "text": "one"} for path in paths]),
    )
    for row in Corpus("someone/corpus"):
        assert "is not a file of the dataset someone/corpus" in row.problem and row.audio is None


def test_what_is_wrong_with_a_row_stands_in_it(tmp_path):
    chat = [{"role": "user", "content": [{"type": "audio"}]}, {"role": "assistant", "content": "A cat."}]
    clips = [{"type": "audio", "path": name} for name in ("a.wav", "b.wav")]
    several = [{"role": "user", "content": clips}, {"role": "assistant", "content": "Two."}]
    lines = {
        '{"audio": "a.wav", "instruction": "Write.", "target": "one"}': None,
        '{"audio": "a.wav", "instruc': "broken JSON",
        '{"audio": "a.wav", "instruction": "Write."}': "missing target",
        '{"audio": 7, "instruction": "Write.", "target": "one"}': "audio is not a path: 7",
        '{"audio": "a.wav", "instruction": ["Write."], "target": "one"}': "instruction is not a string",
        '{"audio": "a.wav", "instruction": "Write.", "target": "\\ud800"}': "target holds half a character",
        json.dumps({"audio": "a.wav", "messages": chat}): None,
        json.dumps({"messages": chat}): "messages hold an audio item without a path",
        json.dumps({"messages": several}): None,
        json.dumps({"audio": "a.wav", "messages": several}): "the row has audio, but its messages hold no",
        json.dumps({"audio": "a.wav", "messages": "?"}): "messages: broken JSON",
        json.dumps({"audio": "a.wav", "messages": [1]}): "messages is not a list of messages",
    }
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    problems = load_rows(tmp_path / "rows.jsonl", columns=TRAINING)["problem"]
    for problem, expected in zip(problems, lines.values(), strict=True):
        assert problem is None if expected is None else problem.startswith(expected)


def test_chats_keep_their_clips(tmp_path):
    """A clip alone moves to the row; several stay in their places, with whole paths."""

    def ask(*items):
        return [{"role": "user", "content": [*items]}, {"role": "assistant", "content": "A cat."}]

    a, b = {"type": "audio", "url": "a.wav"}, {"type": "audio", "audio": str(tmp_path / "b.wav")}
    own, text = {"type": "audio"}, {"type": "text", "text": "What?"}
    records = [
        {"messages": ask(text, a), "text": "x"},
        {"messages": json.dumps(ask(own, text)), "audio": "a.wav"},
        {"messages": ask(a, text, b)},
        {"messages": ask(own, b), "audio": "a.wav"},
        {"messages": ask(text)},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = load_rows(tmp_path / "rows.jsonl", columns=TRAINING)
    assert rows["problem"][:] == [None] * 5
    whole = {name: {"path": str(tmp_path / f"{name}.wav"), "bytes": None} for name in "ab"}
    assert rows["audio"][:] == [whole["a"], whole["a"], None, whole["a"], None]
    contents = [json.loads(messages)[0]["content"] for messages in rows["messages"]]
    placed = {name: {"type": "audio", "path": whole[name]["path"]} for name in "ab"}
    assert contents == [[text, own], [own, text], [placed["a"], text, placed["b"]], [own, placed["b"]], [text]]


def test_chats_of_parquet_may_embed_one_clip(tmp_path):
    def chat(*clips):
        items = [{"type": "text", "text": "What?", "audio": None}]
        items += [{"type": "audio", "text": None, "audio": {"path": "a.wav", "bytes": clip}} for clip in clips]
        return [{"role": "user", "content": items}, {"role": "assistant", "content": None}]

    pq.write_table(
        pa.Table.from_pylist([{"messages": chat(wave_bytes())}, {"messages": chat(b"1", b"2")}]),
        tmp_path / "rows.parquet",
    )
    one, two = load_rows(tmp_path / "rows.parquet", columns=TRAINING)
    assert one["audio"] == {"path": "a.wav", "bytes": wave_bytes()} and one["problem"] is None
    assert json.loads(one["messages"])[0]["content"] == [{"type": "text", "text": "What?"}, {"type": "audio"}]
    assert two["problem"].startswith("messages hold embedded audio of several clips")


def test_a_changed_manifest_is_read_anew(tmp_path, monkeypatch):
    source = write_form("jsonl", tmp_path, RECORDS)
    reads, to_row = [], loading.to_row
    monkeypatch.setattr(loading, "to_row", lambda *args: reads.append(args) or to_row(*args))
    first, again = load_rows(source), load_rows(source)
    assert len(reads) == 2 and first._fingerprint == again._fingerprint
    assert load_rows(source, columns=TRAINING)._fingerprint != first._fingerprint
    write_form("jsonl", tmp_path, [*RECORDS, RECORDS[0]])
    assert len(load_rows(source)) == 3


def test_workers_and_nodes_share_the_files_of_a_stream(tmp_path):
    for index in range(4):
        rows = [{"text": f"{index}-{row}"} for row in range(3)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{index}.parquet")
    stream = load_rows(tmp_path, streaming=True)
    assert stream.num_shards == 4
    texts = {row["text"] for row in load_rows(tmp_path)}
    loaded = [row["text"] for row in DataLoader(stream, batch_size=None, num_workers=2)]
    assert len(loaded) == len(texts) and set(loaded) == texts
    nodes = [[row["text"] for row in split_dataset_by_node(stream, rank, 2)] for rank in range(2)]
    assert [len(node) for node in nodes] == [6, 6] and {*nodes[0], *nodes[1]} == texts


def test_load_rows_names_what_is_wrong(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"audio": "a.flac"}\n')
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['text'\]; it has \['audio'\]"):
        load_rows(tmp_path / "rows.jsonl", columns=("audio", "text"))
    with pytest.raises(ValueError, match=r"lacks .*\['instruction', 'target'\] \(or `messages`\); it has \['audio'\]"):
        load_rows(tmp_path / "rows.jsonl", columns=TRAINING, streaming=True)
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(ValueError, match=r"is a '\.txt' file; expected one of \.jsonl"):
        load_rows(tmp_path / "rows.txt")
    with pytest.raises(FileNotFoundError, match=r"There is no file .*nothing\.jsonl"):
        load_rows(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match=r"has no metadata\.jsonl.*nor is it a folder of augment\.py"):
        load_rows(tmp_path)
    (tmp_path / "accepted").mkdir()
    with pytest.raises(ValueError, match="holds no accepted rows"):
        load_rows(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no rows"):
        load_rows(tmp_path / "empty.jsonl")
    (tmp_path / "shards").mkdir()
    write_form("parquet", tmp_path / "shards", RECORDS * 20)
    (tmp_path / "shards" / "second.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"second\.parquet cannot be read"):
        load_rows(tmp_path / "shards")


@pytest.mark.parametrize("streaming", [False, True])
def test_sets_of_every_form_mix(streaming, tmp_path):
    sets = [
        load_rows(write_form(form, tmp_path / form, RECORDS), streaming=streaming, columns=TRAINING) for form in FORMS
    ]
    assert list(mix_rows(sets)) == [row for rows in sets for row in rows]
    assert mix_rows(sets).features == FEATURES


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_are_how_often_rows_come(streaming, tmp_path):
    sets = []
    for name, count in (("much", 300), ("little", 20), ("text", 20)):
        records = [{"audio": None, "text": f"{name}{index}"} for index in range(count)]
        sets.append(load_rows(write_form("jsonl", tmp_path / name, records), streaming=streaming))
    mixed = [row["text"] for row in mix_rows(sets, [6, 3, 1], seed=1)]
    counts = Counter(text.rstrip("0123456789") for text in mixed)
    assert counts["much"] / len(mixed) == pytest.approx(0.6, abs=0.06)
    assert counts["little"] / len(mixed) == pytest.approx(0.3, abs=0.06)
    assert len(set(mixed)) == 340  # every row of every set
    assert [row["text"] for row in mix_rows(sets, [6, 3, 1], seed=1)] == mixed
    assert [row["text"] for row in mix_rows(sets, [6, 3, 1], seed=2)] != mixed


def test_weights_that_make_no_sense_are_refused(tmp_path):
    rows = load_rows(write_form("jsonl", tmp_path, RECORDS))
    with pytest.raises(ValueError, match=r"There are 2 datasets, but 1 weights: \[1\.0\]"):
        mix_rows([rows, rows], [1.0])
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected numbers above 0"):
            mix_rows([rows, rows], [1.0, weight])


@pytest.mark.parametrize("form", ["parquet", "embedded"])
def test_vanilla_asks_for_the_transcript_of_every_clip(form, tmp_path):
    records = [
        {"audio": f"{index}.wav", "text": f"words {index}", "task": "intent", "instruction": "Why?", "target": "x"}
        for index in range(40)
    ]
    records.insert(3, {**RECORDS[1], "task": None})  # of text alone
    source = write_form(form, tmp_path, records)
    rows, wordings = load_rows(source), ("Write it down.", "What is said?", "Transcribe.")
    vanilla = ask_for_transcriptions(rows, wordings)
    del records[3]
    assert vanilla["audio"][:] == [row["audio"] for row in rows if row["audio"]]
    assert vanilla["target"][:] == vanilla["text"][:] == [record["text"] for record in records]
    assert set(vanilla["task"]) == {"transcription"} and set(vanilla["instruction"]) == set(wordings)
    assert vanilla.features == rows.features
    assert list(ask_for_transcriptions(load_rows(source, streaming=True), wordings)) == list(vanilla)


def test_vanilla_makes_questions_of_chats(tmp_path):
    chat = [
        {"role": "user", "content": [{"type": "audio", "path": "a.wav"}]},
        {"role": "assistant", "content": "A cat."},
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": chat, "text": "meow"}) + "\n{\n")
    row, broken = ask_for_transcriptions(load_rows(tmp_path / "rows.jsonl"), ("Write.",))
    assert (row["instruction"], row["target"], row["messages"]) == ("Write.", "meow", None)
    assert row["audio"]["path"] == str(tmp_path / "a.wav")
    assert broken["problem"].startswith("broken JSON")  # to be counted with all that cannot be used


@pytest.mark.parametrize("streaming", [False, True])
def test_vanilla_without_a_transcript_is_refused(streaming, tmp_path):
    records = [RECORDS[0], {**RECORDS[0], "text": None}]
    rows = load_rows(write_form("jsonl", tmp_path, records), streaming=streaming)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 has audio, but no transcript in `text`"):
        list(ask_for_transcriptions(rows, ("Write.",)))
