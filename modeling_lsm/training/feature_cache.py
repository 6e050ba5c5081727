"""
The frozen encoder's output on disk: built once, read by every run with the same encoder.

A cache is a folder per encoder, with safetensors shards that are written whole or not at all. Whatever stops the
building, what stands in a shard is done; the rest is found missing and built by the next start.
"""

import json
import os
import uuid
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..files import write_atomically
from ..fingerprints import fingerprint, hash_text
from ..modeling_lsm import LsmForConditionalGeneration
from ..processing_lsm import LsmProcessor, load_waveform
from .ctc import whole


ARCHITECTURE = ("d_model", "encoder_layers", "encoder_attention_heads", "activation_function", "max_source_positions")
FEATURES = ("feature_size", "sampling_rate", "n_fft", "hop_length", "padding_value", "dither")


def describe_encoder(model: LsmForConditionalGeneration, processor: LsmProcessor) -> dict[str, Any]:
    """Everything that the encoder's output for a clip depends on."""
    encoder = model.lsm.audio_tower
    with whole(encoder.parameters()):
        weights = fingerprint(encoder)
    device_type = encoder.conv1.weight.device.type
    autocast = {}
    if torch.is_autocast_enabled(device_type):
        autocast["autocast"] = str(torch.get_autocast_dtype(device_type)).removeprefix("torch.")
    return {
        "weights": weights,
        "dtype": str(encoder.conv1.weight.dtype).removeprefix("torch."),
        **autocast,
        "encoder_padding": model.config.encoder_padding,
        "chunk_samples": model.config.timing.chunk_samples,
        "architecture": {name: getattr(model.config.audio_config, name) for name in ARCHITECTURE},
        "feature_extractor": {name: getattr(processor.feature_extractor, name) for name in FEATURES},
    }


def encoder_key(model: LsmForConditionalGeneration, processor: LsmProcessor) -> str:
    """
    A hash of everything that the encoder's output for a clip depends on: its weights, dtype, architecture and padding,
    the length of its chunks, the settings of the feature extractor, and, within `torch.autocast`, what is cast. Under
    ZeRO-3 all processes call it together.

    Args:
        model ([`LsmForConditionalGeneration`]): The model.
        processor ([`LsmProcessor`]): Its processor.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    return hash_text(json.dumps(describe_encoder(model, processor), sort_keys=True))


class FeatureCache:
    """
    The encoder's output for clips, by the hash of their audio.

    It takes `50 × d_model × bytes per number` bytes of disk per second of audio: 128 kB for Whisper-large in bfloat16
    (0.46 GB per hour, 0.44 TB for the 960 hours of LibriSpeech), 77 kB for Whisper-tiny in float32.

    Args:
        folder (`str` or `os.PathLike`): The folder of all caches. The one of this encoder is made in it.
        encoder_key (`str`): What [`encoder_key`] says of the model.
    """

    def __init__(self, folder: str | os.PathLike, encoder_key: str):
        self.encoder_key = encoder_key
        self.folder = Path(folder) / encoder_key[:16]
        self._index: dict[str, tuple[Path, int]] = {}  # audio hash → shard, chunks
        self._indexed: set[Path] = set()
        self._open: dict[Path, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # every process opens files itself

    def build(
        self,
        clips: Dataset,
        model: LsmForConditionalGeneration,
        processor: LsmProcessor,
        batch_seconds: float = 120.0,
        process_index: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        max_shard_bytes: int = 256 * 2**20,
    ) -> None:
        """
        Encodes the clips that are missing, on the device of `model`. Stopped at any moment and called again, it goes
        on, and has lost at most the shard that it was filling. With several processes, wait for all of them before
        [`~FeatureCache.load`]. Within `torch.autocast` the encoder computes as it would in training with mixed
        precision, and `encoder_key` has to come from there, too.

        What else is in a batch changes the last bits of a clip's features, as it does without a cache: by 1e-6 of
        their norm in float32, by 0.7 % in bfloat16 (Whisper tiny.en). One clip at a time gives the same bits.

        Args:
            clips (`datasets.Dataset`):
                Rows with the columns `audio` (anything that [`load_waveform`] takes), `audio_hash` and `num_samples`
                (by which clips of similar duration are put together). Rows whose `audio_hash` is `None` have no audio.
            model ([`LsmForConditionalGeneration`]): Gives the encoder.
            processor ([`LsmProcessor`]): Gives the spectrograms.
            batch_seconds (`float`, *optional*, defaults to 120.0): Audio to encode at once, with its padding.
            process_index, num_processes (`int`): Which of how many processes this is; each does its own clips.
            num_workers (`int`, *optional*, defaults to 0): Processes that read audio and make spectrograms.
            max_shard_bytes (`int`, *optional*, defaults to 256 MiB):
                Size of a shard; twice as much memory is used.

        Raises:
            ValueError: If the cache is one of another encoder, or a clip cannot be read.
        """
        description = describe_encoder(model, processor)
        if hash_text(json.dumps(description, sort_keys=True)) != self.encoder_key:
            raise ValueError(
                f"This is the cache of another encoder ({self.encoder_key[:16]}) than the model's. Open it with "
                "FeatureCache(folder, encoder_key(model, processor))."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {
            "encoder_key": self.encoder_key,
            "encoder": ((model.config.base_models or {}).get("speech") or {}).get("id"),
            "what": "Encoder output, (frames, d_model) per chunk, named '<audio hash>/<chunk>'. encoder_key is the "
            "SHA-256 of what stands under 'depends_on', as JSON with sorted keys.",
            "depends_on": description,
        }
        write_atomically(self.folder / "encoder.json", json.dumps(about, indent=2).encode())

        rows = self._rows_to_build(clips, process_index, num_processes)
        lengths = np.asarray(clips["num_samples"][:], dtype=object)[rows].astype(np.int64)
        order = np.argsort(-lengths, kind="stable")  # the longest first: if memory is short, that shows at once
        sampling_rate = processor.feature_extractor.sampling_rate
        loader = DataLoader(
            clips,
            batch_sampler=split_by_cost(rows[order], lengths[order], int(batch_seconds * sampling_rate)),
            collate_fn=SpectrogramCollator(processor),
            num_workers=num_workers,
        )
        shard: dict[str, torch.Tensor] = {}
        shard_bytes = 0
        encoder = model.lsm.audio_tower
        was_training = encoder.training
        encoder.eval()
        progress = tqdm(total=len(rows), desc="Encoding", unit="clip", disable=process_index != 0)
        try:
            with whole(encoder.parameters()):
                for batch in loader:
                    features = encode(model, batch, batch_seconds)
                    shard |= features
                    shard_bytes += sum(tensor.nbytes for tensor in features.values())
                    if shard_bytes >= max_shard_bytes:
                        self._write(shard)
                        shard, shard_bytes = {}, 0
                    progress.update(len(batch["audio_hashes"]))
        finally:
            progress.close()
            encoder.train(was_training)
            self._write(shard)

    def load(self, audio_hash: str) -> list[torch.Tensor]:
        """
        The encoder's output for a clip.

        Args:
            audio_hash (`str`): The hash of the clip's audio.

        Returns:
            `list[torch.Tensor]`: A tensor of shape `(frames, d_model)` for each chunk, without padding, in the
            encoder's dtype.

        Raises:
            LookupError: If the clip is not in the cache.
        """
        if audio_hash not in self._index:
            self._read_new_headers()
        if audio_hash not in self._index:
            raise LookupError(
                f"The feature cache {self.folder} has nothing for the clip {audio_hash}. Build it with these clips, "
                "or train without it."
            )
        path, num_chunks = self._index[audio_hash]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return [self._open[path].get_tensor(f"{audio_hash}/{chunk}") for chunk in range(num_chunks)]

    def missing(self, audio_hashes: Iterable[str]) -> list[str]:
        """Which of `audio_hashes` are not in the cache: each once, in their order."""
        self._read_new_headers()
        return [audio_hash for audio_hash in dict.fromkeys(audio_hashes) if audio_hash not in self._index]

    def _rows_to_build(self, clips: Dataset, process_index: int, num_processes: int) -> np.ndarray:
        """Indices of the rows that this process is to encode: one for each clip that is missing."""
        first_row: dict[str, int] = {}
        for row, audio_hash in enumerate(clips["audio_hash"][:]):
            if audio_hash is not None and zlib.crc32(audio_hash.encode()) % num_processes == process_index:
                first_row.setdefault(audio_hash, row)
        return np.array([first_row[audio_hash] for audio_hash in self.missing(first_row)], dtype=np.int64)

    def _read_new_headers(self) -> None:
        """Indexes the shards that have come since the last time."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._indexed):
            try:
                with safe_open(path, framework="pt") as file:
                    names = file.keys()
            except SafetensorError as error:
                raise ValueError(
                    f"The shard {path} is damaged ({error}). Delete it and build the cache again."
                ) from error
            num_chunks: dict[str, int] = {}
            for name in names:
                audio_hash = name.rpartition("/")[0]
                num_chunks[audio_hash] = num_chunks.get(audio_hash, 0) + 1
            self._index |= {audio_hash: (path, count) for audio_hash, count in num_chunks.items()}
            self._indexed.add(path)

    def _write(self, shard: dict[str, torch.Tensor]) -> None:
        if shard:
            write_atomically(self.folder / f"{uuid.uuid4().hex}.safetensors", save(shard))


class SpectrogramCollator:
    """Turns rows into spectrograms as `processor` makes them, and says whose they are."""

    def __init__(self, processor: LsmProcessor):
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        timing, waveforms, names = self.processor.timing, [], []
        for row in rows:
            try:
                waveform = load_waveform(row["audio"], target_rate=timing.sampling_rate)
            except (ValueError, OSError) as error:
                raise ValueError(f"The clip {row['audio_hash']} cannot be encoded: {error}") from error
            waveforms.append(waveform)
            names += [f"{row['audio_hash']}/{chunk}" for chunk in range(len(timing.chunk_bounds(len(waveform))))]
        return {
            **self.processor(audio=waveforms),
            "names": names,
            "audio_hashes": [row["audio_hash"] for row in rows],
        }


def split_by_cost(rows: np.ndarray, lengths: np.ndarray, max_cost: int) -> list[list[int]]:
    """Cuts `rows`, the longest first, into batches whose padded length is at most `max_cost`, or which are one row."""
    batches, start = [], 0
    while start < len(rows):
        size = max(1, max_cost // max(1, int(lengths[start])))
        batches.append(rows[start : start + size].tolist())
        start += size
    return batches


@torch.no_grad()
def encode(model: LsmForConditionalGeneration, batch: dict[str, Any], batch_seconds: float) -> dict[str, torch.Tensor]:
    """What the encoder of `model` makes of a batch of a [`SpectrogramCollator`]: frames of each chunk, by name."""
    encoder, timing = model.lsm.audio_tower, model.config.timing
    features, masks = batch["input_features"], batch["input_features_mask"]
    mel_frames_per_second = timing.sampling_rate / timing.hop_length
    chunks_at_once = max(1, int(batch_seconds * mel_frames_per_second) // features.shape[-1])
    device, dtype = encoder.conv1.weight.device, encoder.conv1.weight.dtype
    hidden_states = []
    for part, mask in zip(features.split(chunks_at_once), masks.split(chunks_at_once), strict=True):
        mask = mask.to(device) if model.config.encoder_padding == "longest" else None
        hidden_states += encoder(part.to(device, dtype), input_features_mask=mask).last_hidden_state.cpu()
    frames = timing.encoder_frames(masks.sum(-1)).tolist()
    # Copies, as a slice would keep its whole batch in memory.
    return {
        name: states[:count].clone() for name, states, count in zip(batch["names"], hidden_states, frames, strict=True)
    }


__all__ = ["FeatureCache", "encoder_key"]
