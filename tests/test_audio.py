"""Audio from anywhere to waveforms, within limits, and one clear error for each bad input."""

import base64
import io
import os
import re
import struct
import sys
import threading
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from modeling_lsm import audio_files_lsm, load_waveform, resampling_lsm
from tests.tiny import noise, tone


def audio_bytes(samples: np.ndarray, sampling_rate: int = 16_000, **kwargs) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, sampling_rate, **{"format": "WAV", **kwargs})
    return file.getvalue()


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

    @pytest.mark.parametrize("channels", [1, 2])
    def test_channels_are_averaged_in_both_orientations(self, channels):
        samples = np.random.default_rng(0).standard_normal((channels, 600)).astype(np.float32)
        for source in (samples, samples.T, torch.tensor(samples), audio_bytes(samples.T, subtype="FLOAT")):
            np.testing.assert_allclose(load_waveform(source), samples.mean(0), atol=1e-6)

    @pytest.mark.parametrize("channels", [3, 8])
    def test_more_channels_than_two_must_be_said(self, channels):
        samples = np.random.default_rng(0).standard_normal((channels, 600)).astype(np.float32)
        for source, axis in ((samples, 0), (samples.T, 1), ((torch.tensor(samples), 16_000), 0)):
            with pytest.raises(ValueError, match=r"has the shape .* channels along `channel_axis`"):
                load_waveform(source)
            np.testing.assert_allclose(load_waveform(source, channel_axis=axis), samples.mean(0), atol=1e-6)
        decoded = SimpleNamespace(data=torch.tensor(samples), sample_rate=16_000)
        for source in (audio_bytes(samples.T, subtype="FLOAT"), SimpleNamespace(get_all_samples=lambda: decoded)):
            np.testing.assert_allclose(load_waveform(source), samples.mean(0), atol=1e-6)  # these say it

    def test_integer_channels(self):
        samples = np.stack([np.full(50, 2**14), np.full(50, -(2**13))]).astype(np.int16)
        assert load_waveform(samples).tolist() == [0.125] * 50

    @pytest.mark.parametrize("with_torchaudio", [True, False])
    @pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 22_254, 44_100, 44_101, 47_999, 48_000])
    def test_resampling_keeps_frequency_length_and_loudness(self, monkeypatch, rate, with_torchaudio):
        if not with_torchaudio:
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

    def test_decoding_needs_a_package(self, monkeypatch, librivox):
        monkeypatch.setitem(sys.modules, "soundfile", None)
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

    @pytest.mark.parametrize("shape", [(), (2, 3, 400), (3, 16_000), (9, 400), (400, 9), (30, 30)])
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

    def test_paths_stand_under_path_alone(self, tmp_path):
        path = str(tmp_path / "clip.wav")
        (tmp_path / "clip.wav").write_bytes(audio_bytes(noise(0.1)))
        assert len(load_waveform({"path": path})) == 1600
        for source in (
            {"bytes": path},
            {"bytes": tmp_path / "clip.wav", "path": path},
            {"array": path, "sampling_rate": 16_000},
        ):
            with pytest.raises(ValueError, match="audio (dict|file).* paths and URLs stand under 'path'"):
                load_waveform(source)

    def test_tuples(self):
        with pytest.raises(
            ValueError, match="An audio tuple has 3 items; expected 2: samples and their sampling rate"
        ):
            load_waveform((noise(0.1), 16_000, "mono"))


def flac_that_declares(samples: int) -> bytes:
    """A FLAC of a second whose header declares `samples`."""
    data = bytearray(audio_bytes(noise(1), format="FLAC"))
    data[21] = data[21] & 0xF0 | samples >> 32
    data[22:26] = (samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


def wav_that_declares(sampling_rate: int, channels: int = 1) -> bytes:
    """A WAV of 1 kB with this header."""
    data = np.zeros(500, dtype="<i2").tobytes()
    header = struct.pack("<HHIIHH", 1, channels, sampling_rate, sampling_rate * 2 % 2**32, 2 * channels % 2**16, 16)
    return b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt \x10\0\0\0" + header + b"data\xe8\x03\0\0" + data


class TestLimits:
    """What is said of a signal decides before memory is taken for it."""

    def test_an_hour_unless_said_otherwise(self, tmp_path):
        hour = np.zeros(3600 * 1000, dtype=np.int16)
        assert len(load_waveform((hour, 1_000), target_rate=1_000)) == len(hour)
        longer = np.zeros(3601 * 1000, dtype=np.int16)
        path = tmp_path / "long.flac"
        path.write_bytes(audio_bytes(longer, 1_000, format="FLAC"))
        for source in ((longer, 1_000), path, path.read_bytes()):
            with pytest.raises(ValueError, match=r"lasts 3601 seconds; expected at most 3600\. Cut it, or raise"):
                load_waveform(source, target_rate=1_000)
            assert len(load_waveform(source, target_rate=1_000, max_seconds=3601)) == len(longer)

    def test_a_decoder_is_asked_how_long_it_is(self):
        decoder = SimpleNamespace(metadata=SimpleNamespace(duration_seconds=3601), get_all_samples=None)
        with pytest.raises(ValueError, match="audio array lasts 3601 seconds"):
            load_waveform(decoder)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (wav_that_declares(2**31 - 1), "has a sampling rate of 2147483647; expected .* from 1000 to 384000"),
            (wav_that_declares(1), "has a sampling rate of 1;"),
            (wav_that_declares(0), "cannot be decoded|sampling rate of 0"),
            (wav_that_declares(16_000, 65_535), "cannot be decoded|has 65535 channels"),
            (wav_that_declares(16_000, 9), "has 9 channels; expected at most 8"),
            (flac_that_declares(2**36 - 1), "lasts 4294967 seconds; expected at most 3600"),
            (flac_that_declares(0), "does not say how long it is: it was written to a pipe"),
        ],
    )
    def test_headers(self, monkeypatch, data, message):
        monkeypatch.setattr(audio_files_lsm, "decode", lambda *_: pytest.fail("was decoded"))
        with pytest.raises(ValueError, match=rf"The audio bytes \(length {len(data)}\) ({message})"):
            load_waveform(data)

    def test_a_header_that_declares_more_than_is_there(self):
        with pytest.raises(ValueError, match=r"is cut off|cannot be decoded"):
            load_waveform(flac_that_declares(32_000))

    def test_values_of_all_channels_are_limited(self):
        data = audio_bytes(np.zeros((100_000, 8), dtype=np.int16), 100_000, format="FLAC")
        assert len(load_waveform(data)) == 16_000
        with pytest.raises(ValueError, match="has 100000 samples in each of 8 channels, too many for `max_seconds=1`"):
            load_waveform(data, max_seconds=1)

    @pytest.mark.parametrize("rate", [float("nan"), float("inf"), 10**400, Decimal(16_000), True, None, [8_000]])
    def test_rates_that_are_none(self, rate):
        if rate is None:
            assert len(load_waveform({"array": noise(0.1), "sampling_rate": None})) == 1600
            return
        with pytest.raises(ValueError, match="audio (array|dict) .*(sampling rate of|cannot be read)"):
            load_waveform({"array": noise(0.1), "sampling_rate": rate})

    def test_unknown_limits(self):
        with pytest.raises(TypeError, match="max_minutes"):
            load_waveform(noise(0.1), max_minutes=3)

    def test_long_files_are_decoded_and_resampled_in_blocks(self, tmp_path):
        """Block by block they are what they are at once."""
        for rate, format_ in ((44_100, "FLAC"), (48_000, "WAV"), (22_254, "WAV"), (16_000, "MP3")):
            samples = np.stack([noise(65, seed, rate) for seed in (1, 2)], axis=1)
            path = tmp_path / f"clip.{format_}"
            soundfile.write(path, samples, rate)
            decoded, _ = soundfile.read(path, dtype="float32")
            source, target = rate // np.gcd(rate, 16_000), 16_000 // np.gcd(rate, 16_000)
            expected = (
                decoded.mean(1) if source == target else resampling_lsm.resample(decoded.mean(1), source, target)
            )
            np.testing.assert_allclose(load_waveform(path), expected, atol=1e-6)
            np.testing.assert_allclose(load_waveform((decoded, rate)), expected, atol=1e-6)


class TestSources:
    @pytest.mark.parametrize("kind", [bytearray, memoryview, io.BytesIO, lambda data: memoryview(data).cast("B")])
    def test_all_that_is_bytes(self, kind):
        clip = noise(0.2)
        data = kind(audio_bytes(clip, subtype="FLOAT"))
        for source in (data, {"bytes": data, "path": None}, {"bytes": data, "path": "elsewhere.wav"}):
            assert np.array_equal(load_waveform(source, local_files=False), clip)
        with pytest.raises(ValueError, match="audio (bytes|file object)"):
            load_waveform(kind(b"junk" * 10))

    def test_file_objects_stay_where_they_are(self, tmp_path):
        clip = noise(0.2)
        path = tmp_path / "clip.wav"
        path.write_bytes(b"before" + audio_bytes(clip, subtype="FLOAT"))
        with open(path, "rb") as file:
            file.seek(6)
            assert np.array_equal(load_waveform(file), clip) and file.tell() == 6
            assert np.array_equal(load_waveform(file, local_files=False), clip) and not file.closed
        reading, writing = os.pipe()
        with open(reading, "rb") as pipe, open(writing, "wb") as other:
            threading.Thread(target=lambda: (other.write(audio_bytes(clip, subtype="FLOAT")), other.close())).start()
            assert np.array_equal(load_waveform(pipe), clip)

    def test_file_objects_that_cannot_be(self, tmp_path):
        with pytest.raises(ValueError, match=r"audio file object gives str; expected the bytes .* \('rb'\)"):
            load_waveform(io.StringIO("hello"))
        with open("/dev/zero", "rb") as endless, pytest.raises(ValueError, match="has more than 1000 bytes. Raise"):
            load_waveform(endless, max_bytes=1000)
        closed = io.BytesIO(b"x")
        closed.close()
        with pytest.raises(ValueError, match="audio file object cannot be read: I/O operation on closed file"):
            load_waveform(closed)

    def test_data_uris(self):
        clip = noise(0.2)
        data = audio_bytes(clip, subtype="FLOAT")
        text = base64.b64encode(data).decode()
        for uri in (
            f"data:audio/wav;base64,{text}",
            f"DATA:;BASE64,{text[:80]}\n {text[80:]}",
            f"data:audio/wav;base64,{text.replace('+', '%2B').replace('/', '%2f')}",
            "data:audio/wav," + "".join(f"%{byte:02x}" for byte in data),
        ):
            assert np.array_equal(load_waveform(uri, local_files=False), clip)
            assert np.array_equal(load_waveform({"path": uri}, local_files=False), clip)

    @pytest.mark.parametrize(
        ("uri", "message"),
        [
            ("data:audio/wav;base64", "has no comma"),
            ("data:audio/wav;base64,", "is empty"),
            ("data:audio/wav;base64,$$$", "cannot be read: Only base64 data"),
            ("data:audio/wav;base64,abc", "cannot be read: Incorrect padding"),
            ("data:,data:,data:,", "cannot be decoded"),
            ("data:audio/wav;base64," + "A" * 2000, "It has 15.. bytes or more, but at most 1000 are read. Raise"),
            ("data:audio/wav," + "A" * 2000, "It has 2000 bytes or more"),
        ],
    )
    def test_data_uris_that_are_none(self, uri, message):
        with pytest.raises(ValueError, match=rf"The audio data URI \(length {len(uri)}\) .*{message}"):
            load_waveform(uri, max_bytes=1000)

    def test_file_urls(self, tmp_path):
        clip = noise(0.2)
        path = tmp_path / "a clip.wav"
        path.write_bytes(audio_bytes(clip, subtype="FLOAT"))
        assert np.array_equal(load_waveform(path.as_uri()), clip)

    @pytest.mark.parametrize("form", ["str", "path", "url", "dict", "tuple", "missing"])
    def test_paths_can_be_switched_off(self, tmp_path, form):
        path = tmp_path / "clip.wav"
        path.write_bytes(audio_bytes(noise(0.1)))
        source = {
            "str": str(path),
            "path": path,
            "url": path.as_uri(),
            "dict": {"path": str(path), "bytes": None},
            "tuple": (str(path), 16_000),
            "missing": "nowhere.wav",
        }[form]
        with pytest.raises(
            ValueError, match=r"audio file '.*\.wav' is a path, but `local_files=False`: send the audio"
        ):
            load_waveform(source, local_files=False)
        assert len(load_waveform(noise(0.1), local_files=False)) == 1600

    @pytest.mark.parametrize(
        "url", ["s3://bucket/a.wav", "hdfs://host/a.wav", "ftp://host/a.wav", "hf://datasets/a/b"]
    )
    def test_no_other_file_systems(self, url):
        with pytest.raises(ValueError, match=rf"audio file '{url}' is on \w+://; expected a path, http://"):
            load_waveform(url)


class TestHostile:
    """Nothing but a `ValueError` or an `OSError` that names the source."""

    def test_paths(self, tmp_path):
        os.mkfifo(tmp_path / "fifo")  # opening it would wait for ever
        (tmp_path / "clip.raw").write_bytes(b"\0" * 100)
        for path in (
            "/dev/zero",
            "/dev/stdin",
            tmp_path / "fifo",
            tmp_path,
            "a\0b.wav",
            "x" * 10_000,
            "/proc/self/mem",
        ):
            with pytest.raises((ValueError, OSError), match="audio file '") as caught:
                load_waveform(path)
            assert len(str(caught.value)) < 600
        with pytest.raises(ValueError, match=r"clip\.raw' cannot be decoded"):
            load_waveform(tmp_path / "clip.raw")

    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            (MemoryError(), ValueError),
            (RuntimeError("no"), ValueError),
            (KeyError("k"), ValueError),
            (OverflowError("big"), ValueError),
            (RecursionError("deep"), ValueError),
            (ConnectionResetError("gone"), OSError),
            (TimeoutError(), TimeoutError),
        ],
    )
    def test_what_raises(self, error, kind):
        def fail(*_, **__):
            raise error

        array = type("Array", (), {"__array__": fail})()
        for source in (SimpleNamespace(read=fail), SimpleNamespace(get_all_samples=fail), array):
            with pytest.raises(kind, match=r"The audio (file object|array) cannot be read: .*\w"):
                load_waveform(source)

    def test_odd_arrays(self):
        recursive = []
        recursive.append(recursive)
        for source in (
            [[1.0, 2.0], [3.0]],
            [[[[]]]],
            recursive,
            np.array(1.0),
            np.array("path.wav"),
            np.zeros((0, 0)),
            np.array([1e300, 1.0]),
            torch.zeros(3, device="meta"),
            torch.eye(3).to_sparse(),
            {"array": {"path": "a.wav"}, "sampling_rate": 16_000},
            {"path": {"path": "a.wav"}},
            {"bytes": 7},
            {1: 2, "a": 3},
            object(),
            ...,
            (),
            7,
        ):
            with pytest.raises(ValueError, match="audio (array|dict|tuple|file)"):
                load_waveform(source)

    def test_strings_of_other_types(self, tmp_path):
        class Name(str):
            pass

        (tmp_path / "clip.wav").write_bytes(audio_bytes(noise(0.1)))
        assert len(load_waveform(Name(tmp_path / "clip.wav"))) == 1600
        with pytest.raises(ValueError, match="local_files=False"):
            load_waveform(Name(tmp_path / "clip.wav"), local_files=False)
