"""The model card of a checkpoint."""

from collections.abc import Sequence

import torch

from .assembling_lsm import whole_models
from .modeling_lsm import LsmForConditionalGeneration
from .slim_lsm import BASES, merged_config, part_of, parts_from_bases


CARD = """\
---
library_name: transformers
pipeline_tag: audio-text-to-text
tags:
- speech
- lsm
{tags}{metadata}---

# {title}

A large speech-text model: it takes speech and a written instruction and answers in text. A Whisper encoder hears, a
{projector_type} projector turns every {window_seconds:.2f} s into {num_queries} vector(s), a causal LLM reads them
among the words.

| part | from | licence | parameters | trained here |
| --- | --- | --- | ---: | --- |
{rows}
| **total** | | | **{total:,}** | **{trained:,}** |

{training}

## Use

```python
from transformers import pipeline

pipe = pipeline("audio-text-to-text", model="{name}", trust_remote_code=True)
print(pipe("clip.flac", text="Transcribe the speech.", max_new_tokens=64))
```

`pipe` takes a file, an array with its `sampling_rate`, a list of them, or a chat with `{{"type": "audio"}}` items. It
needs `transformers>=5.19`, `torch`, `soundfile`, and `torchaudio` or `soxr` for audio that is not at 16 kHz.

Method: [Self-Powered LLM Modality Expansion for Large Speech-Text Models](https://huggingface.co/papers/2410.03798).
"""


def model_card(model: LsmForConditionalGeneration, name: str, slim: bool = False, tags: Sequence[str] = ()) -> str:
    """The README of a checkpoint called `name`, in Markdown: parts, licences, parameter counts, how to use it."""
    config = merged_config(model.config)
    base_models = config.base_models or {}
    parts = {
        "encoder": ("speech encoder", base_models.get("speech", {})),
        "projector": (f"{config.projector_config.projector_type} projector", {"id": "this model"}),
        "llm": ("LLM", base_models.get("text", {})),
    }
    # The model itself may be partitioned or quantized.
    with whole_models(), torch.device("meta"):
        sizes = {name: p.numel() for name, p in LsmForConditionalGeneration(config).named_parameters()}
    counts = {part: sum(size for name, size in sizes.items() if part_of(name) == part) for part in parts}
    if slim and "llm" in parts_from_bases(model.config) and model.config.lora_scaling is not None:
        config = model.config
        parts["lora"] = ("LoRA on the LLM", {"id": "this model"})
        lora = [p for name, p in model.named_parameters() if ".lora_" in name]
        counts["lora"] = sum(getattr(p, "ds_numel", p.numel()) for p in lora)  # what ZeRO-3 calls it
    trained_parts = config.trained_parts or []
    rows = "\n".join(
        f"| {label} | {base.get('id', 'unknown')} | {base.get('license') or '–'} | {counts[part]:,} | "
        f"{'yes' if part in trained_parts else 'no'} |"
        for part, (label, base) in parts.items()
    )
    if trained_parts:
        names = ["LoRA on the LLM" if part == "lora" else part for part in trained_parts]
        training = f"Trained: {', '.join(names)}. Everything else is as its authors published it."
    else:
        training = "**Not trained yet**: the projector is random, so answers about speech mean nothing."
    if slim:
        left_out = " and ".join(f"`{base_models[BASES[part]]['id']}`" for part in parts_from_bases(config))
        training += f"\n\nThis checkpoint is slim. What did not train is fetched when it is loaded: {left_out}."
    ids = [base["id"] for base in base_models.values() if base.get("id")]
    licenses = {base.get("license") for base in base_models.values()}
    metadata = "".join(f"- {id_}\n" for id_ in ids)
    metadata = f"base_model:\n{metadata}" if ids else ""
    if len(licenses) == 1 and None not in licenses:
        metadata += f"license: {licenses.pop()}\n"
    return CARD.format(
        title=name.rsplit("/", 1)[-1],
        name=name,
        tags="".join(f"- {tag}\n" for tag in tags),
        metadata=metadata,
        rows=rows,
        total=sum(counts.values()),
        trained=sum(counts[part] for part in trained_parts),
        training=training,
        projector_type=config.projector_config.projector_type,
        num_queries=config.num_queries,
        window_seconds=config.window_size
        * config.timing.ENCODER_STRIDE
        * config.timing.hop_length
        / config.timing.sampling_rate,
    )


__all__ = ["model_card"]
