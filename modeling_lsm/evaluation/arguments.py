"""The arguments of `eval.py`, and whether they make sense."""

import re
from dataclasses import dataclass, field

from .bias.scores import READER_SUFFIX, UNTRAINED


SYSTEMS = ("lsm", "cascade", "text")


@dataclass
class EvalArguments:
    """Arguments of `eval.py`."""

    output_dir: str = field(metadata={"help": "Folder for predictions/, results.json and report.md."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "LSM checkpoint to evaluate."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "A manifest, a folder, a Hub dataset, a name in tasks.yaml, or NAME=path of your copy."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    split: str | None = field(default=None, metadata={"help": "Split of a Hub dataset. Default: test."})
    revision: str | None = field(default=None, metadata={"help": "Revision of a Hub dataset."})
    columns: list[str] = field(
        default_factory=list, metadata={"help": "OURS=THEIRS, where the dataset has other names of columns."}
    )
    tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What to measure. Default: the dataset's tasks in tasks.yaml, or else transcription, and own "
            "where rows have an instruction and a target."
        },
    )
    tasks_file: str | None = field(default=None, metadata={"help": "YAML file with more tasks and datasets."})
    target_language: str | None = field(default=None, metadata={"help": "Language of the translation task."})
    draw_wordings: bool = field(
        default=False, metadata={"help": "Draw one of a task's wordings for each row, not the first for all."}
    )
    limit: int | None = field(default=None, metadata={"help": "Use only the first rows."})

    systems: list[str] = field(
        default_factory=list,
        metadata={"help": f"Any of {', '.join(SYSTEMS)}, and NAME=checkpoint for other LSMs. Default: lsm."},
    )
    compare: bool = field(default=False, metadata={"help": f"Add the systems {', '.join(SYSTEMS)}, side by side."})
    asr_model: str | None = field(
        default=None,
        metadata={"help": "ASR model of the cascade. Default: the Whisper that the LSM was composed from."},
    )
    text_model: str | None = field(
        default=None, metadata={"help": "LLM of cascade and text: an LSM or a causal LM. Default: the LSM's own."}
    )
    max_new_tokens: int = field(default=225, metadata={"help": "Longest answer, in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Rows at a time. No answer depends on it."})
    dtype: str = field(default="auto", metadata={"help": "dtype that the weights are loaded in."})
    seed: int = field(default=0, metadata={"help": "Seed of what is drawn for a row, and of resampling."})

    bias: bool = field(default=False, metadata={"help": "Measure the anchor bias, too: bias_report.md."})
    bias_rows: int = field(default=100, metadata={"help": "Clips, and spoken requests, of the bias suite: the first."})
    measured_rows: int = field(
        default=32, metadata={"help": "Clips of the bias suite whose attention and divergence are measured."}
    )
    requests: str | None = field(
        default=None,
        metadata={
            "help": "Clips that speak requests, of any form that --dataset takes. Default: the questions and commands "
            "among --dataset."
        },
    )
    untrained_model: str | None = field(
        default=None, metadata={"help": "The LLM or LSM before training, to see what it forgot."}
    )

    recompute: bool = field(
        default=False, metadata={"help": "Compute figures from the answers on disk, without a model."}
    )
    resamples: int = field(default=1000, metadata={"help": "Resamples of the bootstrap, permutations of the tests."})
    confidence: float = field(default=0.95, metadata={"help": "Of the intervals."})
    update_model_card: bool = field(default=False, metadata={"help": "Write the LSM's figures into its README."})


def check_arguments(args: EvalArguments) -> None:
    """Raises a `ValueError` for arguments that make no sense."""
    if not args.recompute and (args.model_name_or_path is None or args.dataset is None):
        raise ValueError("Give --model_name_or_path and --dataset, or --recompute figures from answers on disk.")
    for name in ("limit", "max_new_tokens", "batch_size", "resamples", "bias_rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; expected 1 or more.")
    if args.measured_rows < 0:
        raise ValueError(f"--measured_rows is {args.measured_rows}; expected 0 or more.")
    if not args.bias and (args.requests or args.untrained_model):
        raise ValueError("--requests and --untrained_model are for --bias. Add it.")
    if not 0 < args.confidence < 1:
        raise ValueError(f"--confidence is {args.confidence}; expected a number between 0 and 1, like 0.95.")
    for column in args.columns:
        if not re.fullmatch(r"[^=]+=[^=]+", column):
            raise ValueError(f"--columns has {column!r}; expected OURS=THEIRS, like text=sentence.")
    for system in args.systems:
        if system not in SYSTEMS and not re.fullmatch(r"[\w-]+=.+", system):
            raise ValueError(
                f"--systems has {system!r}; expected {', '.join(SYSTEMS)}, or NAME=checkpoint for another LSM."
            )
        name, is_checkpoint, _ = system.partition("=")
        if is_checkpoint and (name in (*SYSTEMS, UNTRAINED) or name.endswith(READER_SUFFIX)):
            raise ValueError(
                f"A system cannot be called {name!r}, as {system!r} in --systems has it: {', '.join(SYSTEMS)}, "
                f"{UNTRAINED} and names in {READER_SUFFIX} have a meaning of their own. Give it another name."
            )
    names = [system.partition("=")[0] for system in args.systems]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"--systems has two systems called {', '.join(twice)}. Give each a name of its own.")
    if args.update_model_card and not args.recompute and "lsm" not in list_systems(args):
        raise ValueError("--update_model_card writes the figures of the system lsm. Add it to --systems.")


def list_systems(args: EvalArguments) -> list[str]:
    """The systems that are asked for."""
    return list(dict.fromkeys([*args.systems, *(SYSTEMS if args.compare else ())])) or ["lsm"]


__all__ = ["EvalArguments", "check_arguments", "list_systems"]
