"""What strangers send: damaged and crafted files, each in a process of its own whose time and memory are measured."""

import gzip
import io
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.test_audio import audio_bytes, flac_that_declares, wav_that_declares
from tests.tiny import noise, tone


MAX_SECONDS = 5
MAX_BYTES = 2e9  # above the loaded package
DAMAGED = 1000
FORMATS = [
    {"format": "WAV", "subtype": "PCM_16"},
    {"format": "WAV", "subtype": "FLOAT"},
    {"format": "WAV", "subtype": "IMA_ADPCM"},
    {"format": "FLAC"},
    {"format": "OGG", "subtype": "VORBIS"},
    {"format": "OGG", "subtype": "OPUS"},
    {"format": "MP3"},
    {"format": "AIFF"},
    {"format": "CAF"},
    {"format": "AU"},
    {"format": "W64"},
]
EXTREMES = [0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]


def cut(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    return data[: draw.randrange(len(data))]


def flip(data: bytes, draw: random.Random, others: list[bytes], within: int | None = None) -> bytes:
    changed = bytearray(data)
    for _ in range(2 ** draw.randrange(8)):
        changed[draw.randrange(min(within or len(data), len(data)))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flip_header(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    return flip(data, draw, others, within=64)


def claim(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """A field of the header with an extreme value."""
    at, order = draw.randrange(4, 60), draw.choice("<>")
    return data[:at] + struct.pack(f"{order}I", draw.choice(EXTREMES)) + data[at + 4 :]


def behead(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """The header of another format."""
    size = draw.choice([4, 12, 36, 44, 100, 500])
    return draw.choice(others)[:size] + data[size:]


def leave_out(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    start = draw.randrange(len(data))
    return data[:start] + data[start + draw.randrange(2000) :]


def repeat(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    start = draw.randrange(len(data))
    return data[:start] + data[start : start + draw.randrange(2000)] * draw.randrange(2, 20) + data[start:]


def overwrite(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    start, size = draw.randrange(len(data)), draw.randrange(1, 5000)
    return data[:start] + draw.choice([b"\0" * size, b"\xff" * size, draw.randbytes(size)]) + data[start + size :]


def join(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    return data + draw.choice(others)


def other_file(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """No audio, or audio in another wrapping."""
    kinds = [
        draw.randbytes(draw.randrange(5000)),
        b"he was not an ill disposed young man\n" * draw.randrange(1, 200),
        gzip.compress(data),
        b"PK\x03\x04" + data,
        b"\x89PNG\r\n\x1a\n" + zlib.compress(data),
        b"\0\0\0\x18ftypM4A \0\0\0\0" + data,
        b"\x1a\x45\xdf\xa3webm" + data,
        b"ID3\x04\0\0" + draw.randbytes(4) + data,
        json.dumps({"audio": "a.wav"}).encode(),
        b"#EXTM3U\nhttp://127.0.0.1/a.wav\n",
    ]
    return draw.choice(kinds)


DAMAGES = [cut, flip, flip_header, claim, behead, leave_out, repeat, overwrite, join, other_file]


def write_damaged(folder: Path, count: int) -> None:
    """`count` damaged files, the same ones each time."""
    there = [kwargs for kwargs in FORMATS if kwargs["format"] in soundfile.available_formats()]
    bases = [
        audio_bytes(np.stack([noise(0.5, channel, rate) for channel in range(channels)], axis=1), rate, **kwargs)
        for kwargs in there
        for channels, rate in ((1, 16_000), (2, 48_000))
    ]
    draw = random.Random(0)
    for number in range(count):
        damage, data = DAMAGES[number % len(DAMAGES)], draw.choice(bases)
        (folder / f"{number:04}-{damage.__name__}.audio").write_bytes(damage(data, draw, bases))


def silence(hours: float, sampling_rate: int, channels: int = 1, **kwargs) -> bytes:
    file, zeros = io.BytesIO(), np.zeros((2**20, channels), dtype=np.int16)
    with soundfile.SoundFile(file, "w", sampling_rate, channels, **{"format": "FLAC", **kwargs}) as sound:
        for _ in range(int(hours * 3600 * sampling_rate / 2**20)):
            sound.write(zeros)
    return file.getvalue()


def ogg_that_declares(granules: int) -> bytes:
    """An OGG whose last page says that it ends at the sample `granules`."""
    data = bytearray(audio_bytes(noise(1), format="OGG", subtype="VORBIS"))
    start = data.rindex(b"OggS")
    data[start + 6 : start + 14] = struct.pack("<q", granules)
    data[start + 22 : start + 26] = bytes(4)
    checksum = 0
    for byte in data[start:]:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x104C11DB7 if checksum & 0x80000000 else 0)) & 0xFFFFFFFF
    data[start + 22 : start + 26] = struct.pack("<I", checksum)
    return bytes(data)


def write_crafted(folder: Path) -> None:
    """What took a machine's memory, its time or a whole run at the first release, and its like."""
    files = {f"1-s-at-{rate}-hz": audio_bytes(tone(440, 1, rate), rate) for rate in (22_254, 44_101, 47_999, 383_999)}
    for rate in (0, 1, 999, 384_001, 2**31 - 1, 2**31, 2**32 - 1):
        files[f"wav-that-claims-{rate}-hz"] = wav_that_declares(rate)
    for channels in (0, 9, 1024, 65_535):
        files[f"wav-that-claims-{channels}-channels"] = wav_that_declares(16_000, channels)
    for samples in (0, 1, 2**31, 2**36 - 1):
        files[f"flac-that-claims-{samples}-samples"] = flac_that_declares(samples)
    for granules in (0, -1, 2**31, 2**50, 2**62, -(2**62)):
        files[f"ogg-that-claims-{granules}-samples"] = ogg_that_declares(granules)
    files["ten-hours-of-silence"] = silence(10, 16_000)
    files["ten-hours-that-claim-a-second"] = bytearray(files["ten-hours-of-silence"])
    files["ten-hours-that-claim-a-second"][21:26] = bytes([0xF0, 0, 0, 0x3E, 0x80])
    files["ten-hours-that-claim-nothing"] = bytearray(files["ten-hours-of-silence"])
    files["ten-hours-that-claim-nothing"][21:26] = bytes([0xF0, 0, 0, 0, 0])
    files["two-hours-of-ogg"] = silence(2, 8_000, format="OGG", subtype="VORBIS")
    files["8-channels-at-383990-hz"] = silence(0.25, 383_990, 8)
    files["an-hour-at-1000-hz"] = silence(1, 1_000)
    files["wav-of-half-a-sample"] = wav_that_declares(16_000)[:45]
    for name, data in files.items():
        (folder / f"{name}.crafted").write_bytes(data)


def read_in_child(path: Path, out: int) -> None:
    """Reads one file, says what came of it on `out`, and ends the process."""
    from modeling_lsm import load_waveform

    signal.alarm(60)
    started_with = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = path if len(path.name) % 2 else path.read_bytes()
    start = time.perf_counter()
    try:
        waveform = load_waveform(source)
        right = waveform.dtype == np.float32 and waveform.ndim == 1 and waveform.size and np.isfinite(waveform).all()
        result = "waveform" if right else f"wrong: {waveform!r}"
    except (ValueError, OSError) as error:
        named = str(path) in str(error) or "audio bytes (length" in str(error)
        result = type(error).__name__ if named else f"unnamed: {error!r}"
    except BaseException as error:
        result = f"escaped: {error!r}"
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started_with
    os.write(out, json.dumps([result, seconds, peak * 1024]).encode())
    os._exit(0)


def read_all(folder: str) -> None:
    """Reads each file of `folder` in a fork of this process, which has the package loaded; prints what came of it."""
    import torch

    from modeling_lsm import load_waveform

    torch.set_num_threads(1)
    load_waveform(audio_bytes(noise(0.1, sampling_rate=8_000), 8_000))  # loads soundfile and torchaudio
    results = {}
    for path in sorted(Path(folder).iterdir()):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            read_in_child(path, writing)
        os.close(writing)
        with open(reading, "rb") as file:
            said = file.read()
        _, status = os.waitpid(child, 0)
        results[path.name] = json.loads(said) if said else [f"died: status {status}", 0, 0]
    print(json.dumps(results))


def measure(folder: Path) -> dict[str, tuple[str, float, int]]:
    """What came of each file in `folder`: the kind of result, seconds, and bytes above the loaded package."""
    code = f"from tests.test_audio_damaged import read_all; read_all({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(results: dict[str, tuple[str, float, int]]) -> None:
    bad = {
        name: (result, f"{seconds:.2f} s", f"{peak / 1e6:.0f} MB")
        for name, (result, seconds, peak) in results.items()
        if not (result == "waveform" or result.endswith("Error")) or seconds > MAX_SECONDS or peak > MAX_BYTES
    }
    kinds, times, peaks = zip(*results.values(), strict=True)
    figures = f"{dict(Counter(kinds))}, at most {max(times):.2f} s and {max(peaks) / 1e6:.0f} MB"
    print(figures)
    assert not bad, f"{len(bad)} of {len(results)} files: {bad}\nAll: {figures}"


@pytest.mark.slow
def test_damaged_files(tmp_path):
    write_damaged(tmp_path, DAMAGED)
    results = measure(tmp_path)
    assert len(results) == DAMAGED
    check(results)


@pytest.mark.slow
def test_crafted_files(tmp_path):
    write_crafted(tmp_path)
    results = measure(tmp_path)
    check(results)
    assert {name for name in results if name.startswith("1-s-at-")} <= {
        name for name, (result, *_) in results.items() if result == "waveform"
    }
    assert results["ten-hours-of-silence.crafted"][0] == "ValueError"
