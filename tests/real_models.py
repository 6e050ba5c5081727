"""Fixtures with real pretrained models, for slow tests. They are fetched and converted once per machine."""

from pathlib import Path

import pytest

from demo.fetch_models import fetch_speech_model, fetch_text_model


__all__ = ["real_speech_model", "real_text_model"]


@pytest.fixture(scope="session")
def real_speech_model() -> Path:
    """Folder of Whisper tiny.en: model, processor, generation config. Shared by all tests: read only."""
    return fetch_speech_model()


@pytest.fixture(scope="session")
def real_text_model() -> Path:
    """Folder of SmolLM2-135M-Instruct: model, tokenizer with chat template. Shared by all tests: read only."""
    return fetch_text_model()
