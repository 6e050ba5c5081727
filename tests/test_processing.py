"""Chats to model inputs, and one clear error for each bad input."""

import base64
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_lsm import AUDIO_TOKEN, LsmProcessor, make_chat, placeholders_lsm
from modeling_lsm.composing import read_chat_template
from tests import tiny
from tests.tiny import ask, noise, tone


def audio_bytes(samples: np.ndarray, sampling_rate: int = 16_000, **kwargs) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, sampling_rate, **{"format": "WAV", **kwargs})
    return file.getvalue()


def user(*content) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


class TestChats:
    def test_every_way_to_name_a_clip(self, processor, tmp_path):
        clip = noise(0.7)
        path = tmp_path / "clip.wav"
        path.write_bytes(audio_bytes(clip, subtype="FLOAT"))
        items = [
            {"type": "audio", "audio": clip},
            {"type": "audio", "audio": clip.tolist()},
            {"type": "audio", "audio": str(path)},
            {"type": "audio", "path": path},
            {"type": "audio", "url": str(path)},
            {"type": "audio", "audio": {"array": clip, "sampling_rate": 16_000}},
            {"type": "audio", "audio": path.read_bytes(), "path": None},
            {"type": "audio", "audio": clip, "sampling_rate": 16_000},
        ]
        expected = ask(processor, user({"type": "text", "text": "Say."}, items[0]))
        for item in items[1:]:
            inputs = ask(processor, user({"type": "text", "text": "Say."}, item))
            assert set(inputs) == {"input_ids", "attention_mask", "input_features", "input_features_mask"}
            assert all(torch.equal(inputs[key], expected[key]) for key in inputs)
        assert items[0]["audio"] is clip and set(items[0]) == {"type", "audio"}  # the caller's chat is untouched

    def test_turns_and_contents(self, processor):
        chat = [
            {"role": "system", "content": "Be brief."},
            *user({"type": "text", "text": "First "}, {"type": "audio", "audio": noise(1, 1)}),
            {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
            *user({"type": "audio", "audio": noise(2, 2)}, {"type": "audio", "audio": noise(0.3, 3)}),
        ]
        inputs = ask(processor, chat)
        counts = [processor.timing.audio_tokens_of_clip(samples) for samples in (16_000, 32_000, 4_800)]
        first, *rest = (AUDIO_TOKEN * count for count in counts)
        assert processor.decode(inputs["input_ids"][0]) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            f"<|im_start|>user\nFirst {first}<|im_end|>\n"
            "<|im_start|>assistant\nYes.<|im_end|>\n"
            f"<|im_start|>user\n{''.join(rest)}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert inputs["input_features"].shape == (3, 80, 200)
        assert inputs["input_features_mask"].sum(-1).tolist() == [100, 200, 30]

    def test_one_chat_or_a_list_of_them(self, processor):
        chat = make_chat("Say.", audio=noise(1))
        kwargs = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        one = processor.apply_chat_template(chat, **kwargs)
        many = processor.apply_chat_template([chat, make_chat("Say.", transcript="it")], **kwargs)
        assert one["input_ids"].shape[0] == 1 and many["input_ids"].shape[0] == 2
        assert torch.equal(many["input_ids"][:1], one["input_ids"])
        assert many["attention_mask"][1].tolist() == sorted(many["attention_mask"][1].tolist())  # left-padded
        assert many["input_features"].shape[0] == 1

    def test_prompt_symmetry(self, processor):
        """The prompt with speech is the prompt with the transcript, the transcript changed for the placeholder."""
        words = "he was not an ill disposed young man"
        for target in (None, "il n'était pas un jeune homme mal intentionné"):
            kwargs = {"add_generation_prompt": target is None}
            heard = processor.apply_chat_template(
                make_chat("Translate into French.", audio=noise(2), target=target), **kwargs
            )
            read = processor.apply_chat_template(
                make_chat("Translate into French.", transcript=words, target=target), **kwargs
            )
            assert heard.count(AUDIO_TOKEN) == 1 and heard.replace(AUDIO_TOKEN, words) == read
        # Token by token, too: around the speech stands what stands around the words.
        heard = ask(processor, make_chat("Translate.", audio=noise(2)))["input_ids"][0]
        read = ask(processor, make_chat("Translate.", transcript=words))["input_ids"][0]
        at = (heard == processor.audio_token_id).nonzero().flatten()
        after = len(heard) - int(at[-1]) - 1
        assert torch.equal(heard[: at[0]], read[: at[0]]) and torch.equal(heard[-after:], read[-after:])

    def test_text_chats_render_as_the_llms_own(self, processor):
        tokenizer = tiny.make_tokenizer()
        assert processor.chat_template != tokenizer.chat_template
        for generation in (True, False):
            for chat in (
                [{"role": "user", "content": "hi"}],
                [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi\n\nthere "}],
                [*user({"type": "text", "text": "hi"}), {"role": "assistant", "content": "hello"}],
            ):
                strings = [
                    {**m, "content": m["content"] if isinstance(m["content"], str) else m["content"][0]["text"]}
                    for m in chat
                ]
                expected = tokenizer.apply_chat_template(strings, tokenize=False, add_generation_prompt=generation)
                assert processor.apply_chat_template(chat, add_generation_prompt=generation) == expected

    def test_make_chat_takes_speech_or_words(self):
        for kwargs in ({}, {"audio": "a.wav", "transcript": "hi"}):
            with pytest.raises(ValueError, match="exactly one of `audio` and `transcript`"):
                make_chat("Say.", **kwargs)

    def test_vicuna(self):
        tokenizer = tiny.make_tokenizer(chat_template=False)
        processor = tiny.make_processor(tokenizer, chat_template=read_chat_template("vicuna", tokenizer))
        chat = [
            {"role": "system", "content": "SYSTEM"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "again"},
        ]
        rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
        assert rendered == "<s>SYSTEM USER: hi ASSISTANT: hello</s>USER: again ASSISTANT:"
        speech = [{"type": "text", "text": "hi "}, {"type": "audio", "audio": "a.wav"}]
        rendered = processor.apply_chat_template([{"role": "user", "content": speech}], add_generation_prompt=True)
        assert rendered == (
            "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            f"detailed, and polite answers to the user's questions. USER: hi {AUDIO_TOKEN} ASSISTANT:"
        )
        ids = ask(processor, make_chat("hi", audio=noise(1)))["input_ids"][0]
        assert (ids == tokenizer.bos_token_id).sum() == 1
        with pytest.raises(TemplateError, match="takes the roles system .* got 'tool'"):
            processor.apply_chat_template([*chat, {"role": "tool", "content": "x"}])

    def test_audio_item_without_audio(self, processor):
        for item in ({"type": "audio"}, {"type": "audio", "audio": None}, {"type": "audio", "file": "a.wav"}):
            with pytest.raises(
                ValueError, match=rf"its keys are {re.escape(str(sorted(item)))}\).*'audio', 'path' or"
            ):
                ask(processor, user(item))

    def test_item_without_a_type(self, processor):
        with pytest.raises(ValueError, match=r"an item without a 'type' \(its keys are \['text'\]\)\. Write it as"):
            ask(processor, user({"text": "hi"}))

    @pytest.mark.parametrize(
        "chat",
        [
            [],
            ["hi"],
            [{"content": "hi"}],
            *(
                [{"role": "user", "content": content}]
                for content in (5, {"type": "text", "text": "hi"}, ["hi"], [None], [{"type": ["text"]}])
            ),
            *([{"role": "user", "content": [{"type": "text", **text}]}] for text in ({}, {"text": None}, {"text": 5})),
        ],
        ids=repr,
    )
    def test_what_is_no_chat(self, processor, chat):
        begins = "The chat is empty|A chat holds .*|A message holds .*"
        for tokenize in (True, False):
            with pytest.raises(ValueError, match=rf"^({begins}); expected "):
                processor.apply_chat_template(chat, tokenize=tokenize)

    @pytest.mark.parametrize("type_", ["image", "video"])
    def test_items_of_other_types(self, processor, type_):
        item = {"type": type_, type_: "a.png"}
        for tokenize in (True, False):
            with pytest.raises(TemplateError, match=f"an item of type '{type_}'; this model takes 'text' and 'audio'"):
                processor.apply_chat_template(user(item), tokenize=tokenize, return_dict=True)

    def test_placeholders_and_clips_must_match(self, processor):
        for text, audio, counts in (
            (f"a {AUDIO_TOKEN}", None, "1 and 0"),
            ("a", noise(1), "0 and 1"),
            ([f"a {AUDIO_TOKEN}", "b"], [noise(1), noise(1)], "1 and 2"),
        ):
            with pytest.raises(ValueError, match=f"clips, but there are {counts}. Every clip needs one placeholder"):
                processor(text=text, audio=audio)

    def test_a_bad_clip_is_named(self, processor, tmp_path):
        path = tmp_path / "missing.flac"
        with pytest.raises(FileNotFoundError, match=r"missing\.flac"):
            ask(processor, make_chat("Say.", audio=noise(1)), make_chat("Say.", audio=path))

    def test_plain_calls(self, processor):
        clips = [noise(1, 1), noise(2, 2)]
        texts = [f"a {AUDIO_TOKEN}", f"{AUDIO_TOKEN} b"]
        inputs = processor(text=texts, audio=clips)
        assert inputs["input_features"].shape == (2, 80, 200)
        lists = processor(text=texts, audio=[clip.tolist() for clip in clips])
        assert torch.equal(lists["input_features"], inputs["input_features"])
        for clip in (clips[0].tolist(), list(clips[0])):  # one clip as a list of numbers
            one = processor(text=texts[0], audio=clip)
            torch.testing.assert_close(one["input_features"], inputs["input_features"][:1, :, :100])
        resampled = processor(text=texts[0], audio=tone(440, 1, 8_000), sampling_rate=8_000)
        assert resampled["input_features"].shape == (1, 80, 100)
        assert set(processor(text=["a", "bc"])) == {"input_ids", "attention_mask"}


class TestFeatures:
    @pytest.mark.parametrize("seconds", [0.0001, 1.234, 29.9, 30])
    def test_max_length_is_whispers_own(self, seconds):
        processor = tiny.make_processor(encoder_padding="max_length", window_size=20)
        clip = noise(seconds)
        inputs = processor(text=AUDIO_TOKEN, audio=clip)
        expected = processor.feature_extractor(clip, sampling_rate=16_000, return_tensors="pt")["input_features"]
        assert torch.equal(inputs["input_features"], expected)
        assert inputs["input_features_mask"].sum() == -(-len(clip) // 160)

    @pytest.mark.parametrize("seconds", [0.0001, 0.0099, 0.01, 0.0101, 0.5, 3.21, 29.9])
    def test_longest_differs_from_max_length_in_padding_alone(self, seconds):
        clip = noise(seconds, 3)
        short, whole = (
            tiny.make_processor(encoder_padding=padding)(text=AUDIO_TOKEN, audio=clip)["input_features"]
            for padding in ("longest", "max_length")
        )
        assert short.shape[-1] == -(-len(clip) // 160)
        torch.testing.assert_close(short, whole[..., : short.shape[-1]], atol=1e-6, rtol=0.0)

    @pytest.mark.parametrize("mates", [[0.1], [10.0], [29.99], [45.0], [0.005, 30.0, 7.77]])
    def test_a_clips_features_do_not_depend_on_its_batch(self, processor, mates):
        clip = noise(3.3333, 1)
        alone = processor(text=AUDIO_TOKEN, audio=clip)
        audio = [noise(seconds, 10 + i) for i, seconds in enumerate(mates)]
        batch = processor(text=[AUDIO_TOKEN] * (len(mates) + 1), audio=[clip, *audio])
        frames = alone["input_features"].shape[-1]
        length = int(batch["input_features_mask"][0].sum())
        assert length == frames == 334
        torch.testing.assert_close(
            batch["input_features"][:1, :, :length], alone["input_features"][..., :length], atol=1e-6, rtol=0.0
        )

    def test_features_are_whole_within_autocast(self, processor):
        clip = noise(0.5)
        with torch.autocast("cpu", torch.bfloat16):
            inputs = processor(text=AUDIO_TOKEN, audio=clip)
        assert torch.equal(inputs["input_features"], processor(text=AUDIO_TOKEN, audio=clip)["input_features"])

    def test_chunks_of_long_audio(self, processor):
        clip = noise(70)
        inputs = processor(text=[AUDIO_TOKEN, AUDIO_TOKEN], audio=[clip, clip[:100]])
        bounds = processor.timing.chunk_bounds(len(clip))
        assert inputs["input_features"].shape[0] == len(bounds) + 1
        assert inputs["input_features_mask"].sum(-1).tolist() == [-(-(b - a) // 160) for a, b in bounds] + [1]

    def test_other_mel_bins_and_rates(self):
        processor = tiny.make_processor()
        processor.feature_extractor = type(processor.feature_extractor)(feature_size=128)
        assert processor(text=AUDIO_TOKEN, audio=noise(1))["input_features"].shape == (1, 128, 100)


class TestSavingAndMatching:
    def test_save_and_reload(self, tmp_path):
        settings = {"window_size": 20, "num_queries": 2, "encoder_padding": "max_length", "max_encoder_frames": 1500}
        processor = tiny.make_processor(**settings)
        processor.save_pretrained(tmp_path)
        reloaded = LsmProcessor.from_pretrained(tmp_path)
        assert {key: getattr(reloaded, key) for key in settings} == settings
        assert reloaded.audio_token_id == processor.audio_token_id
        assert reloaded.chat_template == processor.chat_template
        chats = [make_chat("Say.", audio=noise(1)), make_chat("Say something longer.", audio=noise(33))]
        expected, actual = ask(processor, *chats), ask(reloaded, *chats)
        assert set(actual) == set(expected)
        assert all(torch.equal(actual[key], expected[key]) for key in expected)

    def test_tokenizer_without_the_audio_token(self):
        with pytest.raises(ValueError, match=r"does not know the audio token '<\|audio\|>'.*modeling_lsm\.composing"):
            LsmProcessor(tiny.make_processor().feature_extractor, tiny.make_tokenizer())

    def test_matches_its_own_model(self, model, processor):
        processor.check_matches(model.config)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"window_size": 20}, r"timing: \{'window_size': 20.*and \{'window_size': 17.*same checkpoint"),
            ({"num_queries": 2}, r"timing: .*'num_queries': 2.* and .*'num_queries': 1"),
            ({"max_encoder_frames": 500}, "timing: .*'max_encoder_frames': 500.* and .*'max_encoder_frames': 1500"),
            ({"encoder_padding": "max_length"}, "encoder_padding: max_length and longest"),
        ],
    )
    def test_other_settings_are_refused(self, model, kwargs, message):
        with pytest.raises(ValueError, match=f"disagree on {message}"):
            tiny.make_processor(**kwargs).check_matches(model.config)

    def test_other_tokens_are_refused(self, processor):
        with pytest.raises(ValueError, match="disagree on audio token id: 261 and 7. Load both from the same"):
            processor.check_matches(tiny.model_config(audio_token_id=7))
        config = tiny.model_config(text_config=tiny.llm_config(vocab_size=261).to_dict())
        with pytest.raises(ValueError, match="tokenizer has 262 tokens, but the LLM has embeddings for 261"):
            processor.check_matches(config)

    def test_other_mel_bins_are_refused(self, processor):
        config = tiny.model_config(audio_config=tiny.whisper_config(num_mel_bins=128).to_dict())
        with pytest.raises(ValueError, match="disagree on mel bins: 80 and 128"):
            processor.check_matches(config)


def test_templates_are_part_of_the_package():
    folder = Path(sys.modules["modeling_lsm"].__file__).parent / "chat_templates"
    assert {"vicuna", "with_audio"} <= {path.stem for path in folder.glob("*.jinja")}
    with pytest.raises(ValueError, match="no chat template 'alpaca'; expected a Jinja file or one of vicuna"):
        read_chat_template("alpaca", tiny.make_tokenizer())


def test_padding_is_on_the_left_whatever_side_the_tokenizer_has(processor):
    chats = [make_chat(instruction, transcript="a cat") for instruction in ("Why?", "What for, I wonder?")]
    expected = tiny.ask(processor, *chats)
    processor.tokenizer.padding_side = processor.tokenizer.init_kwargs["padding_side"] = "right"
    turned = tiny.ask(processor, *chats)
    assert turned["attention_mask"][0, 0] == 0
    assert torch.equal(turned["input_ids"], expected["input_ids"])
    right = tiny.ask(processor, *chats, processor_kwargs={"padding_side": "right"})
    assert right["attention_mask"][0, 0] == 1


def test_prompts_depend_neither_on_the_day_nor_on_a_chain_of_thought():
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}|{% for message in messages %}{{ message['content'] }}{% endfor %}|"
        "{% if enable_thinking is defined and enable_thinking is false %}no thoughts{% endif %}"
    )
    processor = tiny.make_processor(tokenizer)
    assert processor.apply_chat_template([{"role": "user", "content": "hi"}]) == "01 Jan 2025|hi|no thoughts"


class TestSamplingRates:
    """A rate means the same wherever it is said: a second at 8 kHz has 100 mel frames."""

    clip = tone(440, 1, 8_000)

    def features(self, processor, **kwargs):
        expected = processor(audio=(self.clip, 8_000))["input_features"]
        actual = processor(**{"audio": self.clip, **kwargs})["input_features"]
        assert actual.shape == (1, 80, 100) and torch.equal(actual, expected)

    def test_calls(self, processor):
        for rate in ({"sampling_rate": 8_000}, {"audio_kwargs": {"sampling_rate": 8_000}}):
            self.features(processor, **rate)
            self.features(processor, text=AUDIO_TOKEN, **rate)
            self.features(processor, audio=[self.clip], text=[AUDIO_TOKEN], **rate)
            self.features(processor, audio=audio_bytes(self.clip, 8_000, subtype="FLOAT"), **rate)  # says it itself
        self.features(processor, sampling_rate=8_000, audio_kwargs={"sampling_rate": 4_000})
        kwargs = {"audio_kwargs": {"sampling_rate": 8_000}}
        self.features(processor, **kwargs)
        assert kwargs == {"audio_kwargs": {"sampling_rate": 8_000}}  # the caller's

    @pytest.mark.parametrize("item_rate", [None, 8_000])
    def test_chats(self, processor, item_rate):
        expected = ask(processor, make_chat("Say.", audio=(self.clip, 8_000)))
        item = {"type": "audio", "audio": self.clip, "sampling_rate": item_rate}
        chat = user({"type": "text", "text": "Say.\n\n"}, item)
        rate = item_rate and 4_000 or 8_000  # what an item says of itself goes first
        for kwargs in (
            {"processor_kwargs": {"sampling_rate": rate}},
            {"processor_kwargs": {"audio_kwargs": {"sampling_rate": rate}}},
            {"sampling_rate": rate},
            {"audio_kwargs": {"sampling_rate": rate}},
        ):
            inputs = ask(processor, chat, **kwargs)
            assert inputs["input_features"].shape == (1, 80, 100)
            assert all(torch.equal(inputs[key], expected[key]) for key in expected)

    def test_other_arguments_still_arrive(self, processor):
        inputs = ask(
            processor,
            *[make_chat(text, audio=self.clip) for text in ("Say.", "Say it.")],
            processor_kwargs={"sampling_rate": 8_000, "padding_side": "right", "text_kwargs": {"padding": "longest"}},
        )
        assert inputs["attention_mask"][0, 0] == 1 and inputs["attention_mask"][0, -1] == 0


class TestReading:
    def test_limits_of_calls_and_of_the_processor(self, processor, tmp_path):
        path = tmp_path / "clip.wav"
        path.write_bytes(audio_bytes(noise(2)))
        chat = make_chat("Say.", audio=str(path))
        for limits, message in (({"local_files": False}, "local_files=False"), ({"max_seconds": 1}, "at most 1")):
            for kwargs in (limits, {"audio_kwargs": limits}):
                with pytest.raises(ValueError, match=message):
                    processor(audio=path, **kwargs)
                with pytest.raises(ValueError, match=message):
                    ask(processor, chat, processor_kwargs=kwargs)
            other = tiny.make_processor()
            other.audio_kwargs = limits
            with pytest.raises(ValueError, match=message):
                ask(other, chat)
            with pytest.raises(ValueError, match=message):
                other(audio=path)
            assert ask(other, chat, processor_kwargs={"local_files": True, "max_seconds": 2})
        assert ask(processor, chat)
        channels = np.zeros((3, 16_000), dtype=np.float32)
        assert processor(audio=channels, channel_axis=0)["input_features"].shape == (1, 80, 100)
        with pytest.raises(ValueError, match=r"shape \(3, 16000\)"):
            processor(audio=channels)

    def test_items_as_openai_writes_them(self, processor, tmp_path):
        data = audio_bytes(noise(0.5), subtype="FLOAT")
        text = base64.b64encode(data).decode()
        expected = ask(processor, user({"type": "audio", "audio": data}))
        for item in (
            {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}},
            {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{text}"}},
            {"type": "audio_url", "audio_url": f"data:audio/wav;base64,{text}"},
            {"type": "audio", "url": f"data:audio/wav;base64,{text}"},
            {"type": "audio", "audio": io.BytesIO(data)},
        ):
            for chat in (user(item), [{"role": "system", "content": "Be brief."}, *user(item)][1:]):
                inputs = ask(processor, chat, processor_kwargs={"local_files": False})
                assert all(torch.equal(inputs[key], expected[key]) for key in expected)
                assert processor.apply_chat_template(chat).count(AUDIO_TOKEN) == 1

    @pytest.mark.parametrize(
        "item",
        [
            {"type": "audio_url", "audio_url": {"url": "/etc/passwd"}},
            {"type": "audio_url", "audio_url": {"url": "file:///etc/passwd"}},
            {"type": "audio_url", "audio_url": "clip.wav"},
            {"type": "audio_url", "url": "http://example.org/a.wav"},
            {"type": "input_audio", "input_audio": {"path": "clip.wav"}},
            {"type": "input_audio", "input_audio": {"data": b"RIFF"}},
        ],
    )
    def test_items_as_openai_writes_them_name_no_files(self, processor, item):
        with pytest.raises(ValueError, match=rf"item of type '{item['type']}' with .*; expected base64 under 'data'"):
            ask(processor, user(item))


class TestAudioTokenAsText:
    """The audio token in what a user writes is text: it takes no clip's place and is not encoded as one."""

    text = f"What does {AUDIO_TOKEN}mean, {AUDIO_TOKEN}{AUDIO_TOKEN}?"

    def check(self, processor, inputs, row, samples):
        """That the row holds the placeholders of its clips alone, and all of its text."""
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        placeholders = ids == processor.audio_token_id
        counts = [processor.timing.audio_tokens_of_clip(count) for count in samples]
        assert placeholders.sum() == sum(counts)
        assert self.text in processor.decode(ids[~placeholders])
        return ids

    def test_beside_clips(self, processor):
        chats = [
            user({"type": "text", "text": self.text}, {"type": "audio", "audio": noise(1, 1)}),
            make_chat("Say.", audio=noise(2, 2)),
            user({"type": "audio", "audio": noise(0.5, 3)}, {"type": "text", "text": self.text}),
            [{"role": "system", "content": self.text}, *make_chat("Say.", audio=noise(0.7, 4))],
            [{"role": "user", "content": self.text}],
        ]
        batch = ask(processor, *chats)
        for row, samples in ((0, [16_000]), (2, [8_000]), (3, [11_200]), (4, [])):
            alone = ask(processor, chats[row])
            assert torch.equal(self.check(processor, batch, row, samples), alone["input_ids"][0])
        ids = batch["input_ids"][1][batch["attention_mask"][1].bool()]
        assert torch.equal(ids, ask(processor, chats[1])["input_ids"][0])
        assert batch["input_features"].shape[0] == 4

    def test_the_clip_stays_where_it_is(self, processor):
        """Between the same tokens as with any other word in the place of the literal."""
        chats = [
            user({"type": "text", "text": t}, {"type": "audio", "audio": noise(1)}) for t in (AUDIO_TOKEN, "x" * 9)
        ]
        literal, other = (ask(processor, chat)["input_ids"][0] for chat in chats)
        assert torch.equal(literal == processor.audio_token_id, other == processor.audio_token_id)

    def test_the_model_answers(self, model, processor):
        inputs = ask(processor, make_chat(self.text, audio=noise(1)), [{"role": "user", "content": self.text}])
        assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2

    def test_the_pipeline_answers(self, pipe):
        chats = [make_chat(text, audio=noise(seconds)) for text, seconds in ((self.text, 1), ("Say.", 2))]
        both = pipe(chats, batch_size=2, max_new_tokens=4, return_full_text=False)
        assert both == [pipe(chat, max_new_tokens=4, return_full_text=False) for chat in chats]

    @pytest.mark.parametrize("kind", ["metaspace", "prepend", "lower-case", "words"])
    def test_tokenizers_of_other_kinds(self, kind):
        """As of Llama, Gemma and BERT: normalizers, prefix spaces, bytes for unknown characters."""
        specials = [tiny.BOS, tiny.EOS, tiny.PAD, tiny.START, tiny.END, "<unk>"]
        pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *(chr(code) for code in range(33, 127)), "\n", "\u2581"]
        vocabulary = {piece: index for index, piece in enumerate(specials + pieces)}
        if kind == "words":
            backend = Tokenizer(models.WordLevel({**vocabulary, "audio": len(vocabulary)}, unk_token="<unk>"))
            backend.pre_tokenizer = pre_tokenizers.Whitespace()
        else:
            backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
            undo = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
            backend.decoder = decoders.Sequence(undo)
        if kind == "metaspace":
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        elif kind == "prepend":
            parts = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            backend.normalizer = normalizers.Sequence(parts)
        elif kind == "lower-case":
            parts = [normalizers.NFD(), normalizers.Lowercase(), normalizers.Replace(" ", "\u2581")]
            backend.normalizer = normalizers.Sequence(parts)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=tiny.BOS,
            eos_token=tiny.END,
            pad_token=tiny.PAD,
            unk_token="<unk>",
            chat_template=tiny.CHAT_TEMPLATE,
        )
        processor = tiny.make_processor(tokenizer)
        chat = user({"type": "text", "text": self.text}, {"type": "audio", "audio": noise(1)})
        ids = ask(processor, chat)["input_ids"][0]
        placeholders = ids == processor.audio_token_id
        assert placeholders.sum() == processor.timing.audio_tokens_of_clip(16_000)
        text = processor.decode(ids[~placeholders]).replace(" ", "")
        if kind == "words":
            assert (ids == processor.tokenizer.convert_tokens_to_ids("audio")).sum() == 3
        else:
            wanted = self.text.lower() if kind == "lower-case" else self.text
            assert wanted.replace(" ", "") in text and tokenizer.unk_token not in text

    def test_tools_and_documents(self, processor):
        processor.chat_template = "{{ tools }}{{ documents }}{% for m in messages %}{{ m.content }}{% endfor %}"
        inputs = ask(
            processor,
            [{"role": "user", "content": "hi"}],
            tools=[{"type": "function", "function": {"name": "f", "description": self.text}}],
            documents=[{"text": self.text}],
        )
        self.check(processor, inputs, 0, [])

    def test_assistant_masks_stay_aligned(self):
        template = (
            "{% for m in messages %}{% if m.role == 'assistant' %}"
            "{% generation %}{{ m.content }}{% endgeneration %}"
            "{% else %}{% for i in m.content %}{{ i.text if i.type == 'text' else '<|audio|>' }}{% endfor %}"
            "{% endif %}|{% endfor %}"
        )
        processor = tiny.make_processor(chat_template=template)
        chat = [
            *user({"type": "text", "text": self.text}, {"type": "audio", "audio": noise(1)}),
            {"role": "assistant", "content": f"It is {AUDIO_TOKEN}."},
            *user({"type": "audio", "audio": noise(2)}, {"type": "text", "text": self.text}),
            {"role": "assistant", "content": "Again."},
        ]
        inputs = ask(processor, chat, add_generation_prompt=False, return_assistant_tokens_mask=True)
        learnt = inputs["input_ids"][0][torch.as_tensor(inputs["assistant_masks"][0]).bool()]
        assert processor.decode(learnt) == f"It is {AUDIO_TOKEN}.Again."

    def test_the_tokenizer_is_left_alone(self, processor):
        before = processor.tokenizer.backend_tokenizer.to_str()
        ask(processor, make_chat(self.text, audio=noise(1)))
        assert processor.tokenizer.backend_tokenizer.to_str() == before
        assert ask(processor, [{"role": "user", "content": "hi"}])
        copies = [placeholders_lsm._copies[processor.tokenizer][1]]
        ask(processor, make_chat(self.text, audio=noise(1)))
        assert placeholders_lsm._copies[processor.tokenizer][1] is copies[0]  # made once
        processor.tokenizer.add_tokens(["meow"])
        inputs = ask(processor, make_chat(self.text + "meow", audio=noise(1)))
        assert processor.tokenizer.convert_tokens_to_ids("meow") in inputs["input_ids"]

    def test_tokenizers_that_cannot(self, processor):
        class Slow(str):
            is_fast = False

        with pytest.raises(ValueError, match=r"holds '<\|audio\|>', which a Slow cannot tell from a placeholder"):
            placeholders_lsm.tokenizer_of([placeholders_lsm.mark_of(AUDIO_TOKEN)], Slow(), AUDIO_TOKEN)
        assert placeholders_lsm.tokenizer_of([self.text], Slow, AUDIO_TOKEN) is Slow

    @pytest.mark.parametrize("audio_token", ["<a>", "<|" + "sound" * 20 + "|>"])
    def test_other_audio_tokens(self, audio_token):
        template = (
            "{% for m in messages %}{% for i in m.content %}{{ i.text or '"
            + audio_token
            + "' }}{% endfor %}{% endfor %}"
        )
        processor = tiny.make_processor(audio_token=audio_token, chat_template=template)
        chat = user({"type": "text", "text": f"a{audio_token}b"}, {"type": "audio", "audio": noise(1)})
        ids = ask(processor, chat, add_generation_prompt=False)["input_ids"][0]
        assert processor.decode(ids[ids != processor.audio_token_id]) == f"a{audio_token}b"
