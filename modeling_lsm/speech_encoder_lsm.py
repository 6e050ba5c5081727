"""Whisper's encoder for clips of any length."""

import torch
from torch import nn
from transformers import AutoConfig
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder, sinusoids
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


class LsmSpeechEncoder(WhisperEncoder):
    """
    Whisper's encoder for audio of any length up to 30 s. The weights and their names are Whisper's own.

    `WhisperEncoder` insists on 30 s of mel frames. This one takes fewer, with the position embeddings cut to match,
    and with a mask that keeps the frames after the end of a clip from reaching the ones before it.
    """

    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?decoder\."]  # a whole Whisper loads without a remark

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # Whisper does this where it meets the encoder itself, by the shape of the weight, which is empty under ZeRO-3.
        if module is not self:
            super()._init_weights(module)
        if module is self.embed_positions:
            init.copy_(module.weight, sinusoids(self.config.max_source_positions, self.config.d_model))

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        r"""
        Args:
            input_features (`torch.Tensor` of shape `(chunks, num_mel_bins, mel_frames)`):
                Log-mel spectrograms, at most `2 * max_source_positions` frames long.
            input_features_mask (`torch.Tensor` of shape `(chunks, mel_frames)`, *optional*):
                1 for the frames of the clip, 0 for padding after it. Without it every frame counts, as in Whisper.

        Returns:
            [`BaseModelOutput`] whose `last_hidden_state` has the shape `(chunks, ceil(mel_frames / 2), d_model)`.
            What stands there after the end of a clip is undefined.
        """
        max_mel_frames = self.max_source_positions * self.conv2.stride[0]
        if input_features.shape[-1] > max_mel_frames:
            raise ValueError(
                f"`input_features` has {input_features.shape[-1]} mel frames, more than the {max_mel_frames} that "
                "this encoder has positions for. Use `LsmProcessor`: it splits longer clips into chunks."
            )
        if input_features_mask is not None:
            # A convolution at the end of a clip must see zeros there, as it would without batch-mates.
            mel_mask = input_features_mask[:, None, :].to(input_features.dtype)
            input_features = input_features * mel_mask

        hidden_states = nn.functional.gelu(self.conv1(input_features))
        if input_features_mask is not None:
            hidden_states = hidden_states * mel_mask
        hidden_states = nn.functional.gelu(self.conv2(hidden_states)).transpose(1, 2)  # [chunks, frames, d_model]
        # Called rather than sliced: where weights are offloaded, accelerate brings them in when a module is called.
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        hidden_states = hidden_states + self.embed_positions(positions)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)

        attention_mask = None
        if input_features_mask is not None:
            attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=input_features_mask[:, :: self.conv2.stride[0]],
            )
        for layer in self.layers:
            if self.training and self.layerdrop > 0.0 and torch.rand([]) < self.layerdrop:
                continue  # LayerDrop, https://huggingface.co/papers/1909.11556
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden_states))


def load_speech_encoder(name: str, dtype: torch.dtype, **hub_kwargs) -> LsmSpeechEncoder:
    """Loads the encoder of a whole Whisper checkpoint and makes sure that all its weights were found."""
    config = AutoConfig.from_pretrained(name, **hub_kwargs)
    if config.model_type != "whisper":
        raise ValueError(f"{name} is a {config.model_type} model; the speech model must be a Whisper.")
    encoder, report = LsmSpeechEncoder.from_pretrained(
        name,
        config=config,
        dtype=dtype,
        key_mapping={r"^(model\.)?encoder\.": ""},
        output_loading_info=True,
        **hub_kwargs,
    )
    if report["missing_keys"]:
        raise ValueError(f"{name} lacks these weights of a Whisper encoder: {sorted(report['missing_keys'])}.")
    return encoder


__all__ = ["LsmSpeechEncoder", "load_speech_encoder"]
