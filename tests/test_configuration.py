"""The time arithmetic against counting by hand, and the configuration's checks and round trips."""

import numpy as np
import pytest
import torch

from modeling_lsm import AudioTiming, LsmConfig
from tests import tiny


SHAPES = [(17, 1), (17, 4), (1, 1), (8, 1), (20, 2), (751, 3), (1500, 1)]
SECONDS_90 = 90 * 16_000


def count_by_hand(samples: int, window_size: int, num_queries: int) -> list[int]:
    """Audio tokens of every chunk of a clip, found by walking over it. No formula is shared with `AudioTiming`."""
    chunk_frames = 0
    while chunk_frames + window_size <= 1500:
        chunk_frames += window_size
    tokens = []
    sample = 0
    while sample < samples:
        chunk = range(sample, min(samples, sample + chunk_frames * 320))
        mel_frames = chunk[::160]  # one starts at every 160th sample
        encoder_frames = mel_frames[::2]
        windows = encoder_frames[::window_size]
        tokens.append(len(windows) * num_queries)
        sample = chunk.stop
    return tokens


@pytest.mark.parametrize(("window_size", "num_queries"), SHAPES)
def test_audio_tokens_of_clip_against_counting(window_size, num_queries):
    timing = AudioTiming(window_size=window_size, num_queries=num_queries)
    lengths = {*range(1, 12_000, 7), *range(1, 700), *range(11, SECONDS_90, 3_989), SECONDS_90}
    for chunks in (1, 2, 3):  # around the borders of chunks and of Whisper's 30 s
        for border in (chunks * timing.chunk_samples, chunks * 480_000):
            lengths |= {length for length in range(border - 330, border + 331, 5) if length > 0}
            lengths |= {border - 1, border, border + 1}
    wrong = [
        length
        for length in sorted(lengths)
        if timing.audio_tokens_of_clip(length) != sum(count_by_hand(length, window_size, num_queries))
    ]
    assert not wrong


@pytest.mark.parametrize(("window_size", "num_queries"), SHAPES)
def test_tensors_count_as_integers_do(window_size, num_queries):
    timing = AudioTiming(window_size=window_size, num_queries=num_queries)
    lengths = range(1, 3001)
    counted = timing.audio_tokens(torch.tensor(lengths))
    assert counted.dtype == torch.int64
    assert counted.tolist() == [timing.audio_tokens(length) for length in lengths]


@pytest.mark.parametrize("window_size", [1, 8, 17, 400, 751, 1499, 1500])
def test_chunk_bounds_cover_the_clip_in_order(window_size):
    timing = AudioTiming(window_size=window_size)
    window_samples = window_size * 320
    for samples in [1, 160, 479_999, 480_000, 480_001, timing.chunk_samples, timing.chunk_samples + 1, SECONDS_90]:
        bounds = timing.chunk_bounds(samples)
        covered = np.concatenate([np.arange(start, end) for start, end in bounds])
        assert np.array_equal(covered, np.arange(samples))
        assert all(0 < end - start <= 480_000 for start, end in bounds)
        # Every chunk but the last holds whole windows, so the windows of the clip are those of its chunks.
        assert all((end - start) % window_samples == 0 for start, end in bounds[:-1])
        assert timing.audio_tokens_of_clip(samples) == len(range(0, samples, window_samples))
    assert timing.chunk_samples <= timing.max_samples < timing.chunk_samples + window_samples


def test_documented_example():
    assert LsmConfig(window_size=17).timing.audio_tokens_of_clip(10 * 16_000) == 30


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"window_size": 0}, r"`window_size` is 0, but a window holds between 1 and 1500 .*17"),
        ({"window_size": -17}, r"`window_size` is -17"),
        ({"window_size": 1501}, r"`window_size` is 1501, but a window holds between 1 and 1500"),
        ({"num_queries": 0}, r"`num_queries` is 0; every window needs at least 1"),
        ({"encoder_padding": "30s"}, r"`encoder_padding` is '30s'; expected 'longest' .* or 'max_length'"),
    ],
)
def test_impossible_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LsmConfig(**kwargs)


def test_window_size_is_bounded_by_the_encoder_at_hand():
    with pytest.raises(ValueError, match="`window_size` is 101, but a window holds between 1 and 100"):
        tiny.model_config(audio_config=tiny.whisper_config(max_source_positions=100).to_dict(), window_size=101)
    config = tiny.model_config(audio_config=tiny.whisper_config(max_source_positions=100).to_dict(), window_size=30)
    assert config.timing.max_samples == 2 * 16_000
    assert config.timing.chunk_samples == 90 * 320


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path, tied):
    config = tiny.model_config(
        text_config=tiny.llm_config(tie_word_embeddings=tied).to_dict(),
        encoder_padding="max_length",
        window_size=23,
        num_queries=3,
        base_models={"speech": {"id": "a/b", "revision": None, "license": "mit"}},
        trained_parts=["projector"],
    )
    config.save_pretrained(tmp_path)
    reloaded = LsmConfig.from_pretrained(tmp_path)
    assert reloaded.tie_word_embeddings is tied
    assert reloaded.get_text_config().tie_word_embeddings is tied
    assert reloaded.timing == config.timing == AudioTiming(window_size=23, num_queries=3)
    assert type(reloaded.text_config).__name__ == "LlamaConfig"
    assert type(reloaded.audio_config).__name__ == "WhisperConfig"
    ignored = {"transformers_version", "_name_or_path"}
    expected, actual = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (config, reloaded))
    assert actual == expected


def test_text_config_of_any_kind():
    config = LsmConfig(text_config={"model_type": "gpt2", "n_embd": 16})
    assert (config.text_config.model_type, config.text_config.hidden_size) == ("gpt2", 16)
    assert config.tie_word_embeddings is True
