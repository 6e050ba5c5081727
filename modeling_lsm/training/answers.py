"""What the model answers while it trains: held-out rows, as text, and their word error rate."""

import json
import logging
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from trl import SFTTrainer
from trl.models.utils import unwrap_model_for_generation

from ..data.rows import row_to_chat
from ..evaluation import word_error_rate
from ..pipeline_lsm import LsmPipeline


logger = logging.getLogger(__name__)


class HeldOutAnswers(TrainerCallback):
    """
    Lets the model answer held-out rows every so many steps. The answers go to the log, to `answers.jsonl` in the
    output folder and to TensorBoard if it is reported to.

    Args:
        trainer (`SFTTrainer`): The trainer, whose model answers.
        rows (`Dataset`): Rows as [`prepare_rows`] gives them.
        steps (`int`): Optimizer steps from one time to the next.
        shown (`int`, *optional*, defaults to 4): Answers that are shown.
        with_wer (`bool`, *optional*, defaults to `False`):
            Whether all rows are answered, and the word error rate between the answers and the targets is logged.
        max_new_tokens (`int`, *optional*, defaults to 128): Longest answer, in tokens.
    """

    def __init__(
        self,
        trainer: SFTTrainer,
        rows: Dataset,
        steps: int,
        shown: int = 4,
        with_wer: bool = False,
        max_new_tokens: int = 128,
    ):
        self.trainer, self.steps, self.shown, self.with_wer = trainer, steps, shown, with_wer
        self.max_new_tokens = max_new_tokens
        self.rows = rows if with_wer else rows.select(range(min(shown, len(rows))))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            self.answer(state.global_step)

    def answer(self, step: int) -> None:
        """Answers the rows, each process its share, and logs what came of it. All processes must call it."""
        trainer = self.trainer
        mine = range(trainer.args.process_index, len(self.rows), trainer.args.world_size)
        answers: list[tuple[int, str]] = []
        with (
            unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model,
            trainer.compute_loss_context_manager(),
        ):
            was_training = model.training
            model.eval()
            pipe = LsmPipeline(model=model, processor=trainer.processing_class, device=trainer.args.device)
            batch_size = trainer.args.per_device_eval_batch_size
            for start in range(0, len(mine), batch_size):
                indices = list(mine[start : start + batch_size])
                texts = pipe(
                    [row_to_chat(self.rows[index])[:-1] for index in indices],
                    batch_size=batch_size,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    return_full_text=False,
                )
                answers += [(index, text[0]["generated_text"]) for index, text in zip(indices, texts, strict=True)]
            model.train(was_training)
        answers = [text for _, text in sorted(gather_object(answers))]
        if self.with_wer:
            targets = [target_of(row) for row in self.rows]
            trainer.log({"held_out_wer": word_error_rate(answers, targets)})
        if trainer.is_world_process_zero():
            self._show(step, answers)

    def _show(self, step: int, answers: list[str]) -> None:
        shown = [
            {"step": step, "instruction": row["instruction"], "target": target_of(row), "answer": answer}
            for row, answer in zip(self.rows.select(range(min(self.shown, len(self.rows)))), answers, strict=False)
        ]
        path = Path(self.trainer.args.output_dir) / "answers.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in shown)
        for row in shown:
            logger.info("step %d: %s\n  target: %s\n  answer: %s", *row.values())
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                text = "\n\n".join(f"**{row['instruction']}** {row['answer']}" for row in shown)
                callback.tb_writer.add_text("held-out answers", text, step)


def target_of(row: dict[str, Any]) -> str:
    """The answer that a row holds, as text."""
    content = row_to_chat(row)[-1]["content"]
    return content if isinstance(content, str) else "".join(item.get("text", "") for item in content)


__all__ = ["HeldOutAnswers"]
