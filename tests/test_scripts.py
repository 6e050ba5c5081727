"""The commands, one after another as a user runs them, with tiny models: in one process and in two."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from demo.synthesize import read_sentences
from tests import tiny


ROOT = Path(__file__).parent.parent
PYTHON = [sys.executable]
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(command: list) -> str:
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [PYTHON, TWO_PROCESSES], ids=["one", "two"])
def test_augment_train_eval(launcher, tiny_checkpoint, librivox, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    manifest = librivox[0].path.parent / "metadata.jsonl"

    augmented = tmp_path / "augmented"
    tasks = ["transcription", "repetition", "keyword"]
    run(
        [*launcher, "augment.py", "--model_name_or_path", tiny_checkpoint, "--dataset", manifest]
        + ["--output_dir", augmented, "--max_new_tokens", "16", "--num_targets_per_row", "3", "--tasks", *tasks]
    )
    accepted = pq.read_table(augmented / "accepted").to_pylist()
    assert [row["text"] for row in accepted if row["task"] == "transcription"] == [clip.text for clip in librivox]
    provenance = json.loads((augmented / "provenance.json").read_text())
    assert sum(provenance["counts"].values()) == 15 and provenance["counts"]["accepted: transcription"] == 5

    trained = tmp_path / "trained"
    settings = tmp_path / "recipe.yaml"
    settings.write_text("max_steps: 3\nper_device_train_batch_size: 2\nlogging_steps: 1\nbf16: false\nuse_cpu: true\n")
    run(
        [*launcher, "train_sft.py", "--config", settings, "--model_name_or_path", tiny_checkpoint]
        + ["--dataset", augmented, "--output_dir", trained, "--report_to", "none", "--recipe", "vanilla"]
    )
    config = json.loads((trained / "config.json").read_text())
    assert config["trained_parts"] == ["projector", "llm"]
    assert "pipeline_lsm.py" in {path.name for path in trained.iterdir()}
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "loss" in entry]) == 3

    evaluated = tmp_path / "evaluated"
    run(
        [*launcher, "eval.py", "--model_name_or_path", trained, "--dataset", manifest]
        + ["--output_dir", evaluated, "--max_new_tokens", "8", "--batch_size", "2"]
    )
    files = sorted((evaluated / "predictions").iterdir())  # one for each process
    assert [file.name for file in files] == ["lsm.1.jsonl", "lsm.jsonl"][-1 if launcher == PYTHON else 0 :]
    predictions = [json.loads(line) for file in files for line in file.read_text().splitlines()[1:]]
    assert sorted(row["text"] for row in predictions) == sorted(clip.text for clip in librivox)
    results = json.loads((evaluated / "results.json").read_text())
    word_error_rate = results["figures"]["transcription"]["wer"]["lsm"]["value"]
    assert word_error_rate > 0.5  # three steps teach nothing
    assert results["counts"]["transcription"]["lsm"]["rows"] == 5
    assert f"**{word_error_rate:.3f}**" in (evaluated / "report.md").read_text()


@pytest.mark.slow
def test_demo_with_other_models(tiny_bases, librivox, tmp_path):
    """`make demo` from end to end, with models of one's own; run again, it reuses what is there."""
    tiny.save_llm_of_words([*read_sentences(), *(clip.text for clip in librivox)], tmp_path / "llm")
    command = [*PYTHON, "-m", "demo.run", "--speech-model", tiny_bases.speech, "--text-model", tmp_path / "llm"]
    command += ["--output-dir", tmp_path / "demo"]
    first = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-3000:]
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["loss_last"] < summary["loss_first"]
    assert summary.keys() >= {"checkpoint", "answer", "seconds"}
    assert "reused" not in first.stdout

    second = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert second.returncode == 0 and second.stdout.count("reused") == 4
    again = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert again["answer"] == summary["answer"] and again["loss_last"] == summary["loss_last"]

    other = subprocess.run(
        [*map(str, command[:-4]), "--output-dir", str(tmp_path / "demo")], capture_output=True, cwd=ROOT
    )
    assert other.returncode != 0 and b"Set another OUTPUT_DIR" in other.stderr
