"""What `generate` does with audio; with everything else it does what it does with the LLM."""

import inspect
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import CandidateGenerator, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


# Inputs that hold audio or what has been made of it, which belong to the prompt.
AUDIO_INPUTS = ("input_features", "input_features_mask", "encoder_hidden_states", "audio_embeds")


class LsmGenerationMixin(GenerationMixin):
    """[`GenerationMixin`] for a model with an `lsm` in it, see [`LsmForConditionalGeneration`]."""

    def _supports_default_dynamic_cache(self) -> bool:
        return self.lsm.language_model._supports_default_dynamic_cache()

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, inputs_embeds: torch.Tensor | None = None, **kwargs
    ) -> dict[str, Any]:
        """The LLM's own, with the audio wherever the whole prompt is fed: at first, without a cache, or anew."""
        audio = {name: kwargs.pop(name) for name in AUDIO_INPUTS if name in kwargs}
        inputs = self.lsm.language_model.prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        feeds_prompt = kwargs.get("is_first_iteration") or inputs.get("past_key_values") is None
        return {**inputs, **audio} if feeds_prompt else inputs

    def _prefill(
        self,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> ModelOutput:
        # Assistants are told that nothing is their first iteration, but with an empty cache they have heard nothing.
        cache = model_kwargs.get("past_key_values")
        is_new = cache is not None and cache.get_seq_length() == 0
        audio = {name: model_kwargs.pop(name) for name in AUDIO_INPUTS if model_kwargs.get(name) is not None}
        if audio and generation_config.prefill_chunk_size is not None:
            # A prompt fed in pieces: transformers gives each piece the embeddings of its own placeholders.
            audio_embeds = self._hear(**audio)
            if is_new:
                self.lsm.get_placeholder_mask(input_ids, input_ids[..., None], audio_embeds)
            audio = {"mm_encoder_outputs": {"audio": BaseModelOutputWithPooling(pooler_output=audio_embeds)}}
        model_kwargs.update(audio)
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration or is_new)

    def _hear(self, audio_embeds: torch.Tensor | None = None, **audio_inputs: torch.Tensor) -> torch.Tensor:
        """The audio embeddings of all clips, `(audio tokens, hidden_size)`, whatever they are given as."""
        if audio_embeds is not None:
            return audio_embeds
        return self.get_audio_features(**audio_inputs, return_dict=True).pooler_output

    def _get_candidate_generator(
        self, *, model_kwargs: dict[str, Any], assistant_model: PreTrainedModel | None = None, **kwargs
    ) -> CandidateGenerator:
        # An assistant that reads only reads the prompt.
        if assistant_model is not None:
            understood = inspect.signature(assistant_model.forward).parameters
            model_kwargs = {k: v for k, v in model_kwargs.items() if k not in AUDIO_INPUTS or k in understood}
        return super()._get_candidate_generator(model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        # Clips are heard once, however many beams or answers there are. A row may hold several of them, or none.
        audio = {name: model_kwargs.pop(name) for name in AUDIO_INPUTS if model_kwargs.get(name) is not None}
        if expand_size > 1 and audio:
            audio_embeds = self._hear(**audio)
            inputs_embeds = model_kwargs.get("inputs_embeds")
            prompt = (input_ids, input_ids[..., None]) if inputs_embeds is None else (None, inputs_embeds)
            is_audio = self.lsm.get_placeholder_mask(*prompt, audio_embeds)[..., 0]
            rows = audio_embeds.split(is_audio.sum(-1).tolist())
            audio = {"audio_embeds": torch.cat([row.repeat(expand_size, 1) for row in rows])}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **audio}


__all__ = ["AUDIO_INPUTS", "LsmGenerationMixin"]
