"""Corpora of every form as streams, with what is wrong in them named and placed."""

import csv
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from modeling_lsm.data.corpora import Corpus, SeenRows, audio_problem, sentence_case
from tests import tiny


ROWS = [{"audio": "clips/a.flac", "text": "one"}, {"audio": "clips/b.flac", "text": "two"}]


def write_tar(path):
    with tarfile.open(path, "w") as tar:
        for row in ROWS:
            waveform = io.BytesIO()
            soundfile.write(waveform, tiny.noise(0.1), tiny.SAMPLING_RATE, format="FLAC")
            for ending, content in (("flac", waveform.getvalue()), ("txt", row["text"].encode())):
                info = tarfile.TarInfo(f"{row['text']}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder", "shards"])
def test_every_form_gives_the_same_rows(kind, tmp_path):
    names = {"folder": "metadata.jsonl", "shards": "train-0.parquet"}
    path = tmp_path / names.get(kind, f"rows.{kind}")
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["audio", "text"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        pq.write_table(pa.Table.from_pylist([{**row, "other": 1} for row in ROWS]), path)
    corpus = Corpus(str(tmp_path if kind in names else path))
    rows = list(corpus)
    assert [row.text for row in rows] == ["one", "two"]
    assert [row.audio for row in rows] == [str(tmp_path / "clips" / "a.flac"), str(tmp_path / "clips" / "b.flac")]
    assert [row.problem for row in rows] == [None, None]
    assert all(row.source.startswith(path.name) for row in rows)
    assert corpus.count_rows() in (2, None)
    assert len(list(Corpus(str(path), max_rows=1))) == 1


def test_tars_and_parquet_with_embedded_audio(tmp_path):
    write_tar(tmp_path / "shard.tar")
    rows = list(Corpus(str(tmp_path / "shard.tar"), audio_column="flac", text_column="txt"))
    assert [row.text for row in rows] == ["one", "two"] and [row.problem for row in rows] == [None, None]
    assert all(audio_problem(row.audio, "decode") is None for row in rows)

    embedded = [{"audio": row.audio, "text": row.text} for row in rows]
    pq.write_table(pa.Table.from_pylist(embedded), tmp_path / "rows.parquet")
    corpus = Corpus(str(tmp_path / "rows.parquet"))
    assert corpus.embeds_audio
    assert [row.audio["bytes"] for row in corpus] == [row.audio["bytes"] for row in rows]


def test_what_is_wrong_is_named_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"audio": "a.flac", "text": "fine"}\n'
        b'{"audio": "a.flac", "text": "bro\n'
        b'{"audio": "a.flac", "text": "caf\xe9"}\n'
        b'{"audio": "a.flac"}\n'
        b'{"text": "no audio"}\n'
        b'{"audio": "a.flac", "text": "  "}\n'
        b'{"audio": "a.flac", "text": 7}\n'
        b'{"audio": 7, "text": "x"}\n'
        b"[1]\n"
        b'"duplicate"\n'
    )
    problems = {row.source.split(":")[1]: row.problem for row in Corpus(str(path))}
    assert problems.pop("1") is None
    starts = {
        "2": "broken JSON: Invalid control character|Unterminated",
        "3": "invalid UTF-8",
        "4": "missing text",
        "5": "missing audio",
        "6": "empty transcript",
        "7": "text is not a string: 7",
        "8": "audio is not a path: 7",
        "9": "not an object",
        "10": "not an object: 'duplicate'",
    }
    assert problems.keys() == starts.keys()
    for line, start in starts.items():
        assert problems[line].startswith(start.split("|")[0].split(":")[0]), problems[line]


def test_csv_with_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbfaudio,text\na.flac,fine\nb.flac,caf\xe9\nc.flac,fine too\n")
    rows = list(Corpus(str(tmp_path / "rows.csv")))
    assert [row.problem for row in rows] == [None, "invalid UTF-8", None]
    assert rows[1].source == "rows.csv:3"


def test_corpora_that_cannot_be_opened(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"path": "a.flac", "sentence": "x"}\n')
    with pytest.raises(ValueError, match=r"no column 'audio'; it has \['path', 'sentence'\].*--audio_column"):
        Corpus(str(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match="no column 'text'.*--text_column"):
        Corpus(str(tmp_path / "rows.jsonl"), audio_column="path")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"no column 'audio'; it has \['a'\]"):
        Corpus(str(tmp_path / "rows.parquet"))
    (tmp_path / "rows.json").write_text("[{]")
    with pytest.raises(ValueError, match=r"cannot be read.*JSONL"):
        Corpus(str(tmp_path / "rows.json"))
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(ValueError, match=r"is a '\.txt' file"):
        Corpus(str(tmp_path / "rows.txt"))
    with pytest.raises(FileNotFoundError, match="There is no file"):
        Corpus(str(tmp_path / "gone.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no metadata\.jsonl"):
        Corpus(str(tmp_path / "empty"))


def test_a_path_in_a_dict_is_a_path(tmp_path):
    rows = [{"audio": {"path": "a.flac", "bytes": None}, "text": "one"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (row,) = Corpus(str(tmp_path / "rows.parquet"))
    assert row.audio == {"path": str(tmp_path / "a.flac"), "bytes": None}
    assert row.written_audio["path"] == "a.flac"
    assert "missing audio file" in audio_problem(row.audio, "exists")


def test_audio_checks(tmp_path, librivox):
    (tmp_path / "broken.flac").write_bytes(librivox[0].path.read_bytes()[:5000])
    broken, missing = str(tmp_path / "broken.flac"), str(tmp_path / "missing.flac")
    assert audio_problem(str(librivox[0].path), "decode") is None
    assert audio_problem(broken, "exists") is None
    assert "cut off" in audio_problem(broken, "decode")
    assert audio_problem(missing, "exists") == f"missing audio file: {missing}"
    assert audio_problem(missing, "none") is None


@pytest.mark.parametrize(
    ("text", "cased"),
    [
        ("I'M SURE I SAW IT", "I'm sure I saw it"),
        ("HELLO", "Hello"),
        ("It stays AS IT IS", "It stays AS IT IS"),
        ("lower case", "lower case"),
    ],
)
def test_sentence_case(text, cased):
    assert sentence_case(text) == cased


def test_seen_rows():
    seen = SeenRows()
    assert [seen.is_new(row_id) for row_id in "abab"] == [True, True, False, False]
