"""Tiny configurations of the LLM families of transformers, for `test_families.py`."""

from dataclasses import fields

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests import tiny


# What most families call their sizes. A family takes those that its config knows.
SIZES = {
    "vocab_size": 261,  # as the tokenizer, so that composing has to add a row
    "hidden_size": 32,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "bos_token_id": 0,
    "eos_token_id": 4,
    "pad_token_id": 2,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"num_key_value_heads": 4}
EXPERTS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
PER_LAYER = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": SLIDING["layer_types"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 261,
}

# Families by their names in `AutoConfig`, with what is their own.
FAMILIES = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {**SLIDING, "logit_scale": 0.25},
    "deepseek_v2": {**LATENT, **EXPERTS, "n_group": 1},
    "deepseek_v3": {**LATENT, **EXPERTS},
    "ernie4_5": {},
    "exaone4": SLIDING,
    "falcon": {},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0},
    "gemma": {},
    "gemma2": {**SLIDING, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 8},
    "gemma3n_text": {**PER_LAYER, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": PER_LAYER,
    "glm": {},
    "glm4": {},
    "glm4_moe": {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gpt_oss": SLIDING,
    "gptj": {"rotary_dim": 4},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 2.0},
    "granitemoe": {"logits_scaling": 8.0},
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 32,
        "logits_scaling": 8.0,
    },
    "granitemoeshared": {"shared_intermediate_size": 32},
    "helium": {},
    "hunyuan_v1_dense": {},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "llama4_text": {},
    "minicpm3": LATENT,
    "minimax_m2": {},
    "ministral": SLIDING,
    "mistral": {},
    "mixtral": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "layers_block_type": ["mamba", "attention", "moe"],
        "moe_shared_expert_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "olmo_hybrid": {},
    "olmoe": {},
    "opt": {"word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_moe": {},
    "qwen3_next": LINEAR,
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}


# Families that cannot be the LLM, and what is wrong with them.
OTHER_CACHE = "it keeps a cache of its own kind, not transformers' `Cache`"
LOOKS_AHEAD = "given vectors that are no tokens, as speech is, what it says of a beginning depends on what follows"
REFUSED = {
    "bert": ({}, LOOKS_AHEAD),
    "cpmant": (
        {"prompt_types": 1, "prompt_length": 4},
        "its forward pass takes no embeddings, of which speech is made",
    ),
    "electra": ({"embedding_size": 16}, "its embeddings are 16 wide, its layers 32"),
    "falcon_mamba": ({"state_size": 8}, OTHER_CACHE),
    "mamba": ({"state_size": 8}, OTHER_CACHE),
    "mamba2": ({"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 16, "chunk_size": 16}, OTHER_CACHE),
    "minimax": ({}, OTHER_CACHE),
    "openai-gpt": ({}, OTHER_CACHE),
    "recurrent_gemma": (
        {"lru_width": 32, "num_hidden_layers": 3},
        "given vectors that are no tokens, as speech is, what it says depends on padding before it, and so on its "
        "batch",
    ),
    "roberta": ({}, LOOKS_AHEAD),
    "rwkv": ({"attention_hidden_size": 32}, OTHER_CACHE),
    "t5": (
        {"d_model": 32, "num_layers": 1, "d_kv": 8, "d_ff": 32},
        "it is an encoder-decoder model, not a decoder alone",
    ),
    "xlnet": ({"d_inner": 64, "d_head": 8}, OTHER_CACHE),
    "xlstm": ({"num_heads": 4}, OTHER_CACHE),
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
# Multimodal families: that of their text part, and the other parts.
MULTIMODAL = {
    "gemma3": (
        "gemma3_text",
        {"vision_config": {**VISION, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4},
    ),
    "gemma4": ("gemma4_text", {"vision_config": {**VISION, "head_dim": 8}, "audio_config": None}),
    "llama4": (
        "llama4_text",
        {
            "vision_config": {
                **VISION,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
                "pixel_shuffle_ratio": 0.5,
            }
        },
    ),
    "mistral3": ("mistral", {"vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8}}),
    "qwen3_5": (
        "qwen3_5_text",
        {
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "depth": 1,
                "num_heads": 2,
                "out_hidden_size": 32,
            }
        },
    ),
}


def family_config(family: str) -> PreTrainedConfig:
    """A tiny configuration of `family`."""
    config_class = CONFIG_MAPPING[family]
    known = {field.name for field in fields(config_class)} | set(config_class.attribute_map)
    sizes = {name: value for name, value in SIZES.items() if name in known}
    return config_class(**{**sizes, **(REFUSED[family][0] if family in REFUSED else FAMILIES[family])})


def make_family(family: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random LLM of `family`, or a multimodal model with one, whose every weight matters."""
    if family in MULTIMODAL:
        of_text, others = MULTIMODAL[family]
        config = CONFIG_MAPPING[family](text_config=family_config(of_text).to_dict(), **others)
        return tiny.enliven(AutoModelForMultimodalLM.from_config(config), seed)
    auto_class = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    return tiny.enliven(auto_class.from_config(family_config(family)), seed)
