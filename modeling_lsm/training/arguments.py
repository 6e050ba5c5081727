"""The arguments of `train_sft.py`, besides those of TRL, and whether they make sense."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from trl import ModelConfig, SFTConfig

from ..fingerprints import hash_text
from ..modeling_lsm import LsmForConditionalGeneration
from .parts import PARTS


@dataclass
class ScriptArguments:
    """What `SFTConfig` and `ModelConfig` do not say."""

    dataset: list[str] = field(
        default_factory=list, metadata={"help": "Folders of augment.py, manifests or Hub datasets: all are used."}
    )
    asr_dataset: list[str] = field(
        default_factory=list, metadata={"help": "More of them, with speech and transcripts: rows ask for these."}
    )
    dataset_weights: list[float] = field(
        default_factory=list,
        metadata={"help": "Share of each --dataset, then each --asr_dataset. Default: all rows of all."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of Hub datasets."})
    split: str = field(default="train", metadata={"help": "Split of Hub datasets."})
    streaming: bool = field(default=False, metadata={"help": "Read rows as they are needed. Needs --max_steps."})
    max_unreadable: float = field(
        default=0.01, metadata={"help": "Rows that cannot be read are skipped, up to this share of all."}
    )
    held_out: str | None = field(
        default=None, metadata={"help": "Rows for --eval_strategy, --answer_steps and the warm-up's word error rate."}
    )
    held_out_split: str = field(default="test", metadata={"help": "Split of --held_out, if it is on the Hub."})
    answer_steps: int = field(default=0, metadata={"help": "Answer held-out rows every so many steps; 0: never."})
    answer_wer: bool = field(default=False, metadata={"help": "Answer all of them, and log the word error rate."})

    recipe: str = field(
        default="self_powered",
        metadata={"help": "'self_powered' as the rows are, or 'vanilla', the baseline: all ask for transcripts."},
    )
    train: list[str] = field(
        default_factory=lambda: ["projector", "llm"], metadata={"help": f"Parts to train, any of: {', '.join(PARTS)}."}
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector, if not that of everything else."}
    )
    distill_weight: float = field(
        default=0.0, metadata={"help": "Weight of the divergence from what the LLM says reading the transcript."}
    )
    align_steps: int = field(
        default=0, metadata={"help": "First train the projector alone for so many steps, with CTC, without the LLM."}
    )
    align_batch_size: int = field(default=32, metadata={"help": "Clips per step of the warm-up."})
    align_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the warm-up."})

    max_batch_tokens: int | None = field(
        default=None, metadata={"help": "Fill batches up to so many tokens instead of a fixed number of rows."}
    )
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder for the frozen encoder's output, made once and used by every run."}
    )
    augment_speed: list[float] = field(
        default_factory=list, metadata={"help": "Factors of speed to draw from, like 0.9 1.0 1.1."}
    )
    augment_level_db: list[float] = field(
        default_factory=list, metadata={"help": "Lowest and highest change of level, in dB."}
    )
    augment_noise_snr_db: list[float] = field(
        default_factory=list, metadata={"help": "Lowest and highest signal-to-noise ratio, in dB."}
    )
    augment_noise_dir: str | None = field(
        default=None, metadata={"help": "Folder with recordings of noise. Default: white noise."}
    )
    augment_spec: list[int] = field(
        default_factory=list, metadata={"help": "SpecAugment: widest time mask, widest frequency mask, in bins."}
    )

    whole_checkpoints: bool = field(
        default=False, metadata={"help": "Save all weights, not only what trained and where the rest comes from."}
    )
    allow_foreign_targets: bool = field(
        default=False, metadata={"help": "Train on targets that another LLM wrote, or with another chat template."}
    )


def check_arguments(script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Raises a `ValueError` for arguments that make no sense, or not on this machine."""
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing. Name the LSM checkpoint to train: a folder or a Hub id.")
    if not script_args.dataset and not script_args.asr_dataset:
        raise ValueError("There is nothing to train on. Name rows with --dataset or --asr_dataset.")
    if script_args.recipe not in ("self_powered", "vanilla"):
        raise ValueError(f"--recipe is {script_args.recipe!r}; expected 'self_powered' or 'vanilla'.")
    has_gpu = torch.accelerator.is_available()
    if not has_gpu and model_args.attn_implementation is not None and "flash" in model_args.attn_implementation:
        raise ValueError(
            f"--attn_implementation is {model_args.attn_implementation!r}, which needs a GPU, and there is none. Use "
            "'sdpa', which is the default."
        )
    if not has_gpu and (training_args.fp16 or model_args.load_in_4bit or model_args.load_in_8bit):
        raise ValueError(
            "--fp16, --load_in_4bit and --load_in_8bit need a GPU, and there is none. Leave them out; --bf16 works on "
            "a CPU, too."
        )
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not model_args.use_peft:
        raise ValueError("Quantized weights cannot train. Add --use_peft, or leave --load_in_4bit/8bit out.")
    if model_args.use_peft and "llm" not in script_args.train:
        raise ValueError(
            f"--use_peft puts LoRA into the LLM, but --train is {script_args.train}. Add llm, or leave --use_peft out."
        )
    if script_args.streaming:
        if training_args.max_steps < 1:
            raise ValueError("--streaming needs --max_steps: nobody knows how long an epoch of a stream is.")
        for name in ("max_batch_tokens", "feature_cache"):
            if getattr(script_args, name) is not None:
                raise ValueError(f"--{name} needs to know all rows beforehand. Leave out either it or --streaming.")
        if script_args.align_steps > 0:
            raise ValueError("--align_steps needs to know all rows beforehand. Leave out either it or --streaming.")
    if training_args.packing or training_args.padding_free:
        raise ValueError("Rows with audio cannot be packed. Leave --packing and --padding_free out.")
    if training_args.n_gpu > 1:
        raise ValueError(
            f"This process sees {training_args.n_gpu} GPUs and would part batches between them in the wrong places. "
            "Start with torchrun --nproc_per_node, or let it see one GPU (CUDA_VISIBLE_DEVICES=0)."
        )
    if script_args.feature_cache is not None and any(
        value for name, value in vars(script_args).items() if name.startswith("augment_")
    ):
        raise ValueError("--feature_cache holds the output for unchanged speech. Leave out either it or --augment_….")
    if script_args.answer_wer and script_args.answer_steps < 1:
        raise ValueError("--answer_wer needs --answer_steps: how often to answer.")
    if script_args.align_steps > 0 and "projector" not in script_args.train:
        raise ValueError(f"--align_steps trains the projector, but --train is {script_args.train}. Add projector.")
    if script_args.answer_steps > 0 and script_args.held_out is None:
        raise ValueError("--answer_steps needs rows to answer. Name them with --held_out.")
    if training_args.eval_strategy.value != "no" and script_args.held_out is None:
        raise ValueError(f"--eval_strategy {training_args.eval_strategy.value} needs rows. Name them with --held_out.")
    if script_args.feature_cache is not None and "encoder" in script_args.train:
        raise ValueError("--feature_cache holds the output of a frozen encoder, but --train has encoder. Drop either.")


def describe_run(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig, model: LsmForConditionalGeneration
) -> dict[str, Any]:
    """What decides which weights a run ends with: one output folder is for one run."""
    run = {
        key: value
        for key, value in asdict(script_args).items()
        if not key.startswith(("held_out", "answer_")) and key not in ("feature_cache", "max_unreadable")
    }
    run |= {key: value for key, value in asdict(model_args).items() if key == "use_peft" or key.startswith("lora_")}
    return run | {
        "model_name_or_path": model_args.model_name_or_path,
        "seed": training_args.seed,
        "batch_size": training_args.train_batch_size
        * training_args.gradient_accumulation_steps
        * training_args.world_size,
        # Under ZeRO-3 a parameter's own shape is that of an empty one.
        "weights": hash_text(
            str([(name, tuple(getattr(p, "ds_shape", p.shape))) for name, p in model.named_parameters()])
        ),
    }


__all__ = ["ScriptArguments", "check_arguments", "describe_run"]
