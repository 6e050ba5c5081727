"""
What encoding speech at its own length, rather than padded to 30 s, saves, and what it changes.

    python -m benchmarks.bench_encoder

The clips are the real recordings of `tests/fixtures`, one at a time on one thread; the two ways take turns. The last
line on stdout is a JSON object with the figures.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from demo.fetch_models import fetch_speech_model, fetch_text_model
from modeling_lsm.composing import compose
from modeling_lsm.processing_lsm import load_waveform


RECORDINGS = Path(__file__).parent.parent / "tests" / "fixtures" / "librivox"
PADDINGS = ("longest", "max_length")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="times that each clip is encoded, each way")
    args = parser.parse_args()

    torch.set_num_threads(1)
    models = {
        padding: compose(str(fetch_speech_model()), str(fetch_text_model()), dtype="float32", encoder_padding=padding)
        for padding in PADDINGS
    }
    clips = [json.loads(line)["audio"] for line in (RECORDINGS / "metadata.jsonl").read_text("utf-8").splitlines()]
    differences, seconds, loads = {}, dict.fromkeys(PADDINGS, 0.0), []
    for clip in tqdm(clips, unit="clip"):
        waveform = load_waveform(RECORDINGS / clip)
        inputs = {
            padding: {
                key: value
                for key, value in processor(audio=[waveform]).items()
                if key in ("input_features", "input_features_mask")
            }
            for padding, (_, processor) in models.items()
        }
        states, times = {}, {padding: [] for padding in PADDINGS}
        for _ in range(args.repetitions):
            for padding, (model, _) in models.items():
                started = time.perf_counter()
                states[padding] = model.get_audio_features(**inputs[padding]).last_hidden_state[0]
                times[padding].append(time.perf_counter() - started)
        for padding in PADDINGS:
            seconds[padding] += min(times[padding])
        num_frames = models["longest"][0].config.timing.encoder_frames(
            inputs["longest"]["input_features_mask"].sum().item()
        )
        expected = states["max_length"][:num_frames]
        differences[clip] = round(((states["longest"][:num_frames] - expected).norm() / expected.norm()).item(), 4)
        loads.append(round(os.getloadavg()[0], 1))

    figures = {
        "ratio": round(seconds["max_length"] / seconds["longest"], 2),
        "seconds_longest": round(seconds["longest"], 3),
        "seconds_max_length": round(seconds["max_length"], 3),
        "relative_l2_difference": differences,
        "clips": len(clips),
        "repetitions": args.repetitions,
        "device": "cpu",
        "threads": 1,
        "load_average": loads,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
