"""
`LsmProcessor`: a chat that holds audio → the tensors an LSM takes.

The prompt that asks the LLM for a training target, the prompt that trains on it and the prompt of later use are all
`make_chat(...)`, rendered with the processor's one template; only the transcript changes places with the audio.
"""

import io
import os
import re
from math import gcd
from numbers import Real
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.audio_utils import load_audio as fetch_audio

from .configuration_lsm import AudioTiming


AUDIO_TOKEN = "<|audio|>"
MAX_CHANNELS = 8
SIZE_UNKNOWN = 0x7FFFF000  # a WAV that was written to a pipe declares this size or a larger one
MAX_OGG_PAGE = 65_307  # bytes


def make_chat(
    instruction: str, audio: Any = None, transcript: str | None = None, target: str | None = None
) -> list[dict[str, Any]]:
    """
    The one prompt: an instruction, then what it is about, as speech or as its transcript.

    Args:
        instruction (`str`): What to do with the speech.
        audio (*optional*): Anything that [`load_waveform`] takes.
        transcript (`str`, *optional*): The words of the speech, in its place.
        target (`str`, *optional*): The assistant's answer.

    Returns:
        `list[dict]`: A chat for [`LsmProcessor.apply_chat_template`].
    """
    if (audio is None) == (transcript is None):
        raise ValueError("Pass exactly one of `audio` and `transcript`.")
    content = {"type": "audio", "audio": audio} if transcript is None else {"type": "text", "text": transcript}
    chat = [{"role": "user", "content": [{"type": "text", "text": f"{instruction}\n\n"}, content]}]
    if target is not None:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": target}]})
    return chat


def describe_source(source: Any) -> str:
    """What to call an audio source in an error message."""
    if isinstance(source, (str, os.PathLike)):
        return f"audio file '{source}'"
    if isinstance(source, bytes):
        return f"audio bytes (length {len(source)})"
    if isinstance(source, dict):
        return f"audio file '{source['path']}'" if source.get("path") else "audio dict"
    return "audio array"


def load_waveform(source: Any, sampling_rate: int | None = None, target_rate: int = 16_000) -> np.ndarray:
    """
    Reads audio from wherever it is and turns it into what a speech encoder takes.

    Args:
        source:
            A path or URL, the `bytes` of an audio file, an array or tensor of shape `(samples,)`,
            `(channels, samples)` or `(samples, channels)`, a `(samples, rate)` tuple as `soundfile.read` gives it, a
            `datasets` dict (`{"array", "sampling_rate"}` or `{"path", "bytes"}`), or a decoder with
            `get_all_samples()`. Integers are scaled by the range of their type; floats are taken as they are.
        sampling_rate (`int`, *optional*):
            Samples per second of a bare array. Defaults to `target_rate`. Files say it themselves.
        target_rate (`int`, *optional*, defaults to 16000):
            Samples per second of the result.

    Returns:
        `np.ndarray` of shape `(samples,)`: mono, float32, at `target_rate`.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If the audio cannot be decoded, is cut off, has no samples, has samples that are not finite, or has
            a shape that is not that of audio.
        ImportError: If no installed package can decode or resample.
    """
    name = describe_source(source)
    if isinstance(source, dict):
        if source.get("array") is not None and "sampling_rate" in source:
            source, sampling_rate = source["array"], source["sampling_rate"]
        elif source.get("bytes") or source.get("path"):
            source = source.get("bytes") or source["path"]
        else:
            raise ValueError(
                f"An audio dict has the keys {sorted(source)}; expected 'array' and 'sampling_rate', "
                "'bytes', or 'path'."
            )
    elif isinstance(source, tuple):
        if len(source) != 2:
            raise ValueError(f"An audio tuple has {len(source)} items; expected 2: samples and their sampling rate.")
        source, sampling_rate = source

    if hasattr(source, "get_all_samples"):  # a torchcodec decoder, which is what `datasets.Audio` decodes to
        samples = source.get_all_samples()
        source, sampling_rate = samples.data, samples.sample_rate
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        source, sampling_rate = fetch_audio(source, sampling_rate=target_rate), target_rate
    elif isinstance(source, (str, os.PathLike, bytes)):
        source, sampling_rate = decode(source, name)

    waveform = to_mono_float(source, name)
    if waveform.size == 0:
        raise ValueError(f"The {name} has no samples. Leave it out, or check how it was cut.")
    if not np.isfinite(waveform).all():
        count = int((~np.isfinite(waveform)).sum())
        raise ValueError(
            f"The {name} has {count} samples that are NaN or infinite. Repair or leave out this recording."
        )
    if sampling_rate is None or sampling_rate == target_rate:
        return waveform
    if not isinstance(sampling_rate, Real) or sampling_rate <= 0:
        raise ValueError(
            f"The {name} has a sampling rate of {sampling_rate!r}; expected samples per second, like 16000."
        )
    return resample(waveform, int(sampling_rate), target_rate)


def decode(source: str | os.PathLike | bytes, name: str) -> tuple[np.ndarray, int]:
    """Decodes an audio file or its bytes to samples, `(samples, channels)` or `(samples,)`, and their rate."""
    size = len(source) if isinstance(source, bytes) else None
    if size is None:
        if not os.path.isfile(source):
            raise FileNotFoundError(f"There is no {name}. Check the path; relative ones start at {os.getcwd()}.")
        size = os.path.getsize(source)
    if size == 0:
        raise ValueError(f"The {name} is empty (0 bytes). Fetch or record it again.")
    try:
        import soundfile
    except ImportError as error:
        try:  # torchcodec, where it is there; it takes a path only
            return fetch_audio(os.fspath(source)), 16_000
        except (ImportError, TypeError):
            raise ImportError(f"Reading {name} needs soundfile: pip install soundfile.") from error
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)) as file:
            declared, header = file.frames, file.extra_info
            samples, sampling_rate = file.read(dtype="float32"), file.samplerate
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ValueError(
            f"The {name} cannot be decoded: {error} It is damaged, cut off, or not WAV, FLAC, OGG or MP3; convert it "
            "first (for instance with ffmpeg)."
        ) from error
    # libsndfile reads what is left of a file that was cut off, and only remarks on it.
    sizes = [(int(size), int(there)) for size, there in re.findall(r" : (\d+) \(should be (\d+)\)", header)]
    cut_off = len(samples) < declared or any(there < size < SIZE_UNKNOWN for size, there in sizes)
    if cut_off or last_ogg_page_is_cut_off(source):
        raise ValueError(
            f"The {name} is cut off: it holds {len(samples)} samples, fewer than it should. Fetch it again."
        )
    return samples, sampling_rate


def last_ogg_page_is_cut_off(source: str | os.PathLike | bytes) -> bool:
    """Whether an OGG file or its bytes end inside of a page, about which libsndfile says nothing."""
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        if file.read(4) != b"OggS":
            return False
        file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_OGG_PAGE))
        page = file.read()
    page = page[page.rfind(b"OggS") :]
    return len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def to_mono_float(samples: Any, name: str) -> np.ndarray:
    """Turns an array, tensor or list of samples into a float32 array of shape `(samples,)`."""
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
    if samples.ndim == 2 and min(samples.shape) <= MAX_CHANNELS:
        channel_axis = int(np.argmin(samples.shape))
    elif samples.ndim == 1:
        channel_axis = None
    else:
        raise ValueError(
            f"The {name} has the shape {samples.shape}; expected (samples,), (channels, samples) or (samples, "
            f"channels) with at most {MAX_CHANNELS} channels. Pass several clips as a list of arrays."
        )
    dtype = samples.dtype
    samples = samples.astype(np.float32)
    if dtype.kind == "u":
        samples = samples / (np.iinfo(dtype).max // 2 + 1) - 1
    elif dtype.kind == "i":
        samples = samples / -float(np.iinfo(dtype).min)
    if channel_axis is not None:
        samples = samples.mean(axis=channel_axis) if samples.size else samples.reshape(-1)
    return np.ascontiguousarray(samples, dtype=np.float32)


def resample(waveform: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Resamples `waveform`, `(samples,)`, with torchaudio or else with soxr, to `ceil(samples * ratio)` samples."""
    try:
        import torchaudio

        divisor = gcd(source_rate, target_rate)
        return torchaudio.functional.resample(
            torch.from_numpy(waveform), source_rate // divisor, target_rate // divisor
        ).numpy()
    except (ImportError, OSError) as torchaudio_error:  # an OSError where its compiled part does not load
        try:
            import soxr
        except ImportError:
            raise ImportError(
                f"Resampling from {source_rate} to {target_rate} Hz needs torchaudio or soxr: pip install torchaudio."
            ) from torchaudio_error
        return soxr.resample(waveform, source_rate, target_rate).astype(np.float32)


class LsmProcessor(ProcessorMixin):
    r"""
    Prepares chats with audio for an LSM: log-mel spectrograms from Whisper's feature extractor, token ids from the
    LLM's tokenizer, with as many audio placeholders as the model makes audio embeddings.

    Args:
        feature_extractor (`WhisperFeatureExtractor`):
            The feature extractor of the speech encoder.
        tokenizer (`PreTrainedTokenizerBase`):
            The LLM's tokenizer, in which `audio_token` is one token.
        chat_template (`str`, *optional*):
            Jinja template for chats whose content may hold `{"type": "audio"}` items.
        audio_token (`str`, *optional*, defaults to `"<|audio|>"`):
            Placeholder for audio in a rendered prompt.
        window_size, num_queries, max_encoder_frames (`int`):
            See [`AudioTiming`]; the same as in the model's [`LsmConfig`].
        encoder_padding (`str`, *optional*, defaults to `"longest"`):
            `"longest"` or `"max_length"`, the same as in the model's [`LsmConfig`].

    Example:

    ```python
    >>> chat = make_chat("Transcribe the speech.", audio="clip.wav")
    >>> inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    >>> inputs["input_features"].shape  # (chunks, mels, mel frames), inputs["input_ids"] is (1, tokens)
    ```"""

    text_kwargs = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    audio_kwargs = {"return_tensors": "pt"}

    def __init__(
        self,
        feature_extractor,
        tokenizer,
        chat_template=None,
        audio_token=AUDIO_TOKEN,
        window_size=17,
        num_queries=1,
        max_encoder_frames=1500,
        encoder_padding="longest",
    ):
        self.audio_token = audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        if self.audio_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"The tokenizer does not know the audio token {audio_token!r}. Compose the checkpoint with "
                "`python -m modeling_lsm.composing`, which adds it, or call `tokenizer.add_special_tokens` yourself."
            )
        self.window_size = window_size
        self.num_queries = num_queries
        self.max_encoder_frames = max_encoder_frames
        self.encoder_padding = encoder_padding
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    @property
    def timing(self) -> AudioTiming:
        """The time arithmetic, an [`AudioTiming`]."""
        return AudioTiming(
            window_size=self.window_size,
            num_queries=self.num_queries,
            max_encoder_frames=self.max_encoder_frames,
            sampling_rate=self.feature_extractor.sampling_rate,
            hop_length=self.feature_extractor.hop_length,
        )

    def __call__(self, text=None, audio=None, sampling_rate: int | None = None, **kwargs) -> BatchFeature:
        r"""
        Args:
            text (`str` or `list[str]`):
                Prompts, with one `audio_token` for every clip. See `apply_chat_template`, which writes them.
            audio (*optional*):
                A clip or a list of clips, in the order of their placeholders: anything that [`load_waveform`] takes.
            sampling_rate (`int`, *optional*):
                Samples per second of clips that are bare arrays. Defaults to the encoder's own rate.

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask`, `(batch, tokens)`, and, if there is audio,
            `input_features`, `(chunks, mels, mel frames)`, and `input_features_mask`, `(chunks, mel frames)`.

        Raises:
            ValueError: If clips and placeholders differ in number, or a clip cannot be used.
        """
        if audio is not None:
            clips = audio if isinstance(audio, list) and not is_list_of_numbers(audio) else [audio]
            rate = self.feature_extractor.sampling_rate
            audio = [load_waveform(clip, sampling_rate, rate) for clip in clips] or None
        if "padding_side" not in {**kwargs, **(kwargs.get("text_kwargs") or {})}:
            # Said in every call: a trainer may have turned the tokenizer's own side, which would come first.
            kwargs["padding_side"] = self.text_kwargs["padding_side"]
        return super().__call__(text=text, audio=audio, **kwargs)

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """
        As in [`ProcessorMixin.apply_chat_template`]. An audio item of a message's content holds its clip under
        `"audio"`, `"path"` or `"url"` (anything that [`load_waveform`] takes), and, for a bare array, may hold its
        `"sampling_rate"`. Files and arrays of any rate are resampled.
        """
        if kwargs.get("tokenize"):
            batched = isinstance(conversation[0], (list, tuple))
            chats = [self._load_audio_items(chat) for chat in (conversation if batched else [conversation])]
            conversation = chats if batched else chats[0]
        return super().apply_chat_template(conversation, chat_template=chat_template, **kwargs)

    def _load_audio_items(self, chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A copy of `chat` in which every audio item holds a waveform."""

        def load(item):
            if "type" not in item:
                raise ValueError(
                    f"A message holds an item without a 'type' (its keys are {sorted(item)}). Write it as "
                    "{'type': 'text', 'text': …} or {'type': 'audio', 'audio': …}."
                )
            if item["type"] != "audio":
                return item
            source = next((item[key] for key in ("audio", "path", "url") if item.get(key) is not None), None)
            if source is None:
                raise ValueError(
                    f"A message holds an audio item without audio (its keys are {sorted(item)}). Put the clip under "
                    "'audio', 'path' or 'url', or remove the item."
                )
            waveform = load_waveform(source, item.get("sampling_rate"), self.feature_extractor.sampling_rate)
            return {"type": "audio", "audio": waveform}

        return [
            message
            if isinstance(message.get("content"), str) or message.get("content") is None
            else {**message, "content": [load(item) for item in message["content"]]}
            for message in chat
        ]

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if text is not None and all(isinstance(sample, str) for sample in text):
            placeholders = sum(sample.count(self.audio_token) for sample in text)
            clips = 0 if audio is None else len(audio)
            if placeholders != clips:
                raise ValueError(
                    f"The prompts hold {placeholders} audio placeholders ({self.audio_token}), but {clips} clips were "
                    "passed. Every clip needs one placeholder and every placeholder one clip."
                )
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _process_audio(
        self, audio: list[np.ndarray], device: str = "cpu", **kwargs
    ) -> tuple[dict[str, Any], list[str]]:
        timing = self.timing
        bounds = [timing.chunk_bounds(len(clip)) for clip in audio]
        chunks = [
            clip[start:end] for clip, clip_bounds in zip(audio, bounds, strict=True) for start, end in clip_bounds
        ]
        mel_lengths = torch.tensor([timing.mel_frames(len(chunk)) for chunk in chunks])

        if self.encoder_padding == "max_length":
            padded_samples = timing.max_samples
            mel_frames = timing.mel_frames(padded_samples)
        else:
            # The spectrogram mirrors the signal at its end. With a frame length of silence after the longest chunk
            # the mirror image stays outside of every chunk, so that no chunk depends on the others' lengths.
            mel_frames = int(mel_lengths.max())
            padded_samples = mel_frames * timing.hop_length + self.feature_extractor.n_fft
        with torch.autocast(torch.device(device).type, enabled=False):  # it ends in NumPy, without bfloat16
            features = self.feature_extractor(
                chunks,
                sampling_rate=timing.sampling_rate,
                padding="max_length",
                max_length=padded_samples,
                device=device,
                return_tensors="pt",
            )["input_features"][..., :mel_frames]

        inputs = {
            "input_features": features,
            "input_features_mask": (torch.arange(mel_frames) < mel_lengths[:, None]).long(),
            "num_audio_tokens": [timing.audio_tokens_of_clip(len(clip)) for clip in audio],
        }
        return inputs, [self.replace_audio_token(inputs, index) for index in range(len(audio))]

    def replace_audio_token(self, audio_inputs: dict[str, Any], audio_idx: int, **kwargs) -> str:
        return self.audio_token * audio_inputs["num_audio_tokens"][audio_idx]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "input_features", "input_features_mask"]

    @property
    def unused_input_names(self) -> list[str]:
        return ["num_audio_tokens"]

    def check_matches(self, config) -> None:
        """
        Raises a `ValueError` if this processor does not belong to the model with the [`LsmConfig`] `config`: another
        tokenizer, another audio token, or another count of audio tokens.
        """
        mine = {
            "audio token id": self.audio_token_id,
            # As a dict: loaded from a checkpoint's own code, the two have classes of two modules of the same name.
            "timing": vars(self.timing),
            "encoder_padding": self.encoder_padding,
            "mel bins": self.feature_extractor.feature_size,
        }
        theirs = {
            "audio token id": config.audio_token_id,
            "timing": vars(config.timing),
            "encoder_padding": config.encoder_padding,
            "mel bins": config.audio_config.num_mel_bins,
        }
        for key, value in mine.items():
            if value != theirs[key]:
                raise ValueError(
                    f"Processor and model disagree on {key}: {value} and {theirs[key]}. Load both from the same "
                    "checkpoint, or compose it anew with `python -m modeling_lsm.composing`."
                )
        if len(self.tokenizer) > config.text_config.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(self.tokenizer)} tokens, but the LLM has embeddings for "
                f"{config.text_config.vocab_size}. Load both from the same checkpoint, or compose it anew with "
                "`python -m modeling_lsm.composing`."
            )


def is_list_of_numbers(values: list) -> bool:
    """Whether `values` is one clip given as a list of samples rather than a list of clips."""
    return bool(values) and isinstance(values[0], Real)


__all__ = ["AUDIO_TOKEN", "LsmProcessor", "load_waveform", "make_chat"]
