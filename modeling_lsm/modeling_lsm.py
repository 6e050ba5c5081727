"""
A large speech-text model: Whisper encoder → projector → causal LLM, in one `PreTrainedModel`.

Nothing that one clip yields depends on the other clips of its batch: the encoder masks every layer that could look
past the end of a clip, windows have a fixed duration, and windows of padding are never made.
"""

import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .assembling_lsm import assemble, download_checkpoint, whole_models
from .configuration_lsm import LsmConfig
from .projectors_lsm import PROJECTORS, LsmQFormerProjector
from .slim_lsm import merged_config
from .speech_encoder_lsm import LsmSpeechEncoder


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
    """Weight initialisation and capabilities shared by the two LSM classes."""

    config: LsmConfig
    base_model_prefix = "model"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    # The parts do the attending: each takes the implementation set on its own config.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, LsmQFormerProjector):
            init.normal_(module.queries, std=self.config.initializer_range)

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
        hub_names = ("cache_dir", "force_download", "local_files_only", "token")
        hub_kwargs = {name: kwargs[name] for name in hub_names if name in kwargs}
        source = {name: kwargs[name] for name in ("revision", "subfolder") if name in kwargs}
        if kwargs.get("state_dict") is not None or pretrained_model_name_or_path is None:
            slim = False
        elif isinstance(config, PreTrainedConfig):
            slim = config.slim
        else:
            saved, _ = LsmConfig.get_config_dict(config or pretrained_model_name_or_path, **source, **hub_kwargs)
            slim = saved.get("slim", False)
        if not slim:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

        for name in (*hub_names, *source):
            kwargs.pop(name, None)
        folder = download_checkpoint(os.fspath(pretrained_model_name_or_path), **source, **hub_kwargs)
        if not isinstance(config, PreTrainedConfig):
            # A config would take "auto" for a dtype.
            dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
            config, kwargs = LsmConfig.from_pretrained(config or folder, return_unused_kwargs=True, **kwargs)
            kwargs |= dtype
        whole_config = merged_config(config)
        with whole_models(), torch.device("meta"):
            state_dict = dict(LsmForConditionalGeneration(whole_config).state_dict())
        if config.tie_word_embeddings:
            del state_dict["lm_head.weight"]
        # Under ZeRO-3 the first process hands out the weights; the others need their names and shapes alone.
        handed_out = is_deepspeed_zero3_enabled() and kwargs.get("quantization_config") is None
        if not (handed_out and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0):
            weights = assemble(folder, config, base_folders or {}, **hub_kwargs)
            missing = sorted(state_dict.keys() - weights.keys())
            if missing:
                raise ValueError(
                    f"The slim checkpoint {folder} and its base models lack {len(missing)} weights, as {missing[0]}. "
                    "Save it anew with `LsmPipeline.save_pretrained(…, slim=True)`."
                )
            state_dict = weights
            whole_config.base_models = config.base_models
        if "generation_config" not in kwargs:
            kwargs["generation_config"] = GenerationConfig.from_pretrained(folder)
        loaded = super().from_pretrained(None, *model_args, config=whole_config, state_dict=state_dict, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = os.fspath(pretrained_model_name_or_path)
        return loaded


class LsmModel(LsmPreTrainedModel):
    """
    The LSM without a language modeling head: `audio_tower` (Whisper's encoder), `projector` and `language_model`.

    Args:
        config ([`LsmConfig`]): Configuration. Weights are random: pretrained parts are put together by
            `modeling_lsm.composing`, whole checkpoints loaded with `from_pretrained`.

    Raises:
        ValueError: If `config.projector_type` is unknown or does not fit `window_size` or `num_queries`.
    """

    def __init__(self, config: LsmConfig):
        super().__init__(config)
        if config.projector_type not in PROJECTORS:
            raise ValueError(
                f"`projector_type` is {config.projector_type!r}; expected one of {', '.join(map(repr, PROJECTORS))}."
            )
        self.audio_tower = LsmSpeechEncoder._from_config(config.audio_config)
        self.projector = PROJECTORS[config.projector_type](config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    @property
    def _encoder_is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.audio_tower.parameters())

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
            # Gradient checkpointing makes the inputs of the encoder's first layer require gradients, so that autograd
            # would run through a frozen encoder if it were not told otherwise.
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self._encoder_is_frozen):
                audio_outputs = self.audio_tower(
                    input_features.to(self.audio_tower.conv1.weight.dtype),
                    input_features_mask=input_features_mask if self.config.encoder_padding == "longest" else None,
                    **kwargs,
                )
        else:
            audio_outputs = BaseModelOutput(
                last_hidden_state=encoder_hidden_states.to(self.audio_tower.conv1.weight.dtype)
            )
        lengths = self.config.timing.encoder_frames(input_features_mask.sum(-1))
        audio_embeds = self.projector(audio_outputs.last_hidden_state, lengths)
        return BaseModelOutputWithPooling(
            last_hidden_state=audio_outputs.last_hidden_state,
            pooler_output=audio_embeds,
            hidden_states=audio_outputs.hidden_states,
            attentions=audio_outputs.attentions,
        )

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor, inputs_embeds: torch.Tensor, audio_features: torch.Tensor
    ) -> torch.Tensor:
        """
        Finds where the audio embeddings go.

        Returns:
            `torch.Tensor`: Boolean mask of the shape of `inputs_embeds`.

        Raises:
            ValueError: If there are more or fewer placeholders in `input_ids` than rows in `audio_features`.
        """
        mask = input_ids == self.config.audio_token_id
        torch_compilable_check(
            mask.sum() == audio_features.shape[0],
            lambda: (
                f"`input_ids` holds {int(mask.sum())} audio placeholders (token {self.config.audio_token_id}), but "
                f"`input_features` gives {audio_features.shape[0]} audio embeddings. Prepare both in one call of the "
                "`LsmProcessor` that was saved with this model, and do not truncate its output."
            ),
        )
        return mask.unsqueeze(-1).expand_as(inputs_embeds).to(inputs_embeds.device)

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
            attention_mask, position_ids, past_key_values, inputs_embeds, use_cache:
                As in every causal LM of transformers.

        Returns:
            [`LsmModelOutputWithPast`] whose `last_hidden_state` has the shape `(batch, sequence, hidden_size)`.

        Raises:
            ValueError: If audio placeholders and audio embeddings do not match in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        has_audio = input_features is not None or encoder_hidden_states is not None
        if has_audio and input_ids is None:
            raise ValueError("Audio needs `input_ids`, whose placeholders say where it goes.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        audio_embeds = None
        if has_audio:
            audio_embeds = self.get_audio_features(
                input_features, input_features_mask, encoder_hidden_states, return_dict=True
            ).pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
            audio_mask = self.get_placeholder_mask(input_ids, inputs_embeds, audio_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(audio_mask, audio_embeds)
        elif input_ids is not None and (past_key_values is None or past_key_values.get_seq_length() == 0):
            # Only where a prompt begins: generated tokens cannot be placeholders, and looking costs a GPU sync.
            self.get_placeholder_mask(input_ids, inputs_embeds, inputs_embeds.new_empty(0))
            if self.training or hasattr(self.get_input_embeddings().weight, "ds_id"):
                # A batch of text alone goes through all parts, too: under ZeRO-3, whose parameters have a `ds_id`,
                # processes that run different ones would wait for each other for ever.
                mel_frames = self.config.window_size * self.config.timing.ENCODER_STRIDE
                silence = inputs_embeds.new_zeros(1, self.config.audio_config.num_mel_bins, mel_frames)
                silence = self.get_audio_features(silence, return_dict=True).pooler_output
                inputs_embeds = inputs_embeds + 0.0 * silence.sum().to(inputs_embeds.device, inputs_embeds.dtype)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return LsmModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            audio_hidden_states=audio_embeds,
        )


class LsmForConditionalGeneration(LsmPreTrainedModel, GenerationMixin):
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

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: LsmConfig):
        super().__init__(config)
        self.model = LsmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # Most LLMs call their input embeddings `embed_tokens`; GPT-2 and its kin do not.
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_audio_features(self, *args, **kwargs):
        """See [`LsmModel.get_audio_features`]."""
        return self.model.get_audio_features(*args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, input_features=None, **model_kwargs
    ):
        # A row may hold several chunks, of which the base class would make [a, a, b, b] rather than [a, b, a, b].
        audio = {}
        if input_features is not None:
            mask = model_kwargs.pop("input_features_mask", None)
            if mask is None:
                mask = input_features.new_ones(input_features.shape[::2], dtype=torch.long)
            chunk_ends = self.config.timing.audio_tokens(mask.sum(-1)).cumsum(0)
            row_ends = (input_ids == self.config.audio_token_id).sum(-1).cumsum(0).to(chunk_ends.device)
            rows = torch.searchsorted(row_ends, chunk_ends)  # [chunks], the row that each belongs to
            order = rows.repeat(expand_size).argsort(stable=True) % len(rows)
            audio = {"input_features": input_features[order], "input_features_mask": mask[order]}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **audio}

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
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        labelled_logits_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LsmCausalLMOutputWithPast:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                Token ids to predict, -100 where nothing is to be learnt: prompts, audio placeholders, padding.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                The last positions (or the positions given) whose logits are computed; 0 for all.
            labelled_logits_only (`bool`, *optional*, defaults to `False`):
                Compute no logits but those that predict a label. In training they are few beside prompt and speech.

        The other arguments are those of [`LsmModel.forward`].

        Returns:
            [`LsmCausalLMOutputWithPast`] whose `logits` have the shape `(batch, sequence, vocab_size)`, or, with
            `labelled_logits_only`, `(labels, vocab_size)`: those that predict the labels, row by row.
        """
        outputs = self.model(
            input_ids=input_ids,
            input_features=input_features,
            input_features_mask=input_features_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states, shift_labels = outputs.last_hidden_state, None
        if labelled_logits_only:
            is_predicted = labels[:, 1:] != -100
            hidden_states = hidden_states[:, :-1][is_predicted]  # [labels, hidden_size]
            shift_labels = labels[:, 1:][is_predicted]
        else:
            hidden_states = slice_logits_to_keep(hidden_states, logits_to_keep)
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                shift_labels=shift_labels,
                **kwargs,
            )
        return LsmCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            audio_hidden_states=outputs.audio_hidden_states,
        )


__all__ = ["LsmForConditionalGeneration", "LsmModel", "LsmPreTrainedModel"]
