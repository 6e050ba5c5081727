"""What trains, what the loss is, and what an interrupted run ends with."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from modeling_lsm.data.collating import SpeechTextCollator
from modeling_lsm.training import set_trained_parts
from tests import tiny


ROOT = Path(__file__).parents[2]
TARGETS = ["a cat", "two dogs ran", "no", "it rains", "well, well, well", "stop", "the sun", "go on then"]


@pytest.fixture
def rows() -> list[dict]:
    return [
        {"instruction": "Write.", "audio": tiny.noise(0.3 + 0.4 * index, index).tolist(), "target": target}
        for index, target in enumerate(TARGETS)
    ]


def make_trainer(model, processor, rows, output_dir, **kwargs) -> SFTTrainer:
    args = SFTConfig(
        output_dir=str(output_dir),
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        bf16=False,
        **{"per_device_train_batch_size": 4, "max_steps": 2, "save_strategy": "no", **kwargs},
    )
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        data_collator=SpeechTextCollator(processor),
    )


def test_loss_of_the_model_is_the_loss_of_the_trainer(model, processor, rows, tmp_path):
    batch = SpeechTextCollator(processor)(rows)
    with torch.no_grad():
        own = model(**batch).loss
        trainer = make_trainer(model, processor, rows, tmp_path)
        fused = trainer.compute_loss(trainer.model, batch, num_items_in_batch=None)
    assert own.item() == pytest.approx(fused.item(), abs=1e-5)


def test_one_batch_of_eight_is_eight_accumulated_batches_of_one(processor, rows, tmp_path):
    weights = []
    for size in (8, 1):
        model = tiny.make_model()
        set_trained_parts(model, ["projector", "llm"])
        trainer = make_trainer(
            model,
            processor,
            rows,
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
        )
        trainer.train()
        weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    start = dict(tiny.make_model().named_parameters())
    for name, whole in weights[0].items():
        step, accumulated = whole - start[name], weights[1][name] - start[name]
        torch.testing.assert_close(
            accumulated, step, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert any((whole != start[name]).any() for name, whole in weights[0].items())


@pytest.mark.parametrize("parts", [["projector"], ["llm"], ["projector", "llm"], ["encoder", "projector", "llm"]])
def test_only_what_is_meant_to_train_does(parts, model, processor, rows, tmp_path):
    prefixes = {"encoder": "lsm.audio_tower", "projector": "lsm.projector", "llm": "lsm.language_model"}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    set_trained_parts(model, parts)
    trainer = make_trainer(model, processor, rows, tmp_path, learning_rate=1e-2, gradient_checkpointing=True)
    trainer.train()

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimized = {names[id(p)] for group in trainer.optimizer.param_groups for p in group["params"]}
    with_state = {names[id(p)] for p in trainer.optimizer.optimizer.state}
    meant = {
        name
        for name in before
        if name.startswith(tuple(prefixes[part] for part in parts)) and "audio_tower.embed_positions" not in name
    }
    assert optimized == with_state == meant
    for name, parameter in model.named_parameters():
        if name not in meant:
            assert parameter.grad is None and torch.equal(parameter, before[name]), name
    for part in parts:
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n.startswith(prefixes[part]))
    assert model.config.trained_parts == [part for part in prefixes if part in parts]


def test_unknown_parts_are_refused(model):
    with pytest.raises(ValueError, match=r"--train got \['decoder'\]; expected any of encoder, projector, llm"):
        set_trained_parts(model, ["decoder"])
    with pytest.raises(ValueError, match="--train got nothing"):
        set_trained_parts(model, [])


@pytest.mark.slow
def test_overfits_real_speech_with_a_tiny_model(processor, librivox, tmp_path):
    """Loss on five real recordings falls to a fraction: gradients reach projector and LLM the right way round."""
    model = tiny.make_model()
    set_trained_parts(model, ["projector", "llm"])
    rows = [
        {"instruction": "Write.", "audio": str(clip.path), "target": clip.text.split()[index]}
        for index, clip in enumerate(librivox)
    ]
    trainer = make_trainer(
        model,
        processor,
        rows,
        tmp_path,
        max_steps=300,
        per_device_train_batch_size=5,
        learning_rate=5e-3,
        logging_steps=1,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.05 * losses[0]


def write_rows(folder: Path, with_text: bool = False) -> Path:
    """Augmented rows with audio files, as `augment.py` leaves them, with the transcripts or without."""
    (folder / "accepted").mkdir(parents=True)
    rows = []
    for index, target in enumerate(TARGETS):
        path = folder / f"{index}.wav"
        soundfile.write(path, np.asarray(tiny.noise(0.5 + 0.1 * index, index)), tiny.SAMPLING_RATE)
        rows.append({"audio": str(path), "task": "transcription", "instruction": "Write.", "target": target})
        if with_text:
            rows[-1]["text"] = target
    pq.write_table(pa.Table.from_pylist(rows), folder / "accepted" / "000000.parquet")
    return folder


def train_command(checkpoint: Path, data: Path, output_dir: Path) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "train_sft.py"), "--model_name_or_path", str(checkpoint)),
        *("--dataset", str(data), "--output_dir", str(output_dir), "--report_to", "none"),
        *("--max_steps", "24", "--save_steps", "4", "--per_device_train_batch_size", "3", "--learning_rate", "1e-3"),
        *("--logging_steps", "1", "--gradient_checkpointing", "False"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="whole LLM"),
        pytest.param(["--use_peft", "--max_batch_tokens", "250", "--feature_cache", "cache"], id="LoRA"),
        pytest.param(["--streaming", "True", "--gradient_accumulation_steps", "2"], id="stream"),
    ],
)
def test_killed_and_resumed_training_ends_with_the_same_weights(arguments, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = write_rows(tmp_path / "data")
    if "--feature_cache" in arguments:
        arguments = [*arguments[:-1], str(tmp_path / "cache")]
    whole_command = train_command(tiny_checkpoint, data, tmp_path / "whole") + arguments
    subprocess.run(whole_command, check=True, capture_output=True)

    command = train_command(tiny_checkpoint, data, tmp_path / "killed") + arguments
    kill_after = random.randint(1, 5)  # checkpoints, of six: somewhere after, or in the midst of the next
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while len(list((tmp_path / "killed").glob("checkpoint-*"))) < kill_after:
            assert process.poll() is None, "training ended before it could be killed"
            assert time.monotonic() < deadline, "training made no checkpoint"
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    # A checkpoint that was being written when the process died must not be taken for a whole one.
    (tmp_path / "killed" / "checkpoint-1000").mkdir()
    resumed = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "'epoch'" in resumed.stdout + resumed.stderr
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    again = load_file(tmp_path / "killed" / "model.safetensors")
    assert whole.keys() == again.keys()
    start = load_file(tiny_checkpoint / "model.safetensors")
    assert any(not torch.equal(whole[name], start[name]) for name in whole.keys() & start.keys())
    for name in whole:
        assert torch.equal(whole[name], again[name]), f"{name}, killed after {kill_after} checkpoints"
