"""`SFTTrainer` for an LSM: two learning rates, distillation from the transcript, slim checkpoints, throughput."""

import copy
import resource
import time
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import has_length
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import compute_flops_per_token, compute_mfu, get_peak_flops

from ..data.collating import predicts_label
from ..modeling_lsm import LsmForConditionalGeneration
from ..pipeline_lsm import LsmPipeline
from ..slim_lsm import can_be_slim, part_of, parts_from_bases
from .batching import grouped_dataloader, stream_dataloader
from .lora import without_lora
from .parts import PARTS


# What a run adds up between two log entries, over all processes.
COUNTERS = ("labels", "correct", "tokens", "audio_seconds", "samples", "divergence")
# What trains, as it is in memory, where a checkpoint holds it otherwise: LoRA may be merged, experts taken apart.
TRAINED_FILE = "trained.safetensors"


class LsmTrainer(SFTTrainer):
    """
    `SFTTrainer` with what an LSM needs besides.

    Args:
        projector_learning_rate (`float`, *optional*):
            Learning rate of the projector. Defaults to that of everything else.
        distill_weight (`float`, *optional*, defaults to 0.0):
            Weight of the KL divergence, in nats per token, from what the LLM says of the target reading the
            transcript to what it says hearing the speech. Needs a collator `with_transcript`.
        max_batch_tokens (`int`, *optional*):
            Fill batches up to so many tokens, padding included, rather than with a fixed number of rows.
        slim (`bool`, *optional*, defaults to `True`):
            Save only what trained, where the rest is what the base models are.
        args (`SFTConfig`): See `SFTTrainer`. Rows are not prepared, as the collator does that, and keep all columns.
        kwargs: See `SFTTrainer`.
    """

    def __init__(
        self,
        *,
        args: SFTConfig,
        projector_learning_rate: float | None = None,
        distill_weight: float = 0.0,
        max_batch_tokens: int | None = None,
        slim: bool = True,
        **kwargs,
    ):
        self.projector_learning_rate = projector_learning_rate
        self.distill_weight = distill_weight
        self.max_batch_tokens = max_batch_tokens
        # The collator renders rows and reads audio, from columns that no model knows.
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        args.remove_unused_columns = False
        super().__init__(args=args, **kwargs)
        self.slim = slim and can_be_slim(self.model)
        self._counts = torch.zeros(len(COUNTERS), device=self.args.device)
        self._counting_since: float | None = None  # from the next step on, so that pauses do not count
        self._batches_had = 0

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        if resume_from_checkpoint is not None and not has_length(self.train_dataset):
            # The trainer would skip a stream's batches with their audio, decoded.
            self.args.ignore_data_skip = True
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            self._batches_had = state.global_step * self.args.gradient_accumulation_steps
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    # ---- batches and the optimizer ----

    def get_train_dataloader(self) -> DataLoader:
        if not has_length(self.train_dataset):
            return stream_dataloader(
                self.train_dataset, self.data_collator, self.args, self.accelerator, self._batches_had
            )
        if self.max_batch_tokens is not None or self.args.train_sampling_strategy == "group_by_length":
            return grouped_dataloader(
                self.train_dataset, self.data_collator, self.args, self.max_batch_tokens, self.accelerator
            )
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        # What is held out is heard as it is.
        collator, self.data_collator = self.data_collator, copy.copy(self.data_collator)
        self.data_collator.augment = None
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.projector_learning_rate is not None:
            projector = {id(parameter) for parameter in self.model.lsm.projector.parameters()}
            groups = []
            for group in optimizer.param_groups:
                of_projector = [parameter for parameter in group["params"] if id(parameter) in projector]
                others = [parameter for parameter in group["params"] if id(parameter) not in projector]
                groups.append({**group, "params": others})
                groups.append({**group, "params": of_projector, "lr": self.projector_learning_rate})
            optimizer.param_groups = [group for group in groups if group["params"]]
        return optimizer

    # ---- the loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        teacher = {key: inputs.pop(key) for key in list(inputs) if key.startswith("teacher_")}
        labels = inputs["labels"]
        # Not the fused head of TRL: away from Triton it computes the logits of every position.
        outputs = model(
            **inputs,
            logits_to_keep=predicts_label(labels),
            use_cache=False,
            num_items_in_batch=num_items_in_batch,
        )
        loss, logits = outputs.loss, outputs.logits.float()
        targets = labels[:, 1:][labels[:, 1:] != -100]
        divergence = 0.0
        if self.distill_weight > 0:
            divergence = self._divergence_from_reading(model, teacher, logits)
            loss = loss + self.distill_weight * divergence / (num_items_in_batch or len(targets))
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # which the average over processes takes back
        if model.training:
            with torch.no_grad():
                counts = [targets.numel(), (logits.argmax(-1) == targets).sum(), inputs["attention_mask"].sum()]
                counts += [self._audio_seconds(inputs), len(labels), divergence]
                # Kept on the device: to read them at every step would make the processor wait for it.
                self._counts += torch.stack([torch.as_tensor(count, device=loss.device).float() for count in counts])
        return (loss, outputs) if return_outputs else loss

    def _divergence_from_reading(self, model, teacher: dict[str, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        """Sum over the targets' tokens of KL(reading the transcript ‖ hearing the speech), in nats."""
        inputs = {key.removeprefix("teacher_"): value for key, value in teacher.items()}
        with torch.no_grad(), without_lora(self.accelerator.unwrap_model(model)):
            reading = model(**inputs, logits_to_keep=predicts_label(inputs["labels"]), use_cache=False)
        return nn.functional.kl_div(
            logits.log_softmax(-1), reading.logits.float().log_softmax(-1), reduction="sum", log_target=True
        )

    def _audio_seconds(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | float:
        if "input_features_mask" not in inputs:
            return 0.0
        timing = self.processing_class.timing
        return inputs["input_features_mask"].sum() * timing.hop_length / timing.sampling_rate

    # ---- the log ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._throughput())
        super().log(logs, start_time)

    def _throughput(self) -> dict[str, float]:
        """Accuracy and speed since the last log entry, over all processes."""
        seconds = time.perf_counter() - self._counting_since
        counts = self.accelerator.reduce(self._counts, "sum").tolist()
        self._counts.zero_()
        self._counting_since = None
        count = dict(zip(COUNTERS, counts, strict=True))
        figures = {
            "mean_token_accuracy": count["correct"] / max(1, count["labels"]),
            "samples_per_second": count["samples"] / seconds,
            "audio_seconds_per_second": count["audio_seconds"] / seconds,
            "tokens_per_second": count["tokens"] / seconds,
        }
        if self.distill_weight > 0:
            figures["divergence"] = count["divergence"] / max(1, count["labels"])
        if self.args.device.type == "cuda":
            figures["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            dtype = "bfloat16" if self.args.bf16 else "float32"
            if (peak := get_peak_flops(torch.cuda.get_device_name(), dtype)) is not None:
                flops = compute_flops_per_token(
                    self.model.config.text_config, round(count["tokens"] / max(1, count["samples"]))
                )
                figures["mfu"] = compute_mfu(flops, figures["tokens_per_second"], self.args.world_size, peak)
        else:
            figures["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return figures

    def training_step(self, *args, **kwargs):
        if self._counting_since is None:
            self._counting_since = time.perf_counter()
        return super().training_step(*args, **kwargs)

    # ---- checkpoints ----

    def create_model_card(self, *args, **kwargs) -> None:
        """Does nothing: the card comes with the checkpoint. TRL's would be in the folder before there is one."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves a checkpoint that loads like any other, slim where that is possible. All processes must call it.
        """
        model = self.accelerator.unwrap_model(self.model)
        state_dict = self._gather_weights(model)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        pipe = LsmPipeline(model=model, processor=self.processing_class, device=model.device)
        pipe.save_pretrained(folder, name=self._checkpoint_name, slim=self.slim, state_dict=state_dict)
        # Loading a checkpoint may convert weights, as of experts: what is resumed is what is in memory.
        is_converted = bool(get_model_conversion_mapping(model, add_legacy=False))
        if _internal_call and (model.config.lora_scaling is not None or is_converted):
            trained = {name: state_dict[name] for name, p in model.named_parameters() if p.requires_grad}
            save_file(trained, folder / TRAINED_FILE)

    def push_to_hub(self, commit_message: str | None = "Train", **kwargs) -> str | None:
        """
        Publishes the model as it is now, slim where that is possible. All processes must call it.

        Returns:
            `str`: Address of the commit, on the main process.
        """
        model = self.accelerator.unwrap_model(self.model)
        state_dict = self._gather_weights(model)
        if not self.is_world_process_zero():
            return None
        return LsmPipeline(model=model, processor=self.processing_class, device=model.device).push_to_hub(
            self._checkpoint_name,
            commit_message=commit_message,
            private=self.args.hub_private_repo,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            slim=self.slim,
            state_dict=state_dict,
        )

    @property
    def _checkpoint_name(self) -> str:
        return self.args.hub_model_id or Path(self.args.output_dir).resolve().name

    def _gather_weights(self, model: LsmForConditionalGeneration) -> dict[str, torch.Tensor]:
        """All weights that a checkpoint may need; under ZeRO-3 on the first process only."""
        if not self.is_deepspeed_enabled:
            return model.state_dict()
        if self.accelerator.deepspeed_plugin.zero_stage == 3:
            # Loading under ZeRO-3 notes the renamings that old checkpoints of any kind need; saving would revert them.
            model._weight_conversions = None
            # What is saved slim is what trains, unless earlier runs have trained something else.
            trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
            saved = set(PARTS) - set(parts_from_bases(model.config))
            only_trained = self.slim and saved <= trained and not (model.config.lora_scaling and "llm" in saved)
            weights = self.deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=only_trained)
        else:
            weights = model.state_dict() if self.args.should_save else None
        # Copied, because DeepSpeed's are views of shared buffers, and without the tied ones: of what shares memory
        # saving keeps the first.
        tied = model.all_tied_weights_keys
        return {name: weight.to("cpu", copy=True) for name, weight in (weights or {}).items() if name not in tied}

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The main process next writes the file that says that the checkpoint is whole.
        self.accelerator.wait_for_everyone()

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:  # by names that the trainer does not know
            self._load_from_checkpoint(self.state.best_model_checkpoint, self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.accelerator.unwrap_model(model or self.model)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        folder = Path(resume_from_checkpoint)
        trained = folder / TRAINED_FILE
        files = [trained] if trained.is_file() else sorted(folder.glob("*.safetensors"))
        missing = set(parameters)
        with torch.no_grad():
            for file in files:
                with safe_open(file, framework="pt") as weights:
                    for name in sorted(parameters.keys() & set(weights.keys())):
                        saved = weights.get_tensor(name)
                        if saved.shape != parameters[name].shape:
                            raise ValueError(
                                f"{resume_from_checkpoint} holds {name} with the shape {tuple(saved.shape)}, but the "
                                f"model's is {tuple(parameters[name].shape)}. Resume with the model and the LoRA "
                                "settings that the run began with, or choose another --output_dir."
                            )
                        parameters[name].copy_(saved)
                        missing.discard(name)
        if missing:
            raise ValueError(
                f"{resume_from_checkpoint} lacks {len(missing)} of the {len(parameters)} tensors that train, such as "
                f"{min(missing)}. Resume with the --train and LoRA settings that the run began with, or choose "
                "another --output_dir."
            )


def last_checkpoint(output_dir: str) -> str | None:
    """The last checkpoint in `output_dir` that was written to its end: from there training goes on."""
    checkpoints = Path(output_dir).glob("checkpoint-*/trainer_state.json")  # the trainer writes this file last
    newest = max(checkpoints, key=lambda path: int(path.parent.name.removeprefix("checkpoint-")), default=None)
    return str(newest.parent) if newest else None


__all__ = ["LsmTrainer", "last_checkpoint"]
