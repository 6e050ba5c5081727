"""Audio from wherever it is to what a speech encoder takes: mono, float32, at one rate."""

import os
import re
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch

from .audio_files_lsm import read_file
from .fetching_lsm import decode_data_uri, fetch
from .signals_lsm import BLOCK_VALUES, MAX_CHANNELS, AudioLimits, check_readable, gather, to_mono_float, too_long


SHOWN_CHARACTERS = 200  # of a path or URL, in an error message


def load_waveform(
    source: Any,
    sampling_rate: int | None = None,
    target_rate: int = 16_000,
    channel_axis: int | None = None,
    **limits,
) -> np.ndarray:
    """
    Reads audio from wherever it is and turns it into what a speech encoder takes.

    Args:
        source:
            A path, an http(s) or `data:` URL, the `bytes` of an audio file (or a `bytearray`, a `memoryview`, a file
            object, which is left open and, if it can be, at its position), an array or tensor of shape `(samples,)`,
            `(1 or 2, samples)` or `(samples, 1 or 2)`, a `(samples, rate)` tuple as `soundfile.read` gives it, a
            `datasets` dict (`{"array", "sampling_rate"}` or `{"path", "bytes"}`), or a decoder with
            `get_all_samples()`. Integers are scaled by the range of their type; floats are taken as they are.
        sampling_rate (`int`, *optional*):
            Samples per second of a bare array. Defaults to `target_rate`. Files say it themselves.
        target_rate (`int`, *optional*, defaults to 16000):
            Samples per second of the result.
        channel_axis (`int`, *optional*):
            Which axis of an array has its channels: 0 or 1. Needed for more than two.
        limits (*optional*):
            Fields of [`AudioLimits`], like `max_seconds=7200` or `local_files=False`.

    Returns:
        `np.ndarray` of shape `(samples,)`: mono, float32, at `target_rate`.

    Raises:
        ValueError: If the audio cannot be decoded, is cut off, has no samples, has samples that are not finite, has a
            shape or a sampling rate that is not that of audio, or goes beyond the limits.
        OSError: If a file or URL cannot be read; `FileNotFoundError` if a path does not exist.
        ImportError: If soundfile, which decodes files, is not installed.
    """
    limits = AudioLimits(**limits)
    name = describe_source(source)
    try:
        return read(source, name, sampling_rate, target_rate, channel_axis, limits)
    except Exception as error:
        # Whatever a decoder, a file object or an array of a stranger's raises becomes an error that callers know.
        if isinstance(error, (ValueError, OSError, ImportError)) and name in str(error):
            raise
        kind = next((kind for kind in (TimeoutError, OSError) if isinstance(error, kind)), ValueError)
        raise kind(f"The {name} cannot be read: {str(error) or type(error).__name__}") from error


def describe_source(source: Any) -> str:
    """What to call an audio source in an error message."""
    if isinstance(source, tuple) and source:
        return describe_source(source[0])
    if isinstance(source, dict):
        return describe_source(source["path"]) if isinstance(source.get("path"), str) else "audio dict"
    if isinstance(source, (str, os.PathLike)):
        text = str(source)
        if is_data_uri(text):
            return f"audio data URI (length {len(text)})"
        shown = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
        return f"audio {'URL' if scheme_of(source) in ('http', 'https') else 'file'} '{shown}'"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"audio bytes (length {memoryview(source).nbytes})"
    return "audio file object" if hasattr(source, "read") else "audio array"


def is_data_uri(text: str) -> bool:
    return text[:5].lower() == "data:"


def scheme_of(source: Any) -> str | None:
    """The scheme of a string that is a URL, in lower case."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source) if isinstance(source, str) else None
    return found and found[1].lower()


def read(
    source: Any, name: str, sampling_rate: Any, target_rate: int, channel_axis: int | None, limits: AudioLimits
) -> np.ndarray:
    """[`load_waveform`] without the last look at its errors."""
    source, sampling_rate, channel_axis = unwrap(source, name, sampling_rate, channel_axis, limits)
    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(source, "read"):
        return read_file(find_file(source, name, limits), name, target_rate, limits)
    samples, channel_axis = to_samples(source, name, channel_axis)
    rate = target_rate if sampling_rate is None else sampling_rate
    channels = 1 if channel_axis is None else samples.shape[channel_axis]
    check_readable(name, samples.size // max(1, channels), channels, rate, limits)
    step = BLOCK_VALUES // channels
    samples = samples if channel_axis is None else np.moveaxis(samples, channel_axis, 1)
    blocks = (to_mono_float(samples[start : start + step]) for start in range(0, len(samples), step))
    return gather(blocks, name, round(rate), target_rate)


def unwrap(
    source: Any, name: str, sampling_rate: Any, channel_axis: int | None, limits: AudioLimits
) -> tuple[Any, Any, int | None]:
    """What a dict, tuple or decoder holds, its sampling rate, and the axis of its channels as far as it is known."""
    if isinstance(source, dict):
        for key in ("array", "bytes"):
            if isinstance(source.get(key), (str, os.PathLike)):  # which those who check paths do not look for here
                raise ValueError(f"An {name} has {source[key]!r:.80} as {key!r}; paths and URLs stand under 'path'.")
        if source.get("array") is not None and "sampling_rate" in source:
            source, sampling_rate = source["array"], source["sampling_rate"]
        elif source.get("bytes") or source.get("path"):
            source = source.get("bytes") or source["path"]
        else:
            raise ValueError(
                f"An {name} has the keys {sorted(map(str, source))}; expected 'array' and 'sampling_rate', 'bytes', "
                "or 'path'."
            )
    elif isinstance(source, tuple):
        if len(source) != 2:
            raise ValueError(f"An audio tuple has {len(source)} items; expected 2: samples and their sampling rate.")
        source, sampling_rate = source
    if hasattr(source, "get_all_samples"):  # a torchcodec decoder, which is what `datasets.Audio` decodes to
        seconds = getattr(getattr(source, "metadata", None), "duration_seconds", None)
        if seconds is not None and seconds > limits.max_seconds:
            raise too_long(name, seconds, limits)
        samples = source.get_all_samples()
        return samples.data, samples.sample_rate, 0
    return source, sampling_rate, channel_axis


def find_file(source: Any, name: str, limits: AudioLimits) -> str | bytes:
    """The path or the content of the audio file that `source` is or names."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if hasattr(source, "read") and not isinstance(source, os.PathLike):
        return read_file_object(source, name, limits)
    if isinstance(source, str) and is_data_uri(source):
        return decode_data_uri(source, limits.max_bytes)
    scheme = scheme_of(source)
    if scheme in ("http", "https"):
        return fetch(source, limits.max_bytes, limits.timeout, limits.private_hosts)
    if scheme not in (None, "file"):
        raise ValueError(f"The {name} is on {scheme}://; expected a path, http://, https:// or data:. Fetch it first.")
    if not limits.local_files:
        raise ValueError(
            f"The {name} is a path, but `local_files=False`: send the audio itself, as bytes or as a data: URI, or an "
            "http(s) URL."
        )
    path = url2pathname(urlsplit(source).path) if scheme == "file" else os.fsdecode(source)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no {name}. Check the path; relative ones start at {os.getcwd()}.")
    return path


def read_file_object(source: Any, name: str, limits: AudioLimits) -> bytes:
    """What is left of a file object, which is put back to where it was."""
    position = source.tell() if hasattr(source, "seekable") and source.seekable() else None
    content = source.read(limits.max_bytes + 1)
    if position is not None:
        source.seek(position)
    if not isinstance(content, bytes):
        raise ValueError(f"The {name} gives {type(content).__name__}; expected the bytes of an audio file ('rb').")
    if len(content) > limits.max_bytes:
        raise ValueError(f"The {name} has more than {limits.max_bytes} bytes. Raise `max_bytes` if it may.")
    return content


def to_samples(samples: Any, name: str, channel_axis: int | None) -> tuple[np.ndarray, int | None]:
    """An array of what is an array, a tensor or a list of samples, and the axis of its channels if it has one."""
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().cpu()
        samples = (samples.float() if samples.is_floating_point() else samples).numpy()
    samples = np.asarray(samples)
    if samples.dtype.kind not in "iuf":
        raise ValueError(
            f"The {name} has the type {samples.dtype}; expected integer or float samples, a path, or bytes."
        )
    if samples.dtype.kind in "iu" and samples.dtype.itemsize > 4:
        raise ValueError(
            f"The {name} holds {samples.dtype} samples, whose full scale nobody uses. Pass 8-, 16- or 32-bit "
            "integers, or floats within ±1."
        )
    if samples.ndim == 2 and channel_axis is None and min(samples.shape) <= 2:
        return samples, int(np.argmin(samples.shape))
    if samples.ndim == 1:
        return samples, None
    if samples.ndim == 2 and channel_axis in (0, 1) and samples.shape[channel_axis] <= MAX_CHANNELS:
        return samples, channel_axis
    raise ValueError(
        f"The {name} has the shape {samples.shape}; expected (samples,), (1 or 2, samples) or (samples, 1 or 2), or "
        f"at most {MAX_CHANNELS} channels along `channel_axis`. Pass several clips as a list of arrays."
    )


__all__ = ["load_waveform"]
