"""What turns encoder frames into audio tokens, window by window."""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Blip2QFormerModel, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer
from transformers.utils import logging
from transformers.utils.generic import is_flash_attention_requested

from .configuration_lsm import AudioTiming, LsmConfig, LsmProjectorConfig


logger = logging.get_logger(__name__)


def length_mask(lengths: torch.Tensor, max_length: int) -> torch.Tensor:
    """Boolean mask of shape `(batch, max_length)`, `True` for the first `lengths[i]` positions of row `i`."""
    return torch.arange(max_length, device=lengths.device) < lengths[:, None]


def split_into_windows(
    hidden_states: torch.Tensor, lengths: torch.Tensor, timing: AudioTiming
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cuts encoder frames into windows of `timing.window_size` frames and keeps the windows that hold speech.

    Args:
        hidden_states (`torch.Tensor` of shape `(chunks, frames, d_model)`): Encoder output.
        lengths (`torch.Tensor` of shape `(chunks,)`): Frames of each chunk that are not padding.
        timing ([`AudioTiming`]): Gives the window size.

    Returns:
        The windows, `(windows, window_size, d_model)`, with zeros after the end of a clip, and their mask,
        `(windows, window_size)`. All windows of the first chunk come first, in order of time.
    """
    chunks, frames, _ = hidden_states.shape
    window_counts = timing.windows(lengths)  # [chunks]
    max_windows = timing.windows(frames)
    padded_frames = max_windows * timing.window_size
    frame_mask = length_mask(lengths, padded_frames)
    hidden_states = nn.functional.pad(hidden_states, (0, 0, 0, padded_frames - frames))
    hidden_states = hidden_states * frame_mask[..., None].to(hidden_states.dtype)

    keep = length_mask(window_counts, max_windows)  # [chunks, max_windows]
    windows = hidden_states.view(chunks, max_windows, timing.window_size, -1)[keep]
    return windows, frame_mask.view(chunks, max_windows, timing.window_size)[keep]


class LsmProjector(PreTrainedModel):
    """
    What projectors share. One maps encoder output `(chunks, frames, d_model)` and the chunks' lengths `(chunks,)`, in
    frames, to packed audio embeddings `(audio tokens, LLM width)`, as many per chunk as `AudioTiming.audio_tokens`
    says, through a last layer called `output` whose input has unit variance.

    Args:
        config ([`LsmConfig`]): The config of the whole model. `self.config` is its `projector_config`.
    """

    config: LsmProjectorConfig
    base_model_prefix = "projector"
    input_modalities = ("audio",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LsmConfig):
        super().__init__(config.projector_config)
        self.layer_norm = nn.LayerNorm(config.audio_config.d_model)


class LsmQFormerProjector(LsmProjector):
    """
    Window-level Q-Former: `num_queries` learned queries attend to the frames of one window at a time
    ([Yu et al., 2024](https://huggingface.co/papers/2410.03798), after
    [BLIP-2](https://huggingface.co/papers/2301.12597)). Cross-attention in every layer.

    BLIP-2's Q-Former has no flash attention: asked for it, this projector says so and takes SDPA.
    """

    _supports_flash_attn = False

    def __init__(self, config: LsmConfig):
        super().__init__(config)
        self.timing = config.timing
        width = self.config.hidden_size
        self.queries = nn.Parameter(torch.zeros(1, config.num_queries, width))
        self.qformer = Blip2QFormerModel(self.config)
        self.output = nn.Linear(width, config.text_config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self:
            init.normal_(self.queries, std=self.config.initializer_range)

    # transformers asks the one when a model is made, the other when its attention is set later.
    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        return super()._check_and_adjust_attn_implementation(without_flash(attn_implementation), *args, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, *args, **kwargs) -> str:
        return super().get_correct_attn_implementation(without_flash(requested_attention), *args, **kwargs)

    def forward(self, hidden_states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        windows, mask = split_into_windows(self.layer_norm(hidden_states), lengths, self.timing)
        query_states = self.qformer(
            query_embeds=self.queries.expand(windows.shape[0], -1, -1),
            encoder_hidden_states=windows,
            encoder_attention_mask=mask,
        ).last_hidden_state  # [windows, num_queries, width]
        return self.output(query_states.flatten(0, 1))


class LsmMlpProjector(LsmProjector):
    """Frame stacking and an MLP: the frames of a window, put side by side, give one audio token."""

    def __init__(self, config: LsmConfig):
        super().__init__(config)
        require_one_query(config)
        self.timing = config.timing
        width = self.config.hidden_size
        in_features = [config.window_size * config.audio_config.d_model] + [width] * (
            self.config.num_hidden_layers - 1
        )
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in in_features)
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)
        self.output_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, config.text_config.hidden_size)
        self.post_init()

    def forward(self, hidden_states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        windows, _ = split_into_windows(self.layer_norm(hidden_states), lengths, self.timing)
        stacked = windows.flatten(1)  # [windows, window_size * d_model]
        for layer in self.layers:
            stacked = self.dropout(ACT2FN["gelu"](layer(stacked)))
        return self.output(self.output_norm(stacked))


class LsmConvProjector(LsmProjector):
    """
    Strided convolutions: each halves the frame rate, so `window_size` is a power of two, and an audio token sees a
    little of the windows beside its own.
    """

    def __init__(self, config: LsmConfig):
        super().__init__(config)
        require_one_query(config)
        num_layers = config.window_size.bit_length() - 1
        if config.window_size != 2**num_layers or num_layers < 1:
            raise ValueError(
                f"The conv projector halves the frame rate with every layer, so `window_size` must be a power of two, "
                f"got {config.window_size}. Use 8 or 16, or projector_type='qformer', which takes any window size."
            )
        width = self.config.hidden_size
        channels = [config.audio_config.d_model] + [width] * num_layers
        self.layers = nn.ModuleList(
            nn.Conv1d(channels[i], channels[i + 1], kernel_size=3, stride=2, padding=1) for i in range(num_layers)
        )
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)
        self.output_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, config.text_config.hidden_size)
        self.post_init()

    def forward(self, hidden_states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        hidden_states = self.layer_norm(hidden_states).transpose(1, 2)  # [chunks, d_model, frames]
        for layer in self.layers:
            mask = length_mask(lengths, hidden_states.shape[-1])[:, None, :]
            hidden_states = self.dropout(ACT2FN["gelu"](layer(hidden_states * mask.to(hidden_states.dtype))))
            lengths = -(-lengths // 2)
        hidden_states = hidden_states.transpose(1, 2)  # [chunks, windows, width]
        packed = hidden_states[length_mask(lengths, hidden_states.shape[1])]
        return self.output(self.output_norm(packed))


class LsmTransformerProjector(LsmProjector):
    """
    Frame stacking and a Transformer: the frames of a window, put side by side, give one audio token, and every audio
    token attends to those of its whole chunk. The layers are those of Whisper's encoder.
    """

    def __init__(self, config: LsmConfig):
        super().__init__(config)
        require_one_query(config)
        self.timing = config.timing
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        if width % heads:
            raise ValueError(
                f"`projector_hidden_size` is {width}, which {heads} attention heads cannot share evenly. Choose a "
                f"width that is a multiple of {heads}, or another `projector_num_attention_heads`."
            )
        self.input = nn.Linear(config.window_size * config.audio_config.d_model, width)
        # Relative positions come from a convolution, as in wav2vec 2.0 (https://huggingface.co/papers/2006.11477).
        self.position = nn.Conv1d(width, width, kernel_size=5, padding=2, groups=heads)
        self.layers = nn.ModuleList(WhisperEncoderLayer(self.config) for _ in range(self.config.num_hidden_layers))
        self.output_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, config.text_config.hidden_size)
        self.post_init()

    def forward(self, hidden_states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        windows, _ = split_into_windows(self.layer_norm(hidden_states), lengths, self.timing)
        counts = self.timing.windows(lengths)  # [chunks]
        states = ACT2FN["gelu"](self.input(windows.flatten(1)))
        states = pad_sequence(states.split(counts.tolist()), batch_first=True)  # [chunks, windows, width]
        states = states + ACT2FN["gelu"](self.position(states.transpose(1, 2))).transpose(1, 2)
        mask = length_mask(counts, states.shape[1])
        attention_mask = create_bidirectional_mask(config=self.config, inputs_embeds=states, attention_mask=mask)
        for layer in self.layers:
            states = layer(states, attention_mask)
        return self.output(self.output_norm(states[mask]))


def without_flash(attn_implementation: str | None) -> str | None:
    """`"sdpa"`, with a warning, in the place of flash attention of any kind; everything else as it is."""
    if not is_flash_attention_requested(requested_attention_implementation=attn_implementation):
        return attn_implementation
    logger.warning_once("The Q-Former has no flash attention: it takes SDPA, the other parts take what was asked for.")
    return "sdpa"


def require_one_query(config: LsmConfig) -> None:
    """Raises a `ValueError` unless `config` asks for one audio token per window."""
    if config.num_queries != 1:
        raise ValueError(
            f"`num_queries` is {config.num_queries}, but the {config.projector_config.projector_type} projector makes "
            "exactly 1 audio token per window. Set num_queries=1 or projector_type='qformer'."
        )


# To add a projector, add it here.
PROJECTORS = {
    "qformer": LsmQFormerProjector,
    "mlp": LsmMlpProjector,
    "conv": LsmConvProjector,
    "transformer": LsmTransformerProjector,
}


__all__ = ["PROJECTORS", "LsmQFormerProjector", "length_mask"]
