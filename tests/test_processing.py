"""Audio from anywhere to waveforms, chats to model inputs, and one clear error for each bad input."""

import io
import re
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from jinja2 import TemplateError

from modeling_lsm import AUDIO_TOKEN, LsmProcessor, load_waveform, make_chat
from modeling_lsm.composing import read_chat_template
from tests import tiny
from tests.tiny import ask, noise, tone


def audio_bytes(samples: np.ndarray, sampling_rate: int = 16_000, **kwargs) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, sampling_rate, **{"format": "WAV", **kwargs})
    return file.getvalue()


def user(*content) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


def frequency(samples: np.ndarray, sampling_rate: int = 16_000) -> float:
    """The loudest frequency, in Hz."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * sampling_rate / len(samples))


class TestLoadWaveform:
    @pytest.mark.parametrize("form", ["str", "path", "bytes", "dict-path", "dict-bytes", "dict-both"])
    def test_files(self, tmp_path, form):
        clip = noise(0.5)
        path = tmp_path / "clip.wav"
        data = audio_bytes(clip, subtype="FLOAT")
        path.write_bytes(data)
        source = {
            "str": str(path),
            "path": path,
            "bytes": data,
            "dict-path": {"path": str(path), "bytes": None},
            "dict-bytes": {"path": None, "bytes": data},
            "dict-both": {"path": "archived/elsewhere.wav", "bytes": data},
        }[form]
        waveform = load_waveform(source)
        assert waveform.dtype == np.float32 and np.array_equal(waveform, clip)

    @pytest.mark.parametrize(
        "form", ["array", "float64", "float16", "list", "tensor", "tuple", "dict", "dict-list", "decoder", "strided"]
    )
    def test_arrays(self, form):
        clip = (np.random.default_rng(0).integers(-512, 512, 800) / 1024).astype(np.float32)  # exact in half precision
        decoder = SimpleNamespace(data=torch.tensor(clip)[None], sample_rate=16_000)
        source = {
            "array": clip,
            "float64": clip.astype(np.float64),
            "float16": clip.astype(np.float16),
            "list": clip.tolist(),
            "tensor": torch.tensor(clip, dtype=torch.float64, requires_grad=True),
            "tuple": (clip, 16_000),
            "dict": {"array": clip, "sampling_rate": 16_000, "path": None},
            "dict-list": {"array": clip.tolist(), "sampling_rate": 16_000},
            "decoder": SimpleNamespace(get_all_samples=lambda: decoder),
            "strided": np.repeat(clip, 2)[::2],
        }[form]
        waveform = load_waveform(source)
        assert waveform.dtype == np.float32 and np.array_equal(waveform, clip)

    @pytest.mark.parametrize(
        ("dtype", "low", "middle", "high", "full_scale"),
        [
            (np.int16, -(2**15), 0, 2**14, 0.5),
            (np.int32, -(2**31), 0, 2**30, 0.5),
            (np.int8, -(2**7), 0, 2**6, 0.5),
            (np.uint8, 0, 2**7, 2**7 + 2**6, 0.5),
        ],
    )
    def test_integers_are_scaled_by_their_range(self, dtype, low, middle, high, full_scale):
        samples = np.array([low, middle, high], dtype=dtype)
        assert load_waveform(samples).tolist() == [-1.0, 0.0, full_scale]
        assert load_waveform(torch.tensor(samples)).tolist() == [-1.0, 0.0, full_scale]

    @pytest.mark.parametrize("channels", [2, 8])
    def test_channels_are_averaged_in_both_orientations(self, channels):
        samples = np.random.default_rng(0).standard_normal((channels, 600)).astype(np.float32)
        for source in (samples, samples.T, torch.tensor(samples), audio_bytes(samples.T, subtype="FLOAT")):
            np.testing.assert_allclose(load_waveform(source), samples.mean(0), atol=1e-6)

    def test_integer_channels(self):
        samples = np.stack([np.full(50, 2**14), np.full(50, -(2**13))]).astype(np.int16)
        assert load_waveform(samples).tolist() == [0.125] * 50

    @pytest.mark.parametrize("module", ["torchaudio", "soxr"])
    @pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
    def test_resampling_keeps_frequency_length_and_loudness(self, monkeypatch, rate, module):
        if module == "soxr":
            pytest.importorskip("soxr")
            monkeypatch.setitem(sys.modules, "torchaudio", None)
        samples = tone(1000, 2, rate)
        for source in ((samples, rate), {"array": samples, "sampling_rate": rate}, audio_bytes(samples, rate)):
            waveform = load_waveform(source)
            assert waveform.dtype == np.float32 and len(waveform) == 32_000
            assert frequency(waveform) == pytest.approx(1000, abs=0.51)
            inside = waveform[800:-800]
            assert np.sqrt((inside**2).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.01)
        np.testing.assert_array_equal(load_waveform(samples, sampling_rate=rate), load_waveform((samples, rate)))
        assert len(load_waveform(samples, rate, target_rate=rate)) == len(samples)

    @pytest.mark.parametrize("samples", [1, 2, 441, 44_099])
    def test_resampling_rounds_lengths_up(self, samples):
        assert len(load_waveform((noise(1, sampling_rate=samples), 44_100))) == -(-samples * 160 // 441)

    def test_resampling_does_not_alias(self):
        waveform = load_waveform((tone(15_000, 1, 48_000), 48_000))
        assert np.abs(waveform[500:-500]).max() < 0.01

    def test_resampling_needs_a_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchaudio", None)
        monkeypatch.setitem(sys.modules, "soxr", None)
        with pytest.raises(
            ImportError, match="from 8000 to 16000 Hz needs torchaudio or soxr: pip install torchaudio"
        ):
            load_waveform((noise(0.1), 8_000))
        assert len(load_waveform((noise(0.1), 16_000))) == 1600  # nothing to do, nothing needed

    def test_soxr_where_torchaudio_is_missing(self, monkeypatch):
        calls = []

        def resample(waveform, source_rate, target_rate):
            calls.append((len(waveform), source_rate, target_rate))
            return waveform[::2].astype(np.float64)

        monkeypatch.setitem(sys.modules, "torchaudio", None)
        monkeypatch.setitem(sys.modules, "soxr", SimpleNamespace(resample=resample))
        waveform = load_waveform((noise(1), 32_000))
        assert calls == [(16_000, 32_000, 16_000)]
        assert waveform.dtype == np.float32 and len(waveform) == 8_000

    def test_decoding_needs_a_package(self, monkeypatch, librivox):
        monkeypatch.setitem(sys.modules, "soundfile", None)
        monkeypatch.setattr(
            "modeling_lsm.processing_lsm.fetch_audio", lambda *_, **__: (_ for _ in ()).throw(ImportError("librosa"))
        )
        with pytest.raises(ImportError, match=r"Reading audio file '.*0870\.flac' needs soundfile: pip install"):
            load_waveform(librivox[0].path)
        with pytest.raises(ImportError, match=r"Reading audio bytes \(length 3\) needs soundfile"):
            load_waveform(b"abc")

    @pytest.mark.parametrize("format_", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
    @pytest.mark.parametrize("channels", [1, 2])
    def test_file_formats(self, tmp_path, format_, channels):
        if format_ not in soundfile.available_formats():
            pytest.skip(f"libsndfile {soundfile.__libsndfile_version__} cannot write {format_}")
        path = tmp_path / f"clip.{format_.lower()}"
        samples = np.stack([tone(440, 1, 22_050)] * channels, axis=1)
        soundfile.write(path, samples, 22_050, format=format_)
        for source in (path, path.read_bytes()):
            waveform = load_waveform(source)
            assert len(waveform) == 16_000
            assert frequency(waveform) == pytest.approx(440, abs=1)

    @pytest.mark.parametrize("size", [0x7FFFF000, 0xFFFFFFFF])
    def test_wav_written_to_a_pipe(self, size):
        data = bytearray(audio_bytes(tone(440, 1), subtype="FLOAT"))
        position = data.index(b"data") + 4
        data[position : position + 4] = struct.pack("<I", size)
        data[4:8] = struct.pack("<I", min(size + 36, 0xFFFFFFFF))
        assert np.array_equal(load_waveform(bytes(data)), tone(440, 1))

    def test_real_recordings(self, librivox):
        for clip in librivox:
            info = soundfile.info(clip.path)
            waveform = load_waveform(clip.path)
            assert len(waveform) == info.frames * 16_000 // info.samplerate
            assert 0.01 < np.sqrt((waveform**2).mean()) < 0.5
            np.testing.assert_array_equal(waveform, load_waveform(clip.path.read_bytes()))

    def test_urls_go_to_the_library(self, monkeypatch):
        asked = []

        def fetch(source, sampling_rate):
            asked.append((source, sampling_rate))
            return tone(440, 1)

        monkeypatch.setattr("modeling_lsm.processing_lsm.fetch_audio", fetch)
        assert len(load_waveform("https://example.org/a.wav")) == 16_000
        assert asked == [("https://example.org/a.wav", 16_000)]


class TestBadAudio:
    """Each gives one error that names what, its value and the mend."""

    def test_missing_file(self, tmp_path):
        path = tmp_path / "nowhere.wav"
        with pytest.raises(FileNotFoundError, match=rf"no audio file '{re.escape(str(path))}'\. Check the path"):
            load_waveform(path)
        with pytest.raises(FileNotFoundError, match="no audio file"):
            load_waveform(tmp_path)  # a folder

    @pytest.mark.parametrize("as_bytes", [True, False])
    def test_empty_file(self, tmp_path, as_bytes):
        path = tmp_path / "empty.wav"
        path.write_bytes(b"")
        name = r"audio bytes \(length 0\)" if as_bytes else r"audio file '.*empty\.wav'"
        with pytest.raises(ValueError, match=rf"The {name} is empty \(0 bytes\)\. Fetch or record it again"):
            load_waveform(b"" if as_bytes else path)

    @pytest.mark.parametrize("as_bytes", [True, False])
    @pytest.mark.parametrize("format_", ["WAV", "FLAC", "OGG", "MP3"])
    @pytest.mark.parametrize("kept", [0.9, 0.5, 0.05])
    def test_truncated_file(self, tmp_path, format_, kept, as_bytes):
        if format_ not in soundfile.available_formats():
            pytest.skip(f"libsndfile {soundfile.__libsndfile_version__} cannot write {format_}")
        data = audio_bytes(noise(4), format=format_)
        data = data[: int(len(data) * kept)]
        path = tmp_path / "clip.audio"
        path.write_bytes(data)
        name = r"audio bytes \(length \d+\)" if as_bytes else r"audio file '.*clip\.audio'"
        with pytest.raises(
            ValueError, match=rf"The {name} (is cut off|cannot be decoded|has no samples).* (Fetch|conv|Leav)"
        ):
            load_waveform(data if as_bytes else path)

    def test_not_audio(self, tmp_path):
        path = tmp_path / "notes.wav"
        path.write_text("he was not an ill disposed young man\n" * 20)
        with pytest.raises(ValueError, match=r"'.*notes\.wav' cannot be decoded: .* convert it first"):
            load_waveform(path)

    @pytest.mark.parametrize("empty", [np.zeros(0), np.zeros((0, 2)), np.zeros((2, 0)), [], torch.zeros(0)], ids=str)
    def test_no_samples(self, empty):
        with pytest.raises(ValueError, match="audio array has (no samples. Leave it out|the type|the shape)"):
            load_waveform(empty)

    def test_file_without_samples(self, tmp_path):
        path = tmp_path / "header.wav"
        path.write_bytes(audio_bytes(np.zeros(0, dtype=np.float32)))
        with pytest.raises(ValueError, match=r"'.*header\.wav' has no samples\. Leave it out"):
            load_waveform(path)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, value):
        samples = noise(0.1)
        samples[[3, 77]] = value
        for source in (samples, (samples, 8_000), audio_bytes(samples, subtype="FLOAT")):
            with pytest.raises(ValueError, match="has 2 samples that are NaN or infinite. Repair or leave out"):
                load_waveform(source)

    @pytest.mark.parametrize("shape", [(), (2, 3, 400), (9, 400), (400, 9), (30, 30)])
    def test_shapes(self, shape):
        with pytest.raises(ValueError, match=rf"shape {re.escape(str(shape))}; expected \(samples,\).*at most 8"):
            load_waveform(np.zeros(shape, dtype=np.float32))

    @pytest.mark.parametrize(
        ("source", "type_"),
        [
            (np.array([object()]), "object"),
            (None, "object"),
            (["a", "b"], "<U1"),
            (np.array([True, False]), "bool"),
            (np.array([1j, 2j]), "complex128"),
        ],
    )
    def test_types(self, source, type_):
        with pytest.raises(ValueError, match=f"has the type {type_}; expected integer or float samples, a path, or"):
            load_waveform(source)

    @pytest.mark.parametrize("rate", [-16_000, 0, "16000"])
    def test_sampling_rates(self, rate):
        message = f"sampling rate of {rate!r}; expected samples per second, like 16000"
        for source in ((noise(0.1), rate), {"array": noise(0.1), "sampling_rate": rate}):
            with pytest.raises(ValueError, match=message):
                load_waveform(source)
        with pytest.raises(ValueError, match=message):
            load_waveform(noise(0.1), sampling_rate=rate)

    @pytest.mark.parametrize(
        "source", [{}, {"path": None, "bytes": None}, {"array": noise(0.1)}, {"wav": "a.wav"}], ids=sorted
    )
    def test_dicts(self, source):
        keys = re.escape(str(sorted(source)))
        with pytest.raises(ValueError, match=rf"has the keys {keys}; expected 'array' and 'sampling_rate', 'bytes'"):
            load_waveform(source)

    def test_tuples(self):
        with pytest.raises(
            ValueError, match="An audio tuple has 3 items; expected 2: samples and their sampling rate"
        ):
            load_waveform((noise(0.1), 16_000, "mono"))


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

    @pytest.mark.parametrize("type_", ["image", "video"])
    def test_items_of_other_types(self, processor, type_):
        item = {"type": type_, type_: "a.png"}
        for tokenize in (True, False):
            with pytest.raises(TemplateError, match=f"an item of type '{type_}'; this model takes 'text' and 'audio'"):
                processor.apply_chat_template(user(item), tokenize=tokenize, return_dict=True)

    def test_placeholders_and_clips_must_match(self, processor):
        for text, audio, counts in (
            (f"a {AUDIO_TOKEN}", None, "1 .* but 0"),
            ("a", noise(1), "0 .* but 1"),
            ([f"a {AUDIO_TOKEN}", "b"], [noise(1), noise(1)], "1 .* but 2"),
        ):
            with pytest.raises(ValueError, match=f"hold {counts} clips were passed. Every clip needs one placeholder"):
                processor(text=text, audio=audio)
        # A user cannot smuggle a placeholder in as text.
        with pytest.raises(ValueError, match="hold 2 audio placeholders"):
            ask(processor, make_chat(f"Say {AUDIO_TOKEN}.", audio=noise(1)))

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
