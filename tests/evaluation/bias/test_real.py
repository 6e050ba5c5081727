"""The anchor-bias suite on a real LLM: constructed systems whose prompts lack what they are to ignore."""

import json
from pathlib import Path

import pytest
import soundfile
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_lsm.composing import read_chat_template
from modeling_lsm.evaluation.bias.questions import make_bias_questions
from modeling_lsm.evaluation.bias.suite import measure_bias, report_bias
from modeling_lsm.evaluation.questions import Records
from modeling_lsm.evaluation.systems import TextSystem
from modeling_lsm.evaluation.tasks import DatasetEntry
from tests import tiny


STATEMENTS = [
    "The river was frozen from bank to bank that winter.",
    "Nobody had opened the letter.",
    "My brother plays chess with his neighbour every Sunday evening.",
    "The train to London leaves at seven in the morning.",
    "She put the old books into a box under the stairs.",
    "We walked along the beach until it began to rain.",
    "The farmer sold two of his horses at the market.",
    "There was snow on the roof of the church.",
    "He forgot his keys at the office again.",
    "The children were playing in the garden behind the house.",
]
REQUESTS = [
    "What is the capital of France?",
    "Name three colors.",
    "How many days are there in a week?",
    "Tell me a story about a dog.",
    "Who are you?",
    "Write a poem about the sea.",
]


class IgnoresInstruction(TextSystem):
    """The LLM is told to repeat what is said, whatever the instruction is."""

    needs_audio = True

    def answer(self, rows, *args):
        instruction = "Repeat the following sentence word for word, and add nothing."
        return super().answer([{**row, "instruction": instruction} for row in rows], *args)


class IgnoresSpeech(TextSystem):
    """The LLM sees the instruction and nothing else."""

    needs_audio = True

    def answer(self, rows, *args):
        return super().answer([{**row, "text": ""} for row in rows], *args)


def make_clips(folder: Path, texts: list[str]) -> Records:
    """Records of clips of noise: what is said in them is what the LLM reads."""
    folder.mkdir()
    for index in range(len(texts)):
        soundfile.write(folder / f"{index}.wav", tiny.noise(0.1, index), tiny.SAMPLING_RATE)
    rows = [{"audio": f"{index}.wav", "text": text} for index, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Records(DatasetEntry(name="clips", path=str(folder / "metadata.jsonl")))


@pytest.fixture(scope="module")
def measured(real_text_model, tmp_path_factory) -> dict:
    """`bias.json` of the LLM reading, the ceiling, and of the two systems made from it."""
    folder = tmp_path_factory.mktemp("real")
    llm, tokenizer = (kind.from_pretrained(real_text_model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.chat_template = read_chat_template(None, tokenizer)
    questions = make_bias_questions(make_clips(folder / "clips", STATEMENTS), make_clips(folder / "asked", REQUESTS))
    questions["reading"] = []  # nothing was trained that could have forgotten anything
    systems = {
        "repeats": IgnoresInstruction(llm, tokenizer),
        "deaf": IgnoresSpeech(llm, tokenizer),
        "text": TextSystem(llm, tokenizer),
    }
    measure_bias(systems, questions, folder, measured_rows=0, max_new_tokens=48)
    return report_bias(folder, {}, {})


@pytest.mark.slow
def test_bias_of_a_real_llm_that_ignores_its_instruction(measured):
    figures = {name: row["repeats"]["value"] for name, row in measured["figures"].items()}
    assert figures["collapse"] >= 0.95
    assert figures["written"] <= 0.05 and figures["fit"] <= 0.05
    assert figures["distance"] <= 0.05  # one answer to all instructions
    gaps = {name: row["repeats"] for name, row in measured["gaps"].items()}
    assert gaps["collapse"]["low"] >= 0.5 and gaps["collapse"]["p_value"] <= 0.05
    assert gaps["fit"]["high"] <= -0.25 and gaps["fit"]["p_value"] <= 0.05


@pytest.mark.slow
def test_bias_of_a_real_llm_that_ignores_the_speech(measured):
    figures = {name: row["deaf"]["value"] for name, row in measured["figures"].items()}
    ceiling = {name: row["text"]["value"] for name, row in measured["figures"].items()}
    assert figures["collapse"] <= 0.05
    assert figures["spoken"] <= 0.05 and figures["repeated"] <= 0.05
    assert figures["clip_distance"] <= 0.05  # one answer to all clips
    # It follows instructions about as the ceiling does, which is weak itself.
    assert figures["written"] >= 0.75 * ceiling["written"] > 0.05
    assert figures["fit"] >= 0.75 * ceiling["fit"] > 0.05
    assert measured["gaps"]["clip_distance"]["deaf"]["high"] <= -0.5


@pytest.mark.slow
def test_no_bias_of_a_real_llm_that_reads(measured):
    """So small an LLM copies some sentences by itself, hence the bounds, but is far from either bias."""
    figures = {name: row["text"] for name, row in measured["figures"].items()}
    assert figures["collapse"]["high"] <= 0.5
    assert figures["written"]["low"] > 0.05 and figures["fit"]["low"] > 0.25
    assert figures["distance"]["low"] >= 0.5 and figures["clip_distance"]["low"] >= 0.5
    assert figures["repeated"]["value"] > 0.05
