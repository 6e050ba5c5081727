"""
Alignment warm-up: trains the projector alone, with CTC against the LLM's own input embeddings. The LLM never runs.

Every vector that the projector makes is compared with the input embeddings of the tokens that the transcripts have,
zero being CTC's blank, and is drawn to the embedding that it is recognized as. Afterwards speech lies where the LLM's
words lie, and training with the LLM starts from there.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..configuration_lsm import PROJECTOR_SETTINGS
from ..evaluation import word_error_rate
from ..files import claim_folder, write_atomically
from ..modeling_lsm import LsmForConditionalGeneration
from ..processing_lsm import LsmProcessor
from .ctc import BLANK, Aligner, AlignmentCollator, alignable_rows, make_vocabulary, tokenize_transcripts, whole


logger = logging.getLogger(__name__)

WARMUP_SHARE = 0.05
MAX_GRAD_NORM = 1.0
NUM_EXAMPLES = 4


def align(
    model: LsmForConditionalGeneration,
    processor: LsmProcessor,
    rows: Dataset,
    output_dir: str | os.PathLike,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    held_out_rows: Dataset | None = None,
    eval_steps: int = 500,
    save_steps: int = 500,
    logging_steps: int = 10,
    feature_cache: Any = None,
    bf16: bool = False,
    num_workers: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    log: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """
    Trains the projector of `model` in place so that speech lies where the LLM's words lie.

    Started again in the same folder it goes on from its last checkpoint; once finished it only takes the result. Where
    `torch.distributed` is initialized, the processes share the work.

    Args:
        model ([`LsmForConditionalGeneration`]): Only its projector changes. Its weights may be spread by ZeRO-3.
        processor ([`LsmProcessor`]): The processor that belongs to it.
        rows (`datasets.Dataset`): Speech and its words, as [`prepare_rows`] leaves them: columns `audio`, `text`,
            `num_samples`, and `audio_hash` if there is a `feature_cache`. Rows without speech or words are left out.
        output_dir (`str` or `os.PathLike`): Folder of the training; the warm-up keeps its files in `alignment/` there.
        steps (`int`): Batches to train on.
        batch_size (`int`, *optional*, defaults to 32): Clips per batch and process.
        learning_rate (`float`, *optional*, defaults to 1e-3): Highest learning rate; it warms up and decays to 0.
        held_out_rows (`datasets.Dataset`, *optional*): Rows, as above, whose words are recognized now and then.
        eval_steps, save_steps, logging_steps (`int`, *optional*): Steps from one evaluation, checkpoint or log entry
            to the next. The last step is always followed by all three.
        feature_cache ([`FeatureCache`], *optional*): The encoder's output for all rows; without it the encoder runs.
        bf16 (`bool`, *optional*, defaults to `False`): Whether the projector computes in mixed precision.
        num_workers (`int`, *optional*, defaults to 0): Processes that read audio, or cached features.
        seed (`int`, *optional*, defaults to 0): Seed of the order of the rows and of dropout.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where to train.
        log (`Callable`, *optional*): Called with every entry of the log, on the first process.

    Returns:
        `dict`: The latest log figures: `step`, `loss`, `clips_per_second`, and `wer` and `examples` (pairs of what was
        said and what was recognized) if there are held-out rows; with them `clips`, `clips_left_out`, `vocabulary`
        (how many labels), and `unknown_held_out_tokens` (share of the held-out tokens that no transcript has).

    Raises:
        ValueError: If the projector makes too few vectors per second, there are too few rows, or the folder belongs
            to a warm-up with other settings.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows, tokens, figures = choose_rows(processor, rows, batch_size, world_size)
    clips_per_step = batch_size * world_size
    vocabulary = make_vocabulary(processor.tokenizer, tokens)
    label_of = {token: label for label, token in enumerate(vocabulary)}
    figures["vocabulary"] = len(vocabulary)
    if held_out_rows is not None:
        said = list(chain.from_iterable(tokenize_transcripts(processor.tokenizer, held_out_rows["text"][:])))
        figures["unknown_held_out_tokens"] = sum(token not in label_of for token in said) / max(1, len(said))

    folder = Path(output_dir) / "alignment"
    projector = model.config.projector_config
    projector_settings = {name: getattr(projector, names[0]) for name, names in PROJECTOR_SETTINGS.items()}
    settings = {
        "steps": steps,
        "clips_per_step": clips_per_step,
        "learning_rate": learning_rate,
        "seed": seed,
        "bf16": bf16,
        "transcripts": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
        **projector_settings,
        "window_size": model.config.window_size,
        "num_queries": model.config.num_queries,
    }
    claim_folder(folder, "settings.json", settings)

    with torch.random.fork_rng():  # what is trained next draws the same numbers with and without a warm-up
        aligner = Aligner(model, vocabulary, feature_cache is None, bf16).to(device)
        trained = {name: parameter for name, parameter in aligner.named_parameters() if parameter.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate, weight_decay=0.0)
        scheduler = get_cosine_schedule_with_warmup(optimizer, round(WARMUP_SHARE * steps), steps)
        start, figures = load_checkpoint(folder, trained, optimizer, scheduler) or (0, figures)
        batches = draw_batches(rows["num_samples"][:], clips_per_step, steps, seed)[start:]
        labels = [[label_of[token] for token in sequence if label_of[token] != BLANK] for sequence in tokens]
        loader = DataLoader(
            range(len(rows)),
            batch_sampler=[batch[rank::world_size] for batch in batches],
            collate_fn=AlignmentCollator(processor, rows, labels, feature_cache),
            num_workers=num_workers,
        )
        losses, started = [], time.perf_counter()
        progress = tqdm(loader, desc="Aligning", initial=start, total=steps, unit="step", disable=rank != 0)
        for step, batch in enumerate(progress, start=start + 1):
            torch.manual_seed(seed + step * world_size + rank)  # dropout, the same after a resume
            optimizer.zero_grad()
            loss = aligner.loss({key: value.to(device) for key, value in batch.items()})
            loss.backward()
            losses.append(average_over_processes(loss.detach(), trained.values()))
            nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM)
            optimizer.step()
            scheduler.step()
            progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)

            entry: dict[str, Any] = {}
            if step % logging_steps == 0 or step == steps:
                entry["loss"] = sum(losses) / len(losses)
                entry["clips_per_second"] = len(losses) * clips_per_step / (time.perf_counter() - started)
                losses, started = [], time.perf_counter()
            if held_out_rows is not None and (step % eval_steps == 0 or step == steps):
                pause = time.perf_counter()
                entry |= evaluate(aligner, processor, vocabulary, held_out_rows, feature_cache, batch_size, device)
                started += time.perf_counter() - pause
            if entry:
                entry = {"step": step, **entry}
                figures = {**figures, **entry}
                if rank == 0:
                    write_log(folder, entry)
                if rank == 0 and log is not None:
                    log(entry)
            if rank == 0 and (step % save_steps == 0 or step == steps):
                save_checkpoint(folder, step, figures, trained, optimizer, scheduler)

        projector = model.lsm.projector
        with whole(projector.parameters(), write_from=0), torch.no_grad():
            projector.load_state_dict(aligner.projector.state_dict())
    return figures


def choose_rows(
    processor: LsmProcessor, rows: Dataset, batch_size: int, world_size: int
) -> tuple[Dataset, list[list[int]], dict[str, Any]]:
    """The rows that can be aligned, the tokens of their transcripts, and how many rows there are and are not."""
    tokens = tokenize_transcripts(processor.tokenizer, rows["text"][:])
    alignable = alignable_rows(processor, rows, tokens)
    left_out = len(rows) - len(alignable)
    if left_out:
        logger.warning(
            "The alignment leaves out %d of %d rows: no speech, no words, or more words than vectors.",
            left_out,
            len(rows),
        )
    if len(alignable) < batch_size * world_size:
        raise ValueError(
            f"A batch of the alignment takes {batch_size} clips on each of {world_size} processes, but there are only "
            f"{len(alignable)} in all. Use a smaller batch."
        )
    figures = {"clips": len(alignable), "clips_left_out": left_out}
    return rows.select(alignable), [tokens[index] for index in alignable], figures


def evaluate(
    aligner: Aligner,
    processor: LsmProcessor,
    vocabulary: list[int],
    rows: Dataset,
    feature_cache: Any,
    batch_size: int,
    device: torch.device | str,
) -> dict[str, Any]:
    """`wer` of what is recognized in `rows`, and some `examples` of it."""
    collator = AlignmentCollator(processor, rows, [[]] * len(rows), feature_cache)
    recognized = [
        processor.tokenizer.decode([vocabulary[label] for label in path]).strip()
        for path in recognize(aligner, collator, batch_size, device)
    ]
    references = rows["text"][:]
    examples = [list(pair) for pair in zip(references, recognized, strict=True)][:NUM_EXAMPLES]
    return {"wer": word_error_rate(recognized, references), "examples": examples}


def draw_batches(lengths: list[int], batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """`steps` batches of `batch_size` rows of about the same length; none comes again before the others have come."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[list[int]] = []
    while len(batches) < steps:
        order = get_length_grouped_indices(lengths, batch_size, generator=generator)
        epoch = [order[start : start + batch_size] for start in range(0, len(order) - batch_size + 1, batch_size)]
        batches += [epoch[index] for index in torch.randperm(len(epoch), generator=generator).tolist()]
    return batches[:steps]


def average_over_processes(loss: torch.Tensor, parameters: Iterable[nn.Parameter]) -> float:
    """Replaces gradients by their mean over the processes; returns the mean of the losses."""
    if dist.is_initialized():
        for tensor in [loss, *(parameter.grad for parameter in parameters)]:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()
    return loss.item()


def recognize(
    aligner: Aligner, collator: AlignmentCollator, batch_size: int, device: torch.device | str
) -> list[list[int]]:
    """The labels that CTC, greedily decoded, finds in each row of `collator`; the processes share the work."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    lengths = collator.rows["num_samples"][:]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    aligner.eval()
    paths = {}
    for indices in batches[rank::world_size]:
        batch = {key: value.to(device) for key, value in collator(indices).items()}
        paths |= zip(indices, aligner.recognize(batch), strict=True)
    aligner.train()
    if world_size > 1:
        shares: list[dict[int, list[int]]] = [{}] * world_size
        dist.all_gather_object(shares, paths)
        paths = {index: path for share in shares for index, path in share.items()}
    return [paths[index] for index in range(len(lengths))]


def write_log(folder: Path, entry: dict[str, Any]) -> None:
    """Adds an entry to the log, in the place of what a run that was killed wrote of this step and later ones."""
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for line in lines if json.loads(line)["step"] < entry["step"]]
    write_atomically(path, "".join(f"{line}\n" for line in [*kept, json.dumps(entry, ensure_ascii=False)]).encode())


def save_checkpoint(
    folder: Path,
    step: int,
    figures: dict[str, Any],
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Writes a checkpoint that has its name only once it is whole, and removes the ones before it."""
    partial, path = folder / "partial", folder / f"step-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file({name: parameter.detach() for name, parameter in trained.items()}, partial / "projector.safetensors")
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, partial / "optimizer.pt")
    (partial / "figures.json").write_text(json.dumps(figures, indent=2, ensure_ascii=False), encoding="utf-8")
    os.rename(partial, path)
    for older in set(folder.glob("step-*")) - {path}:
        shutil.rmtree(older)


def load_checkpoint(
    folder: Path,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> tuple[int, dict[str, Any]] | None:
    """Takes up the last checkpoint in `folder`, if there is one, and returns its step and figures."""
    steps = [int(path.name.removeprefix("step-")) for path in folder.glob("step-*")]
    if not steps:
        return None
    path = folder / f"step-{max(steps)}"
    weights = load_file(path / "projector.safetensors")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    states = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(states["optimizer"])
    scheduler.load_state_dict(states["scheduler"])
    return max(steps), json.loads((path / "figures.json").read_text(encoding="utf-8"))


__all__ = ["align"]
