"""Which parts of an LSM train."""

from ..modeling_lsm import LsmForConditionalGeneration


PARTS = ("encoder", "projector", "llm")


def set_trained_parts(model: LsmForConditionalGeneration, parts: list[str]) -> None:
    """
    Lets the named parts of `model` train, freezes the others, and notes in its config what has been trained.

    Of an LLM with LoRA ([`add_lora`]) only the LoRA trains.

    Args:
        model ([`LsmForConditionalGeneration`]): The model, changed in place.
        parts (`list[str]`): Any of `"encoder"`, `"projector"`, `"llm"`.

    Raises:
        ValueError: If a part is unknown, or there is none.
    """
    unknown = set(parts) - set(PARTS)
    if unknown or not parts:
        raise ValueError(f"--train got {sorted(unknown) or 'nothing'}; expected any of {', '.join(PARTS)}.")
    model.requires_grad_(False)
    modules = {
        "encoder": [model.lsm.audio_tower],
        "projector": [model.lsm.projector],
        "llm": [model.lsm.language_model],
    }
    has_lora = model.config.lora_scaling is not None
    for part in parts:
        for module in modules[part]:
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(part != "llm" or not has_lora or ".lora_" in name)
    # Whisper's position embeddings are fixed sinusoids, however much of the encoder trains.
    model.lsm.audio_tower.embed_positions.requires_grad_(False)
    trained = {"lora" if part == "llm" and has_lora else part for part in parts}
    trained |= {*(model.config.trained_parts or [])}
    model.config.trained_parts = [part for part in (*PARTS, "lora") if part in trained]
