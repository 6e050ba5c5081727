"""`train_sft.py`: what it refuses, and in which words. What it does is in tests/training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trl import TrlParser

import train_sft
from tests.training.test_training import write_rows


ROOT = Path(__file__).parent.parent


@pytest.fixture
def data(tmp_path) -> Path:
    return write_rows(tmp_path / "data")


@pytest.fixture
def train(tiny_checkpoint, data, tmp_path):
    """Runs the script's `main` for one step, with more arguments; those given replace the ones that stand here."""

    def run(*arguments: str) -> None:
        defaults = {
            "--model_name_or_path": tiny_checkpoint,
            "--dataset": data,
            "--output_dir": tmp_path / "out",
            "--max_steps": "1",
            "--per_device_train_batch_size": "4",
            "--report_to": "none",
            "--gradient_checkpointing": "False",
            "--save_strategy": "no",
        }
        parser = train_sft.make_parser()
        assert isinstance(parser, TrlParser)
        given = [str(part) for pair in defaults.items() if pair[0] not in arguments for part in pair]
        train_sft.main(*parser.parse_args_and_config(given + [str(argument) for argument in arguments]))

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "ours"], "--recipe is 'ours'; expected 'self_powered' or 'vanilla'"),
        (["--train", "decoder"], r"--train got \['decoder'\]; expected any of encoder, projector, llm"),
        (["--attn_implementation", "flash_attention_2"], "needs a GPU, and there is none. Use 'sdpa'"),
        (["--load_in_4bit", "--use_peft"], "need a GPU, and there is none"),
        (["--use_peft", "--train", "projector"], r"--train is \['projector'\]. Add llm"),
        (["--streaming", "--max_steps", "-1"], "--streaming needs --max_steps"),
        (["--streaming", "--feature_cache", "cache"], "--feature_cache needs to know all rows beforehand"),
        (["--streaming", "--align_steps", "3"], "--align_steps needs to know all rows beforehand"),
        (["--answer_steps", "5"], "--answer_steps needs rows to answer. Name them with --held_out"),
        (["--eval_strategy", "epoch"], "--eval_strategy epoch needs rows. Name them with --held_out"),
        (["--train", "encoder", "--feature_cache", "cache"], "--feature_cache holds the output of a frozen encoder"),
        (["--max_length", "30"], r"has \d+ tokens, more than max_length=30, as have 8 of 8 rows. Raise --max_length"),
        (["--dataset_weights", "1", "2"], "There are 1 datasets, but 2 weights"),
        (["--align_steps", "3"], "--align_steps needs the transcripts of the clips, in a column `text`"),
        (["--recipe", "vanilla"], r"lacks the column\(s\) \['text'\]"),
        (["--use_peft", "--use_dora"], "LoRA takes no use_dora=True here"),
        (["--augment_speed", "9"], "`speed` is"),
        (["--augment_speed", "0.9", "--feature_cache", "cache"], "--feature_cache holds the output for unchanged"),
        (["--answer_wer", "True"], "--answer_wer needs --answer_steps"),
        (["--train", "llm", "--align_steps", "3"], r"--align_steps trains the projector, but --train is \['llm'\]"),
        (["--packing", "True"], "Rows with audio cannot be packed"),
    ],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="says what needs a GPU where there is none")
def test_arguments_that_make_no_sense(arguments, message, train):
    with pytest.raises(ValueError, match=message):
        train(*arguments)


def test_model_is_named():
    with pytest.raises(ValueError, match="--model_name_or_path is missing"):
        train_sft.main(*train_sft.make_parser().parse_args_and_config(["--dataset", "x", "--output_dir", "y"]))


def test_rows_without_targets(train, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "hi"}) + "\n")
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['instruction', 'target'\]"):
        train("--dataset", tmp_path / "rows.jsonl")


def test_asr_rows_join_the_others(train, data, tmp_path, caplog):
    rows = [{"audio": str(data / f"{index}.wav"), "text": f"words {index}"} for index in range(4)]
    manifest = tmp_path / "asr.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train("--asr_dataset", manifest, "--max_steps", "-1", "--num_train_epochs", "1")
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["max_steps"] == 3  # (8 + 4) / 4


def test_held_out_chats_are_answered(train, data, tmp_path):
    chat = [{"role": "user", "content": [{"type": "text", "text": "Hm? "}, {"type": "audio"}]}]
    chat.append({"role": "assistant", "content": "no"})
    (tmp_path / "chats.jsonl").write_text(json.dumps({"audio": str(data / "0.wav"), "messages": chat}) + "\n")
    train("--held_out", tmp_path / "chats.jsonl", "--answer_steps", "1", "--answer_wer", "True")
    (row,) = map(json.loads, (tmp_path / "out" / "answers.jsonl").read_text().splitlines())
    assert row["target"] == "no"


def test_unreadable_clips_are_skipped_up_to_a_share(train, data, tmp_path, caplog):
    (data / "3.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"1 of 8 rows cannot be used.*more than the 1.00% allowed"):
        train()
    train("--max_unreadable", "0.2")  # as the error says, in the same folder
    assert "1 of 8 rows cannot be used" in caplog.text and (tmp_path / "out" / "model.safetensors").is_file()


def test_output_folder_of_another_run(train, tmp_path):
    train()
    with pytest.raises(ValueError, match=r"holds a job with other settings: .*train was .*now \['projector'\]"):
        train("--train", "projector")
    with pytest.raises(ValueError, match="seed was 42, now 7"):
        train("--seed", "7")
    train("--logging_steps", "3", "--max_steps", "2")  # these do not make it another run


def test_resume_with_another_model(train, tmp_path, tiny_bases):
    from modeling_lsm import LsmPipeline
    from modeling_lsm.composing import compose

    folder = tmp_path / "model"
    for width in (32, 64):
        model, processor = compose(
            str(tiny_bases.speech), str(tiny_bases.text), projector_hidden_size=width, projector_num_attention_heads=4
        )
        LsmPipeline(model=model, processor=processor, device="cpu").save_pretrained(folder)
        arguments = ("--model_name_or_path", folder, "--save_strategy", "steps", "--save_steps", "1")
        if width == 32:
            train(*arguments)
        else:
            with pytest.raises(ValueError, match="weights was"):
                train(*arguments)


def test_recipes_are_understood():
    """In a process of its own, as a recipe may turn DeepSpeed on for all that follows."""
    script = """
import sys, train_sft
for recipe in sys.argv[1:]:
    script_args, training_args, model_args = train_sft.make_parser().parse_args_and_config(["--config", recipe])
    train_sft.check_arguments(script_args, training_args, model_args)
    print(recipe, model_args.model_name_or_path, script_args.recipe)
"""
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    recipes = [str(recipe) for recipe in recipes if recipe.stem != "demo"]  # which the demo completes
    done = subprocess.run([sys.executable, "-c", script, *recipes], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(recipes) == 3 and all(f"{recipe} outputs/" in done.stdout for recipe in recipes)
