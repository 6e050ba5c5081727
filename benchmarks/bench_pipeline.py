"""
How long an answer about a clip takes, beside Whisper and the same LLM.

    python -m benchmarks.bench_pipeline

Pipeline: a call of `pipeline("audio-text-to-text")` with the path of a recording of 5.3 s and an instruction. Cascade:
the same file is read, `pipeline("automatic-speech-recognition")` writes it down, and the LSM's own LLM, called alone,
reads transcript and instruction. Both are timed from the path to the text of the answer, models loaded, one clip at a
time, greedily (the pipeline of transformers would search for a transcript with 5 beams, which takes twice as long).
Answers have a length that both are held to, the transcript is as long as it is. The two take turns, and figures are
medians: `ratio` of elapsed time, `ratio_of_cpu_time` of the process's, which other work disturbs less.

Most of both is the LLM's forward passes, so that the ratio depends on the length of the answer. What it would be, in
CPU time, if hearing cost nothing at all, reading alone beside transcribing and reading, is
`ratio_if_hearing_were_free`. The last line on stdout is a JSON object with the figures.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm
from transformers import pipeline

from benchmarks.models import load_model
from demo.fetch_models import fetch_speech_model
from modeling_lsm import LsmPipeline, make_chat
from modeling_lsm.processing_lsm import load_waveform


RECORDINGS = Path(__file__).parent.parent / "tests" / "fixtures" / "librivox"
CLIP = RECORDINGS / "sense_and_sensibility_01_0890.flac"  # 5.3 s
INSTRUCTION = "Answer in one sentence: who is being spoken of?"


class Stopwatch:
    """Elapsed and CPU seconds of each of its runs, by name."""

    def __init__(self):
        self.runs: dict[str, list[tuple[float, float]]] = {}

    def time(self, name: str, do: Callable):
        elapsed, cpu = time.perf_counter(), time.process_time()
        result = do()
        self.runs.setdefault(name, []).append((time.perf_counter() - elapsed, time.process_time() - cpu))
        return result

    def medians(self, *names: str) -> tuple[float, float]:
        """The medians of the sums of what was timed under `names`, run by run."""
        runs = zip(*(self.runs[name] for name in names), strict=True)
        elapsed, cpu = zip(*(map(sum, zip(*run, strict=True)) for run in runs), strict=True)
        return median(elapsed), median(cpu)


class Cascade:
    """Whisper, and the LLM of an LSM, which reads what Whisper writes."""

    def __init__(self, model, processor):
        self.asr = pipeline(
            "automatic-speech-recognition", model=str(fetch_speech_model()), device=model.device, dtype=model.dtype
        )
        self.llm, self.processor = model.lsm.language_model, processor

    def transcribe(self) -> str:
        rate = self.asr.feature_extractor.sampling_rate
        clip = {"raw": load_waveform(CLIP, target_rate=rate), "sampling_rate": rate}
        return self.asr(clip, generate_kwargs={"do_sample": False, "num_beams": 1})["text"].strip()

    def read(self, transcript: str, **lengths: int) -> str:
        chat = make_chat(INSTRUCTION, transcript=transcript)
        inputs = self.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True
        ).to(self.llm.device)
        tokens = self.llm.generate(**inputs, do_sample=False, **lengths)[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(tokens, skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="LSM checkpoint. Default: the demo's models, composed.")
    parser.add_argument("--new_tokens", type=int, nargs="+", default=[1, 16, 32], help="lengths of an answer")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of PyTorch")
    parser.add_argument("--repetitions", type=int, default=7, help="answers of each length, each way")
    args = parser.parse_args()

    model, processor = load_model(args.model_name_or_path)
    pipe = LsmPipeline(model=model, processor=processor, device=model.device)
    cascade = Cascade(model, processor)
    figures, loads = [], []
    with tqdm(total=len(args.threads) * len(args.new_tokens) * args.repetitions, unit="answer") as progress:
        for threads in args.threads:
            torch.set_num_threads(threads)
            for new_tokens in args.new_tokens:
                lengths = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
                watch = Stopwatch()
                answer(pipe, cascade, Stopwatch(), lengths)  # warm up
                for _ in range(args.repetitions):
                    answer(pipe, cascade, watch, lengths)
                    progress.update()
                figures.append({"threads": threads, "new_tokens": new_tokens, **compare(watch)})
                loads.append(round(os.getloadavg()[0], 1))
    about = {
        "clip": CLIP.name,
        "transcript": cascade.transcribe(),
        "repetitions": args.repetitions,
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "load_average": loads,
    }
    print(json.dumps({"answers": figures, **about}))


def answer(pipe: LsmPipeline, cascade: Cascade, watch: Stopwatch, lengths: dict[str, int]) -> None:
    """One answer each way."""
    watch.time("pipeline", lambda: pipe(str(CLIP), text=INSTRUCTION, do_sample=False, **lengths))
    transcript = watch.time("transcribing", cascade.transcribe)
    watch.time("reading", lambda: cascade.read(transcript, **lengths))


def compare(watch: Stopwatch) -> dict[str, float]:
    """The figures of one length of answer, in seconds."""
    seconds, cpu_seconds = watch.medians("pipeline")
    cascade_seconds, cascade_cpu_seconds = watch.medians("transcribing", "reading")
    _, transcribing = watch.medians("transcribing")
    _, reading = watch.medians("reading")
    return {
        "ratio": round(seconds / cascade_seconds, 3),
        "ratio_of_cpu_time": round(cpu_seconds / cascade_cpu_seconds, 3),
        "ratio_if_hearing_were_free": round(reading / cascade_cpu_seconds, 3),
        "seconds": round(seconds, 3),
        "cascade_seconds": round(cascade_seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "cascade_cpu_seconds": {"transcribing": round(transcribing, 3), "reading": round(reading, 3)},
    }


if __name__ == "__main__":
    main()
