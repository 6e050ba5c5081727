"""`LsmTrainer`: loss, learning rates, distillation, what it logs, and what it saves and goes on from."""

import json
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from modeling_lsm import LsmForConditionalGeneration
from modeling_lsm.data.collating import SpeechTextCollator
from modeling_lsm.data.loading import load_rows
from modeling_lsm.data.preparing import prepare_rows
from modeling_lsm.data.sound_changes import AudioAugmentation
from modeling_lsm.training import HeldOutAnswers, LsmTrainer, add_lora, last_checkpoint, set_trained_parts
from tests import tiny
from tests.training.test_training import TARGETS, write_rows


@pytest.fixture
def rows(tmp_path, processor) -> Dataset:
    return prepare_rows(load_rows(write_rows(tmp_path / "data")), processor)


def make_args(output_dir: Path, **kwargs) -> SFTConfig:
    return SFTConfig(
        **{
            "output_dir": str(output_dir),
            "length_column_name": "length",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-2,
            **kwargs,
        }
    )


def make_trainer(model, processor, rows, output_dir, with_transcript=False, eval_dataset=None, args=None, **kwargs):
    return LsmTrainer(
        model=model,
        args=make_args(output_dir, **(args or {})),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=processor,
        data_collator=SpeechTextCollator(processor, with_transcript=with_transcript),
        **kwargs,
    )


def history(trainer: LsmTrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_loss_is_that_of_sft_trainer(model, processor, rows, tmp_path):
    batch = SpeechTextCollator(processor)(list(rows))
    ours = make_trainer(model, processor, rows, tmp_path)
    with torch.no_grad():
        loss = ours.compute_loss(model, dict(batch))
        by_count = ours.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(1000))
    theirs = SFTTrainer(
        model=tiny.make_model(),
        args=make_args(tmp_path, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False),
        train_dataset=rows,
        processing_class=processor,
        data_collator=SpeechTextCollator(processor),
    )
    with torch.no_grad():
        expected = theirs.compute_loss(theirs.model, dict(batch))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(by_count * 1000, expected * (batch["labels"] != -100).sum())


@pytest.mark.parametrize("rate", [0.0, 1e-2])
def test_projector_has_a_learning_rate_of_its_own(rate, model, processor, rows, tmp_path):
    set_trained_parts(model, ["projector", "llm"])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(
        model, processor, rows, tmp_path, projector_learning_rate=rate, args={"learning_rate": 1e-2 - rate}
    )
    trainer.train()
    changed = {name.split(".")[1] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == ({"projector"} if rate else {"language_model"})
    optimized = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(optimized) == len(set(map(id, optimized))) == sum(p.requires_grad for p in model.parameters())
    decayed = {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert decayed == {trainer.args.weight_decay, 0.0}


def test_distillation_adds_the_divergence_from_reading(model, processor, rows, tmp_path):
    rows = rows.map(lambda row: {"text": row["target"].upper()}, features=rows.features)
    batch = SpeechTextCollator(processor, with_transcript=True)(list(rows))
    trainer = make_trainer(model, processor, rows, tmp_path, with_transcript=True, distill_weight=0.5)
    plain = make_trainer(model, processor, rows, tmp_path)
    with torch.no_grad():
        distilled = trainer.compute_loss(model, dict(batch))
        loss = plain.compute_loss(model, {key: batch[key] for key in batch if not key.startswith("teacher_")})

        divergence, count = 0.0, 0
        for row in rows:  # one at a time, and by the definition
            one = SpeechTextCollator(processor, with_transcript=True)([row])
            hearing = model(**{key: one[key] for key in one if not key.startswith("teacher_")}).logits[0, :-1]
            reading = model(input_ids=one["teacher_input_ids"]).logits[0, :-1]
            p = reading[one["teacher_labels"][0, 1:] != -100].softmax(-1)
            q = hearing[one["labels"][0, 1:] != -100].softmax(-1)
            divergence += (p * (p.log() - q.log())).sum()
            count += len(p)
    assert divergence > 0.01
    torch.testing.assert_close(distilled, loss + 0.5 * divergence / count, atol=1e-4, rtol=1e-4)


def test_distillation_teacher_has_no_lora(model, processor, rows, tmp_path):
    rows = rows.map(lambda row: {"text": row["target"].upper()}, features=rows.features)
    add_lora(model, peft.LoraConfig(r=4))
    set_trained_parts(model, ["projector", "llm"])
    batch = SpeechTextCollator(processor, with_transcript=True)(list(rows))
    teacher = {key: value for key, value in batch.items() if key.startswith("teacher_")}
    trainer = make_trainer(model, processor, rows, tmp_path, with_transcript=True, distill_weight=0.5)
    logits = torch.zeros((batch["labels"] != -100).sum(), model.config.text_config.vocab_size)
    before = trainer._divergence_from_reading(model, teacher, logits)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert torch.equal(trainer._divergence_from_reading(model, teacher, logits), before)
    trainer.train()
    assert all(value > 0 for value in history(trainer, "divergence"))


def test_log_tells_accuracy_and_throughput(model, processor, rows, tmp_path):
    trainer = make_trainer(model, processor, rows, tmp_path, args={"max_steps": 3})
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert entry["memory_gib"] > 0 and 0 <= entry["mean_token_accuracy"] <= 1
        seconds = 4 / entry["samples_per_second"]
        heard = entry["audio_seconds_per_second"] * seconds
        assert 4 * 0.5 <= heard <= 4 * 1.2  # clips of 0.5 to 1.2 s
        assert 4 * 20 < entry["tokens_per_second"] * seconds < 4 * 100


def test_batches_under_a_token_budget(model, processor, rows, tmp_path):
    seen = []

    class Recorder(SpeechTextCollator):
        def __call__(self, rows):
            seen.append([row["target"] for row in rows])
            batch = super().__call__(rows)
            assert batch["input_ids"].numel() <= 200
            return batch

    trainer = make_trainer(
        model, processor, rows, tmp_path, max_batch_tokens=200, args={"max_steps": -1, "num_train_epochs": 1}
    )
    trainer.data_collator = Recorder(processor)
    trainer.train()
    assert sorted(sum(seen, [])) == sorted(TARGETS)
    assert trainer.state.global_step == len(seen) < len(TARGETS)


def test_held_out_rows_are_answered(model, processor, rows, tmp_path):
    trainer = make_trainer(model, processor, rows, tmp_path / "out", args={"max_steps": 4})
    trainer.add_callback(HeldOutAnswers(trainer, rows, steps=2, shown=3, with_wer=True, max_new_tokens=4))
    trainer.train()
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [row["step"] for row in answers] == [2, 2, 2, 4, 4, 4]
    assert [row["target"] for row in answers[:3]] == TARGETS[:3]
    assert all(row["answer"] for row in answers) and len(history(trainer, "held_out_wer")) == 2
    assert model.training


@pytest.mark.parametrize("slim", [True, False])
@pytest.mark.parametrize("with_lora", [True, False])
def test_goes_on_from_a_checkpoint(with_lora, slim, processor, rows, tmp_path):
    def train(steps: int, resume: str | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = tiny.make_model()
        model.config.base_models = {
            name: {"id": name, "fingerprint": "0", "dtype": "float32"} for name in ("speech", "text")
        }
        if with_lora:
            add_lora(model, peft.LoraConfig(r=4, lora_dropout=0.1))
        set_trained_parts(model, ["projector", "llm"])
        args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        trainer = make_trainer(model, processor, rows, tmp_path / "out", slim=slim, args=args)
        trainer.train(resume_from_checkpoint=resume)
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    whole = train(6)
    resumed = train(6, str(tmp_path / "out" / "checkpoint-3"))
    for name, parameter in whole.items():
        assert torch.equal(resumed[name], parameter), name
    assert not (tmp_path / "out" / "README.md").exists()  # which says that training has ended
    saved = load_file(tmp_path / "out" / "checkpoint-3" / "model.safetensors")
    assert any("audio_tower" in name for name in saved) == (not slim)
    assert any("lora_A" in name for name in saved) == (slim and with_lora)


def test_checkpoints_with_merged_lora_load(processor, rows, tmp_path):
    model = tiny.make_model()
    add_lora(model, peft.LoraConfig(r=4))
    set_trained_parts(model, ["projector", "llm"])
    trainer = make_trainer(model, processor, rows, tmp_path / "out", slim=False)
    trainer.train()
    trainer.save_model()
    batch = SpeechTextCollator(processor)(list(rows))
    reloaded = LsmForConditionalGeneration.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**batch).loss, model.eval()(**batch).loss)
    assert not list((tmp_path / "out").glob("trained.safetensors"))


def test_held_out_rows_are_heard_as_they_are(model, processor, rows, tmp_path):
    trainer = make_trainer(model, processor, rows, tmp_path, eval_dataset=rows)
    trainer.data_collator.augment = AudioAugmentation(noise_snr_db=(0.0, 0.0))
    clean = next(iter(make_trainer(model, processor, rows, tmp_path, eval_dataset=rows).get_eval_dataloader()))
    assert torch.equal(next(iter(trainer.get_eval_dataloader()))["input_features"], clean["input_features"])
    assert trainer.data_collator.augment is not None


def test_best_checkpoint_is_loaded_with_its_lora(processor, rows, tmp_path):
    model = tiny.make_model()
    add_lora(model, peft.LoraConfig(r=4))
    set_trained_parts(model, ["projector", "llm"])
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    args |= {"load_best_model_at_end": True, "learning_rate": 10.0}  # it only gets worse
    trainer = make_trainer(model, processor, rows, tmp_path / "out", eval_dataset=rows, slim=False, args=args)
    trainer.train()
    best = load_file(Path(trainer.state.best_model_checkpoint) / "trained.safetensors")
    last = load_file(tmp_path / "out" / "checkpoint-6" / "trained.safetensors")
    assert not trainer.state.best_model_checkpoint.endswith("-6")
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in best.items())
    assert any(not torch.equal(weights[name], tensor) for name, tensor in last.items())


def test_publishes_the_checkpoint(processor, rows, tmp_path, monkeypatch):
    uploads = []

    class Api:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, repo_id, private=None, exist_ok=False):
            return SimpleNamespace(repo_id=f"someone/{repo_id}")

        def upload_folder(self, repo_id, folder_path, **_):
            uploads.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))
            return SimpleNamespace(commit_url="https://hub.example/commit/1")

    monkeypatch.setattr("modeling_lsm.saving_lsm.HfApi", Api)
    model = tiny.make_model()
    set_trained_parts(model, ["projector"])
    args = {"hub_model_id": "our-lsm", "hub_token": "secret"}
    trainer = make_trainer(model, processor, rows, tmp_path / "out", args=args)
    assert trainer.push_to_hub() == "https://hub.example/commit/1"
    ((repo_id, files),) = uploads
    assert repo_id == "someone/our-lsm" and not any("/" in name for name in files)
    assert {"model.safetensors", "config.json", "README.md", "pipeline_lsm.py"} <= files
    assert not any(name.startswith(("checkpoint", "training_args", "run.json")) for name in files)


def test_refuses_checkpoints_of_another_shape(processor, rows, tmp_path):
    def train(rank: int, resume: str | None = None):
        model = tiny.make_model()
        add_lora(model, peft.LoraConfig(r=rank))
        set_trained_parts(model, ["projector", "llm"])
        args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        make_trainer(model, processor, rows, tmp_path / "out", slim=False, args=args).train(resume)

    train(4)
    with pytest.raises(ValueError, match=r"with the shape \(4, \d+\), but the model's is \(8, \d+\)"):
        train(8, str(tmp_path / "out" / "checkpoint-1"))
    (tmp_path / "out" / "checkpoint-1" / "trained.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-1 lacks \d+ of the \d+ tensors that train"):
        train(4, str(tmp_path / "out" / "checkpoint-1"))


def test_last_checkpoint_is_a_whole_one(tmp_path):
    assert last_checkpoint(str(tmp_path)) is None
    for step in (4, 8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (4, 8):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-8")
