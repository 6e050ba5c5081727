"""
`LsmProcessor`: a chat that holds audio → the tensors an LSM takes.

The prompt that asks the LLM for a training target, the prompt that trains on it and the prompt of later use are all
`make_chat(...)`, rendered with the processor's one template; only the transcript changes places with the audio.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import fields
from numbers import Real
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from .audio_lsm import load_waveform
from .configuration_lsm import AudioTiming
from .fetching_lsm import is_fetched
from .placeholders_lsm import mark_literals, tokenizer_of
from .signals_lsm import AudioLimits


AUDIO_TOKEN = "<|audio|>"
AUDIO_KEYS = ("audio", "path", "url")
OPENAI_KEYS = {"input_audio": "data", "audio_url": "url"}
# Arguments of `load_waveform` that a call of the processor takes.
READING_KWARGS = ("sampling_rate", "channel_axis", *(field.name for field in fields(AudioLimits)))


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

    # Defaults of a call, and of how its clips are read (see `__call__`): `processor.audio_kwargs = {…}` changes them.
    text_kwargs = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    audio_kwargs = {}

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
        # Saving sets it and loading drops it, but one that was loaded is the same as one that was saved.
        self.auto_map = {"AutoProcessor": f"processing_lsm.{type(self).__name__}"}

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

    def __call__(self, text: str | list[str] | None = None, audio: Any = None, **kwargs) -> BatchFeature:
        r"""
        Args:
            text (`str` or `list[str]`):
                Prompts, with one `audio_token` for every clip. See `apply_chat_template`, which writes them.
            audio (*optional*):
                A clip or a list of clips, in the order of their placeholders: anything that [`load_waveform`] takes.
            sampling_rate (`int`, *optional*):
                Samples per second of clips that are bare arrays. Defaults to the encoder's own rate.
            kwargs:
                Arguments of the tokenizer, or `text_kwargs` with them; `channel_axis` of [`load_waveform`] and the
                fields of [`AudioLimits`], like `max_seconds=7200` or `local_files=False`, or `audio_kwargs` with them.

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask`, `(batch, tokens)`, and, if there is audio,
            `input_features`, `(chunks, mels, mel frames)`, and `input_features_mask`, `(chunks, mel frames)`.

        Raises:
            ValueError: If clips and placeholders differ in number, or a clip cannot be used.
            OSError: If a clip cannot be read from where it is.
        """
        reading, kwargs = split_reading_kwargs(kwargs)
        if audio is not None:
            clips = audio if isinstance(audio, list) and not is_list_of_numbers(audio) else [audio]
            audio = [self._load_clip(clip, reading) for clip in clips] or None
        # Said in every call: a trainer may have turned the tokenizer's own side, which would come first, and
        # transformers before 5.23 does not look at a class's defaults.
        own = {key: value for key, value in self.tokenizer.init_kwargs.items() if key != "padding_side"}
        given = {**own, **kwargs, **(kwargs.get("text_kwargs") or {})}
        kwargs |= {key: value for key, value in self.text_kwargs.items() if key not in given}
        processor = self
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            tokenizer = tokenizer_of(texts, self.tokenizer, self.audio_token)
            if tokenizer is not self.tokenizer:
                processor = copy(self)
                processor.tokenizer = tokenizer
        return super(LsmProcessor, processor).__call__(text=text, audio=audio, **kwargs)

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        *,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        """
        As in [`ProcessorMixin.apply_chat_template`]. An audio item of a message's content holds its clip under
        `"audio"`, `"path"` or `"url"` (anything that [`load_waveform`] takes), and, for a bare array, may hold its
        `"sampling_rate"`. Files and arrays of any rate are resampled. OpenAI's `input_audio` items (base64) and
        `audio_url` items (http(s) and `data:` alone) are taken as well. The audio token in a text is text.

        Args:
            processor_kwargs (`dict`, *optional*):
                Arguments of a call of the processor, like `{"local_files": False}` for chats of strangers.
        """
        if not conversation:
            raise ValueError("The chat is empty; expected messages, like {'role': 'user', 'content': 'Hello.'}.")
        batched = isinstance(conversation[0], (list, tuple))
        chats = [with_audio_items(chat) for chat in (conversation if batched else [conversation])]
        if kwargs.get("tokenize"):
            reading, processor_kwargs = split_reading_kwargs(processor_kwargs or {})
            flat, kwargs = split_reading_kwargs(kwargs)
            reading = {**flat, **reading}
            # Of the call that follows, whose clips are at the encoder's rate by then.
            processor_kwargs |= {**reading, "sampling_rate": self.feature_extractor.sampling_rate}
            chats = [mark_literals(self._load_audio_items(chat, reading), self.audio_token) for chat in chats]
            kwargs |= {key: mark_literals(kwargs.get(key), self.audio_token) for key in ("tools", "documents")}
        return super().apply_chat_template(
            chats if batched else chats[0], chat_template=chat_template, processor_kwargs=processor_kwargs, **kwargs
        )

    def _load_clip(self, clip: Any, reading: dict[str, Any]) -> np.ndarray:
        """A clip at the encoder's rate, read with the arguments `reading` of [`load_waveform`]."""
        defaults, _ = split_reading_kwargs(self.audio_kwargs)
        return load_waveform(clip, target_rate=self.feature_extractor.sampling_rate, **{**defaults, **reading})

    def _load_audio_items(self, chat: list[dict[str, Any]], reading: dict[str, Any]) -> list[dict[str, Any]]:
        """A copy of `chat` in which every audio item holds a waveform."""

        def load(item):
            if "type" not in item:
                raise ValueError(
                    f"A message holds an item without a 'type' (its keys are {sorted(item)}). Write it as "
                    "{'type': 'text', 'text': …} or {'type': 'audio', 'audio': …}."
                )
            if item["type"] != "audio":
                return item
            source = next((item[key] for key in AUDIO_KEYS if item.get(key) is not None), None)
            if source is None:
                raise ValueError(
                    f"A message holds an audio item without audio (its keys are {sorted(item)}). Put the clip under "
                    "'audio', 'path' or 'url', or remove the item."
                )
            own = {"sampling_rate": item["sampling_rate"]} if item.get("sampling_rate") is not None else {}
            return {"type": "audio", "audio": self._load_clip(source, {**reading, **own})}

        return change_items(chat, load)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if text is not None and all(isinstance(sample, str) for sample in text):
            placeholders = sum(sample.count(self.audio_token) for sample in text)
            clips = 0 if audio is None else len(audio)
            if placeholders != clips:
                raise ValueError(
                    f"The number of {self.audio_token} tokens in the prompts should be the same as the number of "
                    f"clips, but there are {placeholders} and {clips}. Every clip needs one placeholder and every "
                    "placeholder one clip."
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


def split_reading_kwargs(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of `kwargs`, and of `audio_kwargs` in them, that say how clips are read, and all others."""
    audio_kwargs = kwargs.get("audio_kwargs") or {}
    given = {**audio_kwargs, **{key: value for key, value in kwargs.items() if value is not None}}
    reading = {key: given[key] for key in READING_KWARGS if given.get(key) is not None}
    others = {key: value for key, value in kwargs.items() if key not in READING_KWARGS}
    if audio_kwargs:
        others["audio_kwargs"] = {key: value for key, value in audio_kwargs.items() if key not in READING_KWARGS}
    return reading, others


def change_items(chat: list[dict[str, Any]], change: Callable[[dict[str, Any]], dict[str, Any]]) -> list[dict]:
    """A copy of `chat` with `change` applied to each item of its messages."""
    for message in chat:
        check_message(message)
    return [
        message
        if isinstance(message.get("content"), str) or message.get("content") is None
        else {**message, "content": [change(item) for item in message["content"]]}
        for message in chat
    ]


def check_message(message: Any) -> None:
    """Raises a `ValueError` unless `message` has the form of one: templates raise whatever comes of another form."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"A chat holds {message!r:.80}; expected messages, like {{'role': 'user', 'content': 'Hello.'}}."
        )
    content = message.get("content")
    if content is None or isinstance(content, str):
        return
    is_list = isinstance(content, (list, tuple))
    for item in content if is_list else [content]:
        is_item = is_list and isinstance(item, dict) and isinstance(item.get("type", ""), str)
        if not is_item or (item.get("type") == "text" and not isinstance(item.get("text"), str)):
            raise ValueError(
                f"A message holds {item!r:.80}; expected as content a text, or a list of items like {{'type': 'text', "
                "'text': …} or {'type': 'audio', 'audio': …}."
            )


def with_audio_items(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy of `chat` with audio items in the place of OpenAI's, which come over a network: they name no file."""

    def convert(item):
        kind = item.get("type")
        if kind not in OPENAI_KEYS:
            return item
        source = item.get(kind)
        if isinstance(source, dict):
            source = source.get(OPENAI_KEYS[kind])
        if kind == "input_audio" and isinstance(source, str):
            source = f"data:audio;base64,{source}"
        if not is_fetched(source):
            raise ValueError(
                f"A message holds an item of type {kind!r} with {source!r:.80}; expected base64 under 'data', or an "
                "http(s) or data: URL under 'url'. Name files of this machine as {'type': 'audio', 'path': …}."
            )
        return {"type": "audio", "audio": source}

    return change_items(chat, convert)


__all__ = ["AUDIO_TOKEN", "LsmProcessor", "load_waveform", "make_chat"]
