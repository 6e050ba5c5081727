"""Which parts of an LSM train."""

from ..modeling_lsm import LsmForConditionalGeneration


PARTS = ("encoder", "projector", "llm")


def set_trained_parts(model: LsmForConditionalGeneration, parts: list[str]) -> None:
    """
    Lets the named parts of `model` train, freezes the others, and notes in its config what has been trained.

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
        "encoder": [model.model.audio_tower],
        "projector": [model.model.projector],
        "llm": [model.model.language_model, model.lm_head],
    }
    for part in parts:
        for module in modules[part]:
            module.requires_grad_(True)
    # Whisper's position embeddings are fixed sinusoids, however much of the encoder trains.
    model.model.audio_tower.embed_positions.requires_grad_(False)
    model.config.trained_parts = [part for part in PARTS if part in {*parts, *(model.config.trained_parts or [])}]
