"""Package metadata of modeling_lsm. Pinned versions for development and the demo are in requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent


def read_version() -> str:
    """The version, read from the package without importing it: its dependencies may not be installed yet."""
    source = (ROOT / "modeling_lsm" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('modeling_lsm/__init__.py has no line like __version__ = "0.1.0"')
    return match[1]


def read_readme() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


AUDIO = ["soundfile", "torchaudio>=2.9"]
# From transformers 5.21 on, `logits_to_keep` may be a mask.
TRL = [*AUDIO, "transformers>=5.21", "trl>=1.16", "datasets>=5.2"]
TRAIN = [*TRL, "peft>=0.21", "deepspeed>=0.19", "ninja", "matplotlib", "tqdm"]
SERVER = ["openai>=3.54"]  # augment.py --backend openai
EVAL = [*TRL, "jiwer>=4.0", "sacrebleu>=2.4", "matplotlib", "tqdm"]
DEMO = [*TRAIN, *EVAL, "gguf>=0.10", "piper-tts>=1.3"]
DEV = [*DEMO, *SERVER, "fastapi", "uvicorn", "parameterized", "pytest>=9", "ruff", "sentencepiece", "protobuf"]

setup(
    name="modeling_lsm",
    version=read_version(),
    description="Large speech-text models: a frozen Whisper encoder, a window-level Q-Former and any causal LLM",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    author="The modeling_lsm contributors",
    license="Apache-2.0",
    keywords="speech audio llm transformers whisper q-former multimodal",
    packages=find_packages(include=["modeling_lsm", "modeling_lsm.*"]),
    package_data={
        "modeling_lsm": ["chat_templates/*.jinja"],
        "modeling_lsm.augmentation": ["*.yaml"],
        "modeling_lsm.evaluation": ["*.yaml"],
        "modeling_lsm.evaluation.bias": ["*.yaml"],
    },
    python_requires=">=3.11",  # as transformers from 5.21 on
    install_requires=[
        "transformers>=5.19",
        "torch>=2.9",
        "accelerate>=1.15",
        "safetensors",
        "numpy",
        "jinja2",
    ],
    # A set of extras per thing one does: `pip install modeling_lsm[train]`.
    extras_require={"audio": AUDIO, "train": TRAIN, "server": SERVER, "eval": EVAL, "demo": DEMO, "dev": DEV},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
