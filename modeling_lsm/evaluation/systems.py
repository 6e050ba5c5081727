"""
The systems that are compared, under one interface.

- [`LsmSystem`] hears the clip.
- [`CascadeSystem`] has an ASR model write it down, and the LLM read that.
- [`TextSystem`] has the LLM read the gold transcript: the ceiling of both.

All of them answer greedily, in batches that no answer depends on, the one chat that [`make_chat`] makes. A row is a
dict with `audio` (anything that [`load_waveform`] takes), `text` (the gold transcript) and `instruction`. In a row
whose `kind` is `"transcription"` the transcript that cascade and text system read *is* their answer: no LLM copies it.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, Pipeline, PreTrainedModel

from ..augmentation.decoding import greedy_decode
from ..augmentation.prompts import Prompter
from ..fingerprints import commit_of, fingerprint, hash_text
from ..modeling_lsm import LsmForConditionalGeneration
from ..processing_lsm import LsmProcessor, load_waveform, make_chat


Row = dict[str, Any]
OnAnswer = Callable[[int, str], None]


def ignore(index: int, answer: str) -> None:
    """What `on_answer` does unless told otherwise."""


class LsmSystem:
    """
    The model under test.

    Args:
        model ([`LsmForConditionalGeneration`]): The LSM.
        processor ([`LsmProcessor`]): Its processor.
        batch_size (`int`, *optional*, defaults to 16): Clips at a time.
    """

    needs_audio = True

    def __init__(self, model: LsmForConditionalGeneration, processor: LsmProcessor, batch_size: int = 16):
        processor.check_matches(model.config)
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size

    def prompt(self, row: Row) -> list[dict[str, Any]]:
        """The chat of a row."""
        return make_chat(row["instruction"], audio=row["audio"])

    def inputs(self, rows: list[Row]) -> BatchFeature:
        """Inputs of `model` for the prompts of `rows`, padded on the left."""
        inputs = self.processor.apply_chat_template(
            [self.prompt(row) for row in rows], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return inputs.to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def answer(self, rows: list[Row], max_new_tokens: int, on_answer: OnAnswer = ignore) -> list[str]:
        """
        Answers `rows`, those of similar length together.

        Args:
            rows (`list[dict]`): The rows.
            max_new_tokens (`int`): Longest answer, in tokens.
            on_answer (*optional*): Called with the index of a row and its answer once it is there.

        Returns:
            `list[str]`: The answers, in the order of the rows.
        """
        rate = self.processor.feature_extractor.sampling_rate
        rows = [{**row, "audio": load_waveform(row["audio"], target_rate=rate)} for row in rows]
        order = sorted(
            range(len(rows)), key=lambda index: (len(rows[index]["audio"]), len(rows[index]["instruction"]))
        )
        answers = [""] * len(rows)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            inputs = self.inputs([rows[index] for index in batch])
            sequences = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
            texts = self.processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text.strip()
                on_answer(index, answers[index])
        return answers

    def meta(self) -> dict[str, Any]:
        """What tells this system from others."""
        return {"model": identify(self.model, self.processor)}


class TextSystem:
    """
    An LLM that reads the gold transcript.

    Args:
        model (`PreTrainedModel`): An LSM, whose language model answers, or a causal LM.
        processor: The LSM's [`LsmProcessor`], or a tokenizer whose chat template takes content in parts, see
            [`~composing.read_chat_template`].
        batch_size (`int`, *optional*, defaults to 16): Prompts at a time; more where they are short.
    """

    needs_audio = False

    def __init__(self, model: PreTrainedModel, processor: Any, batch_size: int = 16):
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size
        self.prompter = Prompter(getattr(processor, "tokenizer", processor), processor.chat_template)

    def prompt(self, row: Row) -> list[dict[str, Any]]:
        """The chat of a row."""
        return make_chat(row["instruction"], transcript=row["text"])

    def inputs(self, rows: list[Row]) -> BatchFeature:
        """Inputs of `model` for the prompts of `rows`, padded on the left."""
        prompts = self.prompter.encode([(row["instruction"], row["text"]) for row in rows])
        width = max(map(len, prompts))
        padding = self.model.generation_config.pad_token_id or 0
        inputs = {
            "input_ids": [[padding] * (width - len(prompt)) + prompt for prompt in prompts],
            "attention_mask": [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts],
        }
        return BatchFeature(inputs, tensor_type="pt").to(self.model.device)

    def answer(self, rows: list[Row], max_new_tokens: int, on_answer: OnAnswer = ignore) -> list[str]:
        """Answers `rows`. Arguments and result are those of [`LsmSystem.answer`]."""
        answers = [row["text"] for row in rows]
        asked = [index for index, row in enumerate(rows) if row.get("kind") != "transcription"]
        for index in set(range(len(rows))) - set(asked):
            on_answer(index, answers[index])
        if not asked:
            return answers
        prompts = self.prompter.encode([(rows[index]["instruction"], rows[index]["text"]) for index in asked])

        def read(position: int, tokens: list[int]) -> None:
            answers[asked[position]] = self.prompter.decode(tokens)
            on_answer(asked[position], answers[asked[position]])

        batch_tokens = self.batch_size * (max(map(len, prompts)) + max_new_tokens)
        greedy_decode(self.model, prompts, max_new_tokens, batch_tokens, on_answer=read)
        return answers

    def meta(self) -> dict[str, Any]:
        """What tells this system from others."""
        return {"model": identify(self.model, self.processor)}


class CascadeSystem:
    """
    An ASR model, and an LLM that reads what it writes.

    Args:
        asr (`Pipeline`): A `pipeline("automatic-speech-recognition")` of transformers. It hears clips of any length.
        model, processor, batch_size: The LLM, as of [`TextSystem`].
    """

    needs_audio = True

    def __init__(self, asr: Pipeline, model: PreTrainedModel, processor: Any, batch_size: int = 16):
        self.asr, self.batch_size = asr, batch_size
        self.reader = TextSystem(model, processor, batch_size)
        self.model, self.processor = model, processor
        self._transcripts: dict[bytes, str] = {}  # by a hash of the samples: several tasks ask about the same clip

    def transcribe(self, rows: list[Row]) -> list[str]:
        """What the ASR model hears in `rows`."""
        rate = self.asr.feature_extractor.sampling_rate
        clips = [load_waveform(row["audio"], target_rate=rate) for row in rows]
        keys = [hashlib.sha256(clip.tobytes()).digest() for clip in clips]
        new = {key: clip for key, clip in zip(keys, clips, strict=True) if key not in self._transcripts}
        options: dict[str, Any] = {"batch_size": self.batch_size}
        if self.asr.type == "seq2seq_whisper":
            options["generate_kwargs"] = {"do_sample": False, "num_beams": 1}
            window = self.asr.feature_extractor.n_samples
        else:
            window = max(map(len, clips), default=0)
        # Whisper hears 30 s at a time, and goes through a longer clip by its own timestamps.
        for longer in (False, True):
            part = {key: clip for key, clip in new.items() if (len(clip) > window) == longer}
            heard = (
                self.asr(
                    [{"raw": clip, "sampling_rate": rate} for clip in part.values()],
                    **options,
                    **({"return_timestamps": True} if longer else {}),
                )
                if part
                else []
            )
            self._transcripts |= {key: output["text"].strip() for key, output in zip(part, heard, strict=True)}
        return [self._transcripts[key] for key in keys]

    def prompt(self, row: Row) -> list[dict[str, Any]]:
        """The chat of a row."""
        return self.reader.prompt(self._heard([row])[0])

    def inputs(self, rows: list[Row]) -> BatchFeature:
        """Inputs of `model` for the prompts of `rows`, padded on the left."""
        return self.reader.inputs(self._heard(rows))

    def answer(self, rows: list[Row], max_new_tokens: int, on_answer: OnAnswer = ignore) -> list[str]:
        """Answers `rows`. Arguments and result are those of [`LsmSystem.answer`]."""
        return self.reader.answer(self._heard(rows), max_new_tokens, on_answer)

    def _heard(self, rows: list[Row]) -> list[Row]:
        """`rows` with what was heard in the place of the gold transcript."""
        return [{**row, "text": text} for row, text in zip(rows, self.transcribe(rows), strict=True)]

    def meta(self) -> dict[str, Any]:
        """What tells this system from others."""
        asr = {"id": short_name(self.asr.model), "fingerprint": fingerprint(self.asr.model)}
        return {**self.reader.meta(), "asr": asr}


def short_name(model: PreTrainedModel) -> str:
    """The Hub id of a model, or the name of its folder: the same wherever that is."""
    name = model.name_or_path
    return Path(name).resolve().name if Path(name).is_dir() else name


def identify(model: PreTrainedModel, processor: Any) -> dict[str, Any]:
    """What tells a model and its prompts from others."""
    return {
        "id": short_name(model),
        "revision": commit_of(model.name_or_path) if model.name_or_path else None,
        "fingerprint": fingerprint(model),
        "template_hash": hash_text(processor.chat_template),
    }


__all__ = ["CascadeSystem", "LsmSystem", "TextSystem"]
