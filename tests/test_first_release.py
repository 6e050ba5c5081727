"""What the first release has written is still of use: checkpoints, whole and slim, and targets."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMultimodalLM, pipeline

import train_sft
from modeling_lsm import LsmForConditionalGeneration, LsmModel, LsmPipeline, LsmProcessor, composing, make_chat
from modeling_lsm.augmentation import TextModel, check_provenance
from modeling_lsm.first_release_lsm import is_of_first_release
from modeling_lsm.training import add_lora, set_trained_parts
from tests.test_remote_code import run_isolated
from tests.tiny import ask
from tests.training.test_training import write_rows


COMMIT = "e45a572"
ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "fixtures" / "first_release"
EXPECTED = load_file(FOLDER / "expected.safetensors") | json.loads((FOLDER / "expected.json").read_text())
INPUTS = {key: EXPECTED[key] for key in ("input_ids", "attention_mask", "input_features", "input_features_mask")}
CLIP = (0.1 * np.sin(5e-5 * np.arange(14_000) ** 2)).astype(np.float32)
BASES = {"speech": str(FOLDER / "whisper"), "text": str(FOLDER / "llama")}
WHOLE, SLIM = ["whole-llama", "whole-gpt-neox"], ["slim-projector", "slim-lora"]
load = LsmForConditionalGeneration.from_pretrained


def bases_of(name: str) -> dict[str, dict[str, str]]:
    """The argument that a slim checkpoint needs, whose base models are not where they were."""
    return {"base_folders": BASES} if name in SLIM else {}


@torch.no_grad()
def assert_as_then(model, name: str) -> None:
    logits = model.eval()(**INPUTS).logits
    torch.testing.assert_close(logits, EXPECTED[f"logits.{name}"], atol=1e-5, rtol=0.0)


def assert_of_today(folder: Path) -> None:
    assert not is_of_first_release(json.loads((folder / "config.json").read_text()))
    names = set(load_file(folder / "model.safetensors"))
    parts = ("lsm.audio_tower.", "lsm.projector.", "lsm.language_model.")
    assert names and all(key.startswith(parts) for key in names)
    assert not any(key.startswith("lsm.language_model.layers.") for key in names)


@pytest.fixture
def slim_in_place(tmp_path) -> Path:
    """A slim checkpoint with LoRA whose base models are where its config says, as on the machine that made it."""
    folder = shutil.copytree(FOLDER / "slim-lora", tmp_path / "slim")
    config = json.loads((folder / "config.json").read_text())
    for key, base in BASES.items():
        config["base_models"][key]["path"] = base
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", WHOLE + SLIM)
class TestLoading:
    def test_logits(self, name):
        assert is_of_first_release(json.loads((FOLDER / name / "config.json").read_text()))
        model, info = load(FOLDER / name, output_loading_info=True, **bases_of(name))
        assert not any(info.values()), info
        assert_as_then(model, name)

    def test_with_the_config_given(self, name):
        config = AutoConfig.from_pretrained(FOLDER / name)
        assert config.projector_config.hidden_size == 8 and config.projector_config.num_hidden_layers == 1
        model, info = AutoModelForMultimodalLM.from_pretrained(
            FOLDER / name, config=config, output_loading_info=True, **bases_of(name)
        )
        assert not any(info.values()), info
        assert_as_then(model, name)

    def test_in_a_subfolder(self, name):
        assert_as_then(load(FOLDER, subfolder=name, **bases_of(name)), name)

    def test_without_the_head(self, name):
        model, info = LsmModel.from_pretrained(FOLDER / name, output_loading_info=True, **bases_of(name))
        assert not info["missing_keys"] and not info["unexpected_keys"]
        head = load(FOLDER / name, **bases_of(name)).get_output_embeddings()
        with torch.no_grad():
            logits = head(model.eval()(**INPUTS).last_hidden_state)
        torch.testing.assert_close(logits, EXPECTED[f"logits.{name}"], atol=1e-5, rtol=0.0)

    def test_processor(self, name):
        inputs = ask(LsmProcessor.from_pretrained(FOLDER / name), make_chat("Say it.", audio=CLIP))
        assert inputs.keys() == INPUTS.keys()
        for key, value in INPUTS.items():
            torch.testing.assert_close(inputs[key], value, atol=1e-5, rtol=0.0)

    def test_pipeline(self, name):
        kwargs = {"pipeline_class": LsmPipeline, "device": "cpu", "model_kwargs": bases_of(name)}
        pipe = pipeline("audio-text-to-text", model=str(FOLDER / name), **kwargs)
        assert pipe(CLIP, text="Say it.", max_new_tokens=4) == [{"generated_text": EXPECTED["answers"][name]}]

    def test_shards(self, name, tmp_path):
        folder = shutil.copytree(FOLDER / name, tmp_path / name)
        save_torch_state_dict(load_file(folder / "model.safetensors"), folder, max_shard_size=4000)
        (folder / "model.safetensors").unlink(missing_ok=True)
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        assert_as_then(load(folder, **bases_of(name)), name)

    def test_saved_again(self, name, tmp_path):
        load(FOLDER / name, **bases_of(name)).save_pretrained(tmp_path / name)
        assert_of_today(tmp_path / name)
        assert (tmp_path / name / "processor_config.json").is_file()
        model, info = load(tmp_path / name, output_loading_info=True)
        assert not any(info.values()), info
        assert_as_then(model, name)


class TestSlim:
    @pytest.mark.parametrize("name", SLIM)
    def test_saved_again(self, name, tmp_path):
        """It keeps the fingerprints that it had: the base models must still be those."""
        load(FOLDER / name, base_folders=BASES).save_pretrained(tmp_path / name, slim=True)
        assert_of_today(tmp_path / name)
        assert_as_then(load(tmp_path / name, base_folders=BASES), name)

    @pytest.mark.parametrize(("key", "weight"), [("speech", "encoder.conv1"), ("text", "layers.0.mlp.up_proj")])
    @pytest.mark.parametrize("again", [False, True], ids=["as-it-was", "saved-again"])
    def test_a_changed_base_is_refused(self, key, weight, again, tmp_path):
        changed = shutil.copytree(BASES[key], tmp_path / key)
        weights = load_file(changed / "model.safetensors")
        weights[f"model.{weight}.weight"] += 1e-3
        save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
        folder = FOLDER / "slim-projector"
        if again:
            load(folder, base_folders=BASES).save_pretrained(tmp_path / "again", slim=True)
            folder = tmp_path / "again"
        with pytest.raises(ValueError, match=f"The {key} model that was found is not the .* or it has changed"):
            load(folder, base_folders={**BASES, key: changed})

    def test_command_line_merges(self, tmp_path, monkeypatch):
        arguments = ["--merge", FOLDER / "slim-lora", "--output_dir", tmp_path / "whole"]
        arguments += ["--base_speech", BASES["speech"], "--base_text", BASES["text"]]
        monkeypatch.setattr(sys, "argv", ["composing", *map(str, arguments)])
        composing.main()
        assert_of_today(tmp_path / "whole")
        assert_as_then(load(tmp_path / "whole"), "slim-lora")

    def test_new_lora(self, tmp_path):
        """On the LLM of one whose LLM has not trained: it is slim again, beside the same base models."""
        model = load(FOLDER / "slim-projector", base_folders=BASES)
        add_lora(model, peft.LoraConfig(r=2, lora_alpha=6))
        set_trained_parts(model, ["projector", "llm"])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1
            logits = model.eval()(**INPUTS).logits
        assert (logits - EXPECTED["logits.slim-projector"]).abs().max() > 0.01
        model.save_pretrained(tmp_path / "slim", slim=True)
        assert_of_today(tmp_path / "slim")
        loaded = load(tmp_path / "slim", base_folders=BASES).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**INPUTS).logits, logits, atol=1e-4, rtol=0.0)

    def test_training_goes_on(self, slim_in_place, tmp_path):
        """The LoRA that it came with is merged, so the LLM counts as trained and is saved; it gets new LoRA."""
        arguments = {
            "--model_name_or_path": slim_in_place,
            "--dataset": write_rows(tmp_path / "data"),
            "--output_dir": tmp_path / "out",
            "--max_steps": 1,
            "--learning_rate": 0.01,
            "--report_to": "none",
            "--gradient_checkpointing": "False",
            "--save_strategy": "no",
        }
        arguments = [str(part) for pair in arguments.items() for part in pair]
        arguments += ["--train", "projector", "llm", "--use_peft", "--lora_r", "2"]
        train_sft.main(*train_sft.make_parser().parse_args_and_config(arguments))
        assert_of_today(tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["slim"] and config["trained_parts"] == ["projector", "llm"]
        trained, before = load(tmp_path / "out"), load(slim_in_place)
        changed = {
            name.split(".")[1]
            for (name, weight), old in zip(trained.named_parameters(), before.parameters(), strict=True)
            if not torch.equal(weight, old)
        }
        assert changed == {"projector", "language_model"}


class TestTargets:
    """`provenance.json` of targets that the first release wrote."""

    def check(self, tmp_path, provenance: dict, name: str) -> None:
        (tmp_path / "provenance.json").write_text(json.dumps({"llm": provenance}))
        config, template = AutoConfig.from_pretrained(FOLDER / name), LsmProcessor.from_pretrained(FOLDER / name)
        check_provenance(str(tmp_path), config, str(FOLDER / name), template.chat_template)

    @pytest.mark.parametrize("name", ["whole-llama", *SLIM])
    @pytest.mark.parametrize("writer", ["llama", "whole-llama"])
    def test_of_the_base(self, name, writer, tmp_path):
        self.check(tmp_path, EXPECTED["provenance"][writer], name)

    def test_of_a_trained_llm(self, tmp_path):
        self.check(tmp_path, EXPECTED["provenance"]["whole-gpt-neox"], "whole-gpt-neox")

    @pytest.mark.parametrize("name", WHOLE)
    def test_that_are_written_now(self, name, tmp_path):
        self.check(tmp_path, TextModel(str(FOLDER / name)).provenance(), name)

    @pytest.mark.parametrize(("writer", "name"), [("llama", "whole-gpt-neox"), ("whole-gpt-neox", "whole-llama")])
    def test_of_another_llm_are_refused(self, writer, name, tmp_path):
        with pytest.raises(ValueError, match="which is not the LLM of"):
            self.check(tmp_path, EXPECTED["provenance"][writer], name)


PARTITIONED = """
import json, sys
import deepspeed, torch
from transformers.integrations import HfDeepSpeedConfig
from modeling_lsm import LsmForConditionalGeneration

deepspeed.init_distributed("gloo")
checkpoints = json.loads(sys.argv[1])
expected = [LsmForConditionalGeneration.from_pretrained(f, **k).state_dict() for f, k in checkpoints.items()]
settings = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "train_batch_size": 2}
kept_alive = HfDeepSpeedConfig(settings)
for (folder, kwargs), weights in zip(checkpoints.items(), expected):
    model = LsmForConditionalGeneration.from_pretrained(folder, **kwargs)
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "not partitioned"
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            assert torch.equal(parameter, weights[name]), name
print(f"process {torch.distributed.get_rank()} is content")
"""


@pytest.mark.slow
def test_zero3(tmp_path):
    (tmp_path / "script.py").write_text(PARTITIONED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [*launcher, tmp_path / "script.py", json.dumps({str(FOLDER / name): bases_of(name) for name in WHOLE + SLIM})],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    assert "process 0 is content" in process.stdout and "process 1 is content" in process.stdout


# What a process without the package makes of a checkpoint that holds its own code.
USE = """
import json, numpy as np, torch
from transformers import AutoModelForMultimodalLM, AutoProcessor, pipeline

folder, bases, results = sys.argv[1:4]
clip = (0.1 * np.sin(5e-5 * np.arange(14_000) ** 2)).astype(np.float32)
content = [{"type": "text", "text": "Say it.\\n\\n"}, {"type": "audio", "audio": clip}]
chat = [{"role": "user", "content": content}]
seen = {}
for name, kwargs in json.loads(bases).items():
    checkpoint = f"{folder}/{name}"
    model = AutoModelForMultimodalLM.from_pretrained(checkpoint, trust_remote_code=True, **kwargs).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    pipe = pipeline("audio-text-to-text", checkpoint, trust_remote_code=True, device="cpu", model_kwargs=kwargs)
    inputs = processor.apply_chat_template([chat], add_generation_prompt=True, tokenize=True, return_dict=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    answers = pipe(clip, text="Say it.", max_new_tokens=4)
    modules = [type(part).__module__ for part in (model, processor, pipe)]
    seen[name] = {"logits": logits, "answers": answers, "modules": modules, "weights": list(model.state_dict())}
torch.save(seen, results)
"""


def add_code(folder: Path, of_then: bool) -> None:
    """Puts code beside a checkpoint: what the first release saved there, from the repository's history, or today's."""
    if not of_then:
        for file in (ROOT / "modeling_lsm").glob("*.py"):
            if file.stem.endswith("_lsm") or file.stem == "fingerprints":
                shutil.copy(file, folder)
        return
    command = ["git", "archive", "--format=tar", f"{COMMIT}:modeling_lsm"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True)
    if process.returncode != 0:
        pytest.skip(f"no history of the repository back to {COMMIT}: {process.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(process.stdout)) as code:
        for name in code.getnames():
            if name.endswith("_lsm.py") or name == "fingerprints.py":
                (folder / name).write_bytes(code.extractfile(name).read())


@pytest.mark.slow
@pytest.mark.parametrize("of_then", [True, False], ids=["code-of-then", "code-of-today"])
def test_remote_code(of_then, tmp_path):
    """Checkpoints on the Hub carry code, the first release's or, where it was updated, today's. It is all there is."""
    for name in WHOLE + SLIM:
        add_code(shutil.copytree(FOLDER / name, tmp_path / name), of_then)
    bases = {name: bases_of(name) for name in WHOLE + SLIM}
    run_isolated(tmp_path, USE, tmp_path, json.dumps(bases), tmp_path / "results.pt")
    for name, seen in torch.load(tmp_path / "results.pt", weights_only=False).items():
        assert all(module.startswith("transformers_modules.") for module in seen["modules"]), seen["modules"]
        assert ("lm_head.weight" in seen["weights"]) is of_then
        torch.testing.assert_close(seen["logits"], EXPECTED[f"logits.{name}"], atol=1e-5, rtol=0.0)
        assert seen["answers"] == [{"generated_text": EXPECTED["answers"][name]}]
