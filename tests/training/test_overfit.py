"""Eight clips and the real small models: what trains can learn them by heart, so nothing between them is cut."""

import json
from pathlib import Path

import peft
import pytest
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig

from demo.synthesize import read_sentences, synthesize
from modeling_lsm import LsmPipeline
from modeling_lsm.composing import compose
from modeling_lsm.data.collating import SpeechTextCollator
from modeling_lsm.data.loading import load_rows
from modeling_lsm.data.preparing import prepare_rows
from modeling_lsm.training import FeatureCache, LsmTrainer, add_lora, encoder_key, set_trained_parts


pytestmark = pytest.mark.slow
INSTRUCTION = "Write down what is said."
CLIPS = 8


class StopWhen(TrainerCallback):
    """Ends training at the first log entry that a condition holds at."""

    def __init__(self, condition):
        self.condition, self.holds = condition, False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.holds = self.condition(logs)
            control.should_training_stop = self.holds


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    metadata = synthesize(read_sentences()[:CLIPS], folder)
    rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines()]
    path = folder / "rows.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**row, "instruction": INSTRUCTION, "target": row["text"]}) + "\n")
    return path


@pytest.fixture
def learner(real_speech_model, real_text_model, manifest, tmp_path):
    """Makes the trainer of the real small models on the eight clips."""

    def make(parts: list[str], with_lora: bool, learning_rate: float, steps: int) -> tuple[LsmTrainer, Dataset]:
        model, processor = compose(
            str(real_speech_model),
            str(real_text_model),
            dtype="float32",
            projector_hidden_size=384,
            projector_num_attention_heads=6,
        )
        if with_lora:
            add_lora(model, peft.LoraConfig(r=8, lora_alpha=16))
        set_trained_parts(model, parts)
        rows = prepare_rows(load_rows(manifest), processor)
        cache = FeatureCache(tmp_path / "cache", encoder_key(model, processor))
        cache.build(rows, model, processor)
        args = SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=steps,
            per_device_train_batch_size=CLIPS,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        collator = SpeechTextCollator(processor, end_tokens=model.generation_config.eos_token_id, feature_cache=cache)
        trainer = LsmTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            processing_class=processor,
            data_collator=collator,
            projector_learning_rate=1e-3,
        )
        return trainer, rows

    return make


@pytest.mark.parametrize(("with_lora", "learning_rate"), [(True, 1e-3), (False, 2e-4)], ids=["LoRA", "whole LLM"])
def test_learns_eight_clips_by_heart(with_lora, learning_rate, learner):
    trainer, rows = learner(["projector", "llm"], with_lora, learning_rate, steps=150)
    targets = rows["target"][:]

    def repeats_all(logs: dict[str, float]) -> bool:
        if logs["mean_token_accuracy"] < 1:
            return False
        model = trainer.model.eval()
        pipe = LsmPipeline(model=model, processor=trainer.processing_class, device="cpu")
        answers = pipe(rows["audio"][:], text=INSTRUCTION, batch_size=CLIPS, max_new_tokens=64, do_sample=False)
        model.train()
        return [answer[0]["generated_text"] for answer in answers] == targets

    stop = StopWhen(repeats_all)
    trainer.add_callback(stop)
    trainer.train()
    assert stop.holds


def test_projector_alone_takes_the_loss_below_a_tenth(learner):
    trainer, _ = learner(["projector"], with_lora=False, learning_rate=1e-3, steps=300)
    losses = []

    def is_below_a_tenth(logs: dict[str, float]) -> bool:
        losses.append(logs["loss"])
        return losses[-1] < 0.1 * losses[0]

    stop = StopWhen(is_below_a_tenth)
    trainer.add_callback(stop)
    trainer.train()
    assert stop.holds, losses
