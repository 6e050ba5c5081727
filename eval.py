"""
Evaluates an LSM on speech: word error rate of its transcriptions, and its answers to instructions.

    python eval.py --model_name_or_path outputs/trained --dataset corpus/metadata.jsonl --output_dir outputs/evaluation

Rows need `audio` and `text` (the transcript). Rows that also have `instruction` and `target`, as `augment.py` writes
them, are answered with their own instruction and listed in the report beside the LLM's answer to the transcript.
On several GPUs: `torchrun --nproc_per_node 4 eval.py …`.
"""

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from trl import TrlParser

from modeling_lsm import LsmForConditionalGeneration, LsmPipeline, LsmProcessor
from modeling_lsm.augmentation.tasks import load_tasks
from modeling_lsm.data import load_rows
from modeling_lsm.evaluation import word_error_rate


logger = logging.getLogger(__name__)


@dataclass
class EvalArguments:
    """Arguments of `eval.py`."""

    model_name_or_path: str = field(metadata={"help": "LSM checkpoint to evaluate."})
    dataset: str = field(metadata={"help": "Rows with `audio` and `text`: a manifest, a folder, or a Hub dataset."})
    output_dir: str = field(metadata={"help": "Folder for predictions.jsonl, results.json and report.md."})
    split: str = field(default="test", metadata={"help": "Split of a Hub dataset."})
    instruction: str | None = field(
        default=None, metadata={"help": "How to ask for a transcription. Defaults to the first wording of the task."}
    )
    limit: int | None = field(default=None, metadata={"help": "Use only the first rows."})
    batch_size: int = field(default=8, metadata={"help": "Clips per batch."})
    max_new_tokens: int = field(default=225, metadata={"help": "Longest answer, in tokens."})
    dtype: str = field(default="auto", metadata={"help": "dtype that the weights are loaded in."})


def main(args: EvalArguments) -> None:
    rows = load_rows(args.dataset, args.split, columns=("audio", "text"))
    if args.limit is not None:
        rows = rows.select(range(min(args.limit, len(rows))))
    processor = LsmProcessor.from_pretrained(args.model_name_or_path)
    model = LsmForConditionalGeneration.from_pretrained(args.model_name_or_path, dtype=args.dtype)
    state = PartialState()
    pipe = LsmPipeline(model=model, processor=processor, device=state.device)

    transcribe = args.instruction or load_tasks(["transcription"], target_language="")[0].instructions[0]
    questions = [
        {"audio": row["audio"], "text": row["text"], "task": "transcription", "instruction": transcribe}
        for row in rows
    ]
    if "instruction" in rows.column_names:
        questions += [{"task": "", **row} for row in rows if row.get("task") != "transcription"]

    predictions: list[tuple[int, str]] = []
    mine = list(range(len(questions)))[state.process_index :: state.num_processes]
    with tqdm(total=len(mine), desc="answers", unit="clip", disable=not state.is_local_main_process) as progress:
        for start in range(0, len(mine), args.batch_size):
            batch = mine[start : start + args.batch_size]
            answers = pipe(
                [questions[index]["audio"] for index in batch],
                text=[questions[index]["instruction"] for index in batch],
                batch_size=args.batch_size,
                max_new_tokens=args.max_new_tokens,
                do_sample=False,
            )
            predictions += [(i, answer[0]["generated_text"]) for i, answer in zip(batch, answers, strict=True)]
            progress.update(len(batch))
    predictions = dict(gather_object(predictions))
    if not state.is_main_process:
        return
    answered = []
    for index, question in enumerate(questions):
        audio = question["audio"]["path"] if isinstance(question["audio"], dict) else question["audio"]
        answered.append({**question, "audio": audio, "prediction": predictions[index]})

    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / "predictions.jsonl", "w", encoding="utf-8") as file:
        for row in answered:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    transcribed = [row for row in answered if row["task"] == "transcription"]
    results = {
        "wer": word_error_rate([row["prediction"] for row in transcribed], [row["text"] for row in transcribed]),
        "clips": len(transcribed),
        "arguments": asdict(args),
        "transformers": transformers.__version__,
    }
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (output_dir / "report.md").write_text(report(results, answered), encoding="utf-8")
    logger.info("%s: word error rate %.3f over %d clips.", output_dir, results["wer"], results["clips"])


def report(results: dict, answered: list[dict]) -> str:
    """What a person wants to read: the word error rate and the answers, in Markdown."""

    def cell(text: str | None) -> str:
        return " ".join((text or "").split()).replace("|", "\\|")

    lines = [
        f"# {results['arguments']['model_name_or_path']}",
        "",
        f"Word error rate **{results['wer']:.3f}** over {results['clips']} clips (Whisper's English normalization).",
        "",
        "| task | instruction | transcript | the LLM on the transcript | the model on the speech |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in answered:
        columns = (row["task"], row["instruction"], row["text"], row.get("target"), row["prediction"])
        lines.append("| " + " | ".join(map(cell, columns)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(TrlParser(EvalArguments).parse_args_and_config()[0])
