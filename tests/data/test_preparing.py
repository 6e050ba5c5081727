"""Rows read and measured before training; what cannot be read left out, up to a point."""

import hashlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from datasets import concatenate_datasets
from torch.utils.data import DataLoader

from modeling_lsm import LsmProcessor, load_waveform
from modeling_lsm.data import preparing
from modeling_lsm.data.collating import SpeechTextCollator
from modeling_lsm.data.loading import load_rows, mix_rows
from modeling_lsm.data.preparing import prepare_rows, skip_unreadable
from tests import tiny
from tests.data.test_loading import FORMS, TRAINING, write_form


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Where `datasets` caches: a folder of this test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def reads(monkeypatch) -> list:
    """What has been read so far."""
    clips = []
    monkeypatch.setattr(preparing, "load_waveform", lambda clip, **kw: clips.append(clip) or load_waveform(clip, **kw))
    return clips


def write_clips(folder: Path, count: int = 4, **changes) -> Path:
    """A manifest of clips that get longer and longer, at 8 kHz, and a row of text alone at its end."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(count):
        soundfile.write(folder / f"{index}.flac", tiny.noise(0.5 + index, index, 8000), 8000)
        record = {
            "audio": f"{index}.flac",
            "text": f"words {index}",
            "instruction": "Write.",
            "target": "a cat" * index,
        }
        records.append({**record, **changes})
    records.append({"text": "no sound", "instruction": "Say it.", "target": "silence"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "rows.jsonl"


def damage(folder: Path, librivox) -> None:
    """Makes three clips of four unreadable: no file, a file that is cut off, and text that is named as audio."""
    (folder / "0.flac").unlink()
    (folder / "1.flac").write_bytes(librivox[0].path.read_bytes()[:5000])
    (folder / "3.flac").write_text("This is not audio.")


def test_lengths_are_those_of_the_batch(processor, tmp_path):
    rows = prepare_rows(load_rows(write_clips(tmp_path)), processor)
    assert rows["num_samples"][:] == [round((0.5 + index) * 16_000) for index in range(4)] + [0]
    batch = SpeechTextCollator(processor)(list(rows))
    assert rows["length"][:] == batch["attention_mask"].sum(-1).tolist()
    waveform = load_waveform(str(tmp_path / "2.flac"))
    assert rows["audio_hash"][2] == hashlib.sha256(waveform.astype(np.float32).tobytes()).hexdigest()
    assert rows["audio_hash"][4] is None and len(set(rows["audio_hash"])) == 5
    assert "problem" not in rows.column_names

    slowed = prepare_rows(load_rows(tmp_path / "rows.jsonl"), processor, slowest_speed=0.9)
    timing = processor.timing
    for normal, slow in zip(rows, slowed, strict=True):
        assert slow["num_samples"] == normal["num_samples"]
        counts = [timing.audio_tokens_of_clip(n) for n in (normal["num_samples"], -(-normal["num_samples"] * 10 // 9))]
        assert slow["length"] - normal["length"] == (counts[1] - counts[0] if normal["audio"] else 0)


def test_chats_of_several_clips_are_measured(processor, tmp_path):
    manifest = write_clips(tmp_path)
    clips = [{"type": "audio", "path": f"{index}.flac"} for index in range(3)]
    chat = [{"role": "user", "content": clips}, {"role": "assistant", "content": "Three."}]
    manifest.write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"messages": chat[:1]}))
    with pytest.raises(
        ValueError, match=r"1 of 2 rows cannot be used, .*rows\.jsonl:2: the chat does not end in an an"
    ):
        prepare_rows(load_rows(manifest), processor)
    (row,) = prepare_rows(load_rows(manifest), processor, max_unreadable=0.5)
    assert row["num_samples"] == 4.5 * 16_000 and row["audio_hash"] is None
    assert row["length"] == SpeechTextCollator(processor)([row])["input_ids"].shape[1]


def test_only_the_first_run_reads(processor, reads, tmp_path, caplog):
    manifest = write_clips(tmp_path)
    (tmp_path / "1.flac").unlink()
    caplog.set_level(logging.WARNING)
    first = prepare_rows(load_rows(manifest), processor, max_unreadable=0.5)
    assert len(reads) == 4 + 1  # the one that failed is tried again
    reads.clear()
    processor.tokenizer(["a", "longer"], padding=True, truncation=True, max_length=3)  # which tokenizers remember
    again = prepare_rows(load_rows(manifest), processor, max_unreadable=0.5)
    assert list(again) == list(first) and [clip["path"] for clip in reads] == [str(tmp_path / "1.flac")]
    assert caplog.text.count("1.flac") == 2  # it is told every time

    reads.clear()
    prepare_rows(load_rows(manifest), tiny.make_processor(window_size=8), max_unreadable=0.5)
    assert len(reads) == 4 + 1  # as the lengths are others

    soundfile.write(tmp_path / "1.flac", tiny.noise(2.0), 16_000)
    mended = prepare_rows(load_rows(manifest), processor)
    assert len(mended) == 5 and mended["num_samples"][1] == 32_000


@pytest.mark.slow
def test_another_process_finds_what_was_read(tiny_checkpoint, tmp_path, cache, monkeypatch):
    manifest = write_clips(tmp_path)
    rows = prepare_rows(load_rows(manifest), LsmProcessor.from_pretrained(tiny_checkpoint))
    script = (
        "import sys; from modeling_lsm import LsmProcessor; from modeling_lsm.data import preparing\n"
        "from modeling_lsm.data.loading import load_rows\n"
        "del preparing.load_waveform\n"
        "rows = preparing.prepare_rows(load_rows(sys.argv[1]), LsmProcessor.from_pretrained(sys.argv[2]))\n"
        "print(rows['length'][:], rows['audio_hash'][:])\n"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    command = [sys.executable, "-c", script, str(manifest), str(tiny_checkpoint)]
    root = Path(__file__).parents[2]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root).stdout
    assert output.strip() == f"{rows['length'][:]} {rows['audio_hash'][:]}"


@pytest.mark.parametrize(("form", "num_proc"), [*((form, None) for form in FORMS), ("jsonl", 2), ("embedded", 2)])
def test_unreadable_rows_of_every_form_are_left_out(
    form, num_proc, processor, librivox, tmp_path, monkeypatch, caplog
):
    """Missing, cut off, and no audio at all."""
    monkeypatch.setattr("tests.data.test_loading.wave_bytes", lambda: next(contents))
    sound = librivox[0].path.read_bytes()
    records = [{"audio": f"{i}.flac", "text": "x", "instruction": "Write.", "target": f"{i}"} for i in range(4)]
    contents = iter([sound, sound[:5000], b"This is not audio.", sound] * 2)
    source = write_form(form, tmp_path, records)
    embedded = form in ("embedded", "tar")
    if not embedded:
        (tmp_path / "3.flac").unlink()
    caplog.set_level(logging.WARNING)
    rows = prepare_rows(load_rows(source, columns=TRAINING), processor, max_unreadable=0.8, num_proc=num_proc)
    assert rows["target"][:] == (["0", "3"] if embedded else ["0"])
    assert f"{2 if embedded else 3} of 4 rows cannot be used" in caplog.text
    assert "flac decoder lost sync" in caplog.text and "Format not recognised" in caplog.text
    assert embedded or "There is no audio file" in caplog.text
    with pytest.raises(ValueError, match=r"of 4 rows cannot be used, .*more than the 1\.00% allowed \(--max_unread"):
        prepare_rows(load_rows(source, columns=TRAINING), processor)

    stream = skip_unreadable(load_rows(source, streaming=True, columns=TRAINING), processor, max_unreadable=0.8)
    assert list(stream) == list(rows)


def test_problems_of_the_manifest_count(processor, tmp_path, caplog):
    manifest = write_clips(tmp_path)
    manifest.write_text(manifest.read_text() + "{\n" + json.dumps({"target": "x"}))
    caplog.set_level(logging.WARNING)
    rows = prepare_rows(load_rows(manifest, columns=TRAINING), processor, max_unreadable=0.3)
    assert len(rows) == 5 and "2 of 7 rows cannot be used, namely" in caplog.text
    assert "rows.jsonl:6: broken JSON" in caplog.text and "missing instruction" in caplog.text


def test_rows_that_are_too_long_are_refused(processor, tmp_path):
    rows = load_rows(write_clips(tmp_path))
    lengths = prepare_rows(rows, processor)["length"][:]
    assert len(prepare_rows(rows, processor, max_length=max(lengths))) == 5
    expected = (
        rf"rows\.jsonl:4 has {max(lengths)} tokens, more than max_length={max(lengths) - 1}, as have 1 of 5 rows"
    )
    with pytest.raises(ValueError, match=expected + r"\. Raise --max_length"):
        prepare_rows(rows, processor, max_length=max(lengths) - 1)


def test_prepared_sets_of_every_form_mix(processor, tmp_path):
    sets = [prepare_rows(load_rows(write_clips(tmp_path / name)), processor) for name in "ab"]
    assert list(mix_rows(sets)) == [*sets[0], *sets[1]]
    assert len(mix_rows(sets, [1, 1])) >= 10
    assert concatenate_datasets(sets).features == sets[0].features


def test_streams_are_measured_as_sets_are(processor, librivox, tmp_path):
    manifest = write_clips(tmp_path)
    damage(tmp_path, librivox)
    rows = prepare_rows(load_rows(manifest), processor, max_unreadable=1.0)
    stream = skip_unreadable(load_rows(manifest, streaming=True), processor, max_unreadable=1.0)
    assert stream.features == rows.features
    assert list(stream) == list(rows) and len(rows) == 2
    loaded = DataLoader(stream, batch_size=2, num_workers=1, collate_fn=SpeechTextCollator(processor))
    (batch,) = loaded
    assert batch["attention_mask"].sum(-1).tolist() == rows["length"][:]


def test_a_stream_ends_when_too_much_is_unreadable(processor, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    lines = ["{" if index % 10 == 0 else '{"instruction": "x", "target": "y"}' for index in range(300)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    stream = load_rows(tmp_path / "rows.jsonl", streaming=True)
    assert len(list(skip_unreadable(stream, processor, max_unreadable=0.11))) == 270
    assert caplog.text.count("Left out") == preparing.REPORTED_ROWS
    taken = []
    with pytest.raises(
        ValueError, match=r"11 of 101 rows cannot be used.*rows\.jsonl:101: broken JSON.*than the 9\.00%"
    ):
        taken.extend(skip_unreadable(stream, processor, max_unreadable=0.09))
    with pytest.raises(ValueError, match="more than the 9.00% allowed"):
        list(DataLoader(skip_unreadable(stream, processor, 0.09), batch_size=None, num_workers=1))
