"""The model that a benchmark measures."""

import torch

from demo.fetch_models import fetch_speech_model, fetch_text_model
from modeling_lsm import LsmForConditionalGeneration, LsmProcessor
from modeling_lsm.composing import compose


TIE = 1e-3  # logits nearer to each other than this are told apart by rounding alone


def load_model(checkpoint: str | None) -> tuple[LsmForConditionalGeneration, LsmProcessor]:
    """An LSM, or the demo's two models with a random projector between them, on a GPU if there is one."""
    if checkpoint:
        model = LsmForConditionalGeneration.from_pretrained(checkpoint)
        processor = LsmProcessor.from_pretrained(checkpoint)
    else:
        torch.manual_seed(0)
        model, processor = compose(str(fetch_speech_model()), str(fetch_text_model()))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor
