"""Rows → batches: inputs as at inference, labels on the answer alone."""

from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..processing_lsm import LsmProcessor, load_waveform
from .rows import chat_clips, render, replace_clips, row_to_chat, tokenize
from .sound_changes import AudioAugmentation


IGNORED_LABEL = -100


class FeatureSource(Protocol):
    """Where the encoder's output is kept."""

    def load(self, audio_hash: str) -> list[torch.Tensor]:
        """The encoder's output for a clip: `(frames, d_model)` for each of its chunks."""


class SpeechTextCollator:
    """
    Turns rows into a training batch. Rows may hold one clip, several, or text alone. Only the assistant's last answer
    and its end token carry labels.

    Args:
        processor ([`LsmProcessor`]):
            Renders, tokenizes and extracts features, as at inference.
        max_length (`int`, *optional*):
            Longest sequence that fits into the context, in tokens.
        end_tokens (`int` or `list[int]`, *optional*):
            Tokens that end an answer, as the model's generation config lists them. Defaults to the tokenizer's end
            token.
        augment ([`AudioAugmentation`], *optional*):
            Changes to the speech.
        feature_cache (`FeatureSource`, *optional*):
            Gives the encoder's output, so that no audio is read. Rows must come from [`prepare_rows`].
        with_transcript (`bool`, *optional*, defaults to `False`):
            Add the same chats with each row's `text` in the place of its audio, for distillation.

    Returns:
        A batch with `input_ids`, `attention_mask` and `labels`, `(batch, tokens)`, and, if there is audio,
        `input_features_mask`, `(chunks, mel frames)`, with `input_features`, `(chunks, mels, mel frames)`, or, from a
        `feature_cache`, `encoder_hidden_states`, `(chunks, frames, d_model)`. With `with_transcript` also
        `teacher_input_ids`, `teacher_attention_mask` and `teacher_labels`, `(batch, teacher tokens)`, whose labels are
        the same tokens.

    Raises:
        ValueError: If a chat does not end in an answer, the template does not end answers with an end token, a
            sequence is longer than `max_length`, or rows lack what the cache or the transcripts need.
    """

    def __init__(
        self,
        processor: LsmProcessor,
        max_length: int | None = None,
        end_tokens: int | list[int] | None = None,
        augment: AudioAugmentation | None = None,
        feature_cache: FeatureSource | None = None,
        with_transcript: bool = False,
    ):
        if augment is not None and feature_cache is not None:
            raise ValueError(
                "Audio augmentation changes the speech, of which a feature cache knows the unchanged encoder output. "
                "Use one of the two."
            )
        self.processor = processor
        end_tokens = [end_tokens] if isinstance(end_tokens, int) else end_tokens or []
        self.end_tokens = torch.tensor([*end_tokens, processor.tokenizer.eos_token_id])
        self.max_length = max_length
        self.augment = augment
        self.feature_cache = feature_cache
        self.with_transcript = with_transcript

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        chats = [row_to_chat(row) for row in rows]
        if self.feature_cache is None:
            audio, num_audio_tokens = self.read_audio(chats)
        else:
            audio, num_audio_tokens = self.load_features(rows, chats)
        batch = {**self.with_labels(chats, num_audio_tokens), **audio}
        if self.with_transcript:
            written = [put_transcript(chat, row) for chat, row in zip(chats, rows, strict=True)]
            teacher = self.with_labels(written, [[]] * len(rows))
            check_same_answers(rows, batch["labels"], teacher["labels"])
            batch |= {f"teacher_{name}": tensor for name, tensor in teacher.items()}
        return batch

    def read_audio(self, chats: list[list[dict]]) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
        """The clips of `chats` as the model takes them, and the audio tokens of each clip of each chat."""
        timing = self.processor.timing
        waveforms = [
            [load_waveform(clip, target_rate=timing.sampling_rate) for clip in chat_clips(chat)] for chat in chats
        ]
        if self.augment is not None:
            waveforms = [[self.augment.change_waveform(clip) for clip in clips] for clips in waveforms]
        num_audio_tokens = [[timing.audio_tokens_of_clip(len(clip)) for clip in clips] for clips in waveforms]
        flat = [clip for clips in waveforms for clip in clips]
        audio = dict(self.processor(audio=flat)) if flat else {}
        if self.augment is not None and flat:
            audio["input_features"] = self.augment.mask_features(audio["input_features"], audio["input_features_mask"])
        return audio, num_audio_tokens

    def load_features(
        self, rows: list[dict[str, Any]], chats: list[list[dict]]
    ) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
        """As `read_audio`, with the encoder's output from the cache."""
        timing = self.processor.timing
        num_audio_tokens, features, mel_lengths = [], [], []
        for row, chat in zip(rows, chats, strict=True):
            clips = chat_clips(chat)
            if not clips:
                num_audio_tokens.append([])
                continue
            if len(clips) > 1:
                raise ValueError(
                    f"{name_row(row)} holds {len(clips)} clips, but a feature cache serves rows of one. Train without "
                    "the cache, or leave such rows out."
                )
            if row.get("audio_hash") is None or not row.get("num_samples"):
                raise ValueError(f"{name_row(row)} has not been measured. Pass rows through `prepare_rows` first.")
            bounds = timing.chunk_bounds(row["num_samples"])
            lengths = [timing.mel_frames(end - start) for start, end in bounds]
            chunks = self.feature_cache.load(row["audio_hash"])
            frames = [timing.encoder_frames(length) for length in lengths]
            if len(chunks) != len(frames) or any(len(c) < f for c, f in zip(chunks, frames, strict=True)):
                raise ValueError(
                    f"The feature cache holds {[len(chunk) for chunk in chunks]} frames for {name_row(row)}, whose "
                    f"chunks have {frames}. It was built for another model: build it anew."
                )
            num_audio_tokens.append([timing.audio_tokens_of_clip(row["num_samples"])])
            features += [chunk[:count] for chunk, count in zip(chunks, frames, strict=True)]
            mel_lengths += lengths
        if not features:
            return {}, num_audio_tokens
        is_padded = self.processor.encoder_padding == "max_length"
        mel_frames = timing.mel_frames(timing.max_samples) if is_padded else max(mel_lengths)
        mask = torch.arange(mel_frames) < torch.tensor(mel_lengths)[:, None]
        audio = {
            "encoder_hidden_states": pad_sequence(features, batch_first=True),
            "input_features_mask": mask.long(),
        }
        return audio, num_audio_tokens

    def with_labels(self, chats: list[list[dict]], num_audio_tokens: list[list[int]]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` of `chats`, with `labels` on their last answers."""
        texts = [render(self.processor, chat, counts) for chat, counts in zip(chats, num_audio_tokens, strict=True)]
        batch = dict(
            tokenize(
                self.processor,
                texts,
                padding=True,
                padding_side="right",
                return_offsets_mapping=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
        )
        offsets = batch.pop("offset_mapping")
        labels = torch.full_like(batch["input_ids"], IGNORED_LABEL)
        for index, (chat, counts) in enumerate(zip(chats, num_audio_tokens, strict=True)):
            length = int(batch["attention_mask"][index].sum())
            if self.max_length is not None and length > self.max_length:
                raise ValueError(
                    f"A row has {length} tokens, more than max_length={self.max_length}: "
                    f"{str(chat[-1]['content'])[:80]!r}. Raise --max_length or leave the row out."
                )
            prompt = render(self.processor, chat[:-1], counts, add_generation_prompt=True)
            if chat[-1]["role"] != "assistant" or not texts[index].startswith(prompt):
                raise ValueError(
                    "A training chat must be its prompt followed by the assistant's answer, but this one is not: "
                    f"{texts[index][-200:]!r}. Check the roles of its messages and the chat template."
                )
            answer = self.answer_positions(batch["input_ids"][index], offsets[index], len(prompt))
            labels[index, answer] = batch["input_ids"][index, answer]
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    def answer_positions(self, input_ids: torch.Tensor, offsets: torch.Tensor, start: int) -> torch.Tensor:
        """Positions in `input_ids` of the answer that starts at character `start`, up to and with its end token."""
        positions = torch.nonzero(offsets[:, 1] > start).flatten()
        ends = torch.nonzero(torch.isin(input_ids[positions], self.end_tokens)).flatten()
        if len(ends) == 0:
            raise ValueError(
                "The chat template does not end an answer with any of the end tokens "
                f"{self.processor.tokenizer.convert_ids_to_tokens(self.end_tokens)}, so a model trained with it would "
                "never stop. Give the processor a template that does."
            )
        return positions[: ends[0] + 1]


def predicts_label(labels: torch.Tensor) -> torch.Tensor:
    """Which positions predict a label: a mask of the shape of `labels`, `(batch, sequence)`, for `logits_to_keep`."""
    return nn.functional.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1), value=False)


def name_row(row: dict[str, Any]) -> str:
    """What to call a row in an error message."""
    return f"The row {row.get('source') or repr(row.get('instruction'))}"


def put_transcript(chat: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """`chat` with the transcript of `row` in the place of its audio."""
    clips = chat_clips(chat)
    if not clips:
        return chat
    if len(clips) > 1 or row.get("text") is None:
        raise ValueError(
            f"{name_row(row)} has {len(clips)} clip(s) and the transcript {row.get('text')!r}, but distillation needs "
            "one clip and its transcript in `text`. Leave the row out, or train without --distill_weight."
        )
    return replace_clips(chat, [{"type": "text", "text": row["text"]}])


def check_same_answers(rows: list[dict[str, Any]], labels: torch.Tensor, teacher_labels: torch.Tensor) -> None:
    """Raises a `ValueError` unless every row has the same tokens to learn in `labels` and in `teacher_labels`."""
    for row, mine, theirs in zip(rows, labels, teacher_labels, strict=True):
        mine, theirs = mine[mine != IGNORED_LABEL].tolist(), theirs[theirs != IGNORED_LABEL].tolist()
        if mine != theirs:
            raise ValueError(
                f"{name_row(row)} has an answer of {len(mine)} tokens after the speech, but of {len(theirs)} other "
                "tokens after the transcript, so the two cannot be compared. Train without --distill_weight."
            )


__all__ = ["IGNORED_LABEL", "SpeechTextCollator", "predicts_label"]
