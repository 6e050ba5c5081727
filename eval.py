"""
Measures what an LSM answers, beside a cascade and the LLM that reads the transcript.

    python eval.py --model_name_or_path outputs/trained --dataset heldout/metadata.jsonl --output_dir outputs/eval
    python eval.py … --tasks transcription keyword following --compare --asr_model openai/whisper-large-v2
    python eval.py --recompute --output_dir outputs/eval    # figures from the answers on disk, without a model

`modeling_lsm/evaluation/tasks.yaml` lists the tasks, and datasets by name (`--dataset librispeech_clean`). Any
manifest or folder whose rows have `audio`, `text` and what the tasks name will do. Stopped at any moment and started
again with the same command, it goes on. On several GPUs: `torchrun --nproc_per_node 4 eval.py …`.

`--bias` also measures whether the speech decides what is answered, or the instruction: `bias_report.md`.
"""

import json
import logging
import platform
from dataclasses import asdict
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Pipeline, pipeline
from trl import TrlParser

import modeling_lsm
from modeling_lsm import LsmConfig, LsmForConditionalGeneration, LsmProcessor
from modeling_lsm.composing import read_chat_template
from modeling_lsm.evaluation.arguments import EvalArguments, check_arguments, list_systems
from modeling_lsm.evaluation.bias.questions import make_bias_questions
from modeling_lsm.evaluation.bias.suite import measure_bias, report_bias
from modeling_lsm.evaluation.predictions import Predictions, read_predictions
from modeling_lsm.evaluation.questions import Records, hash_questions, make_questions, needs_keywords
from modeling_lsm.evaluation.report import comparison_table, figure_table, update_model_card, write_report
from modeling_lsm.evaluation.running import answer_questions
from modeling_lsm.evaluation.scoring import CEILING, Answers, score_predictions
from modeling_lsm.evaluation.systems import CascadeSystem, LsmSystem, TextSystem
from modeling_lsm.evaluation.tasks import DatasetEntry, load_dataset_entry, load_task, read_tables
from modeling_lsm.files import write_atomically


logger = logging.getLogger(__name__)

JUDGING = ("resamples", "confidence", "seed", "update_model_card", "recompute", "output_dir")
PACKAGES = ("transformers", "tokenizers", "torch", "accelerate", "datasets", "numpy", "jiwer", "sacrebleu")


def main(args: EvalArguments) -> None:
    check_arguments(args)
    output_dir, results_file = Path(args.output_dir), Path(args.output_dir) / "results.json"
    settings, versions = asdict(args), read_versions()
    if not args.recompute:
        answer_all(args, output_dir / "predictions", {"settings": settings, "versions": versions})
        if not PartialState().is_main_process:
            return

    answers = read_predictions(output_dir / "predictions")
    if args.recompute:
        settings |= recorded_settings(answers)
        if settings["model_name_or_path"] is None or settings["dataset"] is None:
            raise ValueError(
                f"The answers in {output_dir} do not say which command gave them: an earlier version wrote them. Add "
                "the arguments of that command to --recompute, --model_name_or_path and --dataset at least."
            )
    if args.update_model_card and ("lsm" not in answers or settings["model_name_or_path"] is None):
        raise ValueError(
            f"--update_model_card needs answers of the system lsm in {output_dir}, and --model_name_or_path, the "
            "checkpoint whose README it is."
        )
    results = score_predictions(answers, args.resamples, args.seed, args.confidence)
    results["systems"] = {name: meta for name, (meta, _) in answers.items()}
    results["settings"] = settings
    results["versions"] = versions  # of what computed the figures; those of what answered are with the systems
    write_report(output_dir, results, answers)
    write_atomically(results_file, (json.dumps(results, indent=2) + "\n").encode())
    tables = [*figure_table(results), "", *(comparison_table(results) if len(answers) > 1 else [])]
    logger.info("\n%s\n\nMore in %s.", "\n".join(tables), output_dir / "report.md")
    if args.bias or args.recompute and (output_dir / "bias").is_dir():
        if args.recompute:  # the bias may have been measured later than all else
            settings = settings | recorded_settings(read_predictions(output_dir / "bias" / "answers"))
        report_bias(output_dir, settings, versions, args.resamples, args.seed, args.confidence)
        logger.info("The anchor bias: %s.", output_dir / "bias_report.md")
    if args.update_model_card:
        update_model_card(settings["model_name_or_path"], results)


def recorded_settings(answers: Answers) -> dict[str, Any]:
    """What was asked, and by what, if it is on record with `answers`. How these are judged may change."""
    run = next(iter(answers.values()))[0].get("run")
    return {key: value for key, value in run["settings"].items() if key not in JUDGING} if run else {}


def read_versions() -> dict[str, str]:
    """Versions of all that answers or figures may depend on."""
    versions = {"python": platform.python_version(), "modeling_lsm": modeling_lsm.__version__}
    return versions | {package: metadata.version(package) for package in PACKAGES}


def answer_all(args: EvalArguments, folder: Path, run: dict[str, Any]) -> None:
    """Has every system answer every question that it has not answered yet. `run` goes on record with the answers."""
    # Processes that are done wait for the others, which a process group takes for a hang after ten minutes.
    # Without an accelerator, `torchrun` makes several processes only if told so.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    names = list_systems(args)
    table = read_tables(args.tasks_file)[1]
    dataset = load_dataset_entry(
        args.dataset,
        table,
        config=args.dataset_config,
        split=args.split,
        revision=args.revision,
        target_language=args.target_language,
        columns=dict(column.split("=") for column in args.columns),
    )
    records = Records(dataset, args.limit)
    tasks, all_questions = read_questions(args, names, dataset, records)
    if args.bias:
        requests = load_dataset_entry(args.requests, table) if args.requests else None
        spoken = requests and Records(requests, args.limit)
        bias_questions = make_bias_questions(records, spoken, args.bias_rows, args.seed)
    kinds = {name: task.kind for name, task in tasks.items()}
    hashes = {name: hash_questions(questions) for name, questions in all_questions.items()}
    loaded = Models(args, state.device)
    systems = {name.partition("=")[0]: loaded.make(name) for name in names}  # all, before hours go into answers
    untrained = loaded.load(args.untrained_model) if args.untrained_model else None
    for name, system in list(systems.items()):
        asked = list(tasks)
        meta = {
            "dataset": dataset.identity(),
            **system.meta(),
            "max_new_tokens": args.max_new_tokens,
            "dtype": str(system.model.dtype),
            "num_rows": sum(len(all_questions[task]) for task in asked),
            "tasks": {task: {**tasks[task].to_dict(), "questions": hashes[task]} for task in asked},
            "run": run,
        }
        predictions = Predictions(folder, name, meta, state.process_index)
        state.wait_for_everyone()  # all have read what there was before one adds to it
        questions = [question for task in asked for question in all_questions[task]]
        answer_questions(
            system, questions, predictions, args.max_new_tokens, kinds, state.process_index, state.num_processes
        )
        predictions.close()
    state.wait_for_everyone()
    if args.bias:
        measure_bias(
            systems,
            bias_questions,
            folder.parent,
            untrained and TextSystem(*untrained, args.batch_size),
            args.measured_rows,
            args.max_new_tokens,
            dataset.normalizer or "english",
            {"dataset": dataset.identity(), "requests": requests and requests.identity()},
            run,
        )


def read_questions(
    args: EvalArguments, systems: list[str], dataset: DatasetEntry, records: Records
) -> tuple[dict[str, Any], dict[str, list[dict]]]:
    """The tasks, and the questions of each. Adds the text system to `systems` where it has to give the reference."""
    task_table, _ = read_tables(args.tasks_file)
    names = args.tasks or dataset.tasks
    if not names:
        names = ["transcription", *(["own"] if {"instruction", "target"} <= set(records.columns) else [])]
    tasks = {name: load_task(name, task_table, dataset) for name in names}
    if CEILING not in systems and any(needs_keywords(records, task) for task in tasks.values()):
        logger.info("Rows have no keywords: the text system names those of their transcripts, the reference.")
        systems.append(CEILING)
    questions = {}
    for name, task in tasks.items():
        tasks[name], questions[name] = make_questions(
            records,
            task,
            needs_audio=any(system != CEILING for system in systems),
            needs_text=CEILING in systems,
            seed=args.seed,
            draw_wordings=args.draw_wordings,
        )
    return tasks, questions


class Models:
    """Loads models when a system needs them. The LSM and the LLM of the other systems may be one."""

    def __init__(self, args: EvalArguments, device: torch.device):
        self.args, self.device = args, device
        self.pairs: dict[str, tuple[Any, Any]] = {}

    def make(self, name: str) -> Any:
        """The system called `name`."""
        name, _, checkpoint = name.partition("=")
        if checkpoint or name == "lsm":
            pair = self.load(checkpoint or self.args.model_name_or_path)
            if not isinstance(pair[0], LsmForConditionalGeneration):
                raise ValueError(f"{checkpoint or self.args.model_name_or_path} is not an LSM. Compose one first.")
            return LsmSystem(*pair, self.args.batch_size)
        pair = self.load(self.args.text_model or self.args.model_name_or_path)
        if name == "text":
            return TextSystem(*pair, self.args.batch_size)
        return CascadeSystem(self.load_asr(), *pair, self.args.batch_size)

    def load_asr(self) -> Pipeline:
        """The ASR model of the cascade."""
        name, revision = self.args.asr_model, None
        if name is None:
            config = AutoConfig.from_pretrained(self.args.model_name_or_path)
            base = (getattr(config, "base_models", None) or {}).get("speech") or {}
            if base.get("path") and Path(base["path"]).is_dir():
                name = base["path"]
            else:
                name, revision = base.get("id"), base.get("revision")
        if name is None:
            raise ValueError(
                "The cascade needs an ASR model, and the LSM does not say which it came from: --asr_model."
            )
        try:
            asr = pipeline(
                "automatic-speech-recognition",
                model=name,
                revision=revision,
                device=self.device,
                dtype=self.args.dtype,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"The ASR model {name} of the cascade cannot be loaded. Name one with --asr_model. ({error})"
            ) from error
        # For a Whisper without one, transformers makes a tokenizer that knows no words.
        if asr.tokenizer is None or not asr.tokenizer.vocab_size or asr.feature_extractor is None:
            raise ValueError(
                f"The ASR model {name} of the cascade comes without a tokenizer or a feature extractor. Name one that "
                "has both with --asr_model."
            )
        return asr

    def load(self, checkpoint: str) -> tuple[Any, Any]:
        """An LSM and its processor, or a causal LM and its tokenizer."""
        if checkpoint not in self.pairs:
            is_lsm = isinstance(AutoConfig.from_pretrained(checkpoint), LsmConfig)
            if is_lsm:
                processor = LsmProcessor.from_pretrained(checkpoint)
            else:
                processor = AutoTokenizer.from_pretrained(checkpoint)
                processor.chat_template = read_chat_template(None, processor)
            model_class = LsmForConditionalGeneration if is_lsm else AutoModelForCausalLM
            model = model_class.from_pretrained(checkpoint, dtype=self.args.dtype).to(self.device)
            self.pairs[checkpoint] = (model, processor)
        return self.pairs[checkpoint]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(TrlParser(EvalArguments).parse_args_and_config()[0])
