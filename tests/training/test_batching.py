import json
import multiprocessing
import os
import socket
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from trl import SFTConfig, SFTTrainer

from modeling_lsm.training.batching import (
    EndlessStream,
    GroupedBatchSampler,
    grouped_dataloader,
    stream_dataloader,
)
from tests import tiny


def random_lengths(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 400, count)


# ---- the sampler ----


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
def test_every_row_comes_once_in_an_epoch(num_processes):
    lengths = random_lengths(1000)
    samplers = [GroupedBatchSampler(lengths, 2000, 0, num_processes, index) for index in range(num_processes)]
    for epoch in range(3):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        batches = [list(sampler) for sampler in samplers]
        assert {len(part) for part in batches} == {len(samplers[0])}
        assert sorted(row for part in batches for batch in part for row in batch) == list(range(1000))
        assert all(len(batch) * lengths[batch].max() <= 2000 for part in batches for batch in part)


def test_batches_are_full_and_waste_little():
    """As measured against random batches of the same size on average."""
    lengths = random_lengths(5000)
    batches = list(GroupedBatchSampler(lengths, 4000))
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.05 * lengths.sum()
    assert padded > 0.9 * 4000 * len(batches)


def test_order_follows_from_seed_and_epoch():
    lengths = random_lengths(300)

    def batches(seed, epoch):
        sampler = GroupedBatchSampler(lengths, 1000, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(0, 1) == batches(0, 1)
    assert batches(0, 0) != batches(0, 1)
    assert batches(0, 0) != batches(1, 0)
    together = [{frozenset(batch) for batch in batches(0, epoch)} for epoch in range(2)]
    assert len(together[0] & together[1]) < len(together[0]) / 2  # other rows share a batch
    longest = [lengths[batch].max() for batch in batches(0, 0)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_single_rows_that_do_not_divide_come_twice():
    samplers = [GroupedBatchSampler([9, 9, 9], 10, 0, 2, index) for index in range(2)]
    rows = [row for sampler in samplers for batch in sampler for row in batch]
    assert [len(sampler) for sampler in samplers] == [2, 2]
    assert len(rows) == 4 and set(rows) == {0, 1, 2}


def test_too_long_a_row_is_named():
    with pytest.raises(ValueError, match=r"Row 1 has 101 tokens, more than .* max_tokens=100\. Raise"):
        GroupedBatchSampler([7, 101], 100)
    assert sorted(GroupedBatchSampler([7, 101], 101)) == [[0], [1]]
    with pytest.raises(ValueError, match="no rows"):
        GroupedBatchSampler([], 100)


# ---- in a trainer ----


class Collator:
    """Rows with numbers for text; it remembers which rows it was given."""

    def __init__(self):
        self.rows: list[list[int]] = []

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        self.rows.append([row["row"] for row in rows])
        longest = max(row["length"] for row in rows)
        mask = torch.tensor([[1] * row["length"] + [0] * (longest - row["length"]) for row in rows])
        ids = (torch.arange(longest) + torch.tensor([[row["row"]] for row in rows])) % 250 + 5
        labels = torch.where(mask.bool(), ids, -100)
        labels[:, 0] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class BatchingTrainer(SFTTrainer):
    max_tokens = 60
    skip_batches = 0

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, IterableDataset):
            return stream_dataloader(
                self.train_dataset, self.data_collator, self.args, self.accelerator, self.skip_batches
            )
        return grouped_dataloader(self.train_dataset, self.data_collator, self.args, self.max_tokens, self.accelerator)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append((inputs["input_ids"][:, 0] - 5).tolist())
        self.labels.append((int((inputs["labels"] != -100).sum()), int(num_items_in_batch)))
        return super().training_step(model, inputs, num_items_in_batch)


def make_rows(count: int = 40) -> Dataset:
    return Dataset.from_dict({"row": range(count), "length": random_lengths(count) % 25 + 3})


def make_trainer(rows, folder: Path, **kwargs) -> BatchingTrainer:
    args = SFTConfig(
        output_dir=str(folder),
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **{"learning_rate": 1e-2, "save_strategy": "no", **kwargs},
    )
    model = tiny.make_llm(attention_dropout=0.1)  # so that the random numbers must be the same, too
    collator = Collator()
    trainer = BatchingTrainer(
        model, args, train_dataset=rows, processing_class=tiny.make_tokenizer(), data_collator=collator
    )
    trainer.batches, trainer.labels = [], []
    return trainer


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def same_weights(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_trainer_sees_every_row_in_every_epoch_and_resumes_in_the_same_place(tmp_path):
    rows = make_rows()
    settings = {"num_train_epochs": 3, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(rows, tmp_path, **settings)
    whole.train()
    per_epoch = len(whole.batches) // 3
    steps_per_epoch = -(-per_epoch // 2)
    assert whole.state.global_step == 3 * steps_per_epoch
    epochs = [whole.batches[start : start + per_epoch] for start in range(0, len(whole.batches), per_epoch)]
    assert all(sorted(flat(epoch)) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    for start in range(0, len(epochs[0]), 2):  # the labels of all accumulated batches count
        counts = whole.labels[start : min(start + 2, per_epoch)]
        assert {items for _, items in counts} == {sum(labels for labels, _ in counts)}

    steps = [step for step in range(3, whole.state.global_step, 3) if step % steps_per_epoch]
    for step in (steps[0], steps[-1]):  # in the first epoch and in the last
        resumed = make_trainer(rows, tmp_path, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        done = step // steps_per_epoch * per_epoch + step % steps_per_epoch * 2
        assert resumed.batches == whole.batches[done:]
        assert resumed.data_collator.rows == whole.data_collator.rows[done:]  # nothing else was read
        assert same_weights(resumed.model, whole.model)


@pytest.mark.parametrize(("skips", "num_workers"), [("rows", 0), ("rows", 2), ("batches", 2)])
def test_trainer_resumes_a_stream_in_the_same_place(skips, num_workers, tmp_path):
    stream = make_rows().to_iterable_dataset(num_shards=4)
    settings = {
        "max_steps": 11,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 9,
        "dataloader_num_workers": num_workers,
    }
    whole = make_trainer(stream, tmp_path, **settings)
    whole.train()
    assert len(whole.batches) == 22  # 66 rows: the second epoch has begun
    if num_workers == 0:
        assert sorted(flat(whole.batches)[:40]) == list(range(40))
        assert flat(whole.batches)[:26] != flat(whole.batches)[40:]

    resumed = make_trainer(stream, tmp_path, **settings, ignore_data_skip=skips == "rows")
    resumed.skip_batches = 18 if skips == "rows" else 0
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert resumed.batches == whole.batches[18:]
    assert same_weights(resumed.model, whole.model)
    if skips == "rows" and num_workers == 0:
        assert resumed.data_collator.rows[:4] == whole.batches[18:]


def test_a_stream_has_no_more_workers_than_files(tmp_path):
    stream = make_rows().to_iterable_dataset(num_shards=2)
    trainer = make_trainer(stream, tmp_path, max_steps=1, dataloader_num_workers=3)
    assert trainer.get_train_dataloader().num_workers == 2


def test_a_stream_without_rows_is_named():
    stream = make_rows(3).to_iterable_dataset()
    assert len(list(islice(EndlessStream(stream, 0, 2, 1), 5))) == 5
    with pytest.raises(ValueError, match=r"no rows for process 3 of 4\. Use fewer"):
        next(iter(EndlessStream(stream, 0, 4, 3)))


# ---- in two processes ----


def train_one_of_two(rank: int, port: int, folder: Path, num_shards: int, resume_step: int, settings: dict) -> None:
    """Trains on the rows, or on a stream of `num_shards` files, and writes down what it saw."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    rows = make_rows().to_iterable_dataset(num_shards=num_shards) if num_shards else make_rows()
    trainer = make_trainer(rows, folder, ignore_data_skip=bool(num_shards), **settings)
    trainer.skip_batches = resume_step
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{resume_step}") if resume_step else None)
    assert trainer.accelerator.num_processes == 2
    weights = [float(parameter.double().sum()) for parameter in trainer.model.parameters()]
    seen = {"batches": trainer.batches, "labels": trainer.labels, "weights": weights}
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


def train_two(folder: Path, num_shards: int = 0, resume_step: int = 0, **settings) -> list[dict]:
    """What each of two processes saw that trained together."""
    # Not forked from here: autograd does not work in the children of a process that has used it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    processes = [
        context.Process(target=train_one_of_two, args=(rank, port, folder, num_shards, resume_step, settings))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_share_the_rows_under_a_token_budget(tmp_path):
    settings = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    whole = train_two(tmp_path, **settings)
    per_epoch = len(whole[0]["batches"]) // 2
    assert len(whole[1]["batches"]) == 2 * per_epoch
    for epoch in (slice(per_epoch), slice(per_epoch, None)):
        assert sorted(flat(whole[0]["batches"][epoch]) + flat(whole[1]["batches"][epoch])) == list(range(40))
    for start in range(0, per_epoch, 2):  # the labels of all accumulated batches of both processes count
        counts = [pair for seen in whole for pair in seen["labels"][start : min(start + 2, per_epoch)]]
        assert {items for _, items in counts} == {sum(labels for labels, _ in counts)}
    assert whole[0]["weights"] == whole[1]["weights"]

    steps_per_epoch = -(-per_epoch // 2)
    step = next(step for step in (6, 9) if step % steps_per_epoch)
    done = step // steps_per_epoch * per_epoch + step % steps_per_epoch * 2
    for before, after in zip(whole, train_two(tmp_path, resume_step=step, **settings), strict=True):
        assert after["batches"] == before["batches"][done:]
        assert after["weights"] == before["weights"]


@pytest.mark.slow
@pytest.mark.parametrize(("num_shards", "num_workers"), [(4, 0), (4, 2), (3, 0)])  # 3: shared row by row
def test_two_processes_share_a_stream(num_shards, num_workers, tmp_path):
    settings = {"max_steps": 20, "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 13}
    if num_workers:
        settings |= {"dataloader_num_workers": num_workers, "dataloader_multiprocessing_context": "fork"}
    whole = train_two(tmp_path, num_shards, **settings)
    assert sorted(flat(whole[0]["batches"]) + flat(whole[1]["batches"])) == list(range(40))
    for before, after in zip(whole, train_two(tmp_path, num_shards, resume_step=13, **settings), strict=True):
        assert after["batches"] == before["batches"][13:]
        assert after["weights"] == before["weights"]
