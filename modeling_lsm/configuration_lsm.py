"""Configuration of a large speech-text model (LSM), and the one place that turns seconds into audio tokens."""

from dataclasses import dataclass

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, Blip2QFormerConfig, PreTrainedConfig, WhisperConfig


@dataclass(frozen=True)
class AudioTiming:
    """
    The chain from a waveform to the number of vectors that the LLM receives for it:

        samples --hop_length--> mel frames --2--> encoder frames --window_size--> windows --num_queries--> tokens

    Every step rounds up, so the shortest clip (one sample) still gives one window, and no clip gives a window that
    holds padding alone. Audio longer than the encoder can see is cut into chunks of a whole number of windows: the
    windows of all chunks, put one after another, are the windows of the uncut clip.

    The counting methods take an `int` or an integer `torch.Tensor` and return the same.

    Args:
        window_size (`int`, *optional*, defaults to 17):
            Encoder frames per window; at Whisper's 50 frames per second, 17 frames last 0.34 s.
        num_queries (`int`, *optional*, defaults to 1):
            Audio tokens per window.
        max_encoder_frames (`int`, *optional*, defaults to 1500):
            Frames that the encoder has position embeddings for (30 s for every Whisper).
        sampling_rate (`int`, *optional*, defaults to 16000):
            Samples per second of the waveform.
        hop_length (`int`, *optional*, defaults to 160):
            Samples from one mel frame to the next.
    """

    window_size: int = 17
    num_queries: int = 1
    max_encoder_frames: int = 1500
    sampling_rate: int = 16_000
    hop_length: int = 160

    # Whisper's second convolution has stride 2: a property of its architecture, not a setting.
    ENCODER_STRIDE = 2

    def __post_init__(self):
        if not 1 <= self.window_size <= self.max_encoder_frames:
            raise ValueError(
                f"`window_size` is {self.window_size}, but a window holds between 1 and {self.max_encoder_frames} "
                "encoder frames (`max_source_positions` of the speech encoder). The paper uses 17."
            )
        if self.num_queries < 1:
            raise ValueError(f"`num_queries` is {self.num_queries}; every window needs at least 1 audio token.")

    def mel_frames(self, samples):
        """Mel frames of a waveform with `samples` samples."""
        return -(-samples // self.hop_length)

    def encoder_frames(self, mel_frames):
        """Frames that the speech encoder makes of `mel_frames` mel frames."""
        return -(-mel_frames // self.ENCODER_STRIDE)

    def windows(self, encoder_frames):
        """Windows that `encoder_frames` encoder frames fill; the last one may be partly filled."""
        return -(-encoder_frames // self.window_size)

    def audio_tokens(self, mel_frames):
        """Audio tokens that the LLM receives for one chunk of `mel_frames` mel frames."""
        return self.windows(self.encoder_frames(mel_frames)) * self.num_queries

    @property
    def max_samples(self) -> int:
        """Samples that the encoder can see at once: 30 s for every Whisper."""
        return self.max_encoder_frames * self.ENCODER_STRIDE * self.hop_length

    @property
    def chunk_samples(self) -> int:
        """Samples per chunk of long audio: the most that fit into the encoder and fill a whole number of windows."""
        whole_windows = self.max_encoder_frames // self.window_size
        return whole_windows * self.window_size * self.ENCODER_STRIDE * self.hop_length

    def chunk_bounds(self, samples: int) -> list[tuple[int, int]]:
        """Start and end, in samples, of the chunks that a clip of `samples` samples is encoded in."""
        return [
            (start, min(start + self.chunk_samples, samples))
            for start in range(0, max(samples, 1), self.chunk_samples)
        ]

    def audio_tokens_of_clip(self, samples: int) -> int:
        """Audio tokens for a whole clip of `samples` samples, however many chunks it takes."""
        return sum(self.audio_tokens(self.mel_frames(end - start)) for start, end in self.chunk_bounds(samples))


@strict
class LsmProjectorConfig(Blip2QFormerConfig):
    r"""
    Configuration of the projector of an [`LsmForConditionalGeneration`]. Blocks that attend take it as theirs: those
    of BLIP-2's Q-Former by its own names, those of Whisper's encoder by the names in `attribute_map`.

    Args:
        projector_type (`str`, *optional*, defaults to `"qformer"`):
            A key of `modeling_lsm.PROJECTORS`: `"qformer"` (window-level Q-Former), `"mlp"` (frames of a window
            stacked), `"transformer"` (stacked, with attention over up to 30 s) or `"conv"` (strided convolutions).
        hidden_size (`int`, *optional*, defaults to 768):
            Width of the projector.
        num_hidden_layers (`int`, *optional*, defaults to 2):
            Layers of the Q-Former, the MLP or the Transformer. The `conv` projector has as many as `window_size` asks
            for.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Attention heads of the Q-Former or the Transformer.
        intermediate_size (`int`, *optional*, defaults to `4 * hidden_size`):
            Width of the feed-forward layers of the Q-Former or the Transformer.
        hidden_dropout_prob, attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout inside the projector.
    """

    model_type = "lsm_projector"
    base_config_key = "projector_config"
    attribute_map = {
        "d_model": "hidden_size",
        "encoder_attention_heads": "num_attention_heads",
        "encoder_ffn_dim": "intermediate_size",
        "activation_function": "hidden_act",
        "dropout": "hidden_dropout_prob",
        "activation_dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
    }

    projector_type: str = "qformer"
    hidden_size: int = 768
    num_hidden_layers: int = 2
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    cross_attention_frequency: int = 1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size


# The projector's settings under the names that `LsmConfig` takes them by, as the command line does; in the config of a
# checkpoint of the first release they stand under these names.
PROJECTOR_SETTINGS = {
    "projector_type": ("projector_type",),
    "projector_hidden_size": ("hidden_size",),
    "projector_num_layers": ("num_hidden_layers",),
    "projector_num_attention_heads": ("num_attention_heads",),
    "projector_dropout": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}


@strict
class LsmConfig(PreTrainedConfig):
    r"""
    Configuration of an [`LsmForConditionalGeneration`]: a Whisper encoder, a projector and a causal LLM, after
    [Self-Powered LLM Modality Expansion for Large Speech-Text Models](https://huggingface.co/papers/2410.03798).

    Args:
        audio_config (`dict` or `WhisperConfig`, *optional*):
            The Whisper model whose encoder is the speech encoder. Its decoder is not built.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            The causal LLM: any that `AutoModelForCausalLM` can build. Defaults to a `LlamaConfig`.
        audio_token_id (`int`, *optional*, defaults to 0):
            The token that stands in `input_ids` where an audio embedding goes.
        encoder_padding (`str`, *optional*, defaults to `"longest"`):
            `"longest"` encodes a clip at its own duration; `"max_length"` pads it with silence to 30 s and lets the
            encoder attend to that silence, as Whisper itself does.
        projector_config (`dict` or [`LsmProjectorConfig`], *optional*):
            The projector. `projector_type`, `projector_hidden_size`, `projector_num_layers`,
            `projector_num_attention_heads` and `projector_dropout` may be given in its place.
        window_size (`int`, *optional*, defaults to 17):
            Encoder frames per window, see [`AudioTiming`].
        num_queries (`int`, *optional*, defaults to 1):
            Audio tokens per window, see [`AudioTiming`]. Only the Q-Former can make more than one.
        embedding_scale (`float`, *optional*, defaults to 1.0):
            What the LLM multiplies embeddings by where it looks them up itself, but not where it is given them
            (Falcon-H1). Composing measures it.
        base_models (`dict`, *optional*):
            Where the pretrained parts come from: `{"speech": …, "text": …}`, each with `id`, `revision`, `license`,
            `dtype` and `fingerprint` of the weights, and `path` if it was a local folder.
        trained_parts (`list[str]`, *optional*):
            Which of `"encoder"`, `"projector"`, `"llm"` were trained since the model was composed, and `"lora"` while
            the LLM has LoRA that is not merged. Empty for a model fresh from composing, whose projector is random.
        slim (`bool`, *optional*, defaults to `False`):
            Whether the checkpoint holds only what trained. A model that is loaded is whole.
        lora_scaling (`float`, *optional*):
            What `B @ A` of LoRA is multiplied by, while the LLM has LoRA that is not merged.

    Example:

    ```python
    >>> from modeling_lsm import LsmConfig, LsmForConditionalGeneration

    >>> config = LsmConfig(window_size=17)
    >>> config.timing.audio_tokens_of_clip(10 * 16_000)  # 10 s of audio
    30
    ```"""

    model_type = "lsm"
    # Not `sub_configs_defaults`, which transformers has from 5.20 on.
    sub_configs = {"audio_config": WhisperConfig, "projector_config": LsmProjectorConfig, "text_config": AutoConfig}

    audio_config: dict | PreTrainedConfig | None = None
    projector_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    audio_token_id: int = 0
    encoder_padding: str = "longest"
    window_size: int = 17
    num_queries: int = 1
    embedding_scale: float | int = 1.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool | None = None
    base_models: dict | None = None
    trained_parts: list[str] | None = None
    slim: bool = False
    lora_scaling: float | int | None = None

    def __post_init__(self, **kwargs):
        if not isinstance(self.audio_config, PreTrainedConfig):
            self.audio_config = WhisperConfig(**(self.audio_config or {}))
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**{"model_type": "llama", **(self.text_config or {})})
        settings = {name: kwargs.pop(name) for name in PROJECTOR_SETTINGS if name in kwargs}
        if not isinstance(self.projector_config, PreTrainedConfig):
            renamed = {new: value for name, value in settings.items() for new in PROJECTOR_SETTINGS[name]}
            self.projector_config = LsmProjectorConfig(
                **{**(self.projector_config or {}), **renamed, "encoder_hidden_size": self.audio_config.d_model}
            )
        super().__post_init__(**kwargs)
        # Some tools read the top level; the LLM is the one who knows.
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        if self.encoder_padding not in ("longest", "max_length"):
            raise ValueError(
                f"`encoder_padding` is {self.encoder_padding!r}; expected 'longest' (a clip costs what it lasts) or "
                "'max_length' (Whisper's own 30 s)."
            )
        self.timing  # noqa: B018 -- refuses impossible window sizes here rather than at the first clip

    @property
    def timing(self) -> AudioTiming:
        """The time arithmetic of this model, an [`AudioTiming`]."""
        return AudioTiming(
            window_size=self.window_size,
            num_queries=self.num_queries,
            max_encoder_frames=self.audio_config.max_source_positions,
        )


__all__ = ["PROJECTOR_SETTINGS", "AudioTiming", "LsmConfig", "LsmProjectorConfig"]
