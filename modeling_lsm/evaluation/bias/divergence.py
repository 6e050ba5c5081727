"""The gap between speech and text: how far what an LSM would say next, hearing, is from what it would say, reading."""

from typing import Any

import torch
from torch import nn

from ...data.collating import IGNORED_LABEL, SpeechTextCollator, predicts_label
from ...modeling_lsm import LsmForConditionalGeneration
from ...processing_lsm import LsmProcessor


@torch.inference_mode()
def measure_divergence(
    model: LsmForConditionalGeneration, processor: LsmProcessor, rows: list[dict[str, Any]], batch_size: int = 4
) -> list[list[float]]:
    """
    Measures KL(reading the transcript ‖ hearing the speech) of the next token, along a target.

    Args:
        model ([`LsmForConditionalGeneration`]): The LSM.
        processor ([`LsmProcessor`]): Its processor.
        rows (`list[dict]`): `instruction`, `audio`, `text` and `target`.
        batch_size (`int`, *optional*, defaults to 4): Rows at a time: the whole vocabulary at every token of a target.

    Returns:
        `list[list[float]]`: For each row, the divergence in nats at each token of the target, its end token included.
    """
    collator = SpeechTextCollator(processor, end_tokens=model.generation_config.eos_token_id, with_transcript=True)
    divergences = []
    for start in range(0, len(rows), batch_size):
        batch = collator(rows[start : start + batch_size])
        batch = {
            name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
            for name, tensor in batch.items()
        }
        reading = {name: batch.pop(name) for name in list(batch) if name.startswith("teacher_")}
        lengths = (batch["labels"] != IGNORED_LABEL).sum(-1).tolist()
        reading = {name.removeprefix("teacher_"): tensor for name, tensor in reading.items()}
        heard, read = (
            model(**inputs, logits_to_keep=predicts_label(inputs["labels"]), use_cache=False)
            .logits.float()
            .log_softmax(-1)
            for inputs in (batch, reading)
        )
        of_tokens = nn.functional.kl_div(heard, read, reduction="none", log_target=True).sum(-1)
        divergences += [row.tolist() for row in of_tokens.split(lengths)]
    return divergences


__all__ = ["measure_divergence"]
