"""`eval.py` as a user runs it: figures, reports, resuming, recomputing, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
from huggingface_hub import ModelCard, constants
from tokenizers.pre_tokenizers import ByteLevel
from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

import eval as script
from modeling_lsm import LsmPipeline
from modeling_lsm.composing import compose
from modeling_lsm.evaluation.checks import CHECKS
from modeling_lsm.evaluation.systems import LsmSystem
from tests import tiny


ROOT = Path(__file__).parent.parent
TAKEN = ("lsm", "cascade", "text", "untrained", "vanilla-text")  # names with a meaning of their own


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder of six clips of noise, one of which is damaged, with labels, translations and choices."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    for index in range(6):
        soundfile.write(folder / f"{index}.wav", tiny.noise(0.3 + 0.2 * index, index), tiny.SAMPLING_RATE)
        row = {"audio": f"{index}.wav", "text": f"this is number {index}", "translation": f"das ist Nummer {index}"}
        row |= {"sentiment": ("positive", "negative")[index % 2], "question": "Is it even?", "answer": index % 2 == 0}
        rows.append(row)
    (folder / "5.wav").write_bytes(b"RIFF")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluate(model, dataset, output_dir, **kwargs) -> dict:
    settings = {"max_new_tokens": 6, "resamples": 50, **kwargs}
    script.main(script.EvalArguments(str(output_dir), str(model), str(dataset), **settings))
    return json.loads((output_dir / "results.json").read_text())


def test_all_systems_and_tasks(tiny_checkpoint, tiny_bases, corpus, tmp_path):
    tasks = ["transcription", "translation", "sentiment", "keyword", "yes_no", "following"]
    other = f"vanilla={tiny_checkpoint}"
    results = evaluate(
        tiny_checkpoint, corpus, tmp_path, tasks=tasks, systems=["lsm", "text", other], text_model=str(tiny_bases.text)
    )
    assert list(results["systems"]) == ["lsm", "vanilla", "text"]
    assert {path.name for path in (tmp_path / "predictions").iterdir()} == {"lsm.jsonl", "vanilla.jsonl", "text.jsonl"}
    for task, metrics in results["figures"].items():
        for metric, figures in metrics.items():
            for figure in figures.values():
                assert figure["value"] is None or figure["low"] <= figure["high"], (task, metric)
    assert results["figures"]["transcription"]["wer"]["text"]["value"] == 0
    assert results["figures"]["transcription"]["wer"]["lsm"]["value"] >= 1
    assert results["figures"]["keyword"]["f1"].keys() == {"lsm", "vanilla"}  # the text system is the reference
    assert results["counts"]["sentiment"]["lsm"]["unreadable"] == 1
    assert results["counts"]["sentiment"]["text"]["unreadable"] == 0
    assert results["signatures"]["translation"]["bleu"].startswith("nrefs:1|")
    assert results["systems"]["text"]["model"] != results["systems"]["lsm"]["model"]
    assert {row["id"][:-1] for row in results["unreadable"]} == {f"{task}/00000" for task in tasks}
    same = [row for row in results["comparisons"] if {row["first"], row["second"]} == {"lsm", "vanilla"}]
    assert len(same) == 10 and all(row["difference"] in (0, None) for row in same)
    assert results["settings"]["max_new_tokens"] == 6 and "transformers" in results["versions"]

    passing = results["transcripts_that_pass"]["following"]
    asked = (tmp_path / "predictions" / "text.jsonl").read_text().splitlines()[1:]
    checked = [row for row in map(json.loads, asked) if row["task"] == "following"]
    passed = [CHECKS[row["check"]["kind"]].holds(row["text"], **row["check"]["parameters"]) for row in checked]
    assert passing == {"rows": 6, "followed": sum(passed)}

    kinds = [row["check"]["kind"] for row in checked]
    assert {kind: figure["rows"] for kind, figure in results["checks"]["following"]["text"].items()} == {
        kind: kinds.count(kind) for kind in sorted(kinds)
    }
    for figure in results["checks"]["following"]["text"].values():
        assert figure["low"] <= figure["value"] == figure["followed"] / figure["rows"] <= figure["high"]

    report = (tmp_path / "report.md").read_text()
    assert f"The bare transcript would pass {sum(passed)} of the 6 checks." in report
    for part in ("(gap to the ceiling)", "| transcription | word error rate ↓ | 6 |", "5.wav", "BLEU: `nrefs:1|"):
        assert part in report
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_keywords_that_some_rows_lack_are_those_of_the_text_system(tiny_checkpoint, corpus, tmp_path):
    rows = [json.loads(line) for line in (corpus / "metadata.jsonl").read_text().splitlines()][:2]
    rows[0]["keywords"] = ["number"]
    manifest = tmp_path / "metadata.jsonl"
    manifest.write_text("".join(json.dumps({**row, "audio": str(corpus / row["audio"])}) + "\n" for row in rows))
    results = evaluate(tiny_checkpoint, manifest, tmp_path / "out", tasks=["keyword"])
    assert list(results["systems"]) == ["lsm", "text"] and results["figures"]["keyword"]["f1"].keys() == {"lsm"}
    assert results["counts"]["keyword"]["lsm"]["rows"] == 2 and not results["unusable"]


def test_recompute_needs_no_model(tiny_checkpoint, corpus, tmp_path, monkeypatch):
    results = evaluate(tiny_checkpoint, corpus, tmp_path, tasks=["sentiment", "following"])
    monkeypatch.setattr(script, "Models", None)
    run = results["systems"]["lsm"]["run"]
    assert run["settings"]["tasks"] == ["sentiment", "following"] and run["versions"] == results["versions"]
    assert {"python", "tokenizers", "accelerate", "jiwer", "sacrebleu"} < results["versions"].keys()
    monkeypatch.setattr(script, "read_versions", lambda: {"python": "4.0"})  # another day
    (tmp_path / "report.md").unlink()
    (tmp_path / "results.json").unlink()  # all is with the answers
    script.main(script.EvalArguments(str(tmp_path), recompute=True, resamples=50))
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["figures"] == results["figures"] and again["counts"] == results["counts"]
    assert again["settings"]["model_name_or_path"] == str(tiny_checkpoint) and again["settings"]["recompute"]
    assert again["systems"]["lsm"]["run"] == run and again["versions"] == {"python": "4.0"}
    report = (tmp_path / "report.md").read_text()
    assert report.startswith(f"# {tiny_checkpoint}\n") and f"Measured on {corpus}." in report
    # The metric is computed from what the file says.
    path = tmp_path / "predictions" / "lsm.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1:] = [{**row, "prediction": row["reference"] or ""} for row in lines[1:]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    script.main(script.EvalArguments(str(tmp_path), recompute=True, resamples=50, confidence=0.5))
    perfect = json.loads((tmp_path / "results.json").read_text())
    assert perfect["figures"]["sentiment"]["accuracy"]["lsm"] == {"value": 1, "low": 1, "high": 1}


def test_recompute_of_answers_without_a_record_of_their_run(tiny_checkpoint, corpus, tmp_path):
    """Earlier versions wrote such."""
    results = evaluate(tiny_checkpoint, corpus, tmp_path, tasks=["sentiment"])
    path = tmp_path / "predictions" / "lsm.jsonl"
    first, *rows = path.read_text().splitlines(keepends=True)
    meta = json.loads(first)
    del meta["run"]
    path.write_text("".join([json.dumps(meta) + "\n", *rows]))
    for model in (None, str(tiny_checkpoint)):
        with pytest.raises(
            ValueError, match="do not say which command gave them.* --model_name_or_path and --dataset"
        ):
            script.main(script.EvalArguments(str(tmp_path), model, recompute=True))
    again = evaluate(tiny_checkpoint, corpus, tmp_path, recompute=True)
    assert again["figures"] == results["figures"] and again["settings"]["dataset"] == str(corpus)


def test_stopped_and_resumed(tiny_checkpoint, corpus, tmp_path, monkeypatch):
    whole = evaluate(tiny_checkpoint, corpus, tmp_path / "whole", tasks=["transcription", "following"], batch_size=2)
    answer = LsmSystem.answer

    def answer_some(self, rows, max_new_tokens, on_answer):
        answer(self, rows[:4], max_new_tokens, on_answer)
        raise KeyboardInterrupt

    monkeypatch.setattr(LsmSystem, "answer", answer_some)
    settings = {"tasks": ["transcription", "following"], "batch_size": 3}  # batches need not be the same
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_checkpoint, corpus, tmp_path / "parts", **settings)
    path = tmp_path / "parts" / "predictions" / "lsm.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    monkeypatch.setattr(LsmSystem, "answer", answer)
    parts = evaluate(tiny_checkpoint, corpus, tmp_path / "parts", **settings)
    for key in ("figures", "counts", "checks", "unreadable"):
        assert parts[key] == whole[key]


def test_model_card(corpus, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    pipe = LsmPipeline(model=tiny.make_model(), processor=tiny.make_processor(), device="cpu")
    pipe.save_pretrained(checkpoint)
    for _ in range(2):  # the second time takes the place of the first
        results = evaluate(checkpoint, corpus, tmp_path / "out", tasks=["transcription"], update_model_card=True)
    card = ModelCard.load(checkpoint / "README.md")
    assert card.text.count("## Evaluation") == 1 and "| transcription | word error rate ↓ | 6 |" in card.text
    assert "## Use" in card.text and card.data.pipeline_tag == "audio-text-to-text"
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {m: results["figures"]["transcription"][m]["lsm"]["value"] for m in ("wer", "cer")}
    assert str(tmp_path) not in (checkpoint / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["karaoke"]}, "There is no task 'karaoke'; expected some of transcription"),
        ({"tasks": ["intent"]}, "has no column 'intent', the reference of the task 'intent'"),
        ({"columns": ["text"]}, "expected OURS=THEIRS"),
        ({"systems": ["llm"]}, "--systems has 'llm'; expected lsm, cascade, text, or NAME=checkpoint"),
        ({"batch_size": 0}, "--batch_size is 0"),
        ({"confidence": 95}, "--confidence is 95"),
        ({"systems": ["cascade"]}, "The cascade needs an ASR model"),
    ],
)
def test_bad_arguments(tiny_checkpoint, corpus, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_checkpoint, corpus, tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[({"systems": [f"{name}=some/folder"]}, f"A system cannot be called '{name}'") for name in TAKEN],
        ({"systems": ["a=some/folder", "a=other/folder"]}, "two systems called a. Give each a name"),
        ({"systems": ["text"], "update_model_card": True}, "--update_model_card writes the figures of the system lsm"),
        (
            {"systems": ["cascade"], "asr_model": str(ROOT / "recipes")},
            "ASR model .*recipes of the cascade cannot be loaded.*--asr_model",
        ),
    ],
)
def test_bad_systems_are_refused_before_any_answer(tiny_checkpoint, corpus, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_checkpoint, corpus, tmp_path, **settings)
    assert not (tmp_path / "predictions").exists()


def make_asr(folder: Path) -> None:
    """A tiny Whisper with the tokenizer that it needs to be an ASR model by itself: a token for every byte."""
    tiny.make_whisper(vocab_size=300, eos_token_id=0, pad_token_id=0, decoder_start_token_id=1).save_pretrained(folder)
    vocabulary = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>", *sorted(ByteLevel.alphabet())]
    tokenizer = WhisperTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=[], pad_token="<|endoftext|>"
    )
    WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer).save_pretrained(folder)


def test_cascade_is_made_of_what_the_lsm_was_composed_from(tiny_bases, corpus, tmp_path, monkeypatch):
    """In its folder, which is not where the command runs, and whose name alone says nothing."""
    make_asr(tmp_path / "whisper")
    settings = {"projector_hidden_size": 24, "projector_num_attention_heads": 4}
    model, processor = compose(str(tmp_path / "whisper"), str(tiny_bases.text), **settings)
    LsmPipeline(model=model, processor=processor, device="cpu").save_pretrained(tmp_path / "lsm")
    results = evaluate(tmp_path / "lsm", corpus, tmp_path / "out", compare=True, tasks=["transcription", "sentiment"])
    assert list(results["systems"]) == ["lsm", "cascade", "text"]
    assert results["systems"]["cascade"]["asr"]["id"] == "whisper"
    assert results["figures"]["transcription"]["wer"].keys() == {"lsm", "cascade", "text"}
    assert results["counts"]["sentiment"]["cascade"]["unreadable"] == 1
    answers = (tmp_path / "out" / "predictions" / "cascade.jsonl").read_text().splitlines()[1:]
    assert any(json.loads(line)["prediction"] for line in answers)

    (tmp_path / "whisper").rename(tmp_path / "moved")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # its name is all that is left to look for
    with pytest.raises(
        ValueError, match="ASR model whisper of the cascade cannot be loaded. Name one with --asr_model"
    ):
        evaluate(tmp_path / "lsm", corpus, tmp_path / "gone", compare=True)
    assert not (tmp_path / "gone").exists()
    with pytest.raises(ValueError, match="without a tokenizer or a feature extractor"):
        evaluate(tmp_path / "lsm", corpus, tmp_path / "gone", compare=True, asr_model=str(tiny_bases.speech))
    asr_model = str(tmp_path / "moved")
    again = evaluate(tmp_path / "lsm", corpus, tmp_path / "again", systems=["cascade"], asr_model=asr_model, limit=1)
    assert again["systems"]["cascade"]["asr"]["fingerprint"] == results["systems"]["cascade"]["asr"]["fingerprint"]


def test_model_and_dataset_are_needed(tiny_bases, corpus, tmp_path):
    with pytest.raises(ValueError, match="Give --model_name_or_path and --dataset"):
        script.main(script.EvalArguments(str(tmp_path)))
    with pytest.raises(ValueError, match="holds no predictions"):
        script.main(script.EvalArguments(str(tmp_path), recompute=True))
    with pytest.raises(ValueError, match="is not an LSM"):
        evaluate(tiny_bases.text, corpus, tmp_path)


def test_predictions_of_another_model_are_refused(tiny_checkpoint, corpus, tmp_path):
    evaluate(tiny_checkpoint, corpus, tmp_path / "out", limit=2)
    other = tmp_path / "other"
    LsmPipeline(model=tiny.make_model(seed=1), processor=tiny.make_processor(), device="cpu").save_pretrained(other)
    with pytest.raises(ValueError, match="lsm.jsonl holds answers of another model or other settings: model was"):
        evaluate(other, corpus, tmp_path / "out", limit=2)
    with pytest.raises(ValueError, match="num_rows was 2, now 3; tasks was"):
        evaluate(tiny_checkpoint, corpus, tmp_path / "out", limit=3)


@pytest.mark.parametrize("bias", [False, True])
def test_answers_of_another_dataset_are_refused(tiny_checkpoint, tmp_path, bias):
    settings = {"tasks": ["transcription"], "systems": ["lsm"], "bias": bias, "measured_rows": 1}
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text('{"audio": "a.wav", "text": "one or two"}\n')
    soundfile.write(folder / "a.wav", tiny.noise(0.3), tiny.SAMPLING_RATE)
    evaluate(tiny_checkpoint, folder, tmp_path / "out", **settings)
    evaluate(tiny_checkpoint, folder, tmp_path / "out", **settings)
    for revision in ("other", None):  # where it comes from, or what it holds
        if revision is None:
            soundfile.write(folder / "a.wav", tiny.noise(0.3, seed=1), tiny.SAMPLING_RATE)
        message = "dataset was" if revision else "tasks was"
        with pytest.raises(ValueError, match=f"holds answers of another model or other settings: {message}"):
            evaluate(tiny_checkpoint, folder, tmp_path / "out", revision=revision, **settings)
    if bias:  # the suite's own answers by themselves
        for path in (tmp_path / "out" / "predictions").iterdir():
            path.unlink()
        with pytest.raises(ValueError, match=r"bias.answers.lsm.jsonl holds .* settings: questions was"):
            evaluate(tiny_checkpoint, folder, tmp_path / "out", **settings)


@pytest.mark.slow
def test_killed_and_resumed(tiny_checkpoint, librivox, tmp_path):
    """SIGKILL in the middle, and the same command again: the figures are those of a run that was let alone."""
    rows = [{"audio": str(clip.path), "text": clip.text} for clip in librivox] * 12
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "eval.py", "--model_name_or_path", tiny_checkpoint, "--dataset", tmp_path]
    command += ["--tasks", "transcription", "following", "--max_new_tokens", "24", "--batch_size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name: str) -> subprocess.Popen:
        arguments = [*map(str, command), "--output_dir", str(tmp_path / name)]
        return subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    killed = start("parts")
    path = tmp_path / "parts" / "predictions" / "lsm.jsonl"
    while not (path.is_file() and path.read_bytes().count(b"\n") > 20):
        assert killed.poll() is None, killed.stderr.read()[-3000:]
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert 20 < path.read_bytes().count(b"\n") < 121 and not (tmp_path / "parts" / "results.json").exists()

    results = {}
    for name in ("parts", "whole"):
        process = start(name)
        assert process.communicate()[1] is not None and process.returncode == 0
        results[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert results["parts"]["figures"] == results["whole"]["figures"]
    assert results["parts"]["checks"] == results["whole"]["checks"]
    ids = [json.loads(line)["id"] for line in path.read_text().splitlines()[1:]]
    assert len(ids) == len(set(ids)) == 120


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tiny_checkpoint, corpus, tmp_path):
    results = evaluate(tiny_checkpoint, corpus, tmp_path / "one", systems=["lsm", "text"], tasks=["translation"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "eval.py"]
    command += ["--model_name_or_path", tiny_checkpoint, "--dataset", corpus, "--output_dir", tmp_path / "two"]
    command += ["--max_new_tokens", "6", "--resamples", "50", "--systems", "lsm", "text", "--tasks", "translation"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, check=True, capture_output=True)
    assert len(list((tmp_path / "two" / "predictions").iterdir())) == 4
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    for key in ("figures", "comparisons", "counts", "signatures"):
        assert two[key] == results[key]
