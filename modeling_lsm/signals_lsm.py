"""
Signals, whatever they come from: what may be read of them, and how they become a waveform, block by block.

What strangers send passes here: [`check_readable`] decides by what is said of a signal, before memory is taken for it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any

import numpy as np

from .resampling_lsm import resample_blocks


MAX_CHANNELS = 8
MIN_RATE, MAX_RATE = 1_000, 384_000  # Hz
MAX_VALUES_PER_SECOND = 192_000  # of all channels: 96 kHz in stereo for as long as a clip may last
BLOCK_VALUES = 2**20  # of all channels, held at a time
FRAMES_UNKNOWN = 2**63 - 1  # what libsndfile says of a FLAC that was written to a pipe


@dataclass(frozen=True)
class AudioLimits:
    """
    What may be read. For a server that takes chats from strangers: `local_files=False`.

    Args:
        max_seconds (`float`, *optional*, defaults to 3600):
            The longest clip.
        local_files (`bool`, *optional*, defaults to `True`):
            Whether strings may name files of this machine, as paths or `file://` URLs.
        max_bytes (`int`, *optional*, defaults to 268435456):
            The most to read from a URL, a `data:` URI or a file object.
        timeout (`float`, *optional*, defaults to 60):
            Seconds that a download may take in all.
        private_hosts (`tuple[str, ...]`, *optional*):
            Hosts that URLs may name although their address is not public, like `("127.0.0.1", "media.internal")`.
    """

    max_seconds: float = 3600
    local_files: bool = True
    max_bytes: int = 2**28
    timeout: float = 60
    private_hosts: tuple[str, ...] = ()


def check_readable(name: str, frames: int, channels: int, sampling_rate: Any, limits: AudioLimits) -> None:
    """Raises a `ValueError` unless a signal of which this is said may be read."""
    if frames == 0:
        raise ValueError(f"The {name} has no samples. Leave it out, or check how it was cut.")
    is_number = isinstance(sampling_rate, Real) and isfinite(sampling_rate)
    if not is_number or not MIN_RATE <= sampling_rate <= MAX_RATE:
        raise ValueError(
            f"The {name} has a sampling rate of {sampling_rate!r:.80}; expected samples per second, like 16000, from "
            f"{MIN_RATE} to {MAX_RATE}."
        )
    if channels > MAX_CHANNELS:
        raise ValueError(f"The {name} has {channels} channels; expected at most {MAX_CHANNELS}. Mix it down first.")
    if frames == FRAMES_UNKNOWN:
        raise ValueError(f"The {name} does not say how long it is: it was written to a pipe. Write it to a file.")
    seconds = frames / sampling_rate
    if seconds > limits.max_seconds:
        raise too_long(name, seconds, limits)
    if frames * channels > limits.max_seconds * MAX_VALUES_PER_SECOND:
        raise ValueError(
            f"The {name} has {frames} samples in each of {channels} channels, too many for `max_seconds="
            f"{limits.max_seconds:g}`. Resample it or mix it down first, or raise the limit."
        )


def too_long(name: str, seconds: float, limits: AudioLimits) -> ValueError:
    return ValueError(
        f"The {name} lasts {seconds:.0f} seconds; expected at most {limits.max_seconds:g}. Cut it, or raise the limit "
        f"with `max_seconds`."
    )


def gather(blocks: Iterable[np.ndarray], name: str, sampling_rate: int, target_rate: int) -> np.ndarray:
    """The whole signal at `target_rate`; no more of it is held at `sampling_rate` than it takes to resample it."""

    def finite() -> Iterator[np.ndarray]:
        for block in blocks:
            if count := block.size - int(np.isfinite(block).sum()):
                raise ValueError(
                    f"The {name} has {count} samples that are NaN or infinite. Repair or leave out this recording."
                )
            yield block

    return np.concatenate(list(resample_blocks(finite(), sampling_rate, target_rate)))


def to_mono_float(samples: np.ndarray) -> np.ndarray:
    """A float32 array of shape `(samples,)` of one of shape `(samples,)` or `(samples, channels)`."""
    dtype = samples.dtype
    with np.errstate(over="ignore"):  # what is too large for float32 is found to be infinite
        samples = samples.astype(np.float32)
    if dtype.kind == "u":
        samples = samples / (np.iinfo(dtype).max // 2 + 1) - 1
    elif dtype.kind == "i":
        samples = samples / -float(np.iinfo(dtype).min)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    return np.ascontiguousarray(samples, dtype=np.float32)


__all__ = ["AudioLimits", "check_readable", "gather", "to_mono_float"]
