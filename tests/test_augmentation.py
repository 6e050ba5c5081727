"""Tasks, their draw, filters, blocks, and the whole script killed and started again."""

import collections
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from modeling_lsm import make_chat
from modeling_lsm.augmentation import (
    BlockStore,
    Task,
    assign_instruction,
    generate_targets,
    load_tasks,
    rejection_reason,
    row_identity,
)
from modeling_lsm.augmentation.generation import batches_under_budget
from tests import tiny


ROOT = Path(__file__).parent.parent
NAMES = ["transcription", "continuation", "repetition", "keyword", "intent", "sentiment", "translation"]
TASK = Task("intent", True, ("Why is this said?",))


@pytest.fixture
def tasks() -> list[Task]:
    return load_tasks(NAMES, "German")


def test_every_task_has_eight_wordings_that_fit_speech_and_text(tasks):
    wordings = [wording for task in tasks for wording in task.instructions]
    assert len(set(wordings)) == len(wordings)
    for task in tasks:
        assert len(task.instructions) >= 8
        assert task.generated == (task.name != "transcription")
    for wording in wordings:
        assert not {"audio", "speech", "recording", "hear", "listen", "text", "read", "written"} & set(
            wording.lower().replace(".", " ").replace(",", " ").split()
        ), wording
        assert "{" not in wording
    assert all("German" in wording for wording in tasks[-1].instructions)


def test_a_file_adds_tasks_and_replaces_them(tmp_path):
    path = tmp_path / "more.yaml"
    path.write_text("rhyme:\n  instructions: [Find a rhyme.]\nkeyword:\n  instructions: [Keywords!]\n")
    rhyme, keyword, intent = load_tasks(["rhyme", "keyword", "intent"], "French", str(path))
    assert rhyme == Task("rhyme", True, ("Find a rhyme.",))
    assert keyword.instructions == ("Keywords!",)
    assert len(intent.instructions) >= 8


def test_unknown_and_empty_tasks_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no task 'poem'; expected some of transcription, continuation"):
        load_tasks(["poem"], "French")
    (tmp_path / "more.yaml").write_text("rhyme:\n  generated: true\n")
    with pytest.raises(ValueError, match="The task 'rhyme' has no instructions"):
        load_tasks(["rhyme"], "French", str(tmp_path / "more.yaml"))


def test_draws_depend_on_seed_and_row_alone_and_are_even(tasks):
    ids = [row_identity(f"{index}.flac", "words") for index in range(3500)]
    drawn = [assign_instruction(row_id, 0, tasks, seed=1) for row_id in ids]
    assert drawn == [assign_instruction(row_id, 0, tasks, seed=1) for row_id in ids]
    assert drawn != [assign_instruction(row_id, 0, tasks, seed=2) for row_id in ids]
    counts = collections.Counter(task.name for task, _ in drawn)
    assert set(counts) == set(NAMES) and all(420 < count < 580 for count in counts.values())
    assert len({wording for _, wording in drawn}) == sum(len(task.instructions) for task in tasks)
    # The targets of one row are of different tasks.
    assert len({assign_instruction(ids[0], draw, tasks, 1)[0].name for draw in range(7)}) == 7


@pytest.mark.parametrize(
    ("target", "finished", "reason"),
    [
        ("To ask for help.", True, None),
        ("   ", True, "empty"),
        ("To ask for", False, "unfinished"),
        ("It is is is is clear.", True, "loop"),
        ("go on and go on and go on and go on and.", True, "loop"),
        ("As an AI language model, I cannot say.", True, "refusal"),
        ("I'm sorry, but that is not possible.", True, "refusal"),
        ("Why is this said? To ask for help.", True, "echo of the instruction"),
        ("Help me, please!", True, "transcript"),
        ("To ask for help", True, "no terminal punctuation"),
        ("他需要帮助。", True, None),
    ],
)
def test_rejection_reasons(target, finished, reason):
    assert rejection_reason(TASK, TASK.instructions[0], "help me please", target, finished) == reason


def test_what_a_task_may_do_is_not_held_against_it():
    repetition, keyword = Task("repetition", True, ("Again.",)), Task("keyword", True, ("Key?",))
    transcription = Task("transcription", False, ("Write.",))
    assert rejection_reason(repetition, "Say it.", "help me", "Help me.", True) is None
    assert rejection_reason(keyword, "Key?!", "help me please", "help, please", True) is None
    assert rejection_reason(transcription, "Write.", "no no no no no", "no no no no no", True) is None
    assert rejection_reason(transcription, "Write.", "", "", True) == "empty"


def test_batches_hold_every_row_once_within_the_budget():
    lengths = [7, 120, 30, 30, 500, 1, 64, 64, 64, 2]
    batches = list(batches_under_budget(lengths, budget=200))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 200


def test_targets_are_what_the_llm_says_by_itself(processor):
    """In batches, through the LSM: the same as the plain LLM, asked one at a time with its own chat template."""
    model = tiny.make_model()
    llm = tiny.make_llm()
    llm.model.load_state_dict(model.model.language_model.state_dict())
    llm.tie_weights()
    prompts = [
        ("Why?", "a cat sat on the mat"),
        ("Say it again.", "no"),
        ("In French?", "it rains and it pours, they say"),
    ]
    answers = generate_targets(model, processor, prompts, max_new_tokens=12, batch_tokens=250)
    for (instruction, transcript), (answer, finished) in zip(prompts, answers, strict=True):
        chat = [{"role": "user", "content": f"{instruction}\n\n{transcript}"}]
        inputs = processor.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        own = llm.generate(
            **inputs, max_new_tokens=12, do_sample=False, suppress_tokens=[processor.audio_token_id], pad_token_id=2
        )[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.tokenizer.decode(own, skip_special_tokens=True).strip()
        assert finished == bool((own == model.generation_config.eos_token_id).any())


def test_prompt_for_the_target_and_prompt_for_training_differ_in_the_transcript_alone(processor):
    asked = processor.apply_chat_template(make_chat("Why?", transcript="a cat"), add_generation_prompt=True)
    trained = processor.apply_chat_template(make_chat("Why?", audio="clip.flac"), add_generation_prompt=True)
    assert trained.replace(processor.audio_token, "a cat") == asked


def test_blocks_survive_and_other_settings_are_refused(tmp_path):
    store = BlockStore(tmp_path, {"seed": 0})
    store.write(0, {"accepted": [{"a": 1}], "rejected": [{"a": 2, "reason": "x"}]}, {"accepted": 1, "x": 1})
    store.write(1, {"accepted": [{"a": 3}]}, {"accepted": 1})
    store = BlockStore(tmp_path, {"seed": 0})
    assert store.is_done(0) and store.is_done(1) and not store.is_done(2)
    assert store.totals() == {"accepted": 2, "x": 1}
    assert pq.read_table(tmp_path / "accepted").to_pylist() == [{"a": 1}, {"a": 3}]
    assert pq.read_table(tmp_path / "rejected").to_pylist() == [{"a": 2, "reason": "x"}]
    with pytest.raises(ValueError, match=r"other settings: seed was 0, now 1.*another --output_dir"):
        BlockStore(tmp_path, {"seed": 1})


def test_a_full_disk_leaves_no_half_written_block(tmp_path, monkeypatch):
    store = BlockStore(tmp_path, {})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write(0, {"accepted": [{"a": 1}]}, {"accepted": 1})
    assert not store.is_done(0)
    assert not list(tmp_path.glob("**/*.parquet")) and not list(tmp_path.glob("**/*.partial"))


def augment_command(checkpoint: Path, manifest: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "augment.py"), "--model_name_or_path", str(checkpoint)),
        *("--dataset", str(manifest), "--output_dir", str(output_dir), "--max_new_tokens", "24", *more),
    ]


def read_outcome(folder: Path, outcome: str) -> dict[str, dict]:
    rows = [row for path in sorted(folder.glob(f"{outcome}/*.parquet")) for row in pq.read_table(path).to_pylist()]
    by_id = {row["row_id"]: row for row in rows}
    assert len(by_id) == len(rows), "a row stands twice"
    return by_id


@pytest.mark.slow
def test_killed_and_resumed_augmentation_loses_and_repeats_no_row(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text(
        "".join(json.dumps({"audio": f"{i}.flac", "text": f"words number {i} of many"}) + "\n" for i in range(1100))
    )
    subprocess.run(augment_command(tiny_checkpoint, manifest, tmp_path / "whole"), check=True, capture_output=True)

    command = augment_command(tiny_checkpoint, manifest, tmp_path / "killed")
    for blocks in (1, 3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while len(list(tmp_path.glob("killed/journal/[0-9]*.json"))) < blocks and process.poll() is None:
            assert time.monotonic() < deadline, "no block was written"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / "provenance.json").exists()
    subprocess.run(command, check=True, capture_output=True)

    for outcome in ("accepted", "rejected"):
        assert read_outcome(tmp_path / "killed", outcome) == read_outcome(tmp_path / "whole", outcome)
    rows = {**read_outcome(tmp_path / "killed", "accepted"), **read_outcome(tmp_path / "killed", "rejected")}
    assert {row["text"] for row in rows.values()} == {f"words number {i} of many" for i in range(1100)}

    other = subprocess.run([*command, "--seed", "5"], capture_output=True, text=True)
    assert other.returncode != 0 and "seed was 0, now 5" in other.stderr
