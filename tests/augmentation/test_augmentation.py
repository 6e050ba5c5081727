"""Tasks, their draw, filters, blocks, and the whole script: killed, sharded, fed with bad input."""

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import augment
from modeling_lsm import LsmPipeline, make_chat
from modeling_lsm.augmentation import (
    Answer,
    BlockStore,
    Task,
    TextModel,
    assign_instructions,
    generate_targets,
    load_tasks,
    rejection_reason,
    row_identity,
)
from modeling_lsm.augmentation.filters import has_loop, in_script_of
from modeling_lsm.augmentation.prompts import Prompter
from modeling_lsm.composing import compose
from tests import tiny


ROOT = Path(__file__).parents[2]
NAMES = ["transcription", "continuation", "repetition", "keyword", "intent", "sentiment", "translation"]
TINY_PROJECTOR = {"projector_hidden_size": 32, "projector_num_attention_heads": 4}
TASK = Task("intent", ("Why is this said?",))


@pytest.fixture
def tasks() -> list[Task]:
    return load_tasks(NAMES, "German")


def test_every_task_has_eight_wordings_that_fit_speech_and_text(tasks):
    assert load_tasks([], "German") == tasks
    wordings = [wording for task in tasks for wording in task.instructions]
    assert len(set(wordings)) == len(wordings)
    for task in tasks:
        assert len(task.instructions) >= 8
        assert task.generated == (task.name != "transcription")
    for wording in wordings:
        assert not {"audio", "speech", "recording", "hear", "listen", "text", "read", "written"} & set(
            wording.lower().replace(".", " ").replace(",", " ").split()
        ), wording
        assert "{" not in wording
    assert all("German" in wording for wording in tasks[-1].instructions)


def test_a_file_adds_tasks_and_replaces_them(tmp_path):
    path = tmp_path / "more.yaml"
    path.write_text("rhyme:\n  instructions: [Find a rhyme.]\nkeyword:\n  instructions: [Keywords!]\n")
    rhyme, keyword, intent = load_tasks(["rhyme", "keyword", "intent"], "French", str(path))
    assert rhyme == Task("rhyme", ("Find a rhyme.",))
    assert keyword.instructions == ("Keywords!",)
    assert len(intent.instructions) >= 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rhyme:\n  generated: true\n", "The task 'rhyme' has no instructions"),
        ("rhyme:\n  instructions: [3]\n", "The task 'rhyme' has no instructions"),
        ("rhyme:\n  instructions: [Go.]\n  loud: true\n", r"has the settings \['loud'\]; expected some of"),
        (
            "rhyme:\n  instructions: [In French.]\n  in_target_language: true\n",
            "'In French.', which lacks {target_language}",
        ),
        ("rhyme:\n  instructions: ['In {langauge}.']\n", r"with \['{langauge}'\]; the only placeholder"),
        ("- rhyme\n", "must map tasks to their settings"),
    ],
)
def test_bad_instruction_files_are_refused(content, message, tmp_path):
    (tmp_path / "more.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tasks(["rhyme"], "French", str(tmp_path / "more.yaml"))


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match=r"There is no task 'poem'; expected some of transcription, continuation"):
        load_tasks(["poem"], "French")


def test_draws_depend_on_seed_and_row_alone_and_follow_the_weights(tasks):
    def draw(row_id, seed, weights=(1.0,) * 7, num_targets=1):
        return assign_instructions(row_id, tasks, list(weights), num_targets, seed)

    ids = [row_identity(f"{index}.flac", "words") for index in range(3500)]
    drawn = [draw(row_id, seed=1)[0] for row_id in ids]
    assert drawn == [draw(row_id, seed=1)[0] for row_id in ids]
    assert drawn != [draw(row_id, seed=2)[0] for row_id in ids]
    counts = collections.Counter(task.name for task, _ in drawn)
    assert set(counts) == set(NAMES) and all(420 < count < 580 for count in counts.values())
    assert len({wording for _, wording in drawn}) == sum(len(task.instructions) for task in tasks)

    weighted = collections.Counter(draw(row_id, 1, weights=(6, 1, 1, 1, 1, 1, 1))[0][0].name for row_id in ids)
    assert 1650 < weighted["transcription"] < 1850  # half of 3500
    # The targets of one row are of different tasks.
    assert len({task.name for task, _ in draw(ids[0], 1, num_targets=7)}) == 7


@pytest.mark.parametrize(
    ("target", "finished", "reason"),
    [
        ("To ask for help.", True, None),
        ("   ", True, "empty"),
        ("To ask for", False, "no end token"),
        ("It is is is is clear.", True, "loop"),
        ("go on and go on and go on and go on and.", True, "loop"),
        ("It runs on and it runs on, and it runs on and it", False, "loop"),
        ("...", True, "too short"),
        ("Please provide the text that I should look at.", True, "refusal"),
        ("I'm so sorry for any confusion. How may I serve you?", True, "refusal"),
        ("I'm here to help with questions about technology.", True, "refusal"),
        ("As a chatbot designed to write, I have no opinion.", True, "refusal"),
        ("Somebody is sorry, but here to help.", True, None),
        ("As an AI language model, I cannot say.", True, "refusal"),
        ("I'm sorry, but that is not possible.", True, "refusal"),
        ("Why is this said? To ask for help.", True, "echo of the instruction"),
        ("Help me, please!", True, "same as the transcript"),
        ("To ask for help", True, "no terminal punctuation"),
        ("他需要帮助。", True, None),
    ],
)
def test_rejection_reasons(target, finished, reason):
    assert rejection_reason(TASK, TASK.instructions[0], "help me please", target, finished) == reason


def test_what_a_task_asks_for(tasks):
    by_name = {task.name: task for task in tasks}

    def judge(name, transcript, target, **kwargs):
        return rejection_reason(by_name[name], "Do it now.", transcript, target, True, **kwargs)

    assert judge("repetition", "help me", "Help me.") is None
    assert judge("keyword", "help me please", "help, please") is None
    assert judge("intent", "help me please", "to get help", require_terminal_punctuation=False) is None
    assert judge("transcription", "no no no no no", "no no no no no") is None
    assert judge("transcription", "", "") == "empty"
    assert judge("repetition", "help me", "Help me, " + "I say it calmly and with care, " * 2 + "now.") == "too long"
    assert judge("translation", "how are you today", "Comment allez-vous ?", target_language="French") is None
    assert judge("translation", "how are you today", "How is it going?", target_language="Russian") == "wrong script"
    assert judge("translation", "how are you today", "Как дела?", target_language="Russian") is None


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("今日はいい天気です。", "Japanese", True),
        ("今天天气很好。", "Chinese", True),
        ("The weather", "Chinese", False),
        ("오늘은 날씨가 좋다 OK", "Korean", True),
        ("مرحبا", "Arabic", True),
        ("Grüß Gott", "German", True),
        ("Привет", "German", False),
        ("123", "Hindi", True),
        ("今天天气很好。", "Simplified Chinese", True),
        ("Whatever", "Klingon", True),
    ],
)
def test_scripts(text, language, expected):
    assert in_script_of(text, language) == expected


def test_loops():
    assert has_loop("name,\n\nname,\n\nname,\n\nname,\n\nname,")
    assert has_loop("哈哈哈哈哈哈哈哈") and has_loop("我很好我很好我很好我很好我很好我很好")
    assert has_loop("this is what he said to me, this is what he said to me, this is what he said to me")
    assert not has_loop("no, no, no: she said no to that and yes to this, yes to this and no to that")
    assert not has_loop("one two three four five six seven eight nine ten " * 2)
    assert not has_loop("He owes 1000000000 dollars.")


def test_targets_are_what_the_llm_says_by_itself(processor):
    """In batches, through the LSM: the same as the plain LLM, asked one at a time with its own chat template."""
    model = tiny.make_model()
    llm = tiny.make_llm()
    llm.load_state_dict(model.lsm.language_model.state_dict())
    llm.tie_weights()
    prompts = [
        ("Why?", "a cat sat on the mat"),
        ("Say it again.", "no"),
        ("In French?", "it rains and it pours, they say"),
    ]
    prompter = Prompter(processor.tokenizer, processor.chat_template)
    answers = generate_targets(model, prompter, prompts, max_new_tokens=12, batch_tokens=250)
    for (instruction, transcript), (answer, finished, num_tokens) in zip(prompts, answers, strict=True):
        chat = [{"role": "user", "content": f"{instruction}\n\n{transcript}"}]
        inputs = processor.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        own = llm.generate(
            **inputs, max_new_tokens=12, do_sample=False, suppress_tokens=[processor.audio_token_id], pad_token_id=2
        )[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.tokenizer.decode(own, skip_special_tokens=True).strip()
        assert finished == bool((own == model.generation_config.eos_token_id).any())
        assert num_tokens == len(own)


def test_prompt_for_the_target_and_prompt_for_training_differ_in_the_transcript_alone(processor):
    transcript, prompter = "a cat", Prompter(processor.tokenizer, processor.chat_template)
    asked = prompter.encode([("Why?", transcript)])[0]
    trained = processor.apply_chat_template(make_chat("Why?", audio="clip.flac"), add_generation_prompt=True)
    assert processor.tokenizer.decode(asked) == trained.replace(processor.audio_token, transcript)
    # Token by token what the processor makes of the same chat.
    chat = make_chat("Why?", transcript=transcript)
    assert asked == tiny.ask(processor, chat)["input_ids"][0].tolist()


def test_an_lsm_and_its_llm_are_the_same_source_of_targets(tiny_bases, tmp_path):
    model, processor = compose(str(tiny_bases.speech), str(tiny_bases.text), **TINY_PROJECTOR)
    LsmPipeline(model=model, processor=processor, device="cpu").save_pretrained(tmp_path / "lsm")
    lsm, llm = TextModel(str(tmp_path / "lsm")), TextModel(str(tiny_bases.text))
    assert lsm.is_lsm and not llm.is_lsm
    assert lsm.provenance() == llm.provenance()
    prompts = [("Why?", "a cat sat"), ("Say it again.", "no, no")]
    assert lsm.prompter.encode(prompts) == llm.prompter.encode(prompts)
    answers = [
        generate_targets(source.load("float32", torch.device("cpu")), source.prompter, prompts, 12, 500)
        for source in (lsm, llm)
    ]
    assert answers[0] == answers[1]


def test_blocks_survive_and_other_settings_are_refused(tmp_path):
    store = BlockStore(tmp_path, {"seed": 0})
    store.write(0, {"accepted": [{"text": "1"}], "rejected": [{"text": "2", "reason": "x"}]}, {"accepted": 1, "x": 1})
    store.write(1, {"accepted": [{"text": "3"}]}, {"accepted": 1})
    store = BlockStore(tmp_path, {"seed": 0})
    assert store.is_done(0) and store.is_done(1) and not store.is_done(2)
    assert store.totals() == {"accepted": 2, "x": 1}
    assert pq.read_table(tmp_path / "accepted")["text"].to_pylist() == ["1", "3"]
    assert pq.read_table(tmp_path / "rejected").select(["text", "reason"]).to_pylist() == [
        {"text": "2", "reason": "x"}
    ]
    with pytest.raises(ValueError, match=r"other settings: seed was 0, now 1.*another --output_dir"):
        BlockStore(tmp_path, {"seed": 1})


def test_a_full_disk_leaves_no_half_written_block(tmp_path, monkeypatch):
    store = BlockStore(tmp_path, {})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write(0, {"accepted": [{"text": "1"}]}, {"accepted": 1})
    assert not store.is_done(0)
    assert not list(tmp_path.glob("**/*.parquet")) and not list(tmp_path.glob("**/*.partial"))


def augment_command(checkpoint: Path, manifest: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "augment.py"), "--model_name_or_path", str(checkpoint)),
        *("--dataset", str(manifest), "--output_dir", str(output_dir), "--max_new_tokens", "24"),
        *("--block_rows", "64", *more),
    ]


def read_outcomes(folder: Path) -> dict[str, dict]:
    """All rows of a job by their ids; fails if one stands twice."""
    rows = {}
    for outcome in ("accepted", "rejected", "unreadable"):
        for file in sorted(folder.glob(f"{outcome}/*.parquet")):
            for row in pq.read_table(file).to_pylist():
                assert row["row_id"] not in rows, "a row stands twice"
                rows[row["row_id"]] = {**row, "outcome": outcome}
    return rows


@pytest.fixture
def many_rows(tmp_path) -> Path:
    """A manifest of 640 rows without audio files."""
    manifest = tmp_path / "rows.jsonl"
    rows = [{"audio": f"{index}.flac", "text": f"words number {index} of many"} for index in range(640)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


@pytest.mark.slow
def test_killed_ten_times_and_resumed_it_loses_and_repeats_no_row(tiny_checkpoint, many_rows, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    more = ("--check_audio", "none")
    subprocess.run(augment_command(tiny_checkpoint, many_rows, tmp_path / "whole", *more), check=True)
    whole = read_outcomes(tmp_path / "whole")
    assert {row["text"] for row in whole.values()} == {f"words number {index} of many" for index in range(640)}

    command = augment_command(tiny_checkpoint, many_rows, tmp_path / "killed", *more)
    moments = random.Random(0)
    for _ in range(10):
        done = len(list(tmp_path.glob("killed/journal/[0-9]*.json")))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # At a random moment, from before the model is loaded to some way into the second block of this run.
        time.sleep(moments.uniform(0, 4))
        while moments.random() < 0.5 and process.poll() is None:
            time.sleep(0.05)
            if len(list(tmp_path.glob("killed/journal/[0-9]*.json"))) > done:
                break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True)
    assert read_outcomes(tmp_path / "killed") == whole

    other = subprocess.run([*command, "--seed", "5"], capture_output=True, text=True)
    assert other.returncode != 0 and "seed was 0, now 5" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [2, 4])
def test_shards_give_what_one_job_gives(num_shards, tiny_checkpoint, many_rows, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    more = ("--check_audio", "none", "--num_targets_per_row", "2")
    subprocess.run(augment_command(tiny_checkpoint, many_rows, tmp_path / "one", *more), check=True)
    for shard in range(num_shards):
        assert not (tmp_path / "many" / "provenance.json").exists()
        shards = ("--num_shards", str(num_shards), "--shard_index", str(shard))
        subprocess.run(augment_command(tiny_checkpoint, many_rows, tmp_path / "many", *more, *shards), check=True)
    assert read_outcomes(tmp_path / "many") == read_outcomes(tmp_path / "one")
    assert json.loads((tmp_path / "many" / "provenance.json").read_text())["counts"]


@pytest.mark.slow
def test_bad_rows_are_counted_and_the_job_goes_on(tiny_checkpoint, librivox, tmp_path):
    good = str(librivox[0].path)
    lines = [
        json.dumps({"audio": good, "text": "all is well"}).encode(),
        b'{"audio": "a.flac", "text": "bro',
        json.dumps({"audio": good}).encode(),
        json.dumps({"audio": good, "text": " "}).encode(),
        json.dumps({"audio": good, "text": "long " * 20_000}).encode(),
        json.dumps({"audio": "gone.flac", "text": "nobody there"}).encode(),
        json.dumps({"audio": good, "text": "all is well"}).encode(),
        b'{"audio": "a.flac", "text": "caf\xe9"}',
        json.dumps({"audio": good, "text": "all is well again"}).encode(),
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    more = ("--tasks", "transcription", "--check_audio", "decode")
    subprocess.run(augment_command(tiny_checkpoint, tmp_path / "rows.jsonl", tmp_path / "out", *more), check=True)
    rows = {row["source"]: row for row in read_outcomes(tmp_path / "out").values()}
    outcomes = {source.split(":")[1]: (row["outcome"], row["reason"]) for source, row in rows.items()}
    assert outcomes["1"] == outcomes["9"] == ("accepted", None)
    assert outcomes["2"][0] == "unreadable" and outcomes["2"][1].startswith("broken JSON")
    assert outcomes["3"] == ("unreadable", "missing text")
    assert outcomes["4"] == ("unreadable", "empty transcript")
    assert outcomes["5"] == ("rejected", "transcript too long: 100000 characters")
    assert outcomes["6"][0] == "unreadable" and "gone.flac" in outcomes["6"][1]
    assert outcomes["7"] == ("rejected", "duplicate")
    assert outcomes["8"][0] == "unreadable" and outcomes["8"][1].startswith("invalid UTF-8")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "2 of 9 rows accepted, 2 rejected, 5 unreadable" in report
    assert "| unreadable | missing text | 1 |" in report
    assert (tmp_path / "out" / "target_lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "2 of 9 rows were accepted" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_embedded_audio_travels_with_its_row(tiny_checkpoint, librivox, tmp_path):
    table = [{"audio": {"path": c.path.name, "bytes": c.path.read_bytes()}, "text": c.text} for c in librivox]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    more = ("--tasks", "transcription", "--check_audio", "decode")
    subprocess.run(augment_command(tiny_checkpoint, tmp_path / "rows.parquet", tmp_path / "out", *more), check=True)
    rows = read_outcomes(tmp_path / "out")
    assert {row["audio"]["bytes"] for row in rows.values()} == {clip.path.read_bytes() for clip in librivox}


class Stub:
    """A backend that gives every prompt one answer: for what is around the backends."""

    def answer(self, prompts, on_answer):
        return [Answer("To say what is said here.", True, 7) for _ in prompts]


def test_publishing_sends_all_but_the_journal(tiny_checkpoint, librivox, tmp_path, monkeypatch):
    sent = {}

    def create_repo(self, repo_id, repo_type, exist_ok):
        assert repo_type == "dataset" and exist_ok
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    monkeypatch.setattr(augment.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(augment.HfApi, "upload_folder", lambda self, **kwargs: sent.update(kwargs))
    args = augment.AugmentArguments(
        model_name_or_path=str(tiny_checkpoint),
        dataset=str(librivox[0].path.parent),
        output_dir=str(tmp_path),
        num_targets_per_row=7,
        push_to_hub="targets",
    )
    augment.main(args, backend=Stub())
    assert (sent["repo_id"], sent["repo_type"]) == ("me/targets", "dataset")
    assert sent["folder_path"] == tmp_path and sent["ignore_patterns"] == "journal/*"
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"accepted", "rejected", "unreadable", "provenance.json", "report.md", "README.md"}
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["llm"].keys() == {"id", "revision", "fingerprint", "template_hash"}
    assert provenance["settings"]["instructions_hash"] and provenance["versions"]["transformers"]
    assert provenance["counts"]["accepted: transcription"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_targets_per_row": 9}, "--num_targets_per_row is 9; expected 1 to 7"),
        ({"task_weights": [1.0]}, r"--task_weights is \[1.0\]; expected 7 numbers above 0"),
        ({"check_audio": "maybe"}, "--check_audio is 'maybe'"),
        ({"shard_index": 1}, "--shard_index is 1; expected 0 to 0"),
        ({"max_new_tokens": 0}, "--max_new_tokens is 0; expected 1 or more"),
        ({"backend": "magic"}, "--backend is 'magic'; expected 'transformers', 'vllm' or 'openai'"),
        ({"backend": "openai"}, "needs --base_url"),
        ({"backend": "vllm"}, "vLLM cannot load the LSM"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, tiny_checkpoint, librivox, tmp_path):
    where = {"dataset": str(librivox[0].path.parent), "output_dir": str(tmp_path)}
    args = augment.AugmentArguments(model_name_or_path=str(tiny_checkpoint), **where, **arguments)
    with pytest.raises(ValueError, match=message):
        augment.main(args)
    assert not (tmp_path / "journal").exists()  # the folder is free for the right command


MILLION = """
import json, resource, sys, time
sys.path.insert(0, {root!r})
import augment
from modeling_lsm.augmentation import Answer

class Stub:
    first = None
    def answer(self, prompts, on_answer):
        self.first = self.first or time.monotonic()
        return [Answer("To say what is said here.", True, 7) for _ in prompts]

stub, started = Stub(), time.monotonic()
args = augment.AugmentArguments(
    model_name_or_path={checkpoint!r},
    dataset={dataset!r},
    output_dir={output_dir!r},
    check_audio="none",
    block_rows=8192,
)
augment.main(args, backend=stub)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({{"peak_mib": peak, "first_answer_seconds": stub.first - started}}))
"""


@pytest.mark.slow
def test_a_million_rows_take_no_more_memory_than_a_few(tiny_checkpoint, tmp_path):
    figures = {}
    for size in (100, 1_000_000):
        dataset = tmp_path / f"{size}.jsonl"
        with open(dataset, "w") as file:
            for index in range(size):
                file.write(f'{{"audio": "{index}.flac", "text": "words number {index} of many"}}\n')
        output_dir = tmp_path / f"out-{size}"
        script = MILLION.format(
            root=str(ROOT), checkpoint=str(tiny_checkpoint), dataset=str(dataset), output_dir=str(output_dir)
        )
        process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert process.returncode == 0, process.stderr[-2000:]
        figures[size] = json.loads(process.stdout.splitlines()[-1])
        counts = json.loads((output_dir / "provenance.json").read_text())["counts"]
        assert sum(counts.values()) == size
    assert figures[1_000_000]["peak_mib"] <= figures[100]["peak_mib"] + 300, figures
    assert figures[1_000_000]["first_answer_seconds"] <= 10, figures


@pytest.mark.slow
def test_training_refuses_the_targets_of_another_llm(tiny_checkpoint, librivox, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    other = tmp_path / "other"
    LsmPipeline(model=tiny.make_model(seed=7), processor=tiny.make_processor(), device="cpu").save_pretrained(other)
    manifest, data = librivox[0].path.parent / "metadata.jsonl", tmp_path / "data"
    subprocess.run(augment_command(other, manifest, data, "--tasks", "transcription"), check=True)
    train = [sys.executable, str(ROOT / "train_sft.py"), "--model_name_or_path", str(tiny_checkpoint)]
    train += ["--dataset", str(data), "--output_dir", str(tmp_path / "trained"), "--max_steps", "1"]
    train += ["--report_to", "none", "--bf16", "False", "--use_cpu", "True"]
    refused = subprocess.run(train, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "is not the LLM of" in refused.stderr and "--allow_foreign_targets" in refused.stderr
    subprocess.run([*train, "--allow_foreign_targets", "True"], check=True)
