"""The warm-up of the projector: what it learns, what it leaves alone, and what an interrupted one ends with."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from datasets import Dataset
from safetensors.torch import load_file

from modeling_lsm.composing import new_projector
from modeling_lsm.training import ctc, feature_cache
from modeling_lsm.training.alignment import align, draw_batches
from modeling_lsm.training.ctc import alignable_rows, tokenize_transcripts
from tests import tiny


ROOT = Path(__file__).parents[2]
WORDS = ["a cat", "no", "it rains", "stop"]
PROJECTORS = {
    "qformer": {"window_size": 8, "num_queries": 2},
    "mlp": {"projector_type": "mlp", "window_size": 4, "projector_hidden_size": 64},
    "conv": {"projector_type": "conv", "window_size": 4},
    "transformer": {"projector_type": "transformer", "window_size": 4},
}


def make_rows(texts: list[str] = WORDS, seconds: float = 1.0) -> Dataset:
    """Clips of noise with words, as `prepare_rows` leaves them, but with samples for audio."""
    waveforms = [tiny.noise(seconds + 0.1 * index, index) for index in range(len(texts))]
    return Dataset.from_list(
        [
            {
                "audio": {"array": waveform, "sampling_rate": tiny.SAMPLING_RATE},
                "text": text,
                "num_samples": len(waveform),
                "audio_hash": f"{index:064x}",
            }
            for index, (text, waveform) in enumerate(zip(texts, waveforms, strict=True))
        ]
    )


def make_pair(projector: str = "mlp", **kwargs):
    """A tiny model with a projector as composing makes it, and its processor."""
    model, processor = tiny.make_pair(**{**PROJECTORS[projector], **kwargs})
    torch.manual_seed(0)
    model.lsm.projector = new_projector(model)
    return model, processor


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "alignment" / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("projector, bf16", [*((projector, False) for projector in PROJECTORS), ("transformer", True)])
def test_learns_the_words_of_a_few_clips_and_changes_the_projector_alone(projector, bf16, tmp_path):
    model, processor = make_pair(projector)
    rows, before, random_state = make_rows(), weights(model), torch.get_rng_state()
    entries = []
    figures = align(
        model,
        processor,
        rows,
        tmp_path,
        steps=150,
        batch_size=4,
        learning_rate=1e-2,
        held_out_rows=rows,
        eval_steps=75,
        bf16=bf16,
        log=entries.append,
    )
    assert entries == read_log(tmp_path)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < 0.2 * losses[0]
    assert [entry["step"] for entry in entries if "wer" in entry] == [75, 150]
    assert figures["wer"] == 0.0 and figures["step"] == 150 and figures["clips"] == 4
    assert [heard for _, heard in figures["examples"]] == WORDS
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.startswith("lsm.projector.")), name


def test_a_sample_of_the_labels_stands_for_all(monkeypatch):
    """Told apart from a few of the others at a time, and these weighing more, words have about the same loss."""
    embeddings = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    head = ctc.EmbeddingCtcHead(embeddings)
    vectors, labels = 0.3 * embeddings[[7, 50, 300]], torch.tensor([50, 7, 300, 50])
    whole = head(vectors)[range(3), [7, 50, 300]]
    everything, no_weights = head.sample(labels)
    assert everything.tolist() == list(range(1, 400)) and not no_weights.any()

    monkeypatch.setattr(ctc, "NUM_OTHER_LABELS", 40)
    drawn = []
    for seed in range(2000):
        torch.manual_seed(seed)
        chosen, log_weights = head.sample(labels)
        assert len(chosen.unique()) == 43 and {7, 50, 300} < set(chosen.tolist()) and ctc.BLANK not in chosen
        assert set(chosen[log_weights == 0].tolist()) == {7, 50, 300}
        log_probs = head(vectors, chosen, log_weights)
        assert torch.allclose(log_probs.exp().sum(-1), torch.ones(3))
        drawn.append(log_probs[range(3), torch.searchsorted(chosen, torch.tensor([7, 50, 300])) + 1])
    # 1 / probability is the partition function, whose mean over samples is exact.
    torch.testing.assert_close((-torch.stack(drawn)).exp().mean(0), (-whole).exp(), rtol=0.05, atol=0)


def test_learns_from_samples_of_the_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(ctc, "NUM_OTHER_LABELS", 2)
    model, processor = make_pair()
    rows = make_rows()
    figures = align(model, processor, rows, tmp_path, steps=300, batch_size=2, learning_rate=3e-3, held_out_rows=rows)
    assert figures["vocabulary"] > 6 and figures["wer"] == 0.0


def test_vectors_lie_where_the_words_lie_and_blanks_at_the_filler(tmp_path):
    """What the LLM will be given, beside what it knows."""
    model, processor = make_pair()
    rows = make_rows()
    align(model, processor, rows, tmp_path, steps=300, batch_size=4, learning_rate=1e-2)
    embeddings = model.get_input_embeddings().weight.detach()
    for row in rows:
        inputs = processor(audio=[np.array(row["audio"]["array"])])
        with torch.no_grad():
            vectors = model.get_audio_features(**inputs).pooler_output
        tokens = processor.tokenizer("_" + row["text"])["input_ids"]
        distances, nearest = torch.cdist(vectors, embeddings).min(dim=-1)
        assert set(tokens[1:]) <= set(nearest.tolist()) <= set(tokens), row["text"]
        assert distances.mean() < 0.5 * embeddings[tokens].norm(dim=-1).mean()


def test_an_underscore_in_a_transcript_is_not_spoken(tmp_path):
    model, processor = make_pair()
    rows = make_rows(["a_b", "_", "c__"])
    assert align(model, processor, rows, tmp_path, steps=1, batch_size=1)["vocabulary"] == 4


def test_transcripts_have_the_tokens_that_they_have_in_a_prompt(processor):
    texts = ["two words", " naïve ", "it’s\nso", "ok"]
    tokens = tokenize_transcripts(processor.tokenizer, texts)
    for text, sequence in zip(texts, tokens, strict=True):
        assert processor.tokenizer.decode(sequence) == text.strip()
        prompt = processor.tokenizer("Write.\n\n" + text.strip())["input_ids"]
        assert prompt[-len(sequence) :] == sequence


def test_rows_without_words_or_with_too_many_are_left_out(tmp_path, caplog):
    model, processor = make_pair()
    texts = [*WORDS * 10, "", "as many letters as no clip of one second has vectors"]
    rows = make_rows(texts, seconds=0.8)
    rows = rows.remove_columns("num_samples").add_column("num_samples", [*[16_000] * 40, 16_000, 8_000])
    figures = align(model, processor, rows, tmp_path, steps=1, batch_size=2)
    assert figures["clips"] == 40 and figures["clips_left_out"] == 2
    assert "leaves out 2 of 42 rows" in caplog.text


def test_an_equal_token_twice_needs_a_vector_between():
    _, processor = tiny.make_pair(window_size=25)  # 2 vectors per second
    rows = make_rows(["abcd", "abba", "abc"] * 2, seconds=1.6)
    rows = rows.remove_columns("num_samples").add_column("num_samples", [32_000] * 6)
    tokens = tokenize_transcripts(processor.tokenizer, rows["text"][:])
    with pytest.raises(ValueError, match=r"^2 of 6 clips have more words than vectors"):
        alignable_rows(processor, rows, tokens)
    assert alignable_rows(processor, rows.select([0, 2]), [tokens[0], tokens[2]]) == [0, 1]


def test_too_few_vectors_per_second_are_refused(tmp_path):
    model, processor = make_pair("qformer", window_size=17, num_queries=1)
    with pytest.raises(
        ValueError,
        match=r"^2 of 4 clips have more words than vectors: the projector makes 3\.\d vectors per second, the "
        r"transcripts have 4\.\d tokens per second.*smaller --window_size \(it is 17; .*--num_queries \(it is 1\)",
    ):
        align(model, processor, make_rows(), tmp_path, steps=1, batch_size=2)


def test_rows_that_do_not_fill_a_batch_are_refused(tmp_path):
    model, processor = make_pair()
    with pytest.raises(ValueError, match="takes 8 clips on each of 1 processes, but there are only 4"):
        align(model, processor, make_rows(), tmp_path, steps=1, batch_size=8)
    with pytest.raises(ValueError, match="None of 4 rows has speech and, in its column `text`, words"):
        align(model, processor, make_rows(["", " ", "", ""]), tmp_path, steps=1, batch_size=8)


def test_every_row_comes_once_before_any_comes_again():
    lengths = torch.randint(1, 100, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = draw_batches(lengths, 4, 30, seed=1)
    assert sorted(sum(batches[:15], [])) == sorted(sum(batches[15:], [])) == list(range(60))
    assert batches[:15] != batches[15:] and batches == draw_batches(lengths, 4, 30, seed=1)
    assert batches != draw_batches(lengths, 4, 30, seed=2)
    spreads = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert sum(spreads) / len(spreads) < 35  # 60 for random batches


def test_a_feature_cache_takes_the_place_of_the_encoder(tmp_path):
    """Also with clips that take several chunks."""
    audio_config = tiny.whisper_config(max_source_positions=52).to_dict()  # 1.04 s
    results = []
    for use_cache in (False, True):
        model, processor = make_pair(audio_config=audio_config)
        processor.max_encoder_frames = 52
        rows, cache = make_rows(seconds=0.9), None
        if use_cache:
            cache = feature_cache.FeatureCache(tmp_path, feature_cache.encoder_key(model, processor))
            cache.build(rows, model, processor)
            assert [len(cache.load(audio_hash)) for audio_hash in rows["audio_hash"]] == [1, 1, 2, 2]
            rows = rows.remove_columns("audio").add_column("audio", [None] * len(rows))
        figures = align(
            model, processor, rows, tmp_path / str(use_cache), 5, 2, held_out_rows=rows, feature_cache=cache
        )
        results.append((figures["loss"], figures["examples"], weights(model.lsm.projector)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5) and results[0][1] == results[1][1]
    for name, tensor in results[0][2].items():
        torch.testing.assert_close(tensor, results[1][2][name], rtol=1e-3, atol=1e-4)


def test_an_interrupted_warm_up_goes_on_and_a_finished_one_is_not_repeated(tmp_path):
    class Interruption(Exception):
        pass

    def interrupt(entry):
        if entry["step"] == 11:
            raise Interruption

    def run(folder, **kwargs):
        model, processor = make_pair(projector_dropout=0.2)
        figures = align(
            model, processor, make_rows(), folder, 14, 2, save_steps=4, logging_steps=1, eval_steps=4, **kwargs
        )
        return figures, weights(model.lsm.projector)

    whole_figures, whole = run(tmp_path / "whole", held_out_rows=make_rows())
    with pytest.raises(Interruption):
        run(tmp_path / "stopped", held_out_rows=make_rows(), log=interrupt)
    (tmp_path / "stopped" / "alignment" / "partial").mkdir()  # of a checkpoint that was being written
    steps = []
    figures, again = run(
        tmp_path / "stopped", held_out_rows=make_rows(), log=lambda entry: steps.append(entry["step"])
    )
    assert steps == list(range(9, 15))
    assert [entry["step"] for entry in read_log(tmp_path / "stopped")] == list(range(1, 15))
    assert figures["loss"] == whole_figures["loss"] and figures["wer"] == whole_figures["wer"]
    assert all(torch.equal(whole[name], again[name]) for name in whole)

    figures, third = run(tmp_path / "stopped", held_out_rows=make_rows(), log=steps.append)
    assert len(steps) == 6 and figures["loss"] == whole_figures["loss"]
    assert all(torch.equal(whole[name], third[name]) for name in whole)


def test_a_folder_of_another_warm_up_is_refused(tmp_path):
    model, processor = make_pair()
    align(model, processor, make_rows(), tmp_path, steps=2, batch_size=2)
    with pytest.raises(ValueError, match="other settings: steps was 2, now 3"):
        align(model, processor, make_rows(), tmp_path, steps=3, batch_size=2)
    with pytest.raises(ValueError, match="other settings: transcripts was"):
        align(model, processor, make_rows(["b", *WORDS[1:]]), tmp_path, steps=2, batch_size=2)
    model, processor = make_pair(projector_hidden_size=32)
    with pytest.raises(ValueError, match="projector_hidden_size was 64, now 32"):
        align(model, processor, make_rows(), tmp_path, steps=2, batch_size=2)


def test_weights_in_bfloat16_stay_so(tmp_path):
    model, processor = make_pair()
    model.to(torch.bfloat16)
    before = weights(model.lsm.projector)
    align(model, processor, make_rows(), tmp_path, steps=3, batch_size=4, learning_rate=1e-2)
    after = weights(model.lsm.projector)
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    assert not torch.equal(before["output.weight"], after["output.weight"])


# Run by the tests below in processes of its own.
def run_alone(folder: str, steps: int = 40) -> None:
    model, processor = make_pair()
    align(model, processor, make_rows(), folder, steps, 2, save_steps=5, logging_steps=1)


def run_in_parallel(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model, processor = make_pair()
    align(
        model, processor, make_rows(), folder, 6, 2, logging_steps=1, held_out_rows=make_rows(WORDS[:3]), eval_steps=3
    )
    torch.save(weights(model.lsm.projector), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_with_a_double_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "two").mkdir()
    mp.spawn(run_in_parallel, (str(tmp_path / "two"), port), nprocs=2)
    model, processor = make_pair()
    align(
        model,
        processor,
        make_rows(),
        tmp_path / "one",
        6,
        4,
        logging_steps=1,
        held_out_rows=make_rows(WORDS[:3]),
        eval_steps=3,
    )
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert [entry["step"] for entry in two] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(one, two, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours.get("wer") == theirs.get("wer") and ours.get("examples") == theirs.get("examples")
    first, second = (torch.load(tmp_path / "two" / f"rank{rank}.pt") for rank in (0, 1))
    for name, tensor in weights(model.lsm.projector).items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_killed_and_started_again_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def start(name: str) -> subprocess.Popen:
        code = f"from tests.training.test_alignment import run_alone; run_alone({str(tmp_path / name)!r})"
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)

    assert start("whole").wait(300) == 0
    process = start("killed")
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / "alignment" / "step-10").is_dir():
        assert process.poll() is None, "the warm-up ended before it could be killed"
        assert time.monotonic() < deadline, "the warm-up made no checkpoint"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "alignment" / "step-40").exists()
    assert start("killed").wait(300) == 0
    files = [tmp_path / name / "alignment" / "step-40" / "projector.safetensors" for name in ("whole", "killed")]
    whole, again = map(load_file, files)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert [entry["step"] for entry in read_log(tmp_path / "killed")] == list(range(1, 41))
