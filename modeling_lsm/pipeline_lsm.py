"""`pipeline("audio-text-to-text")` for LSMs."""

import copy
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import Any

import torch
from transformers import Pipeline
from transformers.utils import logging

from .questions_lsm import (
    Batches,
    check_lengths,
    holds_items,
    is_indexable,
    read_batches,
    to_question,
    with_answer,
)


logger = logging.get_logger(__name__)

TASK = "audio-text-to-text"
# What the config of a checkpoint says, so that `pipeline()` finds this class in the checkpoint's own files.
CUSTOM_PIPELINES = {TASK: {"impl": "pipeline_lsm.LsmPipeline", "pt": ["AutoModelForMultimodalLM"]}}

MAX_NEW_TOKENS = 256


class LsmPipeline(Pipeline):
    """
    Answers a written instruction about speech, with an [`LsmForConditionalGeneration`] and its [`LsmProcessor`].

    Arguments of `generate` (`max_new_tokens`, `do_sample`, `num_beams`, `streamer`, …) may be given to the pipeline or
    to a call. Without any, an answer has at most 256 tokens.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> pipe = pipeline("audio-text-to-text", model="path/or/hub-id", trust_remote_code=True)
    >>> pipe("clip.flac", text="Translate into French.", max_new_tokens=64)
    [{'generated_text': '…'}]

    >>> # as it is written, token by token
    >>> from transformers import TextStreamer

    >>> pipe("clip.flac", text="Sum this up.", streamer=TextStreamer(pipe.tokenizer, skip_prompt=True))

    >>> # a stream of clips, however long
    >>> for answer in pipe((row["audio"] for row in dataset), text="Transcribe the speech.", batch_size=8):
    ...     print(answer[0]["generated_text"])
    ```"""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    # What the base class makes of arguments for `generate` differs from version to version: here it makes nothing.
    _pipeline_calls_generate = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError("The pipeline got no processor; pass `processor=` the one that was saved with the model.")
        self.processor.check_matches(self.model.config)

    def _sanitize_parameters(
        self,
        tools: list[dict | Callable] | None = None,
        documents: list[dict] | None = None,
        enable_thinking: bool | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        continue_final_message: bool | None = None,
        return_full_text: bool | None = None,
        return_tensors: bool | None = None,
        skip_special_tokens: bool | None = None,
        stop_sequence: str | list[str] | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        if return_full_text is not None and return_tensors is not None:
            raise ValueError("`return_full_text` is mutually exclusive with `return_tensors`; pass one of them.")
        preprocessing = {
            "continue_final_message": continue_final_message,
            "tools": tools,
            "documents": documents,
            "enable_thinking": enable_thinking,
            "processor_kwargs": processor_kwargs,
            **(chat_template_kwargs or {}),
        }
        postprocessing = {
            "return_full_text": return_full_text,
            "return_tensors": return_tensors,
            "skip_special_tokens": skip_special_tokens,
        }
        generate_kwargs = {**(generate_kwargs or {}), **kwargs}
        if stop_sequence is not None:
            generate_kwargs["stop_strings"] = stop_sequence
        if "stop_strings" in generate_kwargs:
            generate_kwargs.setdefault("tokenizer", self.processor.tokenizer)
        given = [
            {name: value for name, value in parameters.items() if value is not None}
            for parameters in (preprocessing, postprocessing)
        ]
        return given[0], {"generate_kwargs": generate_kwargs}, given[1]

    def __call__(
        self,
        audio: Any = None,
        text: Any = None,
        sampling_rate: int | None = None,
        batch_size: int | None = None,
        **kwargs,
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]] | Iterator[list[dict[str, Any]]]:
        """
        Answers one or many questions.

        Args:
            audio (*optional*):
                A question: a clip, which is a path, URL, `bytes`, array, or a `datasets` dict (see
                [`load_waveform`]); a dict with a clip under `"audio"` and its instruction under `"text"`; or a chat,
                without `text`. Or many: a list or tuple of questions, or any other iterable or dataset of them, such
                as a generator, a `KeyDataset`, or a column of a `datasets.Dataset`.
            text (`str` or many of them, *optional*):
                The instruction, or one for each clip. Without `audio` it is asked of the LLM alone.
            sampling_rate (`int`, *optional*):
                Samples per second of clips that are bare arrays. Defaults to the encoder's own rate.
            batch_size (`int`, *optional*, defaults to 1):
                Questions answered at a time. No answer depends on it.
            num_workers (`int`, *optional*, defaults to 0):
                Processes that read clips while others are answered.
            tools, documents, enable_thinking (*optional*):
                For the chat template, if it knows them.
            chat_template_kwargs, processor_kwargs (`dict`, *optional*):
                More arguments for the chat template, and for the processor.
            continue_final_message (`bool`, *optional*):
                Go on with the last message of a chat rather than answer it. Defaults to whether that is the
                assistant's.
            return_full_text (`bool`, *optional*):
                With chats: return the chat with the answer in it (the default) or, if `False`, the answer alone.
            return_tensors (`bool`, *optional*, defaults to `False`):
                Return the tokens of the answer, without padding, rather than its text.
            skip_special_tokens (`bool`, *optional*, defaults to `True`):
                Leave special tokens out of the text.
            stop_sequence (`str` or `list[str]`, *optional*):
                Texts that end an answer.
            kwargs:
                Arguments of `generate`, which may also be given as a dict, `generate_kwargs`. Of what it returns with
                `return_dict_in_generate`, only the sequences are used.

        Returns:
            `list[dict]`: `[{"generated_text": …}]`, or `"generated_token_ids"`, with more entries if
            `num_return_sequences` asks for them. For a list or tuple a list of such lists, in order. For any other
            iterable an iterator of such lists, which reads one batch at a time.

        Raises:
            ValueError: If an instruction is missing or there are two, audio cannot be used, or a prompt is too long
                for the LLM.
        """
        given, instruction = (text, None) if audio is None else (audio, text)
        ask = partial(to_question, sampling_rate=sampling_rate, is_text=audio is None)
        batch_size = batch_size or self._batch_size or 1
        many = [value for value in (given, instruction) if holds_items(value)]
        if not many:
            (answer,) = self._answer([{"questions": [ask(given, instruction)]}], **kwargs)
            return answer
        if holds_items(instruction):
            check_lengths(given, instruction)
            clips = given if holds_items(given) else repeat(given)
            questions = (ask(*pair) for pair in zip(clips, instruction, strict=holds_items(given)))
        elif is_indexable(given) and not isinstance(given, (list, tuple)):
            return self._answer(Batches(given, partial(ask, instruction=instruction), batch_size), **kwargs)
        else:
            questions = (ask(item, instruction) for item in given)
        if all(isinstance(value, (list, tuple)) for value in many):
            # All chats before the first answer, so that what is wrong with the last comes to light at once.
            batches = list(read_batches(list(questions), batch_size))
            return list(self._answer(batches, **kwargs)) if batches else []
        return self._answer(read_batches(questions, batch_size), **kwargs)

    def _answer(self, batches: Any, **kwargs) -> Iterator[list[dict[str, Any]]]:
        """The answers to the questions of `batches`, one after another."""
        # Batches are formed before and padded by the processor: the base class would pad every tensor on one side.
        for answers in super().__call__(batches, batch_size=1, **kwargs):
            yield from answers

    def preprocess(
        self, inputs: dict[str, Any], continue_final_message: bool | None = None, **template_kwargs
    ) -> dict[str, Any]:
        for question in inputs["questions"]:
            is_prefill = question["chat"][-1]["role"] == "assistant"
            question["continues"] = is_prefill if continue_final_message is None else continue_final_message
        groups = []
        for continues in (False, True):  # the chats of one call of the template are of one kind
            rows = [row for row, question in enumerate(inputs["questions"]) if question["continues"] == continues]
            if not rows:
                continue
            model_inputs = self.processor.apply_chat_template(
                [inputs["questions"][row]["chat"] for row in rows],
                add_generation_prompt=not continues,
                continue_final_message=continues,
                tokenize=True,
                return_dict=True,
                **template_kwargs,
            )
            self._check_context(model_inputs)
            groups.append({"rows": rows, "model_inputs": model_inputs.to(self.model.dtype)})
        return {**inputs, "groups": groups}

    @property
    def _context(self) -> int | None:
        """Tokens that the LLM has positions for, if it says so."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _check_context(self, model_inputs: dict[str, torch.Tensor]) -> None:
        """Raises a `ValueError` if a prompt leaves no room for an answer."""
        tokens, longest = model_inputs["attention_mask"].sum(-1).max(dim=0)
        if self._context is not None and tokens >= self._context:
            is_audio = model_inputs["input_ids"][longest] == self.model.config.audio_token_id
            raise ValueError(
                f"The prompt has {tokens} tokens, of which {is_audio.sum()} are audio, but the LLM's context holds "
                f"{self._context} (`max_position_embeddings`), answer included. Pass shorter audio, or compose a "
                "checkpoint with an LLM that has a longer context."
            )

    def _generation_settings(self, generate_kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments for `generate`, and all that it will go by: those, on top of the model's generation config."""
        if "generation_config" not in generate_kwargs:
            generate_kwargs = {**self._forward_params.get("generate_kwargs", {}), **generate_kwargs}
        config = generate_kwargs.get("generation_config")
        chosen = self.model.generation_config.to_diff_dict()
        chosen |= {**(config.to_diff_dict() if config is not None else {}), **generate_kwargs}
        added = {}
        if chosen.get("pad_token_id") is None:
            added["pad_token_id"] = self.processor.tokenizer.pad_token_id
        if chosen.get("max_new_tokens") is None and chosen.get("max_length") is None:
            added["max_new_tokens"] = MAX_NEW_TOKENS
        if config is not None:  # `generate` deprecates settings beside one
            config = copy.deepcopy(config)
            config.update(**added)
            return {**generate_kwargs, "generation_config": config}, {**chosen, **added}
        return {**generate_kwargs, **added}, {**chosen, **added}

    def _forward(self, inputs: dict[str, Any], generate_kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
        generate_kwargs, settings = self._generation_settings(generate_kwargs or {})
        for group in inputs.pop("groups"):
            model_inputs = group["model_inputs"]
            prompt = model_inputs["input_ids"].shape[1]
            if self._context is not None and prompt + (settings.get("max_new_tokens") or 0) > self._context:
                logger.warning_once(
                    f"Prompt and answer may exceed the LLM's context of {self._context} tokens, beyond which answers "
                    "get worse or fail. Pass shorter audio or a lower `max_new_tokens`."
                )
            outputs = self.model.generate(**model_inputs, **generate_kwargs)
            sequences = getattr(outputs, "sequences", outputs)  # an object with `return_dict_in_generate`
            # [questions, answers of each, tokens]
            answers = sequences[:, prompt:].unflatten(0, (len(group["rows"]), -1))
            for row, tokens in zip(group["rows"], answers, strict=True):
                inputs["questions"][row]["tokens"] = tokens
        return {**inputs, "pad_token_id": settings["pad_token_id"]}

    def postprocess(
        self,
        outputs: dict[str, Any],
        return_full_text: bool = True,
        return_tensors: bool = False,
        skip_special_tokens: bool = True,
    ) -> list[list[dict[str, Any]]]:
        answers = []
        for question in outputs["questions"]:
            answers.append([])
            for tokens in question["tokens"]:
                # As many as the longest answer of the batch has, of which the last may be padding.
                written = (tokens != outputs["pad_token_id"]).nonzero()
                tokens = tokens[: written.max() + 1 if len(written) else 0]
                if return_tensors:
                    answers[-1].append({"generated_token_ids": tokens})
                    continue
                answer = self.processor.decode(tokens, skip_special_tokens=skip_special_tokens)
                if question["given_as_chat"] and return_full_text:
                    answer = with_answer(question["chat"], answer, question["continues"])
                answers[-1].append({"generated_text": answer})
        return answers

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        Saves the model with the pipeline's processor: see [`LsmForConditionalGeneration.save_pretrained`], which also
        says what `kwargs` there are.
        """
        self.model.save_pretrained(save_directory, processor=self.processor, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """
        Publishes the model with the pipeline's processor: see [`LsmForConditionalGeneration.push_to_hub`], which also
        says what `kwargs` there are.

        Returns:
            `str`: Address of the commit.
        """
        return self.model.push_to_hub(repo_id, processor=self.processor, **kwargs)


__all__ = ["LsmPipeline"]
