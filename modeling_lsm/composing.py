"""
Puts a pretrained Whisper and a pretrained LLM together into an LSM checkpoint, then reloads and checks it.

    python -m modeling_lsm.composing \
        --speech_model openai/whisper-large-v2 \
        --text_model lmsys/vicuna-7b-v1.5 --chat_template vicuna \
        --output_dir outputs/lsm-7b

Models are Hub ids or folders. The projector is random: `train_sft.py` trains it. It may save a slim checkpoint, which
holds only what trained. Of such a one this makes a whole one:

    python -m modeling_lsm.composing --merge outputs/slim --output_dir outputs/whole
"""

import logging
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
)

from .configuration_lsm import LsmConfig
from .fingerprints import commit_of, fingerprint
from .language_model_lsm import grow_vocabulary, load_language_model
from .modeling_lsm import LsmForConditionalGeneration
from .pipeline_lsm import LsmPipeline
from .probing import check_reading, embedding_rms, measure_embedding_scale
from .processing_lsm import AUDIO_TOKEN, LsmProcessor, make_chat
from .projectors_lsm import PROJECTORS
from .speech_encoder_lsm import load_speech_encoder


logger = logging.getLogger(__name__)

TEMPLATE_DIR = Path(__file__).parent / "chat_templates"
PRELUDE = "with_audio"


@dataclass
class ComposingArguments:
    """Arguments of `python -m modeling_lsm.composing`."""

    output_dir: str = field(metadata={"help": "Folder for the checkpoint."})
    speech_model: str | None = field(default=None, metadata={"help": "A Whisper model, as a Hub id or a folder."})
    text_model: str | None = field(
        default=None,
        metadata={"help": "A causal LLM, or a multimodal model for its text part, as a Hub id or a folder."},
    )
    speech_revision: str | None = field(default=None, metadata={"help": "Revision of the speech model on the Hub."})
    text_revision: str | None = field(default=None, metadata={"help": "Revision of the LLM on the Hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that the two repositories carry, as for a tokenizer of its own."}
    )
    projector_type: str = field(default="qformer", metadata={"help": f"One of {', '.join(PROJECTORS)}."})
    window_size: int = field(default=17, metadata={"help": "Encoder frames per window; 50 frames last one second."})
    num_queries: int = field(default=1, metadata={"help": "Audio tokens per window (Q-Former only)."})
    projector_hidden_size: int = field(default=768, metadata={"help": "Width of the projector."})
    projector_num_layers: int = field(default=2, metadata={"help": "Layers of the Q-Former, MLP or Transformer."})
    projector_num_attention_heads: int = field(
        default=12, metadata={"help": "Attention heads of the Q-Former or Transformer."}
    )
    projector_dropout: float = field(default=0.0, metadata={"help": "Dropout in the projector, while it trains."})
    encoder_padding: str = field(
        default="longest",
        metadata={"help": "'longest' (a clip costs what it lasts) or 'max_length' (30 s, as Whisper)."},
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "For an LLM without a chat template: a name from chat_templates/ ('vicuna') or a Jinja file."
        },
    )
    dtype: str = field(default="auto", metadata={"help": "dtype of the checkpoint; 'auto' takes the LLM's own."})
    seed: int = field(default=0, metadata={"help": "Seed of the random projector."})
    merge: str | None = field(
        default=None, metadata={"help": "A slim checkpoint to make whole, instead of composing a new model."}
    )
    base_speech: str | None = field(
        default=None, metadata={"help": "With --merge: where the speech model is now, if it has moved."}
    )
    base_text: str | None = field(default=None, metadata={"help": "With --merge: where the LLM is, if it has moved."})


def read_chat_template(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """
    The template of a processor: an LLM's own, or the one called `name`, made fit for content that holds audio.

    Raises:
        ValueError: If there is no template, or none called `name`.
    """
    available = sorted(path.stem for path in TEMPLATE_DIR.glob("*.jinja") if path.stem != PRELUDE)
    if name is None:
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if template is None:
            raise ValueError(
                f"The tokenizer of {tokenizer.name_or_path} has no chat template. Name one with --chat_template: a "
                f"Jinja file, or one of {', '.join(available)}."
            )
    elif name in available:
        template = (TEMPLATE_DIR / f"{name}.jinja").read_text(encoding="utf-8")
    elif Path(name).is_file():
        template = Path(name).read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"There is no chat template {name!r}; expected a Jinja file or one of {', '.join(available)}."
        )
    return (TEMPLATE_DIR / f"{PRELUDE}.jinja").read_text(encoding="utf-8") + template


def describe_base(
    name: str, model: PreTrainedModel, vocab_size: int | None = None, **hub_kwargs
) -> dict[str, str | int | None]:
    """What a config says of a pretrained model: which it is, as far as that is known, and what its weights are."""
    folder = Path(name)
    license_ = None
    try:
        card = ModelCard.load(folder / "README.md" if folder.is_dir() else name)
        license_ = card.data.license
    except (OSError, ValueError) as error:  # no card, no network, or one that is not valid
        logger.warning("The licence of %s is unknown: its model card cannot be read (%s).", name, error)
    base = {
        "id": folder.resolve().name if folder.is_dir() else name,
        "revision": commit_of(name, **hub_kwargs),
        "license": license_,
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(model, vocab_size),
    }
    if vocab_size is not None:
        base["vocab_size"] = vocab_size
    return {**base, "path": str(folder.resolve())} if folder.is_dir() else base


def compose(
    speech_model: str,
    text_model: str,
    chat_template: str | None = None,
    dtype: str | torch.dtype = "auto",
    seed: int = 0,
    speech_revision: str | None = None,
    text_revision: str | None = None,
    trust_remote_code: bool = False,
    **config_kwargs,
) -> tuple[LsmForConditionalGeneration, LsmProcessor]:
    """
    Makes an LSM from two pretrained models.

    Args:
        speech_model (`str`): Hub id or folder of a Whisper model.
        text_model (`str`): Hub id or folder of a causal LLM, or of a multimodal model, whose text part is taken.
        chat_template (`str`, *optional*): See [`read_chat_template`].
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): dtype of all weights; the LLM's if `"auto"`.
        seed (`int`, *optional*, defaults to 0): Seed of the random projector.
        speech_revision, text_revision (`str`, *optional*): Revisions of the two on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that the two repositories carry.
        config_kwargs: Projector settings of [`LsmConfig`].

    Returns:
        The model and its processor.

    Raises:
        ValueError: If the models are not of the expected kinds, or the LLM cannot read speech.
    """
    of_speech = {"revision": speech_revision, "trust_remote_code": trust_remote_code}
    of_text = {"revision": text_revision, "trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(text_model, **of_text)
    template = read_chat_template(chat_template, tokenizer)
    llm = load_language_model(text_model, dtype, **of_text)
    encoder = load_speech_encoder(speech_model, llm.dtype, **of_speech)
    base_models = {
        "speech": describe_base(speech_model, encoder, **of_speech),
        "text": describe_base(text_model, llm, llm.config.vocab_size, **of_text),
    }
    tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_TOKEN]}, replace_extra_special_tokens=False)
    grow_vocabulary(llm, len(tokenizer))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = LsmConfig(
        audio_config={**encoder.config.to_dict(), "_name_or_path": ""},  # folders of this machine mean nothing later
        text_config={**llm.config.to_dict(), "_name_or_path": ""},
        audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO_TOKEN),
        dtype=llm.dtype,
        base_models=base_models,
        **config_kwargs,
    )
    processor = LsmProcessor(
        WhisperFeatureExtractor.from_pretrained(speech_model, **of_speech),
        tokenizer,
        chat_template=template,
        window_size=config.window_size,
        num_queries=config.num_queries,
        max_encoder_frames=config.timing.max_encoder_frames,
        encoder_padding=config.encoder_padding,
    )
    processor.check_matches(config)
    with torch.device("meta"):
        model = LsmForConditionalGeneration(config)
    model.lsm.audio_tower = encoder
    model.lsm.language_model = llm
    model.generation_config = greedy(llm.generation_config, tokenizer.pad_token_id, config.audio_token_id)
    model.tie_weights()
    model.config.embedding_scale = measure_embedding_scale(text_model, model.eval())
    check_reading(text_model, model)
    torch.manual_seed(seed)
    model.lsm.projector = new_projector(model)
    return model.eval(), processor


def new_projector(model: LsmForConditionalGeneration) -> nn.Module:
    """A random projector for `model` whose output is as large as the embeddings of words that its LLM reads."""
    projector = PROJECTORS[model.config.projector_config.projector_type](model.config)
    with torch.no_grad():
        nn.init.normal_(projector.output.weight, std=embedding_rms(model) / projector.output.in_features**0.5)
        nn.init.zeros_(projector.output.bias)
    return projector.to(model.lsm.language_model.dtype)


def greedy(generation_config: GenerationConfig, pad_token_id: int, audio_token_id: int) -> GenerationConfig:
    """The LLM's generation config without sampling, so that equal questions get equal answers."""
    sampling = ("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff")
    settings = {key: v for key, v in generation_config.to_diff_dict().items() if key not in (*sampling, "eta_cutoff")}
    # The LLM never wrote the placeholder before, and an answer that holds one could not be read back.
    suppressed = [*(generation_config.suppress_tokens or []), audio_token_id]
    return GenerationConfig(**{**settings, "pad_token_id": pad_token_id, "suppress_tokens": suppressed})


@torch.no_grad()
def check_checkpoint(folder: str | Path, model: LsmForConditionalGeneration) -> None:
    """
    Reloads the checkpoint in `folder` and makes sure that it does what `model` does.

    Raises:
        RuntimeError: If a weight differs, or logits for a prompt with audio do.
    """
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    reloaded = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True, dtype=model.dtype).eval()
    noise = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    inputs = processor.apply_chat_template(
        make_chat("What is said?", audio=noise), add_generation_prompt=True, tokenize=True, return_dict=True
    ).to(model.dtype)
    weights = model.state_dict()
    changed = [name for name, weight in reloaded.state_dict().items() if not torch.equal(weight, weights[name])]
    logits = model(**inputs).logits
    difference = ((reloaded(**inputs).logits - logits).norm() / logits.norm()).item()
    if changed or not difference < 1e-2:  # some LLMs give other roundings every time
        raise RuntimeError(
            f"The checkpoint in {folder} does not reload to what was saved: {len(changed)} weights differ, as "
            f"{changed[:1]}, logits by {difference:.2%}."
        )


def save_checked(model: LsmForConditionalGeneration, processor: LsmProcessor, folder: Path) -> None:
    """Saves a checkpoint that is in `folder` only once it has been reloaded and checked."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        unchecked = Path(temporary, folder.name)
        LsmPipeline(model=model, processor=processor, device="cpu").save_pretrained(unchecked)
        check_checkpoint(unchecked, model)
        if folder.is_dir():  # whatever else is in it stays
            for file in sorted(folder.glob("model*.safetensors*")):
                file.unlink()
            shutil.copytree(unchecked, folder, dirs_exist_ok=True, copy_function=shutil.move)
        else:
            unchecked.rename(folder)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = HfArgumentParser(ComposingArguments)
    settings = vars(parser.parse_args_into_dataclasses()[0]).copy()
    output_dir, slim = settings.pop("output_dir"), settings.pop("merge")
    base_folders = {"speech": settings.pop("base_speech"), "text": settings.pop("base_text")}
    if slim is not None:
        if Path(slim).resolve() == Path(output_dir).resolve():
            parser.error(f"--output_dir is the slim checkpoint itself, {slim}; name another folder.")
        model = LsmForConditionalGeneration.from_pretrained(slim, base_folders=base_folders)
        processor = LsmProcessor.from_pretrained(slim)
    elif settings["speech_model"] is None or settings["text_model"] is None:
        parser.error("composing needs --speech_model and --text_model; making a slim checkpoint whole needs --merge.")
    else:
        model, processor = compose(**settings)
    save_checked(model, processor, Path(output_dir))
    logger.info(
        "%s: %s parameters, of which the projector has %s; reloaded and checked.",
        output_dir,
        f"{model.num_parameters():,}",
        f"{sum(p.numel() for p in model.lsm.projector.parameters()):,}",
    )


if __name__ == "__main__":
    main()
