import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import torch
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from modeling_lsm.training import feature_cache
from modeling_lsm.training.feature_cache import FeatureCache, encoder_key
from tests import tiny


SECONDS = [0.4, 1.0, 2.3, 1.7, 0.02, 3.1, 2.9, 1.1]


def make_clips(seconds=SECONDS) -> Dataset:
    """Rows as `load_rows` gives them, but with samples for audio."""
    waveforms = [tiny.noise(length, seed) for seed, length in enumerate(seconds)]
    return Dataset.from_list(
        [
            {
                "audio": {"array": waveform, "sampling_rate": tiny.SAMPLING_RATE},
                "audio_hash": f"{index:064x}",
                "num_samples": len(waveform),
            }
            for index, waveform in enumerate(waveforms)
        ]
    )


def hashes(clips: Dataset) -> list[str]:
    return clips["audio_hash"][:]


def from_model(model, processor, row) -> list[torch.Tensor]:
    """The encoder's output for one clip, by itself, without a cache."""
    inputs = processor(audio=[torch.tensor(row["audio"]["array"])])
    with torch.no_grad():
        states = model.get_audio_features(**inputs).last_hidden_state
    frames = model.config.timing.encoder_frames(inputs["input_features_mask"].sum(-1))
    return [chunk[:count] for chunk, count in zip(states, frames, strict=True)]


def build(folder: Path, clips: Dataset, model, processor, **kwargs) -> FeatureCache:
    cache = FeatureCache(folder, encoder_key(model, processor))
    cache.build(clips, model, processor, **kwargs)
    return cache


@pytest.mark.parametrize("encoder_padding", ["longest", "max_length"])
def test_is_what_the_model_computes(encoder_padding, tmp_path):
    """Clip by clip to the last bit; together with others as nearly as a batch comes to a single clip."""
    model, processor = tiny.make_pair(encoder_padding=encoder_padding)
    clips = make_clips([0.4, 31.0, 0.02, 2.3, 61.5])
    one_by_one = build(tmp_path / "single", clips, model, processor, batch_seconds=0.01)
    together = build(tmp_path / "batch", clips, model, processor, batch_seconds=70.0)
    for row in clips:
        expected = from_model(model, processor, row)
        for cache in (one_by_one, together):
            cached = cache.load(row["audio_hash"])
            assert [chunk.shape for chunk in cached] == [chunk.shape for chunk in expected]
            assert all((a - b).abs().max() < 2e-5 for a, b in zip(cached, expected, strict=True))
    expected = from_model(model, processor, clips[3])
    assert torch.equal(one_by_one.load(clips[3]["audio_hash"])[0], expected[0])
    assert len(one_by_one.load(clips[4]["audio_hash"])) == 3


def test_keeps_the_dtype_of_the_encoder(tmp_path):
    model, processor = tiny.make_pair()
    model = model.to(torch.bfloat16)
    clips = make_clips([1.0])
    cache = build(tmp_path, clips, model, processor)
    (chunk,) = cache.load(hashes(clips)[0])
    assert chunk.dtype == torch.bfloat16
    assert torch.equal(chunk, from_model(model, processor, clips[0])[0])


def test_computes_in_mixed_precision_as_training_would(model, processor, tmp_path):
    clips = make_clips([1.0])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = build(tmp_path, clips, model, processor)
        key = encoder_key(model, processor)
    inputs = processor(audio=[torch.tensor(clips[0]["audio"]["array"])])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model.get_audio_features(**inputs).last_hidden_state[0]
    (chunk,) = mixed.load(hashes(clips)[0])
    assert torch.equal(chunk, expected[: len(chunk)])
    whole = build(tmp_path, clips, model, processor)
    assert not torch.equal(chunk, whole.load(hashes(clips)[0])[0])
    assert mixed.encoder_key == key != whole.encoder_key


def test_gives_the_model_the_same_logits(model, processor, tmp_path):
    clips = make_clips([2.3])
    cache = build(tmp_path, clips, model, processor)
    chat = [{"role": "user", "content": [{"type": "audio", "audio": torch.tensor(clips[0]["audio"]["array"])}]}]
    inputs = tiny.ask(processor, chat)
    with torch.no_grad():
        expected = model(**inputs).logits
        inputs.pop("input_features")
        cached = torch.stack(cache.load(hashes(clips)[0]))
        assert torch.equal(model(**inputs, encoder_hidden_states=cached).logits, expected)


def test_another_encoder_has_another_key(processor):
    model = tiny.make_model()
    key = encoder_key(model, processor)
    assert key == encoder_key(tiny.make_model(), tiny.make_processor())

    with torch.no_grad():
        model.lsm.projector.output.weight.zero_()
        model.lsm.language_model.model.embed_tokens.weight.zero_()
    assert encoder_key(model, processor) == key
    others = {encoder_key(*tiny.make_pair(encoder_padding="max_length")), encoder_key(tiny.make_model(1), processor)}
    others.add(encoder_key(*tiny.make_pair(window_size=16)))  # cuts long clips elsewhere
    others.add(encoder_key(tiny.make_model().to(torch.bfloat16), processor))
    with torch.no_grad():
        model.lsm.audio_tower.layers[1].fc2.bias[3] += 1e-3
    others.add(encoder_key(model, processor))
    processor.feature_extractor.dither = 1e-3
    others.add(encoder_key(tiny.make_model(), processor))
    assert len(others - {key}) == 6


def test_refuses_the_cache_of_another_encoder(model, processor, tmp_path):
    cache = FeatureCache(tmp_path, encoder_key(model, processor))
    with pytest.raises(ValueError, match=r"another encoder .* than the model's"):
        cache.build(make_clips([1.0]), tiny.make_model(seed=1), processor)


def test_says_in_words_what_it_holds(model, processor, tmp_path):
    model.config.base_models = {"speech": {"id": "someone/whisper"}}
    cache = build(tmp_path, make_clips([1.0]), model, processor)
    about = json.loads((tmp_path / cache.encoder_key[:16] / "encoder.json").read_text())
    assert about["encoder"] == "someone/whisper"
    assert about["encoder_key"] == cache.encoder_key
    assert about["depends_on"]["encoder_padding"] == "longest"


def test_encodes_each_clip_once_and_only_what_is_missing(model, processor, tmp_path):
    clips = make_clips()
    doubled = Dataset.from_list([*clips, *clips, {"audio": None, "audio_hash": None, "num_samples": None}])
    cache = FeatureCache(tmp_path, encoder_key(model, processor))
    assert cache.missing(hashes(doubled)[:-1]) == hashes(clips)
    encoded = []
    hook = model.lsm.audio_tower.register_forward_hook(lambda module, args, output: encoded.append(len(args[0])))
    cache.build(clips.select(range(3)), model, processor)
    assert cache.missing(hashes(clips)) == hashes(clips)[3:]
    cache.build(doubled, model, processor, batch_seconds=4.0)
    cache.build(doubled, model, processor)
    hook.remove()
    assert sum(encoded) == len(clips)
    assert cache.missing(hashes(clips)) == []


def test_shards_are_limited_and_all_are_read(model, processor, tmp_path):
    clips = make_clips()
    cache = build(tmp_path, clips, model, processor, batch_seconds=3.0, max_shard_bytes=20_000)
    shards = list(cache.folder.glob("*.safetensors"))
    assert len(shards) >= 3
    assert sum(len(load_file(shard)) for shard in shards) == len(clips)
    for row in clips:
        (chunk,) = FeatureCache(tmp_path, cache.encoder_key).load(row["audio_hash"])
        assert len(chunk) == -(-row["num_samples"] // 320)


def test_a_missing_clip_is_named(model, processor, tmp_path):
    with pytest.raises(LookupError, match=r"has nothing for the clip abc\. Build it"):
        FeatureCache(tmp_path, encoder_key(model, processor)).load("abc")


def test_a_clip_that_cannot_be_read_is_named_and_loses_nothing(model, processor, tmp_path):
    clips = make_clips([3.0, 2.0, 1.0])
    broken = clips.select(range(2)).to_list()
    broken.append({**clips[2], "audio": {"array": [float("nan")] * 16_000, "sampling_rate": tiny.SAMPLING_RATE}})
    cache = FeatureCache(tmp_path, encoder_key(model, processor))
    with pytest.raises(ValueError, match=rf"The clip {hashes(clips)[2]} cannot be encoded: .* NaN"):
        cache.build(Dataset.from_list(broken), model, processor, batch_seconds=0.1)
    assert cache.missing(hashes(clips)) == hashes(clips)[2:]


def test_a_damaged_shard_is_named(model, processor, tmp_path):
    clips = make_clips([1.0])
    shard = next(build(tmp_path, clips, model, processor).folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged"):
        FeatureCache(tmp_path, encoder_key(model, processor)).load(hashes(clips)[0])


class CachedClips(torch.utils.data.Dataset):
    def __init__(self, cache: FeatureCache, audio_hashes: list[str]):
        self.cache, self.audio_hashes = cache, audio_hashes

    def __len__(self) -> int:
        return len(self.audio_hashes)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return os.getpid(), self.cache.load(self.audio_hashes[index])[0]


def test_open_files_are_not_pickled(model, processor, tmp_path):
    clips = make_clips([1.0])
    cache = build(tmp_path, clips, model, processor)
    (chunk,) = cache.load(hashes(clips)[0])
    assert torch.equal(pickle.loads(pickle.dumps(cache)).load(hashes(clips)[0])[0], chunk)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_loads_in_workers(method, model, processor, tmp_path):
    clips = make_clips()
    cache = build(tmp_path, clips, model, processor, batch_seconds=3.0, max_shard_bytes=20_000)
    here = [cache.load(audio_hash)[0] for audio_hash in hashes(clips)]  # with files open before the workers start
    loader = DataLoader(
        CachedClips(cache, hashes(clips)), batch_size=None, num_workers=2, multiprocessing_context=method
    )
    pids, there = zip(*loader, strict=True)
    assert len({os.getpid(), *pids}) == 3
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def start_builder(folder: Path, process_index: int = 0, num_processes: int = 1, pause: float = 0.0):
    """A process that builds the cache of `folder / "clips"`, and waits before it encodes a batch."""

    def build_slowly():
        encode = feature_cache.encode

        def encode_slowly(*args):
            time.sleep(pause)
            return encode(*args)

        feature_cache.encode = encode_slowly
        clips = load_from_disk(folder / "clips")
        sizes = {"batch_seconds": 1.0, "max_shard_bytes": 10_000}
        who = {"process_index": process_index, "num_processes": num_processes}
        build(folder / "cache", clips, *tiny.make_pair(), **sizes, **who)

    process = multiprocessing.get_context("fork").Process(target=build_slowly)
    process.start()
    return process


def test_goes_on_after_a_kill(model, processor, tmp_path):
    clips = make_clips()
    clips.save_to_disk(tmp_path / "clips")
    cache = FeatureCache(tmp_path / "cache", encoder_key(model, processor))
    builder = start_builder(tmp_path, pause=0.3)
    while len(list(cache.folder.glob("*.safetensors"))) < 2:
        assert builder.is_alive()
        time.sleep(0.02)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    before = {path: path.stat().st_mtime_ns for path in cache.folder.glob("*.safetensors")}
    assert 0 < len(cache.missing(hashes(clips))) < len(clips)

    cache.build(clips, model, processor, batch_seconds=1.0)
    assert cache.missing(hashes(clips)) == []
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sum(len(load_file(shard)) for shard in cache.folder.glob("*.safetensors")) == len(clips)
    for row in clips:
        assert torch.allclose(cache.load(row["audio_hash"])[0], from_model(model, processor, row)[0], atol=2e-5)


def test_two_processes_share_the_work(model, processor, tmp_path):
    clips = make_clips()
    clips.save_to_disk(tmp_path / "clips")
    builders = [start_builder(tmp_path, index, 2, pause=0.1) for index in range(2)]
    for builder in builders:
        builder.join()
        assert builder.exitcode == 0
    cache = FeatureCache(tmp_path / "cache", encoder_key(model, processor))
    assert cache.missing(hashes(clips)) == []
    shards = [load_file(shard) for shard in cache.folder.glob("*.safetensors")]
    assert sorted(name for shard in shards for name in shard) == sorted(f"{name}/0" for name in hashes(clips))


def test_workers_read_the_audio(model, processor, tmp_path, librivox):
    clips = Dataset.from_list(
        [
            {"audio": str(clip.path), "audio_hash": clip.path.stem, "num_samples": soundfile.info(clip.path).frames}
            for clip in librivox
        ]
    )
    cache = build(tmp_path, clips, model, processor, num_workers=2, batch_seconds=8.0)
    for clip in librivox:
        (chunk,) = cache.load(clip.path.stem)
        assert len(chunk) == -(-soundfile.info(clip.path).frames // 320)


BUILD_UNDER_ZERO3 = """
import sys
import deepspeed
import torch
from datasets import load_from_disk
from trl import SFTConfig
from modeling_lsm import LsmForConditionalGeneration
from modeling_lsm.training.feature_cache import FeatureCache, encoder_key
from tests import tiny

folder = sys.argv[1]
deepspeed.init_distributed("gloo")
sizes = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
zero3 = {"zero_optimization": {"stage": 3}, **sizes}
args = SFTConfig(output_dir=folder, use_cpu=True, bf16=False, deepspeed=zero3)
model = LsmForConditionalGeneration.from_pretrained(f"{folder}/model")
assert model.lsm.audio_tower.conv1.weight.numel() == 0
processor = tiny.make_processor()
cache = FeatureCache(f"{folder}/cache", encoder_key(model, processor))
who = {"process_index": torch.distributed.get_rank(), "num_processes": 2}
cache.build(load_from_disk(f"{folder}/clips"), model, processor, **who)
assert model.lsm.audio_tower.conv1.weight.numel() == 0
"""


@pytest.mark.slow
def test_builds_under_zero3(model, processor, tmp_path):
    """Two processes, each with a part of the weights, write what one process with all of them computes."""
    clips = make_clips()
    clips.save_to_disk(tmp_path / "clips")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "build.py").write_text(BUILD_UNDER_ZERO3)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [*command, str(tmp_path / "build.py"), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    cache = FeatureCache(tmp_path / "cache", encoder_key(model, processor))
    for row in clips:
        assert torch.allclose(cache.load(row["audio_hash"])[0], from_model(model, processor, row)[0], atol=2e-5)
