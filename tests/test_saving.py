"""`model.save_pretrained` and `model.push_to_hub` alone: what is in the repository then, and what is no longer."""

import fnmatch
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import Trainer, TrainingArguments, pipeline

from modeling_lsm import LsmForConditionalGeneration, LsmPipeline, LsmProcessor, saving_lsm
from modeling_lsm.composing import compose
from modeling_lsm.training import set_trained_parts
from tests import tiny
from tests.test_remote_code import run_isolated
from tests.tiny import noise


SHARDS = {"max_shard_size": "50KB"}
ASK = {"text": "Say.", "max_new_tokens": 6}


def load(folder) -> LsmForConditionalGeneration:
    """The model in `folder`, of which no weight may be missing."""
    model, info = LsmForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def assert_equal(model, other) -> None:
    expected, found = model.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    seen = []
    monkeypatch.setattr(saving_lsm.logger, "warning", seen.append)
    return seen


@pytest.fixture
def hub(monkeypatch) -> SimpleNamespace:
    """A repository: its `files`, and the `commits` that made them."""
    state = SimpleNamespace(files={}, commits=[])

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, delete_patterns=(), **kwargs):
            for name in list(state.files):  # as the Hub does it: but for those that are uploaded
                if any(fnmatch.fnmatch(name, pattern) for pattern in delete_patterns):
                    del state.files[name]
            state.files |= {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            state.commits.append({"repo_id": repo_id, **kwargs})
            return SimpleNamespace(commit_url=f"https://hub.example/commit/{len(state.commits)}")

    monkeypatch.setattr(saving_lsm, "HfApi", Api)
    return state


def download(hub, folder: Path) -> Path:
    folder.mkdir()
    for name, content in hub.files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def composed(tiny_bases):
    sizes = {"projector_hidden_size": 32, "projector_num_attention_heads": 4}
    model, processor = compose(str(tiny_bases.speech), str(tiny_bases.text), dtype="float32", **sizes)
    set_trained_parts(model, ["projector"])
    return model, processor


class TestTheModelAlone:
    def test_gives_a_pipeline(self, tiny_checkpoint, tmp_path):
        model = LsmForConditionalGeneration.from_pretrained(tiny_checkpoint)
        model.save_pretrained(tmp_path / "tiny-lsm")
        names = {path.name for path in tiny_checkpoint.iterdir()}
        assert {path.name for path in (tmp_path / "tiny-lsm").iterdir()} == names
        for name in names - {"config.json", "tokenizer_config.json"}:  # they note how they were loaded
            assert (tmp_path / "tiny-lsm" / name).read_bytes() == (tiny_checkpoint / name).read_bytes(), name
        clip = noise(1, 3)
        pipe, original = (
            pipeline("audio-text-to-text", model=str(folder), trust_remote_code=True, device="cpu")
            for folder in (tmp_path / "tiny-lsm", tiny_checkpoint)
        )
        assert pipe(clip, **ASK) == original(clip, **ASK)

    def test_in_a_process_without_the_package(self, tiny_checkpoint, tmp_path):
        shutil.copytree(tiny_checkpoint, tmp_path / "first")
        code = """
from transformers import AutoModelForMultimodalLM
AutoModelForMultimodalLM.from_pretrained("first", trust_remote_code=True).save_pretrained("second")
"""
        run_isolated(tmp_path, code)
        shutil.rmtree(tmp_path / "first")
        shutil.rmtree(tmp_path / "hf_home")
        assert {path.name for path in (tmp_path / "second").iterdir()} == {
            path.name for path in tiny_checkpoint.iterdir()
        }
        use = """
import numpy as np
from transformers import pipeline
pipe = pipeline("audio-text-to-text", model="second", trust_remote_code=True, device="cpu")
print(ascii(pipe(np.linspace(-1, 1, 16_000, dtype="float32") ** 3, text="Say.", max_new_tokens=6)))
"""
        printed = run_isolated(tmp_path, use)
        assert re.fullmatch(r"\[\{'generated_text': .+\}\]", printed.strip())

    def test_a_processor_that_is_passed(self, model, processor, tmp_path, warnings):
        model.save_pretrained(tmp_path, processor=processor, name="someone/lsm")
        assert not warnings
        assert LsmProcessor.from_pretrained(tmp_path).chat_template == processor.chat_template
        assert 'model="someone/lsm"' in (tmp_path / "README.md").read_text()

    def test_no_processor_is_told(self, model, processor, tmp_path, warnings):
        model.save_pretrained(tmp_path / "new")
        (warning,) = warnings
        assert "gets no processor (the model was not loaded from a checkpoint)" in warning
        assert "processor=processor" in warning
        assert_equal(model, load(tmp_path / "new"))
        # the second mend that the message names
        processor.save_pretrained(tmp_path / "new")
        pipe = pipeline("audio-text-to-text", model=str(tmp_path / "new"), trust_remote_code=True, device="cpu")
        assert pipe(noise(1), **ASK)
        model.save_pretrained(tmp_path / "new")
        assert len(warnings) == 1

    def test_a_processor_that_is_gone(self, tiny_checkpoint, tmp_path, warnings):
        shutil.copytree(tiny_checkpoint, tmp_path / "old")
        model = LsmForConditionalGeneration.from_pretrained(tmp_path / "old")
        shutil.rmtree(tmp_path / "old")
        model.save_pretrained(tmp_path / "new")
        assert len(warnings) == 1 and f"that of {tmp_path / 'old'} cannot be used" in warnings[0]
        assert_equal(model, load(tmp_path / "new"))

    def test_of_another_model(self, tiny_checkpoint, tmp_path, warnings):
        model = LsmForConditionalGeneration.from_pretrained(tiny_checkpoint)
        model.config.window_size = 20
        model.save_pretrained(tmp_path)
        assert len(warnings) == 1 and "disagree on timing" in warnings[0]

    def test_not_the_main_process(self, tiny_checkpoint, tmp_path):
        model = LsmForConditionalGeneration.from_pretrained(tiny_checkpoint)
        model.save_pretrained(tmp_path / "lsm", False)  # the base class takes it by position
        model.should_save_on_this_rank = lambda is_main_process: False  # tensor parallel, on another rank
        model.save_pretrained(tmp_path / "lsm")
        assert not list((tmp_path / "lsm").iterdir())

    def test_weights_that_are_elsewhere(self, model, processor, tmp_path):
        weights = {name: torch.full_like(tensor, 0.5) for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=weights, processor=processor)
        with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
            assert all((file.get_tensor(name) == 0.5).all() for name in file.keys())  # noqa: SIM118 -- no dict

    def test_a_trainers_checkpoints(self, tiny_checkpoint, processor, tmp_path):
        """transformers' own trainer, which knows nothing of pipelines."""
        model = LsmForConditionalGeneration.from_pretrained(tiny_checkpoint)
        (row,) = (dict(tiny.ask(processor, [{"role": "user", "content": "A question."}])),)
        rows = [{name: tensor[0] for name, tensor in row.items()} | {"labels": row["input_ids"][0]}] * 2
        args = TrainingArguments(tmp_path / "out", max_steps=1, save_steps=1, report_to=[], use_cpu=True)
        Trainer(model=model, args=args, train_dataset=rows).train()
        checkpoint = tmp_path / "out" / "checkpoint-1"
        pipe = pipeline("audio-text-to-text", model=str(checkpoint), trust_remote_code=True, device="cpu")
        expected = LsmPipeline(model=model, processor=processor, device="cpu")
        assert pipe(noise(1), **ASK) == expected(noise(1), **ASK)

    def test_slim(self, composed, tmp_path):
        model, processor = composed
        model.save_pretrained(tmp_path / "slim", slim=True, processor=processor)
        assert json.loads((tmp_path / "slim" / "config.json").read_text())["slim"] is True
        loaded = LsmForConditionalGeneration.from_pretrained(tmp_path / "slim")
        assert_equal(model, loaded)
        loaded.save_pretrained(tmp_path / "whole")  # the processor is that of the slim one
        assert LsmPipeline(
            model=load(tmp_path / "whole"), processor=LsmProcessor.from_pretrained(tmp_path / "whole"), device="cpu"
        )(noise(1), **ASK)


class TestWhatWasThere:
    """Weights of an earlier checkpoint, in another layout."""

    def layouts(self, composed):
        model, processor = composed
        return [
            {"slim": True, "processor": processor},
            {"processor": processor, **SHARDS},
            {"processor": processor},
            {"slim": True, "processor": processor, "max_shard_size": "5KB"},
            {"slim": True, "processor": processor},
            {"processor": processor, "max_shard_size": "100KB"},
            {"processor": processor, **SHARDS},
        ]

    def check(self, model, folder: Path, layout: dict) -> None:
        loaded = LsmForConditionalGeneration.from_pretrained(folder) if layout.get("slim") else load(folder)
        assert_equal(model, loaded)
        weights = {path.name for path in folder.glob("model.*")} | {path.name for path in folder.glob("model-*")}
        if "max_shard_size" in layout:
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            assert weights == {"model.safetensors.index.json", *index["weight_map"].values()}
        else:
            assert weights == {"model.safetensors"}

    def test_in_a_folder(self, composed, tmp_path):
        model, _ = composed
        for seed, layout in enumerate(self.layouts(composed)):
            tiny.enliven(model.lsm.projector, seed)
            model.save_pretrained(tmp_path, **layout)
            self.check(model, tmp_path, layout)

    def test_on_the_hub(self, composed, tmp_path, hub):
        model, _ = composed
        for base in model.config.base_models.values():
            base.update(path=None, id=str(base["path"]))  # as if that were on the Hub
        hub.files = {"notes.md": b"", "model.fp16.safetensors": b"another variant", "model.onnx": b""}
        others = dict(hub.files)
        for number, layout in enumerate(self.layouts(composed)):
            tiny.enliven(model.lsm.projector, number)
            url = model.push_to_hub("someone/lsm", **layout)
            assert url == f"https://hub.example/commit/{len(hub.commits)}" and len(hub.commits) == number + 1
            assert hub.files.items() >= others.items()
            folder = download(hub, tmp_path / str(number))
            for name in others:
                (folder / name).unlink()
            self.check(model, folder, layout)

    def test_a_variant_leaves_the_others(self, model, processor, tmp_path):
        model.save_pretrained(tmp_path, processor=processor)
        model.save_pretrained(tmp_path, processor=processor, variant="other")
        model.save_pretrained(tmp_path, processor=processor, variant="other", **SHARDS)
        assert (tmp_path / "model.safetensors").is_file()
        assert not (tmp_path / "model.other.safetensors").is_file()
        assert_equal(model, LsmForConditionalGeneration.from_pretrained(tmp_path, variant="other"))


class TestPublishing:
    def test_the_model_alone(self, tiny_checkpoint, hub, tmp_path):
        model = LsmForConditionalGeneration.from_pretrained(tiny_checkpoint)
        options = {"commit_message": "Publish", "commit_description": "why", "create_pr": True, "tags": ["whispering"]}
        assert model.push_to_hub("someone/lsm", **options) == "https://hub.example/commit/1"
        del options["tags"]
        assert hub.commits == [{"repo_id": "someone/lsm", "revision": None, **options}]
        assert set(hub.files) == {path.name for path in tiny_checkpoint.iterdir()}
        folder = download(hub, tmp_path / "lsm")
        assert ModelCard.load(folder / "README.md").data.tags == ["speech", "lsm", "whispering"]
        assert 'model="someone/lsm"' in (folder / "README.md").read_text()
        pipe = pipeline("audio-text-to-text", model=str(folder), trust_remote_code=True, device="cpu")
        assert pipe(noise(1), **ASK)

    def test_as_it_is_saved(self, model, processor, hub, tmp_path):
        weights = {name: torch.full_like(tensor, 0.5) for name, tensor in model.state_dict().items()}
        options = {"commit_message": "Publish", "private": True, "processor": processor, "state_dict": weights}
        model.save_pretrained(tmp_path / "out" / "lsm", push_to_hub=True, **SHARDS, **options)
        assert [commit["repo_id"] for commit in hub.commits] == ["lsm"]
        assert hub.commits[0]["commit_message"] == "Publish"
        assert set(hub.files) == {path.name for path in (tmp_path / "out" / "lsm").iterdir()}
        loaded = load(download(hub, tmp_path / "hub"))
        assert all((tensor == 0.5).all() for tensor in loaded.state_dict().values())
