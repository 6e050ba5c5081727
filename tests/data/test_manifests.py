"""Files found, and read as far as they can be."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_lsm.data.manifests import READERS, Unparsable, find_files


def write_tar(path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (["metadata.jsonl", "metadata.csv", "a.parquet"], ["metadata.jsonl"]),
        (["metadata.csv", "a.parquet"], ["metadata.csv"]),
        (["b.parquet", "a.parquet", "a.tar"], ["a.parquet", "b.parquet"]),
        (["b.tar", "a.tar", "notes.txt"], ["a.tar", "b.tar"]),
        (["accepted/000001.parquet", "accepted/000000.parquet", "rejected/000000.parquet"], None),
    ],
)
def test_folders(written, found, tmp_path):
    for name in written:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = found or ["accepted/000000.parquet", "accepted/000001.parquet"]
    assert find_files(str(tmp_path)) == [tmp_path / name for name in expected]


def test_names_that_are_no_files(tmp_path):
    assert find_files("someone/corpus") == []
    with pytest.raises(FileNotFoundError, match="There is no file"):
        find_files(str(tmp_path / "corpus"))
    (tmp_path / "accepted").mkdir()
    with pytest.raises(ValueError, match=r"holds no accepted rows\. Look into its report\.md"):
        find_files(str(tmp_path))


def test_a_webdataset_is_read_up_to_its_damage(tmp_path):
    path = tmp_path / "shard.tar"
    broken = {"b.flac": b"2", "b.json": b"{"}
    write_tar(path, {"a.flac": b"1", "a.json": b'{"text": "one"}', **broken, "c.flac": b"3" * 2000, "c.txt": b"three"})
    whole = dict(READERS[".tar"](path))
    assert whole["shard.tar[a]"] == {"flac": {"path": "a.flac", "bytes": b"1"}, "text": "one"}
    assert whole["shard.tar[b]"].startswith("broken b.json")
    assert whole["shard.tar[c]"] == {"flac": {"path": "c.flac", "bytes": b"3" * 2000}, "txt": "three"}

    path.write_bytes(path.read_bytes()[: 4 * 1024 + 512 + 700])  # inside of c.flac
    *sound, (source, record) = READERS[".tar"](path)
    assert dict(sound) == {name: whole[name] for name in ("shard.tar[a]", "shard.tar[b]")}
    assert source == "shard.tar[c]" and isinstance(record, Unparsable)
    assert record.startswith("the tar file is damaged or cut off here")

    path.write_text("no tar at all" * 100)
    ((source, record),) = READERS[".tar"](path)
    assert isinstance(record, Unparsable)


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{"text": str(index), "other": index} for index in range(200)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert [record for _, record in READERS[".parquet"](path)] == rows
    assert [record for _, record in READERS[".parquet"](path, ["text"])] == [{"text": row["text"]} for row in rows]
    assert [source for source, _ in READERS[".parquet"](path)] == [f"rows.parquet[{index}]" for index in range(200)]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read: .*Fetch or write it again"):
        next(READERS[".parquet"](path))


def test_what_is_no_row_comes_as_such(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": \n7\n')
    records = [record for _, record in READERS[".jsonl"](tmp_path / "rows.jsonl")]
    assert [isinstance(record, Unparsable) for record in records] == [False, True, True]
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "one"}, 7]))
    records = [record for _, record in READERS[".json"](tmp_path / "rows.json")]
    assert records == [{"text": "one"}, "not an object: 7"] and isinstance(records[1], Unparsable)
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a dict; expected a list of rows"):
        next(READERS[".json"](tmp_path / "rows.json"))
