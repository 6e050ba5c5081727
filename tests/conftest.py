"""Fixtures: tiny random models and checkpoints, real recordings, and the real models of the slow tests."""

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import WhisperFeatureExtractor

from modeling_lsm import LsmPipeline
from tests import tiny


with contextlib.suppress(ModuleNotFoundError):
    from tests.real_models import real_speech_model, real_text_model  # noqa: F401 -- fixtures

LIBRIVOX = Path(__file__).parent / "fixtures" / "librivox"


class Clip(NamedTuple):
    """A recording and its words."""

    path: Path
    text: str


class Bases(NamedTuple):
    """Folders of a speech model and an LLM to compose."""

    speech: Path
    text: Path


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test reaches the Hub, nor a subprocess that one starts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads(request):
    """Tiny models are faster on one thread, the more so beside other work."""
    count = torch.get_num_threads()
    torch.set_num_threads(count if request.node.get_closest_marker("slow") else 1)
    yield
    torch.set_num_threads(count)


@pytest.fixture
def processor():
    return tiny.make_processor()


@pytest.fixture
def model():
    return tiny.make_model()


@pytest.fixture
def pipe(model, processor):
    return LsmPipeline(model=model, processor=processor, device="cpu")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Folder of a tiny LSM saved by the pipeline. Shared: read it, do not write to it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-lsm"
    LsmPipeline(model=tiny.make_model(), processor=tiny.make_processor(), device="cpu").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory) -> Bases:
    """Folders of a tiny Whisper and a tiny Llama, with feature extractor and tokenizer. Shared: read only."""
    folder = tmp_path_factory.mktemp("bases")
    bases = Bases(folder / "tiny-whisper", folder / "tiny-llm")
    tiny.make_whisper().save_pretrained(bases.speech)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(bases.speech)
    tiny.make_llm().save_pretrained(bases.text)
    tiny.make_tokenizer().save_pretrained(bases.text)
    return bases


@pytest.fixture(scope="session")
def librivox() -> list[Clip]:
    """The five real recordings that the repository holds: FLAC, 16 kHz, mono."""
    rows = [json.loads(line) for line in (LIBRIVOX / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    return [Clip(LIBRIVOX / row["audio"], row["text"]) for row in rows]
