"""
Saving and publishing: a repository from which `pipeline("audio-text-to-text")` works on any machine.

[`LsmForConditionalGeneration.save_pretrained`] and [`~LsmForConditionalGeneration.push_to_hub`] end up here.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .card_lsm import model_card
from .configuration_lsm import LsmConfig
from .pipeline_lsm import CUSTOM_PIPELINES, LsmPipeline
from .processing_lsm import LsmProcessor
from .slim_lsm import BASES, merged_config, merged_state_dict, parts_from_bases, save_slim


logger = logging.get_logger(__name__)

# What `PreTrainedModel.save_pretrained(…, push_to_hub=True)` takes for the Hub.
HUB_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")


def save_checkpoint(
    model: PreTrainedModel,
    save_directory: str | os.PathLike,
    processor: LsmProcessor | None = None,
    name: str | None = None,
    slim: bool = False,
    tags: list[str] | None = None,
    is_main_process: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    **kwargs,
) -> None:
    """See [`LsmForConditionalGeneration.save_pretrained`]."""
    if getattr(model, "_hf_peft_config_loaded", False):  # the adapter alone, which is not a checkpoint of its own
        PreTrainedModel.save_pretrained(
            model, save_directory, is_main_process, state_dict, push_to_hub=push_to_hub, **kwargs
        )
        return
    # All processes of a model that is spread over several call this; one of them writes.
    writes = model.should_save_on_this_rank(is_main_process)
    hub_kwargs = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    if writes and processor is None:
        processor = find_processor(model, folder, kwargs.get("token"))
    model.config.custom_pipelines = CUSTOM_PIPELINES
    # Saving takes the weights out of the dict that it is given.
    weights = dict(state_dict) if push_to_hub and state_dict is not None else state_dict
    save_weights(model, folder, slim, writes, weights, **kwargs)
    if not writes:
        return
    remove_stale_weights(folder, kwargs.get("variant"))
    if processor is not None:
        processor.save_pretrained(folder)
    custom_object_save(LsmPipeline, folder)
    card = model_card(model, name or folder.resolve().name, slim, tags or [])
    (folder / "README.md").write_text(card, encoding="utf-8")
    if push_to_hub:
        repo_id = hub_kwargs.pop("repo_id", folder.resolve().name)
        same = {"processor": processor, "slim": slim, "tags": tags, "state_dict": state_dict, **kwargs}
        publish_checkpoint(model, repo_id, **hub_kwargs, **same)


def save_weights(
    model: PreTrainedModel,
    folder: Path,
    slim: bool,
    is_main_process: bool,
    state_dict: dict[str, torch.Tensor] | None,
    **kwargs,
) -> None:
    """Saves weights, config, generation config and the model's code, slim or whole, LoRA merged."""
    if slim:
        if is_main_process:
            kwargs.pop("token", None)  # for the Hub
            save_slim(model, folder, state_dict, **kwargs)
        return
    config = model.config
    if config.lora_scaling is not None:
        config, state_dict = merged_config(config), merged_state_dict(model, state_dict)
    with replaced(model, config=config):
        PreTrainedModel.save_pretrained(model, folder, is_main_process, state_dict, **kwargs)


def find_processor(model: PreTrainedModel, folder: Path, token: bool | str | None = None) -> LsmProcessor | None:
    """The processor beside the checkpoint that `model` was loaded from, or `None`, which is told."""
    source = model.config.name_or_path
    if not source:
        reason = "the model was not loaded from a checkpoint"
    else:
        try:
            LsmProcessor.register_for_auto_class()  # as remote code nobody has done so, unless it was loaded before
            revision = getattr(model.config, "_commit_hash", None)
            processor = LsmProcessor.from_pretrained(source, revision=revision, token=token)
            processor.check_matches(model.config)
            return processor
        except (OSError, ValueError) as error:
            reason = f"that of {source} cannot be used: {error}"
    if not (folder / "processor_config.json").is_file():
        logger.warning(
            f"{folder} gets no processor ({reason}), and no pipeline works without one. Pass it, "
            "`model.save_pretrained(…, processor=processor)`, or save it there too."
        )
    return None


def weight_files(variant: str | None = None) -> tuple[str, str, str]:
    """What weights are called in a checkpoint: a single file; an index; a pattern for the shards."""
    dot = f".{variant}" if variant else ""
    return f"model{dot}.safetensors", f"model.safetensors.index{dot}.json", f"model{dot}-[0-9]*-of-[0-9]*.safetensors"


def remove_stale_weights(folder: Path, variant: str | None = None) -> None:
    """
    Removes weights of the other layout that an earlier checkpoint has left in `folder`.

    Saving removes shards that are not its own. But a single file would be read in the place of new shards, and some
    libraries read an index whose shards are gone.
    """
    single, index, shards = weight_files(variant)
    (folder / (single if any(folder.glob(shards)) else index)).unlink(missing_ok=True)


def publish_checkpoint(
    model: PreTrainedModel,
    repo_id: str,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    slim: bool = False,
    **kwargs,
) -> str:
    """See [`LsmForConditionalGeneration.push_to_hub`]."""
    base_models = published_bases(model.config, slim)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        with replaced(model.config, base_models=base_models):
            save_checkpoint(model, folder, name=repo_id, slim=slim, token=token, **kwargs)
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload model, processor, pipeline and card",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            # Those that are not uploaded now: they are another checkpoint's.
            delete_patterns=list(weight_files(kwargs.get("variant"))),
        )
    return commit.commit_url


def published_bases(config: LsmConfig, slim: bool) -> dict[str, dict[str, Any]] | None:
    """`config.base_models` without what only this machine knows: folders."""
    for part in parts_from_bases(config) if slim else []:
        base = (config.base_models or {}).get(BASES[part], {})
        if base.get("path"):
            raise ValueError(
                f"The {BASES[part]} model of this slim checkpoint is known only as the folder {base['path']}, which "
                "nobody else has. Publish the checkpoint whole (`slim=False`), or say what the model is on the Hub: "
                f'model.config.base_models["{BASES[part]}"].update(id="owner/name", revision=None, path=None).'
            )
    if config.base_models is None:
        return None
    return {
        key: {name: value for name, value in base.items() if name != "path"}
        for key, base in config.base_models.items()
    }


@contextmanager
def replaced(thing: Any, **attributes) -> Iterator[None]:
    """Gives `thing` other attributes for a while."""
    own = {name: getattr(thing, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(thing, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(thing, name, value)


__all__ = ["publish_checkpoint", "published_bases", "save_checkpoint"]
