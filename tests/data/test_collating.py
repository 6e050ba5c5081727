"""Batches: what is fed, and what is learnt."""

import json

import pytest
import soundfile
import torch

from modeling_lsm import make_chat
from modeling_lsm.data.collating import IGNORED_LABEL, SpeechTextCollator
from modeling_lsm.data.rows import row_to_chat
from modeling_lsm.data.sound_changes import AudioAugmentation
from tests import tiny


def row(instruction="Write it down.", target="a cat sat", seconds=1.0, seed=0) -> dict:
    return {"instruction": instruction, "audio": tiny.noise(seconds, seed), "target": target}


def test_labels_are_the_answer_and_its_end_token(processor):
    rows = [row(), row(target="no", seconds=2.5, seed=1), row("Say more, please.", "well, well", 0.4, seed=2)]
    batch = SpeechTextCollator(processor)(rows)
    for labels, source in zip(batch["labels"], rows, strict=True):
        learnt = labels[labels != IGNORED_LABEL]
        assert processor.tokenizer.decode(learnt) == source["target"] + processor.tokenizer.eos_token
    assert not (batch["labels"] == processor.audio_token_id).any()


def test_prompt_of_training_is_prompt_of_inference(processor):
    """What stands before the labels is, token by token, what the pipeline would give the model."""
    source = row(seconds=3.2)
    batch = SpeechTextCollator(processor)([source])
    prompt = tiny.ask(processor, make_chat(source["instruction"], audio=source["audio"]))
    start = int((batch["labels"][0] != IGNORED_LABEL).nonzero()[0])
    assert batch["input_ids"][0, :start].tolist() == prompt["input_ids"][0].tolist()
    assert (batch["input_features"] == prompt["input_features"]).all()


def test_only_the_last_answer_of_a_chat_is_learnt(processor):
    audio = {"type": "audio", "audio": tiny.noise(1.0)}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What? "}, audio]},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": [audio, {"type": "text", "text": "And this?"}]},
        {"role": "assistant", "content": "a bird"},
    ]
    batch = SpeechTextCollator(processor)([{"messages": messages}])
    learnt = batch["labels"][0][batch["labels"][0] != IGNORED_LABEL]
    assert processor.tokenizer.decode(learnt) == "a bird" + processor.tokenizer.eos_token


def test_too_long_a_target_is_refused(processor):
    with pytest.raises(ValueError, match=r"more than max_length=40.*Raise --max_length"):
        SpeechTextCollator(processor, max_length=40)([row(target="a" * 60)])


def test_a_chat_without_an_answer_is_refused(processor):
    messages = make_chat("What?", audio=tiny.noise(1.0))
    with pytest.raises(ValueError, match="must be its prompt followed by the assistant's answer"):
        SpeechTextCollator(processor)([{"messages": [*messages, {"role": "user", "content": "?"}]}])


def test_answers_may_end_with_another_token_than_the_tokenizers(processor):
    """As Gemma's do: the turn ends with a token of its own, which the generation config lists."""
    processor.tokenizer.eos_token = tiny.EOS
    end_tokens = processor.tokenizer.convert_tokens_to_ids([tiny.EOS, tiny.END])
    batch = SpeechTextCollator(processor, end_tokens=end_tokens)([row()])
    learnt = batch["labels"][0][batch["labels"][0] != IGNORED_LABEL]
    assert processor.tokenizer.decode(learnt) == "a cat sat" + tiny.END


def test_a_template_that_never_ends_an_answer_is_refused(processor):
    processor.chat_template = processor.chat_template.replace("<|im_end|>", "")
    with pytest.raises(ValueError, match="would never stop"):
        SpeechTextCollator(processor)([row()])


class Cache(dict):
    """Encoder output by the hash of the audio."""

    def load(self, audio_hash):
        return self[audio_hash]


def measured(row: dict, name: str) -> dict:
    """`row` as `prepare_rows` leaves it, with `name` for its hash."""
    return {**row, "audio_hash": name, "num_samples": len(row["audio"])}


TEXT_ROW = {"audio": None, "instruction": "Say it.", "target": "it"}


def learnt(processor, labels) -> str:
    return processor.tokenizer.decode(labels[labels != IGNORED_LABEL])


def test_rows_of_text_alone(processor, model):
    """They may stand beside speech or by themselves, and are what the LLM alone would read."""
    mixed = SpeechTextCollator(processor)([TEXT_ROW, row(), {**TEXT_ROW, "text": "a transcript"}])
    assert [learnt(processor, labels) for labels in mixed["labels"]] == [
        f"{target}<|im_end|>" for target in ("it", "a cat sat", "it")
    ]
    assert len(mixed["input_features"]) == 1
    texts = processor.batch_decode(mixed["input_ids"])
    assert "Say it.<|im_end|>" in texts[0] and "Say it.\n\na transcript<|im_end|>" in texts[2]
    alone = SpeechTextCollator(processor)([TEXT_ROW])
    assert set(alone) == {"input_ids", "attention_mask", "labels"}
    assert torch.isfinite(model(**mixed).loss) and torch.isfinite(model(**alone).loss)
    with torch.no_grad():
        length = alone["input_ids"].shape[1]
        assert mixed["input_ids"][0, :length].tolist() == alone["input_ids"][0].tolist()
        logits = [model(**batch).logits[0, :length] for batch in (mixed, alone)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("encoder_padding", ["longest", "max_length"])
@pytest.mark.parametrize("num_queries", [1, 2])
def test_a_batch_is_what_the_processor_makes_of_its_chats(encoder_padding, num_queries):
    processor = tiny.make_processor(encoder_padding=encoder_padding, num_queries=num_queries)
    rows = [row(seconds=1.3), row(seconds=33.0, seed=1), TEXT_ROW]
    batch = SpeechTextCollator(processor)(rows)
    expected = processor.apply_chat_template(
        [row_to_chat(row) for row in rows],
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding_side": "right"},
    )
    for name in ("input_ids", "attention_mask", "input_features", "input_features_mask"):
        assert torch.equal(batch[name], expected[name]), name


def test_rows_of_a_manifest_are_collated(processor, tmp_path):
    """Paths, embedded audio and chats as JSON give what arrays and lists do."""
    clips = [tiny.noise(1.0), tiny.noise(0.4, seed=1)]
    for index, clip in enumerate(clips):
        soundfile.write(tmp_path / f"{index}.wav", clip, tiny.SAMPLING_RATE, subtype="FLOAT")
    paths = [str(tmp_path / f"{index}.wav") for index in range(2)]

    def chat(first, second):
        content = [{"type": "audio", **first}, {"type": "text", "text": "or"}, {"type": "audio", **second}]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": "the first"}]

    plain = {"instruction": "Write.", "target": "a cat"}
    rows = [
        {**plain, "audio": {"path": paths[0], "bytes": None}},
        {**plain, "audio": {"path": None, "bytes": (tmp_path / "1.wav").read_bytes()}},
        {"messages": json.dumps(chat({}, {"path": paths[1]})), "audio": {"path": paths[0], "bytes": None}},
    ]
    expected = [
        {**plain, "audio": clips[0]},
        {**plain, "audio": clips[1]},
        {"messages": chat({"audio": clips[0]}, {"audio": clips[1]})},
    ]
    batch, wanted = SpeechTextCollator(processor)(rows), SpeechTextCollator(processor)(expected)
    assert len(batch["input_features"]) == 4
    assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_arrays_of_another_rate_in_a_chat(processor):
    item = {"type": "audio", "audio": tiny.noise(1.0, sampling_rate=8000), "sampling_rate": 8000}
    messages = [{"role": "user", "content": [item]}, {"role": "assistant", "content": "a cat"}]
    batch = SpeechTextCollator(processor)([{"messages": messages}])
    assert batch["input_features_mask"].sum() == 100


def test_the_audio_token_in_a_row_is_text(processor):
    """In an instruction, a transcript or an answer it takes no clip's place, and is learnt as text."""
    literal = processor.audio_token
    rows = [row(f"Write {literal} down.", f"{literal} it is"), row(), row(literal, literal, 0.4, 1)]
    for source in rows:
        source["text"] = f"{literal}!"
    batch = SpeechTextCollator(processor, with_transcript=True)(rows)
    for index, source in enumerate(rows):
        ids = batch["input_ids"][index]
        placeholders = ids == processor.audio_token_id
        assert placeholders.sum() == processor.timing.audio_tokens_of_clip(len(source["audio"]))
        assert source["instruction"] in processor.decode(ids[~placeholders])
        for name in ("labels", "teacher_labels"):
            learnt = batch[name][index][batch[name][index] != IGNORED_LABEL]
            assert processor.decode(learnt) == source["target"] + processor.tokenizer.eos_token
        assert f"{literal}!" in processor.decode(batch["teacher_input_ids"][index])
        prompt = tiny.ask(processor, make_chat(source["instruction"], audio=source["audio"]))["input_ids"][0]
        assert torch.equal(ids[: len(prompt)], prompt)
    assert not (batch["teacher_input_ids"] == processor.audio_token_id).any()


def test_chats_that_do_not_fit_their_clips_are_refused(processor):
    deaf = tiny.make_processor(chat_template="{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(
        ValueError, match=r"1 clips, but its text 0 placeholders \(<\|audio\|>\) of audio: 'userassist"
    ):
        SpeechTextCollator(deaf)([row()])
    messages = [{"role": "user", "content": [{"type": "audio"}]}, {"role": "assistant", "content": "a cat"}]
    with pytest.raises(ValueError, match="an audio item without a path, and the row has no audio"):
        SpeechTextCollator(processor)([{"messages": messages}])
    with pytest.raises(ValueError, match="neither messages, nor an instruction and a target"):
        SpeechTextCollator(processor)([{"audio": tiny.noise(1.0), "text": "a cat"}])


@pytest.mark.parametrize("encoder_padding", ["longest", "max_length"])
def test_a_feature_cache_gives_the_same_batch_and_loss(encoder_padding):
    model, processor = tiny.make_pair(encoder_padding=encoder_padding)
    rows = [row(seconds=1.3), row(seconds=33.0, seed=1, target="two"), TEXT_ROW, row(seconds=0.02, seed=2)]
    names = ["a", "b", None, "c"]
    normal = SpeechTextCollator(processor)(rows)
    audio = {name: normal[name] for name in ("input_features", "input_features_mask")}
    with torch.no_grad():
        states = list(model.get_audio_features(**audio).last_hidden_state)
    frames = processor.timing.encoder_frames(normal["input_features_mask"].sum(-1)).tolist()
    assert len(states) == 4  # of three clips
    states = [state[:count] for state, count in zip(states, frames, strict=True)]
    cache = Cache(a=states[:1], b=states[1:3], c=states[3:])

    cached_rows = [measured(row, name) if name else row for row, name in zip(rows, names, strict=True)]
    for cached_row in cached_rows:
        if cached_row["audio"] is not None:
            cached_row["audio"] = {"path": "never/read.wav", "bytes": None}
    cached = SpeechTextCollator(processor, feature_cache=cache)(cached_rows)
    for name in ("input_ids", "attention_mask", "labels", "input_features_mask"):
        assert torch.equal(cached[name], normal[name]), name
    assert "input_features" not in cached
    with torch.no_grad():
        assert model(**cached).loss.item() == pytest.approx(model(**normal).loss.item(), abs=1e-5)

    text = SpeechTextCollator(processor, feature_cache=cache)([TEXT_ROW])
    assert set(text) == {"input_ids", "attention_mask", "labels"}


def test_what_a_feature_cache_cannot_serve_is_refused(processor):
    cache = Cache(short=[torch.zeros(10, 32)])
    collator = SpeechTextCollator(processor, feature_cache=cache)
    with pytest.raises(ValueError, match="has not been measured. Pass rows through `prepare_rows`"):
        collator([row()])
    with pytest.raises(
        ValueError, match=r"holds \[10\] frames for The row 'Write it down.', whose chunks have \[50\]"
    ):
        collator([measured(row(), "short")])
    items = [{"type": "audio", "audio": tiny.noise(1.0)}] * 2
    messages = [{"role": "user", "content": items}, {"role": "assistant", "content": "a cat"}]
    with pytest.raises(ValueError, match="The row a.jsonl:3 holds 2 clips, but a feature cache serves rows of one"):
        collator([{"messages": messages, "source": "a.jsonl:3"}])
    with pytest.raises(ValueError, match="Use one of the two"):
        SpeechTextCollator(processor, augment=AudioAugmentation(), feature_cache=cache)


def test_augmentation_reaches_the_batch(processor):
    rows = [row(seconds=1.0), row(seconds=2.0, seed=1), TEXT_ROW]
    plain = SpeechTextCollator(processor)(rows)
    off = SpeechTextCollator(processor, augment=AudioAugmentation())(rows)
    assert all(torch.equal(off[name], plain[name]) for name in plain)

    slow = SpeechTextCollator(processor, augment=AudioAugmentation(speed=[0.5]))(rows)
    assert slow["input_features_mask"].sum(-1).tolist() == [200, 400]
    counts = [(batch["input_ids"] == processor.audio_token_id).sum(-1).tolist() for batch in (plain, slow)]
    assert counts == [[3, 6, 0], [6, 12, 0]]
    assert [learnt(processor, labels) for labels in slow["labels"]] == [
        learnt(processor, labels) for labels in plain["labels"]
    ]

    masked = SpeechTextCollator(processor, augment=AudioAugmentation(spec_augment=(50, 30)))(rows)
    assert all(torch.equal(masked[name], plain[name]) for name in plain if name != "input_features")
    changed = masked["input_features"] != plain["input_features"]
    assert changed.any((1, 2)).all() and not changed[0, :, 100:].any()


def test_transcripts_stand_in_the_place_of_speech(processor):
    rows = [
        {**row(), "text": "a cat sat on a mat, and it sat there for long"},
        {**row(target="no", seconds=2.5, seed=1), "text": "is it"},
        TEXT_ROW,
    ]
    batch = SpeechTextCollator(processor, with_transcript=True)(rows)
    plain = SpeechTextCollator(processor)(rows)
    assert all(torch.equal(batch[name], plain[name]) for name in plain)
    assert set(batch) - set(plain) == {"teacher_input_ids", "teacher_attention_mask", "teacher_labels"}
    assert not (batch["teacher_input_ids"] == processor.audio_token_id).any()
    for index, source in enumerate(rows[:2]):
        chat = make_chat(source["instruction"], transcript=source["text"], target=source["target"])
        length = int(batch["teacher_attention_mask"][index].sum())
        expected = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0]
        assert batch["teacher_input_ids"][index, :length].tolist() == expected.tolist()
        assert learnt(processor, batch["teacher_labels"][index]) == source["target"] + "<|im_end|>"
    assert batch["teacher_input_ids"][2, : batch["teacher_attention_mask"][2].sum()].tolist() == (
        batch["input_ids"][2, : batch["attention_mask"][2].sum()].tolist()
    )
    messages = [
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "a cat"},
    ]
    chat = SpeechTextCollator(processor, with_transcript=True)(
        [{"messages": json.dumps(messages), "audio": tiny.noise(1.0), "text": "meow"}]
    )
    assert "user\nmeow?<|im_end|>" in processor.decode(chat["teacher_input_ids"][0])


def test_what_distillation_cannot_use_is_refused(processor):
    collator = SpeechTextCollator(processor, with_transcript=True)
    with pytest.raises(ValueError, match=r"has 1 clip\(s\) and the transcript None, but distillation needs one clip"):
        collator([row()])
    items = [{"type": "audio", "audio": tiny.noise(1.0)}] * 2
    messages = [{"role": "user", "content": items}, {"role": "assistant", "content": "a cat"}]
    with pytest.raises(ValueError, match=r"has 2 clip\(s\)"):
        collator([{"messages": messages, "text": "x"}])
    # A template that answers otherwise to text than to speech.
    processor.chat_template = processor.chat_template.replace(
        "message['content'] + '<|im_end|>'",
        "message['content'] + ('!' if message.role == 'assistant' and '<|audio|>' in messages[0].content else '')"
        " + '<|im_end|>'",
    )
    with pytest.raises(ValueError, match="an answer of 11 tokens after the speech, but of 10 other tokens after the"):
        collator([{**row(), "text": "a cat sat"}])
