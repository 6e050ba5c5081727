"""What augmentation does to speech, measured."""

import sys

import numpy as np
import pytest
import soundfile
import torch

from modeling_lsm.data.sound_changes import AudioAugmentation
from tests import tiny


def pitch(waveform: np.ndarray) -> float:
    """Frequency of the loudest tone, in Hz."""
    return float(np.abs(np.fft.rfft(waveform)).argmax() * tiny.SAMPLING_RATE / len(waveform))


def power_db(waveform: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(np.square(waveform, dtype=np.float64))))


def test_nothing_changes_unless_asked_for():
    augment, waveform, features = AudioAugmentation(), tiny.noise(1.0), torch.randn(2, 80, 100)
    state = torch.get_rng_state()
    assert not augment.is_active and augment.slowest_speed == 1.0
    assert augment.change_waveform(waveform) is waveform
    assert augment.mask_features(features, torch.ones(2, 100, dtype=torch.long)) is features
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_speed_changes_length_and_pitch(factor):
    changed = AudioAugmentation(speed=[factor]).change_waveform(tiny.tone(1000, 2.0))
    assert len(changed) == pytest.approx(2.0 * tiny.SAMPLING_RATE / factor, abs=1)
    assert pitch(changed) == pytest.approx(1000 * factor, abs=2)
    assert changed.dtype == np.float32


def test_every_speed_is_drawn():
    augment = AudioAugmentation(speed=[0.9, 1.0, 1.1])
    lengths = [len(augment.change_waveform(tiny.tone(440, 0.9))) for _ in range(60)]
    assert set(lengths) == {16_000, 14_400, 13_091} and augment.slowest_speed == 0.9
    assert all(lengths.count(length) > 8 for length in set(lengths))


def test_levels_are_spread_over_their_range():
    waveform = tiny.tone(440, 0.5)
    augment = AudioAugmentation(level_db=(-6, 3))
    gains = [power_db(augment.change_waveform(waveform)) - power_db(waveform) for _ in range(100)]
    assert -6.01 < min(gains) < -5 and 2 < max(gains) < 3.01
    changed = AudioAugmentation(level_db=(6, 6)).change_waveform(waveform)
    np.testing.assert_allclose(changed, waveform * 10 ** (6 / 20), rtol=1e-5)  # not clipped


@pytest.mark.parametrize("noise", ["white", "files"])
def test_noise_has_the_ratio_asked_for(noise, tmp_path):
    if noise == "files":  # shorter than the speech, at another rate, in a folder of the folder
        (tmp_path / "hall").mkdir()
        soundfile.write(tmp_path / "hall" / "hum.WAV", tiny.tone(100, 0.7, 8000) * 0.01, 8000)
    waveform = tiny.noise(2.0)
    for ratio in (0.0, 10.0, 30.0):
        augment = AudioAugmentation(noise_snr_db=(ratio, ratio), noise_dir=str(tmp_path) if noise == "files" else None)
        added = augment.change_waveform(waveform) - waveform
        assert power_db(waveform) - power_db(added) == pytest.approx(ratio, abs=0.05)
        if noise == "files":
            assert pitch(added) == pytest.approx(100, abs=2)
    augment = AudioAugmentation(noise_snr_db=(5, 20))
    ratios = [power_db(waveform) - power_db(augment.change_waveform(waveform) - waveform) for _ in range(50)]
    assert 4.9 < min(ratios) < 7 and 18 < max(ratios) < 20.1


def test_silence_stays_finite(tmp_path):
    silence = np.zeros(16_000, dtype=np.float32)
    assert not AudioAugmentation(noise_snr_db=(5, 5)).change_waveform(silence).any()
    soundfile.write(tmp_path / "silence.wav", silence, 16_000)
    waveform = tiny.noise(0.5)
    augment = AudioAugmentation(noise_snr_db=(5, 5), noise_dir=str(tmp_path))
    assert np.array_equal(augment.change_waveform(waveform), waveform)


def test_masks_stay_inside_of_the_clip():
    """A band of time and a band of frequency, each as wide as allowed at most; padding and input untouched."""
    augment = AudioAugmentation(spec_augment=(30, 20))
    lengths = torch.tensor([400, 60])
    mask = (torch.arange(400) < lengths[:, None]).long()
    features = torch.randn(2, 80, 400)
    widths = {"time": [], "frequency": []}
    for _ in range(50):
        before = features.clone()
        masked = augment.mask_features(features, mask)
        assert torch.equal(features, before)
        changed = masked != features
        assert not changed[1, :, 60:].any()
        for index, length in enumerate(lengths.tolist()):
            mean = features[index, :, :length].mean()
            assert masked[index][changed[index]].sub(mean).abs().max() < 1e-6 if changed[index].any() else True
            columns, bins = changed[index, :, :length].all(0), changed[index, :, :length].all(1)
            assert torch.equal(changed[index, :, :length], columns | bins[:, None])  # bands and nothing else
            widths["time"].append((index, int(columns.sum())))
            widths["frequency"].append(int(bins.sum()))
    assert 20 < max(width for index, width in widths["time"] if index == 0) <= 30
    assert 8 < max(width for index, width in widths["time"] if index == 1) <= 12  # a fifth of the short one
    assert 14 < max(widths["frequency"]) <= 20


def test_the_generator_of_torch_decides():
    augment = AudioAugmentation(speed=[0.9, 1.1], level_db=(-3, 3), noise_snr_db=(5, 20), spec_augment=(20, 10))

    def change(seed):
        torch.manual_seed(seed)
        waveform = torch.from_numpy(augment.change_waveform(tiny.noise(0.5)))
        return waveform, augment.mask_features(torch.ones(1, 80, 100).cumsum(-1), torch.ones(1, 100, dtype=torch.long))

    first, again, other = change(1), change(1), change(2)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[1], other[1]) and first[0][:100].tolist() != other[0][:100].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speed": [0.9, 9.0]}, "`speed` is .*expected factors between 0.5 and 2.0"),
        ({"level_db": (3, -3)}, "`level_db` is .*expected its least and its largest value"),
        ({"noise_snr_db": (5,)}, "`noise_snr_db` is"),
        ({"spec_augment": (10,)}, "`spec_augment` is .*expected two widths"),
        ({"noise_dir": "."}, "`noise_dir` needs `noise_snr_db`"),
        ({"noise_dir": "nowhere", "noise_snr_db": (5, 20)}, "`noise_dir` nowhere holds no .*wav"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AudioAugmentation(**settings)


def test_without_torchaudio(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    AudioAugmentation()
    with pytest.raises(ImportError, match="Audio augmentation needs torchaudio: pip install torchaudio"):
        AudioAugmentation(speed=[0.9])
