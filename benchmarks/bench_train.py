"""
How much faster a training step is than the obvious way, and what each measure contributes.

    python -m benchmarks.bench_train

The obvious way: every clip padded to 30 s as Whisper does, rows in random batches, autograd through the encoder,
logits at every position. One measure after another is added to it, the feature cache last. All ways train the same
parts of the same model on the same clips; they take turns, so that whatever else the machine does meets all of them.
Clips are the demo's sentences, read aloud, those of 2 to 8 s. The last line on stdout is a JSON object with the
figures.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers.trainer_pt_utils import get_length_grouped_indices

from demo.fetch_models import fetch_speech_model, fetch_text_model
from demo.synthesize import SAMPLING_RATE, read_sentences, synthesize
from modeling_lsm import LsmForConditionalGeneration, LsmProcessor
from modeling_lsm.augmentation import load_tasks
from modeling_lsm.composing import compose
from modeling_lsm.data.collating import SpeechTextCollator, predicts_label
from modeling_lsm.data.loading import load_rows
from modeling_lsm.data.preparing import prepare_rows
from modeling_lsm.training import FeatureCache, encoder_key, set_trained_parts


SHORTEST, LONGEST = 2.0, 8.0  # seconds


@dataclass
class Way:
    """A way to train, with what it does beyond the one before it."""

    measure: str
    frozen_encoder: bool = True
    own_length: bool = True
    grouped: bool = True
    labelled_only: bool = True
    cached: bool = False


WAYS = [
    Way("obvious", frozen_encoder=False, own_length=False, grouped=False, labelled_only=False),
    Way("no autograd through the encoder", own_length=False, grouped=False, labelled_only=False),
    Way("clips at their own length", grouped=False, labelled_only=False),
    Way("batches of similar length", labelled_only=False),
    Way("logits at labels only"),
    Way("feature cache", cached=True),
]


class Contestant:
    """One way, its batches, and the time it has taken so far."""

    def __init__(self, way: Way, model, processor, rows, cache: FeatureCache, batch_size: int):
        self.way, self.model, self.processor, self.rows = way, model, processor, rows
        self.collator = SpeechTextCollator(
            processor, end_tokens=model.generation_config.eos_token_id, feature_cache=cache if way.cached else None
        )
        generator = torch.Generator().manual_seed(0)
        if way.grouped:
            order = get_length_grouped_indices(rows["length"], batch_size, generator=generator)
        else:
            order = torch.randperm(len(rows), generator=generator).tolist()
        self.batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self.seconds = 0.0

    def step(self, batch: list[int], optimizer: torch.optim.Optimizer) -> None:
        """Trains on a batch, from reading its audio to the optimizer."""
        padding = "longest" if self.way.own_length else "max_length"
        self.processor.encoder_padding = self.model.config.encoder_padding = padding
        self.model.lsm.audio_tower.requires_grad_(not self.way.frozen_encoder)
        self.model.train()
        started = time.perf_counter()
        inputs = {
            key: value.to(self.model.device) for key, value in self.collator([self.rows[i] for i in batch]).items()
        }
        kept = predicts_label(inputs["labels"]) if self.way.labelled_only else 0
        self.model(**inputs, logits_to_keep=kept, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        self.model.zero_grad()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="LSM checkpoint. Default: the demo's models, composed.")
    parser.add_argument("--clips", type=int, default=64, help="clips that each way trains on")
    parser.add_argument("--batch_size", type=int, default=8, help="clips per step")
    parser.add_argument("--train", nargs="+", default=["projector", "llm"], help="parts that train")
    args = parser.parse_args()

    if args.model_name_or_path:
        model = LsmForConditionalGeneration.from_pretrained(args.model_name_or_path)
        processor = LsmProcessor.from_pretrained(args.model_name_or_path)
    else:
        model, processor = compose(str(fetch_speech_model()), str(fetch_text_model()))
    model = model.float().to("cuda" if torch.cuda.is_available() else "cpu")
    set_trained_parts(model, args.train)
    # The learning rate is nothing, so that all ways train one and the same model.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(processor, Path(folder), args.clips)
        cache = FeatureCache(Path(folder) / "cache", encoder_key(model, processor))
        started = time.perf_counter()
        cache.build(rows, model, processor)
        cache_seconds = time.perf_counter() - started
        contestants = [Contestant(way, model, processor, rows, cache, args.batch_size) for way in WAYS]
        for contestant in contestants:  # warm up
            contestant.step(contestant.batches[0], optimizer)
            contestant.seconds = 0.0
        steps = len(contestants[0].batches)
        loads = []
        with tqdm(total=steps * len(WAYS), unit="step") as progress:
            for step in range(steps):
                for contestant in contestants:
                    progress.set_description(contestant.way.measure)
                    contestant.step(contestant.batches[step], optimizer)
                    progress.update()
                loads.append(round(os.getloadavg()[0], 1))

    speeds = {c.way.measure: args.clips / c.seconds for c in contestants}
    measures = [way.measure for way in WAYS]
    figures = {
        "ratio": round(speeds["logits at labels only"] / speeds["obvious"], 2),
        "ratio_with_feature_cache": round(speeds["feature cache"] / speeds["obvious"], 2),
        "gain_of_each_measure": {
            measure: round(speeds[measure] / speeds[before], 2)
            for before, measure in zip(measures, measures[1:], strict=False)
        },
        "samples_per_second": {measure: round(speed, 3) for measure, speed in speeds.items()},
        "cache_built_in_seconds": round(cache_seconds, 1),
        "clips": args.clips,
        "mean_clip_seconds": round(sum(rows["num_samples"]) / len(rows) / SAMPLING_RATE, 2),
        "batch_size": args.batch_size,
        "trained": args.train,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "load_average": loads,
    }
    print(json.dumps(figures))


def make_rows(processor: LsmProcessor, folder: Path, count: int):
    """Transcription rows of `count` clips that last 2 to 8 s."""
    synthesize(read_sentences(), folder)
    wordings = load_tasks(["transcription"], target_language="")[0].instructions
    manifest = folder / "rows.jsonl"
    with open(folder / "metadata.jsonl", encoding="utf-8") as lines, open(manifest, "w", encoding="utf-8") as file:
        rows = [json.loads(line) for line in lines]
        rows = [row for row in rows if SHORTEST <= row["duration"] <= LONGEST][:count]
        if len(rows) < count:
            raise ValueError(f"--clips is {count}, but only {len(rows)} of the clips last 2 to 8 s.")
        for index, row in enumerate(rows):
            row = {**row, "instruction": wordings[index % len(wordings)], "target": row["text"]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return prepare_rows(load_rows(manifest), processor)


if __name__ == "__main__":
    main()
