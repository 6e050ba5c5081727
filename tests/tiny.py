"""Tiny random models, a byte-level tokenizer and synthetic audio, all built in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from modeling_lsm import AUDIO_TOKEN, LsmConfig, LsmForConditionalGeneration, LsmProcessor
from modeling_lsm.composing import read_chat_template


SAMPLING_RATE = 16_000
BOS, EOS, PAD, START, END = "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"
# As SmolLM2's: it joins strings, so content that is a list makes it fail.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou listen.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def noise(seconds: float, seed: int = 0, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """White noise that swells and fades, so that its windows differ: float32 of shape `(samples,)`, at least one."""
    samples = np.random.default_rng(seed).standard_normal(max(1, round(seconds * sampling_rate)))
    swell = 1.1 + np.sin(np.arange(len(samples)) / sampling_rate * (3 + seed % 5))
    return (0.05 * samples * swell).astype(np.float32)


def tone(frequency: float, seconds: float, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """A sine of `frequency` Hz and amplitude 0.5: float32 of shape `(samples,)`."""
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * sampling_rate)) / sampling_rate)).astype(
        np.float32
    )


def make_tokenizer(chat_template: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: a token for every byte and a few special ones. It does not know the audio token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = [BOS, EOS, PAD, START, END]
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=END if chat_template else EOS,
        pad_token=PAD,
        extra_special_tokens=[START, END],
        chat_template=CHAT_TEMPLATE if chat_template else None,
    )


@torch.no_grad()
def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights so large that every part of the output depends on every part of the input."""
    generator = torch.Generator().manual_seed(seed)
    norms = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    }
    for name, parameter in model.named_parameters():
        if "embed_positions" in name:
            continue  # Whisper's sinusoids
        # Token embeddings are small beside what the layers add, or a tied LLM would repeat its last token for ever.
        embeds = name.endswith(("embed_tokens.weight", "wte.weight"))
        fan_in = 100 if embeds or parameter.ndim == 1 else parameter[0].numel()
        if name.endswith(("conv1.weight", "conv2.weight")):
            fan_in /= 16  # what is heard must be loud beside the encoder's positions
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5 + (name in norms))
    return model.eval()


def whisper_config(**kwargs) -> WhisperConfig:
    """Configuration of a tiny Whisper with 30 s of positions."""
    return WhisperConfig(
        **{
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_layers": 1,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 64,
            "num_mel_bins": 80,
            "max_source_positions": 1500,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "decoder_start_token_id": 3,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
            **kwargs,
        }
    )


def llm_config(**kwargs) -> LlamaConfig:
    """Configuration of a tiny Llama with a spare embedding row or two."""
    return LlamaConfig(
        **{
            "vocab_size": 264,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "bos_token_id": 0,
            "eos_token_id": 4,
            "pad_token_id": 2,
            "tie_word_embeddings": True,
            **kwargs,
        }
    )


def make_whisper(seed: int = 0, **kwargs) -> WhisperForConditionalGeneration:
    """A tiny random Whisper; `kwargs` are settings of its configuration."""
    return enliven(WhisperForConditionalGeneration(whisper_config(**kwargs)), seed)


def make_llm(seed: int = 0, **kwargs) -> LlamaForCausalLM:
    """A tiny random Llama, tied unless `tie_word_embeddings=False`; `kwargs` are settings of its configuration."""
    return enliven(LlamaForCausalLM(llm_config(**kwargs)), seed)


def save_llm_of_words(texts: list[str], folder: Path) -> None:
    """A tiny LLM whose tokens are about as long as those of real ones: letters are too many for the warm-up."""
    tokenizer = make_tokenizer().train_new_from_iterator(texts, vocab_size=1000)
    tokenizer.save_pretrained(folder)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    make_llm(vocab_size=1008, **special).save_pretrained(folder)


def make_processor(tokenizer: PreTrainedTokenizerFast | None = None, **kwargs) -> LsmProcessor:
    """A processor around `make_tokenizer()`; `kwargs` are settings of `LsmProcessor`."""
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [kwargs.get("audio_token", AUDIO_TOKEN)]}, replace_extra_special_tokens=False
    )
    chat_template = kwargs.pop("chat_template", None) or read_chat_template(None, tokenizer)
    return LsmProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer, chat_template=chat_template, **kwargs)


def model_config(**kwargs) -> LsmConfig:
    """Configuration of a tiny LSM that fits `make_processor()`; `kwargs` are settings of `LsmConfig`."""
    return LsmConfig(
        **{
            "audio_config": whisper_config().to_dict(),
            "text_config": llm_config().to_dict(),
            "audio_token_id": make_processor().audio_token_id,
            "projector_hidden_size": 32,
            "projector_num_attention_heads": 4,
            **kwargs,
        }
    )


def make_model(seed: int = 0, **kwargs) -> LsmForConditionalGeneration:
    """A tiny random LSM in float32 that never writes the placeholder; `kwargs` are settings of `LsmConfig`."""
    model = enliven(LsmForConditionalGeneration(model_config(**kwargs)), seed)
    text_config = model.config.text_config
    model.generation_config.update(
        bos_token_id=text_config.bos_token_id,
        eos_token_id=text_config.eos_token_id,
        pad_token_id=text_config.pad_token_id,
        suppress_tokens=[model.config.audio_token_id],
    )
    return model


def make_pair(seed: int = 0, **kwargs) -> tuple[LsmForConditionalGeneration, LsmProcessor]:
    """A tiny model and the processor that belongs to it; `kwargs` are settings of `LsmConfig`."""
    model = make_model(seed, **kwargs)
    return model, make_processor(
        window_size=model.config.window_size,
        num_queries=model.config.num_queries,
        encoder_padding=model.config.encoder_padding,
    )


def ask(processor: LsmProcessor, *chats: list[dict[str, Any]], **kwargs):
    """Model inputs for `chats`, each a list of messages, with the answer to follow."""
    return processor.apply_chat_template(
        list(chats), **{"add_generation_prompt": True, "tokenize": True, "return_dict": True, **kwargs}
    )
