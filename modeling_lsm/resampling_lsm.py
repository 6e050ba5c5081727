"""Sampling rates: a signal that comes in blocks, resampled with a memory that neither its length nor its rate sets."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from math import ceil, gcd

import numpy as np
import torch


# The filter of `torchaudio.functional.resample`: a sinc in a Hann window.
ZERO_CROSSINGS = 6
ROLLOFF = 0.99
# torchaudio's kernel has a row per output phase, each as long as a period of the input: 76,000 values for
# 44,100 → 16,000 Hz, 705 million for 44,101.
MAX_KERNEL = 2**19
BLOCK_SECONDS = 60
GATHERED_VALUES = 2**22


def resample_blocks(blocks: Iterable[np.ndarray], source_rate: int, target_rate: int) -> Iterator[np.ndarray]:
    """
    Resamples a signal that comes in blocks.

    Args:
        blocks (`Iterable[np.ndarray]`): Its samples in float32, each block of shape `(samples,)`.
        source_rate (`int`): Samples per second of the signal.
        target_rate (`int`): Samples per second of the result.

    Yields:
        `np.ndarray`: Blocks of the result, `ceil(samples * target_rate / source_rate)` samples in all: the same,
        within rounding, as if the signal had been resampled at once, which a signal of up to a minute is.
    """
    if source_rate == target_rate:
        yield from blocks
        return
    divisor = gcd(source_rate, target_rate)
    source, target = source_rate // divisor, target_rate // divisor
    context = source * ceil((reach(source, target) + 1) / source)
    step = source * ceil(BLOCK_SECONDS * source_rate / source)
    held, done = np.zeros(0, dtype=np.float32), 0  # of what is held, the first `done` samples are only context
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) >= done + step + context:
            end = done + step
            resampled = resample(held[: end + context], source, target)
            yield resampled[done // source * target : end // source * target]
            held, done = held[end - context :], context
    if len(held) > done:
        yield resample(held, source, target)[done // source * target :]


def reach(source: int, target: int) -> int:
    """How many input samples the filter looks to either side."""
    return ceil(ZERO_CROSSINGS * source / (min(source, target) * ROLLOFF))


def resample(waveform: np.ndarray, source: int, target: int) -> np.ndarray:
    """Resamples `waveform`, `(samples,)`, by the reduced fraction `target / source`."""
    if target * (source + 2 * reach(source, target)) <= MAX_KERNEL:
        try:
            import torchaudio

            return torchaudio.functional.resample(torch.from_numpy(waveform), source, target).numpy()
        except (ImportError, OSError):  # an OSError where its compiled part does not load
            pass
    return resample_by_phases(waveform, source, target)


def resample_by_phases(waveform: np.ndarray, source: int, target: int) -> np.ndarray:
    """As torchaudio, with the same filter, but only the part of each kernel row that is not zero."""
    kernel = phase_kernel(source, target)
    width, taps = reach(source, target), kernel.shape[1]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(waveform, (width, taps)), taps)
    resampled = np.empty(ceil(len(waveform) * target / source), dtype=np.float32)
    rows = max(1, GATHERED_VALUES // taps)
    for start in range(0, len(resampled), rows):
        outputs = np.arange(start, min(start + rows, len(resampled)))
        np.einsum(
            "nt,nt->n",
            windows[outputs * source // target],
            kernel[outputs % target],
            out=resampled[start : start + rows],
        )
    return resampled


@lru_cache(maxsize=2)
def phase_kernel(source: int, target: int) -> np.ndarray:
    """The filter for each phase of the output, `(target, taps)`; the first tap is `reach` samples before the phase."""
    width = reach(source, target)
    cutoff = min(source, target) * ROLLOFF / source
    fractions = np.arange(target) * source % target / target
    times = (np.arange(-width, width + 2) - fractions[:, None]) * cutoff
    window = np.cos(np.clip(times / ZERO_CROSSINGS, -1, 1) * np.pi / 2) ** 2
    return (np.sinc(times) * window * cutoff).astype(np.float32)


__all__ = ["resample_blocks"]
