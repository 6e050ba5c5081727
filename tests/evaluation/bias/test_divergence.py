"""The gap between speech and text, against the divergence computed by hand from the systems' own prompts."""

import numpy as np
import pytest
import torch

from modeling_lsm.evaluation.bias.divergence import measure_divergence
from modeling_lsm.evaluation.bias.suite import summarize_divergence
from modeling_lsm.evaluation.systems import LsmSystem, TextSystem
from tests import tiny


def make_rows() -> list[dict]:
    texts = ["a red fox", "two"]
    targets = ["an animal", ""]
    return [
        {"instruction": "Sum it up.", "audio": tiny.noise(0.5 + index, index), "text": text, "target": target}
        for index, (text, target) in enumerate(zip(texts, targets, strict=True))
    ]


@torch.no_grad()
def distributions(system, row: dict) -> np.ndarray:
    """Probabilities of the next token along the target, its end token included, one step at a time."""
    inputs = dict(system.inputs([row]))
    end = system.processor.tokenizer.eos_token_id
    steps = []
    for token in [*system.processor.tokenizer(row["target"])["input_ids"], end]:
        logits = system.model(**inputs).logits[0, -1].double().numpy()
        weights = np.exp(logits - logits.max())
        steps.append(weights / weights.sum())
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return np.array(steps)


def test_bias_divergence_by_hand(model, processor):
    rows = make_rows()
    expected = []
    for row in rows:
        read, heard = (distributions(system(model, processor), row) for system in (TextSystem, LsmSystem))
        expected.append((read * np.log(read / heard)).sum(-1))
    assert [len(row) for row in expected] == [10, 1]  # a byte a token, and the end
    for batch_size in (1, 2):
        measured = measure_divergence(model, processor, rows, batch_size)
        for mine, theirs in zip(measured, expected, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    assert max(expected[0]) > 1e-4


def test_bias_divergence_of_an_llm_that_looks_at_no_token_before_is_zero(model, processor):
    with torch.no_grad():
        for layer in model.lsm.language_model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    for row in measure_divergence(model, processor, make_rows()):
        assert row == pytest.approx([0] * len(row), abs=1e-6)


def test_bias_divergence_summary_by_hand():
    summary = summarize_divergence([[1.0, 2.0, 3.0, 5.0], [3.0]], 50, 0, 0.95)
    assert summary["in_all"] == {"from": 1, "to": None, "tokens": 5, "value": 14 / 5} | {
        key: summary["in_all"][key] for key in ("low", "high")
    }
    lines = [(line["from"], line["to"], line["tokens"], line["value"]) for line in summary["by_position"]]
    assert lines == [(1, 1, 2, 2), (2, 2, 1, 2), (3, 4, 2, 4)]
    first = summary["by_position"][0]
    assert (first["low"], first["high"]) == (1, 3)
