"""The systems: what they ask, that no answer depends on its batch, and that the ceiling is the LLM itself."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from modeling_lsm import LsmPipeline, load_waveform
from modeling_lsm.composing import compose, read_chat_template
from modeling_lsm.evaluation import word_error_rate
from modeling_lsm.evaluation.systems import CascadeSystem, LsmSystem, TextSystem
from tests import tiny


INSTRUCTIONS = [
    "Repeat it.",
    "What is the mood?",
    "Sum it up in a few words, and say who is speaking.",
    "Why?",
    "Say.",
]


def make_rows() -> list[dict]:
    """Clips of very different lengths."""
    texts = ["one", "two words", "three more words", "a much longer transcript than that", "five"]
    return [
        {"audio": tiny.noise(seconds, seed), "text": text, "instruction": instruction}
        for seed, (seconds, text, instruction) in enumerate(
            zip((0.3, 2.5, 1, 6, 0.8), texts, INSTRUCTIONS, strict=True)
        )
    ]


class ScriptedAsr:
    """An ASR pipeline that hears how long a clip lasts."""

    type = "ctc"

    def __init__(self):
        self.feature_extractor = tiny.make_processor().feature_extractor
        self.model = tiny.make_whisper()
        self.heard: list[int] = []

    def __call__(self, clips, batch_size, **kwargs):
        self.heard += [len(clip["raw"]) for clip in clips]
        return [{"text": f" lasts {len(clip['raw'])}"} for clip in clips]


@pytest.mark.parametrize("kind", ["lsm", "cascade", "text"])
def test_answers_do_not_depend_on_the_batch(kind, model, processor):
    systems = {
        "lsm": lambda size: LsmSystem(model, processor, size),
        "cascade": lambda size: CascadeSystem(ScriptedAsr(), model, processor, size),
        "text": lambda size: TextSystem(model, processor, size),
    }
    rows = make_rows()
    alone = [systems[kind](1).answer([row], 12)[0] for row in rows]
    assert len(set(alone)) == 5  # or the test could not tell
    for size in (1, 2, 3, 16):
        assert systems[kind](size).answer(rows, 12) == alone
        assert systems[kind](size).answer(rows[::-1], 12) == alone[::-1]
    came = {}
    systems[kind](2).answer(rows, 12, lambda index, answer: came.setdefault(index, answer))
    assert came == dict(enumerate(alone))
    assert systems[kind](2).answer([], 12) == []


def test_lsm_answers_as_the_pipeline_does(model, processor):
    rows = make_rows()
    pipe = LsmPipeline(model=model, processor=processor, device="cpu")
    expected = [pipe(row["audio"], text=row["instruction"], max_new_tokens=12)[0]["generated_text"] for row in rows]
    assert LsmSystem(model, processor).answer(rows, 12) == [answer.strip() for answer in expected]


def test_prompts_differ_in_what_stands_for_the_speech_alone(model, processor):
    row = make_rows()[0]
    cascade = CascadeSystem(ScriptedAsr(), model, processor)
    lsm, text = LsmSystem(model, processor), TextSystem(model, processor)
    parts = [system.prompt(row)[0]["content"] for system in (lsm, cascade, text)]
    assert [part[0]["text"] for part in parts] == ["Repeat it.\n\n"] * 3
    assert parts[0][1]["audio"] is row["audio"]
    assert (parts[1][1]["text"], parts[2][1]["text"]) == ("lasts 4800", "one")


@pytest.mark.parametrize("kind", ["lsm", "cascade", "text"])
def test_inputs_give_the_distribution_that_the_answer_begins_with(kind, model, processor):
    reader = {"lsm": LsmSystem(model, processor), "text": TextSystem(model, processor)}
    system = reader.get(kind) or CascadeSystem(ScriptedAsr(), model, processor)
    rows = make_rows()
    with torch.no_grad():
        logits = system.model(**system.inputs(rows)).logits[:, -1]
    logits[:, model.generation_config.suppress_tokens] = -torch.inf
    assert [processor.tokenizer.decode(token) for token in logits.argmax(-1)] == system.answer(rows, 1)


def test_transcription_is_not_copied_out_by_the_llm(model, processor):
    rows = [{**row, "kind": "transcription"} for row in make_rows()]
    assert TextSystem(model, processor).answer(rows, 4) == [row["text"] for row in rows]
    assert CascadeSystem(ScriptedAsr(), model, processor).answer(rows[:1], 4) == ["lasts 4800"]
    assert LsmSystem(model, processor).answer(rows[:1], 4) != ["one"]
    mixed = [rows[0], make_rows()[1]]
    assert TextSystem(model, processor).answer(mixed, 4) == ["one", *TextSystem(model, processor).answer(mixed[1:], 4)]


def test_cascade_hears_a_clip_once(model, processor):
    cascade = CascadeSystem(ScriptedAsr(), model, processor)
    row = make_rows()[0]
    other = {**row, "instruction": "Another question.", "audio": row["audio"].copy()}
    cascade.answer([row, other], 2)
    cascade.prompt(other)
    assert cascade.asr.heard == [4800]


def test_cascade_resamples_to_what_the_asr_model_hears(model, processor):
    cascade = CascadeSystem(ScriptedAsr(), model, processor)
    assert cascade.transcribe([{"audio": (tiny.tone(440, 1, 8000), 8000)}]) == ["lasts 16000"]


def test_text_system_takes_a_causal_llm(tiny_bases):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bases.text)
    tokenizer.chat_template = read_chat_template(None, tokenizer)
    model, processor = compose(
        str(tiny_bases.speech), str(tiny_bases.text), projector_hidden_size=24, projector_num_attention_heads=4
    )
    llm = TextSystem(AutoModelForCausalLM.from_pretrained(tiny_bases.text), tokenizer)
    lsm = TextSystem(model, processor)
    rows = make_rows()
    assert llm.inputs(rows)["input_ids"].tolist() == lsm.inputs(rows)["input_ids"].tolist()
    assert llm.answer(rows, 8) == lsm.answer(rows, 8)  # a composed LSM is its LLM
    assert llm.meta()["model"]["template_hash"] == lsm.meta()["model"]["template_hash"]


def test_meta_tells_models_apart(processor):
    one, same, other = (LsmSystem(tiny.make_model(seed), processor).meta() for seed in (0, 0, 1))
    assert one == same != other
    model = tiny.make_model()
    with torch.no_grad():
        model.lsm.projector.layer_norm.weight[0] += 1e-3  # not a part of the LLM
    assert LsmSystem(model, processor).meta() != one
    asr = CascadeSystem(ScriptedAsr(), tiny.make_model(), processor)
    assert asr.meta()["model"] == one["model"] and len(asr.meta()["asr"]["fingerprint"]) == 64


@pytest.mark.slow
def test_text_is_the_real_llm_token_by_token(real_text_model, librivox):
    """The prompt is the LLM's own template, and the answer its own `generate`, each prompt by itself."""
    llm = AutoModelForCausalLM.from_pretrained(real_text_model)
    tokenizer = AutoTokenizer.from_pretrained(real_text_model)
    own = AutoTokenizer.from_pretrained(real_text_model)
    tokenizer.chat_template = read_chat_template(None, tokenizer)
    system = TextSystem(llm, tokenizer)
    answers, decode = {}, system.prompter.decode
    system.prompter.decode = lambda tokens: answers.setdefault(decode(tokens), tokens) and decode(tokens)

    rows = [
        {"text": clip.text, "instruction": instruction}
        for clip in librivox[:3]
        for instruction in ("Translate the following into French.", "What is the sentiment of the following?")
    ]
    texts = system.answer(rows, 40)
    for row, text in zip(rows, texts, strict=True):
        chat = [{"role": "user", "content": f"{row['instruction']}\n\n{row['text']}"}]
        inputs = own.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        assert inputs["input_ids"].tolist() == system.inputs([row])["input_ids"].tolist()
        sequence = llm.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answers[text] == sequence.tolist()


@pytest.mark.slow
def test_cascade_with_the_real_whisper(real_speech_model, librivox, model, processor):
    asr = pipeline("automatic-speech-recognition", model=str(real_speech_model), device="cpu")
    cascade = CascadeSystem(asr, model, processor, batch_size=2)
    rows = [
        {"audio": str(clip.path), "text": clip.text, "instruction": "Write.", "kind": "transcription"}
        for clip in librivox
    ]
    transcripts = cascade.answer(rows, 8)
    assert word_error_rate(transcripts, [clip.text for clip in librivox]) <= 0.10
    # What the LLM reads is what was heard.
    read = TextSystem(model, processor).answer([{"text": transcripts[0], "instruction": "Why?"}], 8)
    assert cascade.answer([{**rows[0], "kind": None, "instruction": "Why?"}], 8) == read

    waveforms = [load_waveform(str(clip.path)) for clip in librivox]
    (long,) = cascade.transcribe([{"audio": np.concatenate(waveforms * 2)}])  # longer than Whisper's 30 s
    assert word_error_rate([long], [" ".join(clip.text for clip in librivox * 2)]) <= 0.10
