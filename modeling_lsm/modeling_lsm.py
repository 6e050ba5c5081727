"""
A large speech-text model: Whisper encoder → projector → causal LLM, in one `PreTrainedModel`.

Nothing that one clip yields depends on the other clips of its batch: the encoder masks every layer that could look
past the end of a clip, windows have a fixed duration, and windows of padding are never made.
"""

import inspect
import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .assembling_lsm import load_slim, read_config, whole_models
from .configuration_lsm import LsmConfig
from .first_release_lsm import is_of_first_release, load_first_release, name_changes
from .generation_lsm import LsmGenerationMixin
from .projectors_lsm import PROJECTORS
from .speech_encoder_lsm import LsmSpeechEncoder


# Chunks of audio that are encoded at a time, of at most 30 s each: memory does not grow with the length of a clip.
CHUNKS_AT_A_TIME = 16


@dataclass
class LsmModelOutputWithPast(BaseModelOutputWithPast):
    """
    [`BaseModelOutputWithPast`] with the audio embeddings.

    Args:
        audio_hidden_states (`torch.Tensor` of shape `(audio tokens, hidden_size)`, *optional*):
            What the projector made of all clips of the batch, in prompt order.
    """

    audio_hidden_states: torch.Tensor | None = None


@dataclass
class LsmCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    [`CausalLMOutputWithPast`] with the audio embeddings.

    Args:
        audio_hidden_states (`torch.Tensor` of shape `(audio tokens, hidden_size)`, *optional*):
            What the projector made of all clips of the batch, in prompt order.
    """

    audio_hidden_states: torch.Tensor | None = None


class LsmPreTrainedModel(PreTrainedModel):
    """Loading and capabilities shared by the two LSM classes."""

    config: LsmConfig
    base_model_prefix = "lsm"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    # The parts do the attending: each takes the implementation set on its own config, or says that it cannot.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        base_folders: dict[str, str | os.PathLike] | None = None,
        **kwargs,
    ):
        r"""
        Loads a checkpoint, whole or slim. The base models of a slim one are taken from where they were, or from the
        Hub, and LoRA is merged: what is loaded is whole.

        Args:
            base_folders (`dict`, *optional*):
                Where the base models of a slim checkpoint are, if neither where they were nor on the Hub:
                `{"speech": …, "text": …}`, or one of them.
            kwargs:
                As in every model of transformers.
        """
        load, name = super().from_pretrained, pretrained_model_name_or_path
        saved = read_config(name, **kwargs)
        if saved.get("slim"):
            return load_slim(cls, load, name, *model_args, config=config, base_folders=base_folders, **kwargs)
        if is_of_first_release(saved):
            with whole_models():
                changes = name_changes(LsmConfig.from_dict(saved).text_config)
            return load_first_release(load, changes, name, *model_args, config=config, **kwargs)
        return load(name, *model_args, config=config, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """
        No, as far as initialization goes, which this answer is for: transformers passes over modules without weights
        of their own in custom models, and so over buffers that its own models compute there (Falcon-H1).
        """
        return False

    def _take_capabilities(self, llm: PreTrainedModel):
        """What depends on the LLM's architecture is as its own class says."""
        self._is_stateful = llm._is_stateful
        self._can_compile_fullgraph = llm._can_compile_fullgraph
        self._supports_context_parallel = getattr(llm, "_supports_context_parallel", True)


class LsmModel(LsmPreTrainedModel):
    """
    The LSM up to the LLM's last hidden states: `audio_tower` (Whisper's encoder), `projector` and `language_model`, a
    causal LM with its own head, which this class does not use.

    Args:
        config ([`LsmConfig`]): Configuration. Weights are random: pretrained parts are put together by
            `modeling_lsm.composing`, whole checkpoints loaded with `from_pretrained`.

    Raises:
        ValueError: If the projector's type is unknown or does not fit `window_size` or `num_queries`.
    """

    def __init__(self, config: LsmConfig):
        super().__init__(config)
        projector_type = config.projector_config.projector_type
        if projector_type not in PROJECTORS:
            raise ValueError(
                f"`projector_type` is {projector_type!r}; expected one of {', '.join(map(repr, PROJECTORS))}."
            )
        self.audio_tower = LsmSpeechEncoder._from_config(config.audio_config)
        self.projector = PROJECTORS[projector_type](config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self._llm_takes_positions = "position_ids" in inspect.signature(self.language_model.forward).parameters
        self._take_capabilities(self.language_model)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def embed_tokens(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """The embeddings of words as the LLM reads them, `(…, hidden_size)` for ids of shape `(…)`."""
        inputs_embeds = self.get_input_embeddings()(input_ids)
        scale = self.config.embedding_scale
        return inputs_embeds if scale == 1.0 else inputs_embeds * scale

    def get_decoder(self) -> PreTrainedModel:
        """The LLM without its head."""
        return next(child for child in self.language_model.children() if isinstance(child, PreTrainedModel))

    @property
    def _encoder_is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.audio_tower.parameters())

    @property
    def _is_partitioned(self) -> bool:
        """Whether ZeRO-3 has spread the weights over processes: they then have a `ds_id`."""
        return hasattr(self.get_input_embeddings().weight, "ds_id")

    def train(self, mode: bool = True):
        super().train(mode)
        if mode and self._encoder_is_frozen:
            self.audio_tower.eval()  # a frozen encoder gives the same features in training as in use
        return self

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Encodes clips and projects them into the LLM's embedding space.

        Args:
            input_features (`torch.Tensor` of shape `(chunks, num_mel_bins, mel_frames)`):
                Log-mel spectrograms: all clips of the batch along the first dimension, in prompt order; a clip longer
                than the encoder can see takes several rows.
            input_features_mask (`torch.Tensor` of shape `(chunks, mel_frames)`, *optional*):
                1 for the frames of a clip, 0 for padding after it. Without it every frame counts.
            encoder_hidden_states (`torch.Tensor` of shape `(chunks, frames, d_model)`, *optional*):
                The encoder's output for these clips, if it is known: then `input_features` is not needed, but the
                mask is, from which the clips' durations are taken.

        Returns:
            [`BaseModelOutputWithPooling`]: `last_hidden_state` is the encoder's output, `(chunks, frames, d_model)`;
            `pooler_output` holds the audio embeddings of all clips, packed: `(audio tokens, hidden_size)`.
        """
        if input_features_mask is None:
            if input_features is None:
                raise ValueError("`encoder_hidden_states` needs `input_features_mask`, which says how long clips are.")
            input_features_mask = input_features.new_ones(input_features.shape[::2], dtype=torch.long)
        if encoder_hidden_states is None:
            audio_outputs = self._encode(input_features, input_features_mask, **kwargs)
        else:
            audio_outputs = BaseModelOutput(last_hidden_state=encoder_hidden_states.to(self.audio_tower.dtype))
        lengths = self.config.timing.encoder_frames(input_features_mask.sum(-1))
        audio_embeds = self.projector(audio_outputs.last_hidden_state, lengths)
        return BaseModelOutputWithPooling(
            last_hidden_state=audio_outputs.last_hidden_state,
            pooler_output=audio_embeds,
            hidden_states=audio_outputs.hidden_states,
            attentions=audio_outputs.attentions,
        )

    def _encode(self, features: torch.Tensor, mask: torch.Tensor, **kwargs) -> BaseModelOutput:
        """The encoder's output for spectrograms and their mask, see [`~LsmModel.get_audio_features`]."""
        # Under ZeRO-3 all processes must run the encoder equally often, however many chunks each of them has.
        at_a_time = len(features) if self._is_partitioned else CHUNKS_AT_A_TIME
        # Gradient checkpointing makes the inputs of the encoder's first layer require gradients, so that autograd
        # would run through a frozen encoder if it were not told otherwise.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._encoder_is_frozen):
            outputs = [
                self.audio_tower(
                    some_features.to(self.audio_tower.dtype),
                    input_features_mask=some_mask if self.config.encoder_padding == "longest" else None,
                    **kwargs,
                )
                for some_features, some_mask in zip(features.split(at_a_time), mask.split(at_a_time), strict=True)
            ]
        if len(outputs) == 1:
            return outputs[0]
        return BaseModelOutput(
            last_hidden_state=torch.cat([output.last_hidden_state for output in outputs]),
            **{
                name: tuple(map(torch.cat, zip(*(output[name] for output in outputs), strict=True)))
                for name in ("hidden_states", "attentions")
                if outputs[0].get(name) is not None
            },
        )

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, audio_features: torch.Tensor
    ) -> torch.Tensor:
        """
        Finds where the audio embeddings go: where `input_ids` has the placeholder, or else `inputs_embeds` its
        embedding.

        Returns:
            `torch.Tensor`: Boolean mask of the shape of `inputs_embeds`.

        Raises:
            ValueError: If there are more or fewer placeholders in `input_ids` than rows in `audio_features`.
        """
        if input_ids is None:
            placeholder = self.embed_tokens(torch.tensor(self.config.audio_token_id, device=inputs_embeds.device))
            mask = (inputs_embeds == placeholder.to(inputs_embeds.dtype)).all(-1)
        else:
            mask = input_ids == self.config.audio_token_id
        torch_compilable_check(
            mask.sum() == audio_features.shape[0],
            lambda: (
                f"The prompt holds {int(mask.sum())} audio placeholders (token {self.config.audio_token_id}), but "
                f"`input_features` gives {audio_features.shape[0]} audio embeddings. Prepare both in one call of the "
                "`LsmProcessor` that was saved with this model, and do not truncate its output."
            ),
        )
        return mask.unsqueeze(-1).expand_as(inputs_embeds).to(inputs_embeds.device)

    def embed(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        audio_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        **audio_inputs: torch.Tensor | None,
    ) -> tuple[dict[str, torch.Tensor | None], torch.Tensor | None]:
        r"""
        Makes what the LLM reads: embeddings of words, with those of speech in their places.

        Args:
            audio_inputs: Arguments of [`~LsmModel.get_audio_features`]; the others are those of [`~LsmModel.forward`].

        Returns:
            The LLM's inputs, `inputs_embeds` of shape `(batch, sequence, hidden_size)`, mask, positions and whatever
            else it takes from the ids, and the audio embeddings, `(audio tokens, hidden_size)`, or `None`.
        """
        has_audio = any(
            value is not None
            for value in (audio_embeds, audio_inputs.get("input_features"), audio_inputs.get("encoder_hidden_states"))
        )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if has_audio:
            if audio_embeds is None:
                audio_embeds = self.get_audio_features(**audio_inputs, return_dict=True).pooler_output
            audio_embeds = audio_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
            audio_mask = self.get_placeholder_mask(input_ids, inputs_embeds, audio_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(audio_mask, audio_embeds)
        elif input_ids is not None and input_ids.shape[1] > 1:
            # A prompt. What is generated comes token by token: it cannot be a placeholder, and looking costs a sync.
            self.get_placeholder_mask(input_ids, inputs_embeds, inputs_embeds.new_empty(0))
            inputs_embeds = self._run_all_parts(inputs_embeds)
        inputs = self._place(inputs_embeds, attention_mask, position_ids)
        if input_ids is not None and getattr(self.config.text_config, "hidden_size_per_layer_input", None):
            # Gemma 3n and 4 look ids up once more for every layer: speech is padding there, as in their own models.
            padding = self.config.text_config.pad_token_id or 0
            ids = input_ids.masked_fill(input_ids == self.config.audio_token_id, padding)
            inputs["per_layer_inputs"] = self.get_decoder().get_per_layer_inputs(ids)
        return inputs, audio_embeds

    def _place(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.LongTensor | None
    ) -> dict[str, torch.Tensor | None]:
        """Embeddings, mask and positions. LLMs with absolute ones would count padding on the left by themselves."""
        is_padding_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        if position_ids is None and is_padding_mask and self._llm_takes_positions:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        return {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}

    def _run_all_parts(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings of a batch of text alone, after the audio parts have run for nothing where that is needed."""
        # Under ZeRO-3, processes that run different parts would wait for each other for ever; so would gradients under
        # DDP.
        if not self.training and not self._is_partitioned:
            return inputs_embeds
        mel_frames = self.config.window_size * self.config.timing.ENCODER_STRIDE
        silence = inputs_embeds.new_zeros(1, self.config.audio_config.num_mel_bins, mel_frames)
        silence = self.get_audio_features(silence, return_dict=True).pooler_output
        return inputs_embeds + 0.0 * silence.sum().to(inputs_embeds.device, inputs_embeds.dtype)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        audio_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LsmModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                Token ids, with `config.audio_token_id` wherever an audio embedding goes.
            input_features (`torch.Tensor` of shape `(chunks, num_mel_bins, mel_frames)`, *optional*):
                Log-mel spectrograms of all clips of the batch, see [`~LsmModel.get_audio_features`].
            input_features_mask (`torch.Tensor` of shape `(chunks, mel_frames)`, *optional*):
                1 for the frames of a clip, 0 for padding after it.
            encoder_hidden_states (`torch.Tensor` of shape `(chunks, frames, d_model)`, *optional*):
                The encoder's output in the place of `input_features`, see [`~LsmModel.get_audio_features`].
            audio_embeds (`torch.Tensor` of shape `(audio tokens, hidden_size)`, *optional*):
                The audio embeddings of all clips in the place of both: `get_audio_features(…).pooler_output`.
            attention_mask, position_ids, past_key_values, inputs_embeds, use_cache:
                As in every causal LM of transformers.

        Returns:
            [`LsmModelOutputWithPast`] whose `last_hidden_state` has the shape `(batch, sequence, hidden_size)`.

        Raises:
            ValueError: If audio placeholders and audio embeddings do not match in number.
        """
        inputs, audio_embeds = self.embed(
            input_ids,
            inputs_embeds,
            audio_embeds,
            attention_mask,
            position_ids,
            input_features=input_features,
            input_features_mask=input_features_mask,
            encoder_hidden_states=encoder_hidden_states,
        )
        outputs = self.get_decoder()(
            **inputs,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return LsmModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            audio_hidden_states=audio_embeds,
        )


class LsmForConditionalGeneration(LsmPreTrainedModel, LsmGenerationMixin):
    """
    The LSM with its language modeling head: takes speech and text, answers in text.

    Args:
        config ([`LsmConfig`]): Configuration.

    Example:

    ```python
    >>> from transformers import AutoModelForMultimodalLM, AutoProcessor

    >>> checkpoint = "path/or/hub-id"
    >>> processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    >>> model = AutoModelForMultimodalLM.from_pretrained(checkpoint, trust_remote_code=True)

    >>> chat = [
    ...     {
    ...         "role": "user",
    ...         "content": [
    ...             {"type": "text", "text": "Translate into French.\n\n"},
    ...             {"type": "audio", "path": "clip.flac"},
    ...         ],
    ...     }
    ... ]
    >>> inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    >>> answer = model.generate(**inputs, max_new_tokens=64)
    >>> processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ```"""

    def __init__(self, config: LsmConfig):
        super().__init__(config)
        self.lsm = LsmModel(config)
        self._take_capabilities(self.lsm.language_model)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.lsm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.lsm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lsm.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.lsm.language_model.set_output_embeddings(value)

    def get_audio_features(self, *args, **kwargs):
        """See [`LsmModel.get_audio_features`]."""
        return self.lsm.get_audio_features(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        r"""
        Saves a checkpoint that is complete: `pipeline("audio-text-to-text", model=…, trust_remote_code=True)` works
        where this package is not installed. Weights that an earlier checkpoint has left in the folder are removed.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to save to.
            processor ([`LsmProcessor`], *optional*):
                The processor to save. Defaults to that of the checkpoint that the model was loaded from.
            slim (`bool`, *optional*, defaults to `False`):
                Save only what trained (see [`trained_state_dict`]). The rest is taken from the base models when the
                checkpoint is loaded. Otherwise all weights are saved, LoRA merged into them.
            name (`str`, *optional*):
                Name of the checkpoint in its card, `README.md`, which is written anew. Defaults to the folder's.
            tags (`list[str]`, *optional*):
                More tags for the card.
            state_dict (`dict[str, torch.Tensor]`, *optional*):
                The model's weights by name, if they are elsewhere (DeepSpeed).
            args, kwargs:
                As in [`PreTrainedModel.save_pretrained`]: `is_main_process`, `max_shard_size`, `push_to_hub`, …
        """
        from .saving_lsm import save_checkpoint  # here, because its card needs this module

        names = ("is_main_process", "state_dict", "push_to_hub", "max_shard_size", "variant", "token")
        save_checkpoint(self, save_directory, **dict(zip(names, args, strict=False)), **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        r"""
        Publishes everything that [`~LsmForConditionalGeneration.save_pretrained`] saves, in one commit, which deletes
        the weights that an earlier checkpoint has left there.

        Args:
            repo_id (`str`):
                Repository on the Hub, made if it does not exist.
            commit_message, commit_description, private, token, revision, create_pr (*optional*):
                As in every model of transformers.
            kwargs:
                Arguments of [`~LsmForConditionalGeneration.save_pretrained`], like `processor`, `slim` or
                `max_shard_size`.

        Returns:
            `str`: Address of the commit.

        Raises:
            ValueError: If the checkpoint is to be slim, but nobody else could find its base models.
        """
        from .saving_lsm import publish_checkpoint

        return publish_checkpoint(self, repo_id, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        audio_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: torch.LongTensor | None = None,
        shift_labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LsmCausalLMOutputWithPast:
        r"""
        Args:
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*):
                `audio_embeds` as `generate` passes them with `prefill_chunk_size`: `pooler_output` of `"audio"`.
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                Token ids to predict, -100 where nothing is to be learnt: prompts, audio placeholders, padding.
            shift_labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                What each position is to predict, where the sequence is spread over processes and the next token is
                another's (context and sequence parallelism).
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                The last positions (or the positions given) whose logits are computed; 0 for all. A boolean mask of
                shape `(batch, sequence)`, with labels or without, keeps those of its positions: in training, the ones
                that predict a label are few beside prompt and speech. It needs transformers 5.21 or newer.

        The other arguments are those of [`LsmModel.forward`].

        Returns:
            [`LsmCausalLMOutputWithPast`] whose `logits` have the shape `(batch, sequence, vocab_size)`, or, with a
            mask, `(positions kept, vocab_size)`, row by row.
        """
        if mm_encoder_outputs is not None:
            audio_embeds = mm_encoder_outputs["audio"].pooler_output.flatten(0, -2)
        inputs, audio_embeds = self.lsm.embed(
            input_ids,
            inputs_embeds,
            audio_embeds,
            attention_mask,
            position_ids,
            input_features=input_features,
            input_features_mask=input_features_mask,
            encoder_hidden_states=encoder_hidden_states,
        )
        if labels is None:
            labels = shift_labels
        if labels is not None:
            if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dtype == torch.bool:
                if shift_labels is None:
                    shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
                shift_labels = shift_labels[logits_to_keep]
            kwargs |= {"labels": labels} if shift_labels is None else {"labels": labels, "shift_labels": shift_labels}
        outputs = self.lsm.language_model(
            **inputs,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return LsmCausalLMOutputWithPast(
            loss=outputs.get("loss"),
            logits=outputs.logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            audio_hidden_states=audio_embeds,
        )


__all__ = ["LsmForConditionalGeneration", "LsmModel", "LsmPreTrainedModel"]
