"""Audio files, which soundfile decodes: in blocks, and not without a word where something is missing."""

import io
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from .signals_lsm import BLOCK_VALUES, AudioLimits, check_readable, gather, to_mono_float


SIZE_UNKNOWN = 0x7FFFF000  # a WAV that was written to a pipe declares this size or a larger one
MAX_OGG_PAGE = 65_307  # bytes


def read_file(source: str | bytes, name: str, target_rate: int, limits: AudioLimits) -> np.ndarray:
    """Decodes an audio file, given by its path or its content."""
    size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
    if size == 0:
        raise ValueError(f"The {name} is empty (0 bytes). Fetch or record it again.")
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(f"Reading {name} needs soundfile: pip install soundfile.") from error
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            check_readable(name, file.frames, file.channels, file.samplerate, limits)
            # libsndfile reads what is left of a file that was cut off, and only remarks on it.
            sizes = re.findall(r" : (\d+) \(should be (\d+)\)", file.extra_info)
            if any(int(there) < int(size) < SIZE_UNKNOWN for size, there in sizes) or ends_inside_ogg_page(source):
                raise cut_off(name)
            return gather(decode(file, name), name, file.samplerate, target_rate)
    except (RuntimeError, TypeError) as error:  # libsndfile's errors; a TypeError from a path that ends in .raw
        raise ValueError(
            f"The {name} cannot be decoded: {error} It is damaged, cut off, or not WAV, FLAC, OGG or MP3; convert it "
            "first (for instance with ffmpeg)."
        ) from error


def decode(file: Any, name: str) -> Iterator[np.ndarray]:
    """The samples of an open `soundfile.SoundFile`, mono, in blocks: as many as it declares."""
    left = file.frames
    while left:
        block = file.read(min(left, BLOCK_VALUES // file.channels), dtype="float32", always_2d=True)
        if len(block) == 0:
            raise cut_off(name)
        left -= len(block)
        yield to_mono_float(block)


def cut_off(name: str) -> ValueError:
    return ValueError(f"The {name} is cut off: it holds fewer samples than it should. Fetch it again.")


def ends_inside_ogg_page(source: str | bytes) -> bool:
    """Whether an OGG file or its bytes end inside of a page, about which libsndfile says nothing."""
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        if file.read(4) != b"OggS":
            return False
        file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_OGG_PAGE))
        page = file.read()
    page = page[page.rfind(b"OggS") :]
    return len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


__all__ = ["read_file"]
