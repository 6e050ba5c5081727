"""A saved checkpoint in a fresh process, from its folder alone, where the package cannot be imported."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from modeling_lsm import LsmForConditionalGeneration, LsmPipeline, LsmProcessor, make_chat
from tests import tiny


# Neither the working directory nor an (editable) installation may offer the package.
PRELUDE = """
import importlib, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_lsm":
            raise ModuleNotFoundError("No module named 'modeling_lsm'", name=name)

sys.meta_path.insert(0, NotInstalled())
try:
    importlib.import_module("modeling_lsm")
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is importable")
"""

USE = """
import numpy as np, torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor, pipeline

folder, clip, results = sys.argv[1:4]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True).eval()
chat = [{"role": "user", "content": [{"type": "text", "text": "Say."}, {"type": "audio", "path": clip}]}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
with torch.no_grad():
    logits = model(**inputs).logits
pipe = pipeline("audio-text-to-text", model=folder, trust_remote_code=True, device="cpu")
answers = [pipe(clip, text="Say.", max_new_tokens=8), pipe([clip, clip], text="Say.", batch_size=2, max_new_tokens=8)]
modules = [type(part).__module__ for part in (config, processor, model, pipe, pipe.model, pipe.processor)]
classes = [type(part).__name__ for part in (config, processor, model, pipe, pipe.model, pipe.processor)]
seen = {"logits": logits, "inputs": dict(inputs), "answers": answers, "modules": modules, "classes": classes}
seen["transformers"] = transformers.__version__
torch.save(seen, results)
if len(sys.argv) > 4:
    pipe.save_pretrained(sys.argv[4])
"""


def run_isolated(folder: Path, code: str, *arguments, python: str | Path = sys.executable) -> str:
    """Runs `code` in `folder`, in a process that has an empty cache, no network and no package. Returns its output."""
    script = folder / "script.py"
    script.write_text(PRELUDE + code, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "TRANSF"))}
    environment |= {"HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [python, "-I", script, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


def expected_results(folder: Path, clip: Path) -> dict:
    """What the package itself makes of the checkpoint."""
    model, processor = LsmForConditionalGeneration.from_pretrained(folder), LsmProcessor.from_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "text", "text": "Say."}, {"type": "audio", "path": clip}]}]
    inputs = tiny.ask(processor, chat)
    pipe = LsmPipeline(model=model, processor=processor, device="cpu")
    with torch.no_grad():
        logits = model(**inputs).logits
    answers = [pipe(clip, text="Say.", max_new_tokens=8), pipe([clip, clip], text="Say.", max_new_tokens=8)]
    return {"logits": logits, "inputs": dict(inputs), "answers": answers}


@pytest.fixture
def isolated(tmp_path) -> Path:
    folder = tmp_path / "isolated"
    folder.mkdir()
    return folder


def test_load_use_and_save_again(tiny_checkpoint, librivox, isolated):
    clip = librivox[1].path
    expected = expected_results(tiny_checkpoint, clip)
    assert expected["answers"][0][0]["generated_text"]
    first, second, third = (isolated / name for name in ("first", "second", "third"))
    shutil.copytree(tiny_checkpoint, first)
    # Each is saved by the one before, which is gone when it is loaded.
    for folder, successor in ((first, second), (second, third)):
        results = isolated / "results.pt"
        run_isolated(isolated, USE, folder, clip, results, successor)
        actual = torch.load(results, weights_only=False)
        assert actual["transformers"] == transformers.__version__
        assert actual["answers"] == expected["answers"]
        assert set(actual["inputs"]) == set(expected["inputs"])
        assert all(torch.equal(actual["inputs"][key], expected["inputs"][key]) for key in expected["inputs"])
        # Another process, so perhaps another choice of kernels, but nothing more.
        torch.testing.assert_close(actual["logits"], expected["logits"], atol=1e-6, rtol=0.0)
        assert all(module.startswith("transformers_modules.") for module in actual["modules"]), actual["modules"]
        model = "LsmForConditionalGeneration"
        assert actual["classes"] == ["LsmConfig", "LsmProcessor", model, "LsmPipeline", model, "LsmProcessor"]
        shutil.rmtree(folder)
        shutil.rmtree(isolated / "hf_home")
        assert {path.name for path in successor.iterdir()} == {path.name for path in tiny_checkpoint.iterdir()}
        for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
            saved = json.loads((successor / name).read_text())
            original = json.loads((tiny_checkpoint / name).read_text())
            assert saved.get("auto_map") == original.get("auto_map")
            assert saved.get("custom_pipelines") == original.get("custom_pipelines")
            assert "--" not in json.dumps(saved.get("auto_map", {})) + json.dumps(saved.get("custom_pipelines", {}))


def test_the_cards_snippet_runs_as_it_stands(tiny_checkpoint, librivox, isolated):
    checkpoint = isolated / tiny_checkpoint.name
    shutil.copytree(tiny_checkpoint, checkpoint)
    shutil.copy(librivox[0].path, isolated / "clip.flac")
    (snippet,) = re.findall(r"```python\n(.*?)```", (checkpoint / "README.md").read_text(), re.DOTALL)
    assert f'model="{checkpoint.name}"' in snippet and "trust_remote_code=True" in snippet
    printed = run_isolated(isolated, snippet)
    pipe = LsmPipeline(
        model=LsmForConditionalGeneration.from_pretrained(checkpoint),
        processor=LsmProcessor.from_pretrained(checkpoint),
        device="cpu",
    )
    assert printed.strip() == str(pipe(librivox[0].path, text="Transcribe the speech.", max_new_tokens=64))


def test_tokenizer_alone_loads(tiny_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    processor = LsmProcessor.from_pretrained(tiny_checkpoint)
    chat = make_chat("Say.", transcript="it")
    rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert tokenizer(rendered)["input_ids"] == tiny.ask(processor, chat)["input_ids"][0].tolist()
