"""Changes to speech that make a model robust: speed, level, noise, and masks over the spectrogram."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..processing_lsm import load_waveform


MAX_MASKED_SHARE = 0.2  # of the time of a clip: a mask that is wide beside a short clip would leave nothing of it
NOISE_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3"}


@dataclass
class AudioAugmentation:
    """
    Random changes to the speech of a training batch; all are off unless asked for. They are drawn from torch's global
    generator.

    Args:
        speed (`list[float]`, *optional*):
            Factors to draw from: 1.1 is 10 % faster, and as much higher. A clip's length changes with it.
        level_db (`tuple[float, float]`, *optional*):
            Least and largest gain, in dB.
        noise_snr_db (`tuple[float, float]`, *optional*):
            Least and largest signal-to-noise ratio of added noise, in dB.
        noise_dir (`str`, *optional*):
            Folder with recordings of noise, searched with its subfolders. Defaults to white noise.
        spec_augment (`tuple[int, int]`, *optional*):
            Widths of the widest mask over time, in mel frames, and of the widest over frequency, in mel bins. One of
            each is drawn for every chunk. At most a fifth of the time is masked.
        sampling_rate (`int`, *optional*, defaults to 16000):
            Samples per second of the waveforms.

    Raises:
        ImportError: If torchaudio is not there.
        ValueError: If a setting makes no sense.
    """

    speed: list[float] | None = None
    level_db: tuple[float, float] | None = None
    noise_snr_db: tuple[float, float] | None = None
    noise_dir: str | None = None
    spec_augment: tuple[int, int] | None = None
    sampling_rate: int = 16_000
    noise_files: list[Path] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self):
        if self.speed and not all(0.5 <= factor <= 2.0 for factor in self.speed):
            raise ValueError(f"`speed` is {self.speed}; expected factors between 0.5 and 2.0, like 0.9, 1.0 and 1.1.")
        for name in ("level_db", "noise_snr_db"):
            bounds = getattr(self, name)
            if bounds is not None and (len(bounds) != 2 or not bounds[0] <= bounds[1]):
                raise ValueError(f"`{name}` is {bounds}; expected its least and its largest value, in dB.")
        if self.spec_augment is not None and (len(self.spec_augment) != 2 or min(self.spec_augment) < 0):
            raise ValueError(
                f"`spec_augment` is {self.spec_augment}; expected two widths, in mel frames and in mel bins, like 50 "
                "and 20."
            )
        if self.noise_dir is not None:
            if self.noise_snr_db is None:
                raise ValueError("`noise_dir` needs `noise_snr_db`, which says how loud the noise is.")
            self.noise_files = sorted(
                path for path in Path(self.noise_dir).rglob("*") if path.suffix.lower() in NOISE_SUFFIXES
            )
            if not self.noise_files:
                raise ValueError(f"`noise_dir` {self.noise_dir} holds no {', '.join(sorted(NOISE_SUFFIXES))} files.")
        if self.is_active:
            try:
                import torchaudio  # noqa: F401
            except (ImportError, OSError) as error:  # an OSError where its compiled part does not load
                raise ImportError(f"Audio augmentation needs torchaudio: pip install torchaudio. ({error})") from error

    @property
    def is_active(self) -> bool:
        """Whether anything is changed at all."""
        return any((self.speed, self.level_db, self.noise_snr_db, self.spec_augment))

    @property
    def slowest_speed(self) -> float:
        """The factor that lengthens clips the most; 1.0 if none does."""
        return min([1.0, *(self.speed or [])])

    def change_waveform(self, waveform: np.ndarray) -> np.ndarray:
        """
        Changes speed, adds noise, then changes the level.

        Args:
            waveform (`np.ndarray` of shape `(samples,)`): Mono, float32, at `sampling_rate`.

        Returns:
            `np.ndarray`: The same; of another length if the speed changed.
        """
        if not (self.speed or self.noise_snr_db or self.level_db):
            return waveform
        from torchaudio import functional

        samples = torch.from_numpy(waveform)
        if self.speed:
            factor = self.speed[int(torch.randint(len(self.speed), ()))]
            if factor != 1.0:
                samples, _ = functional.speed(samples, self.sampling_rate, factor)
        if self.noise_snr_db:
            noise = self._draw_noise(len(samples))
            if noise.any():
                samples = functional.add_noise(samples, noise, _draw_between(self.noise_snr_db))
        if self.level_db:
            samples = functional.gain(samples, float(_draw_between(self.level_db)))
        return samples.numpy()

    def mask_features(self, input_features: torch.Tensor, input_features_mask: torch.Tensor) -> torch.Tensor:
        """
        SpecAugment: masks a band of time and a band of frequency of every chunk, with the chunk's mean.

        Args:
            input_features (`torch.Tensor` of shape `(chunks, mels, mel frames)`): Log-mel spectrograms.
            input_features_mask (`torch.Tensor` of shape `(chunks, mel frames)`): 1 for frames of the clip.

        Returns:
            `torch.Tensor`: A masked copy, unchanged where the clip has ended.
        """
        if not self.spec_augment:
            return input_features
        from torchaudio.transforms import FrequencyMasking, TimeMasking

        time_mask = TimeMasking(self.spec_augment[0], p=MAX_MASKED_SHARE)
        frequency_mask = FrequencyMasking(self.spec_augment[1])
        input_features = input_features.clone()
        for features, length in zip(input_features, input_features_mask.sum(-1).tolist(), strict=True):
            mean = float(features[:, :length].mean())
            features[:, :length] = frequency_mask(time_mask(features[:, :length], mean), mean)
        return input_features

    def _draw_noise(self, length: int) -> torch.Tensor:
        """Noise of `length` samples: white, or from anywhere in one of the files, from its start again if short."""
        if not self.noise_files:
            return torch.randn(length)
        file = self.noise_files[int(torch.randint(len(self.noise_files), ()))]
        noise = torch.from_numpy(load_waveform(str(file), target_rate=self.sampling_rate))
        start = int(torch.randint(len(noise), ()))
        return noise.roll(-start).repeat(-(-length // len(noise)))[:length]


def _draw_between(bounds: tuple[float, float]) -> torch.Tensor:
    return torch.empty(()).uniform_(*bounds)


__all__ = ["AudioAugmentation"]
