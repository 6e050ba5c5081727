"""Two processes on the CPU under DeepSpeed's ZeRO: what one process does, complete checkpoints, and resuming."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM

from tests.training.test_training import write_rows


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STAGES = ["zero1", "zero2", "zero3", "zero3_offload"]


def train(
    checkpoint: Path, data: Path, output_dir: Path, *arguments: str, processes: int = 2, stage: str | None = None
):
    """Twenty steps of four rows, over however many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(ROOT / "train_sft.py"), "--model_name_or_path", str(checkpoint), "--dataset", str(data)]
    command += ["--output_dir", str(output_dir), "--per_device_train_batch_size", str(4 // processes)]
    command += ["--max_steps", "20", "--save_steps", "10", "--logging_steps", "1", "--learning_rate", "1e-3"]
    # Some gradients are nothing but rounding, as a key's bias's: with its default of 1e-8, Adam makes steps of them.
    command += ["--adam_epsilon", "1e-5"]
    # Grouping by length shuffles what a process sees at a time: its order depends on how many there are.
    command += ["--train_sampling_strategy", "random", "--gradient_checkpointing", "False", "--report_to", "none"]
    if stage is not None:  # or the path of a configuration, which stays as it is
        command += ["--deepspeed", str(ROOT / "ds_configs" / f"{stage}.json") if "/" not in stage else stage]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]


def losses(output_dir: Path) -> torch.Tensor:
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry])


def assert_close(tensor: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Twenty steps of at most 1e-3 each must end at the same place."""
    torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=0, msg=lambda text: f"{name}: {text}")


def forget_second_half(output_dir: Path) -> None:
    """Leaves what a run that was stopped after its first checkpoint would have left."""
    shutil.rmtree(output_dir / "checkpoint-20")
    (output_dir / "model.safetensors").unlink()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("zero") / "data", with_text=True)


@pytest.fixture(scope="module")
def one_process(tiny_checkpoint, data, tmp_path_factory) -> Path:
    """Folder of a run of one process, without DeepSpeed."""
    folder = tmp_path_factory.mktemp("zero") / "one"
    train(tiny_checkpoint, data, folder, "--whole_checkpoints", "True", processes=1)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_zero_does_what_one_process_does(stage, tiny_checkpoint, data, one_process, tmp_path):
    folder = tmp_path / stage
    train(tiny_checkpoint, data, folder, "--whole_checkpoints", "True", stage=stage)
    assert len(losses(folder)) == 20
    torch.testing.assert_close(losses(folder), losses(one_process), atol=1e-5, rtol=0)

    start = load_file(tiny_checkpoint / "model.safetensors")
    expected, weights = load_file(one_process / "model.safetensors"), load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys() == start.keys()
    for name, tensor in weights.items():
        if "audio_tower" in name:
            assert torch.equal(tensor, start[name]), name
        else:
            assert_close(tensor, expected[name], name)
    changed = {name.split(".")[1] for name in weights if not torch.equal(weights[name], start[name])}
    assert changed == {"projector", "language_model"}
    model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
    reloaded = model.state_dict()
    for name, tensor in weights.items():
        assert torch.equal(reloaded[name], tensor), name

    forget_second_half(folder)
    train(tiny_checkpoint, data, folder, "--whole_checkpoints", "True", stage=stage)
    resumed = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_zero3_with_rows_of_text_alone(tiny_checkpoint, data, tmp_path):
    """One process gets speech while the other gets text, in training and in evaluation: neither waits for ever."""
    manifest = tmp_path / "mixed.jsonl"
    rows = pq.read_table(next(data.glob("accepted/*.parquet"))).to_pylist()
    with open(manifest, "w", encoding="utf-8") as file:
        for index, row in enumerate(rows):
            if index % 4 < 2:
                row.pop("audio")
            file.write(json.dumps(row) + "\n")
    arguments = ("--train_sampling_strategy", "sequential", "--held_out", str(manifest))
    arguments += ("--eval_strategy", "steps", "--eval_steps", "10", "--per_device_eval_batch_size", "2")
    train(tiny_checkpoint, manifest, tmp_path / "one", *arguments, processes=1)
    train(tiny_checkpoint, manifest, tmp_path / "two", *arguments, stage="zero3")
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_warm_up_under_zero(stage, tiny_bases, data, tmp_path):
    composed = tmp_path / "composed"
    compose = [sys.executable, "-m", "modeling_lsm.composing", "--output_dir", str(composed)]
    compose += ["--speech_model", str(tiny_bases.speech), "--text_model", str(tiny_bases.text)]
    compose += ["--projector_type", "mlp", "--projector_hidden_size", "32", "--window_size", "2"]
    subprocess.run(compose, check=True, capture_output=True, cwd=ROOT)
    arguments = ("--align_steps", "6", "--num_train_epochs", "0", "--max_steps", "-1")
    train(composed, data, tmp_path / "one", *arguments, "--align_batch_size", "4", processes=1)
    train(composed, data, tmp_path / "two", *arguments, "--align_batch_size", "2", stage=stage)
    expected, weights = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    start = load_file(composed / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert_close(tensor, expected[name], name)
        assert torch.equal(tensor, start[name]) != ("projector" in name), name


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_zero_with_lora_saves_slim_checkpoints(stage, tiny_bases, data, tmp_path):
    composed, folder = tmp_path / "composed", tmp_path / "trained"
    compose = [sys.executable, "-m", "modeling_lsm.composing", "--output_dir", str(composed)]
    compose += ["--speech_model", str(tiny_bases.speech), "--text_model", str(tiny_bases.text)]
    compose += ["--projector_hidden_size", "32", "--projector_num_attention_heads", "4"]
    subprocess.run(compose, check=True, capture_output=True, cwd=ROOT)
    lora = ("--use_peft", "--lora_r", "4", "--lora_dropout", "0.0")
    train(composed, data, tmp_path / "one", *lora, processes=1)
    train(composed, data, folder, *lora, stage=stage)
    torch.testing.assert_close(losses(folder), losses(tmp_path / "one"), atol=1e-5, rtol=0)

    expected, weights = (load_file(path / "model.safetensors") for path in (tmp_path / "one", folder))
    assert weights.keys() == expected.keys()
    assert all(".lora_" in name or name.startswith("lsm.projector.") for name in weights)
    for name, tensor in weights.items():
        assert_close(tensor, expected[name], name)
    forget_second_half(folder)
    train(composed, data, folder, *lora, stage=stage)
    for name, tensor in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=0, msg=name)
    for checkpoint in (folder, folder / "checkpoint-10"):
        AutoModelForMultimodalLM.from_pretrained(checkpoint, trust_remote_code=True)


def test_zero_goes_on_with_another_number_of_processes(tiny_checkpoint, data, one_process, tmp_path):
    """As the README says: DeepSpeed turns its checkpoint into one for any number of processes."""
    stage, folder = "zero2", tmp_path / "zero2"
    train(tiny_checkpoint, data, folder, "--whole_checkpoints", "True", stage=stage)
    forget_second_half(folder)
    state = folder / "checkpoint-10" / "global_step10"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(state), "--output_folder", f"{state}_universal"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    config = json.loads((ROOT / "ds_configs" / f"{stage}.json").read_text())
    (tmp_path / "universal.json").write_text(json.dumps({**config, "checkpoint": {"load_universal": True}}))
    arguments = ("--whole_checkpoints", "True")
    train(tiny_checkpoint, data, folder, *arguments, processes=1, stage=str(tmp_path / "universal.json"))
    torch.testing.assert_close(losses(folder), losses(one_process), atol=1e-5, rtol=0)
    expected = load_file(one_process / "model.safetensors")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert_close(tensor, expected[name], name)
