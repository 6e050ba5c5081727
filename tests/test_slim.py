"""Slim checkpoints: what they hold, where the rest comes from, and that they are the model that was saved."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM

from modeling_lsm import LsmForConditionalGeneration, LsmModel, LsmPipeline, LsmProcessor, composing, make_chat
from modeling_lsm.augmentation.provenance import fingerprint_llm
from modeling_lsm.card_lsm import model_card
from modeling_lsm.composing import check_checkpoint, compose
from modeling_lsm.slim_lsm import can_be_slim, merged_state_dict, trained_state_dict
from modeling_lsm.training import add_lora, set_trained_parts
from tests import tiny
from tests.test_remote_code import run_isolated
from tests.tiny import ask, noise


ROOT = Path(__file__).parents[1]
SMALL = {"projector_hidden_size": 32, "projector_num_attention_heads": 4}
load = LsmForConditionalGeneration.from_pretrained


def train(model, parts: list[str], lora: bool = False, seed: int = 0) -> None:
    """Stands in for training: changes every weight that would train, and notes what did."""
    if lora:
        add_lora(model, peft.LoraConfig(r=4, lora_alpha=6))
    set_trained_parts(model, parts)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def save(model, processor, folder: Path, **kwargs) -> Path:
    LsmPipeline(model=model, processor=processor, device="cpu").save_pretrained(folder, **kwargs)
    return folder


@torch.no_grad()
def logits(model, processor) -> torch.Tensor:
    inputs = ask(processor, make_chat("Say.", audio=noise(1))).to(model.dtype)
    return model.eval()(**inputs).logits


def assert_same_model(model, other) -> None:
    weights, other_weights = model.state_dict(), other.state_dict()
    assert weights.keys() == other_weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, other_weights[name]), name


@pytest.fixture
def bases(tiny_bases, tmp_path):
    """Bases that a test may change."""
    folder = tmp_path / "bases"
    return type(tiny_bases)(*(shutil.copytree(base, folder / base.name) for base in tiny_bases))


@pytest.fixture
def composed(bases):
    return compose(str(bases.speech), str(bases.text), **SMALL)


@pytest.fixture
def slim(composed, tmp_path) -> Path:
    """A slim checkpoint whose projector and LoRA have trained. It wants the folders of `bases`."""
    model, processor = composed
    train(model, ["projector", "llm"], lora=True)
    return save(model, processor, tmp_path / "slim", slim=True)


PROJECTOR, ENCODER, LLM = "lsm.projector.", "lsm.audio_tower.", ("lsm.language_model.",)


class TestSlimIsWhole:
    @pytest.mark.parametrize("spare_rows", [True, False], ids=["spare-row", "new-row"])
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    @pytest.mark.parametrize(
        ("parts", "lora", "prefixes"),
        [
            (["projector"], False, (PROJECTOR,)),
            (["projector", "llm"], True, (PROJECTOR,)),
            (["projector", "llm"], False, (PROJECTOR, *LLM)),
            (["llm"], True, (PROJECTOR,)),
            (["encoder", "projector"], False, (PROJECTOR, ENCODER)),
        ],
        ids=["projector", "lora-projector", "llm-projector", "lora", "encoder-projector"],
    )
    def test_slim_is_whole(self, tiny_bases, tmp_path, parts, lora, prefixes, tied, spare_rows):
        llm = tiny.make_llm(tie_word_embeddings=tied, vocab_size=264 if spare_rows else 261)
        llm.save_pretrained(tmp_path / "llm")
        tiny.make_tokenizer().save_pretrained(tmp_path / "llm")
        model, processor = compose(str(tiny_bases.speech), str(tmp_path / "llm"), **SMALL)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        train(model, parts, lora)
        assert can_be_slim(model)
        weights = model.state_dict()
        slim = save(model, processor, tmp_path / "slim", slim=True)
        whole = save(model, processor, tmp_path / "whole")
        assert logits(model, processor).shape[-1] == (264 if spare_rows else 262)

        expected = {name: tensor for name, tensor in weights.items() if name.startswith(prefixes)}
        if lora:
            expected |= {n.replace(".default.", "."): t for n, t in weights.items() if ".lora_" in n}
        if tied:
            expected.pop("lsm.language_model.lm_head.weight", None)
        saved = load_file(slim / "model.safetensors")
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], expected[name]) for name in saved)
        header = 400 * len(saved)
        assert (slim / "model.safetensors").stat().st_size < sum(t.nbytes for t in saved.values()) + header

        loaded = load(slim)
        assert_same_model(loaded, load(whole))
        torch.testing.assert_close(logits(loaded, processor), logits(model, processor), atol=1e-5, rtol=0.0)
        if not lora:
            assert torch.equal(logits(loaded, processor), logits(model, processor))
        assert any(not torch.equal(tensor, start[name]) for name, tensor in loaded.state_dict().items())
        assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied

    def test_nothing_trained_yet(self, composed, tmp_path):
        model, processor = composed
        slim = save(model, processor, tmp_path / "slim", slim=True)
        assert all(name.startswith(PROJECTOR) for name in load_file(slim / "model.safetensors"))
        assert_same_model(load(slim), model)

    def test_weights_from_elsewhere(self, composed, tmp_path):
        """DeepSpeed hands over a plain dict, in which a tied head is a tensor of its own; the model may be hollow."""
        model, processor = composed
        train(model, ["projector", "llm"], lora=True)
        reference = logits(model, processor)
        state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        slim = save(model, processor, tmp_path / "slim", slim=True, state_dict=dict(state_dict))
        whole = save(model, processor, tmp_path / "whole", state_dict=dict(state_dict))
        for folder in (slim, whole):
            torch.testing.assert_close(logits(load(folder), processor), reference, atol=1e-5, rtol=0.0)
        trained = {name: tensor for name, tensor in state_dict.items() if ".lora_" in name or ".projector." in name}
        assert trained_state_dict(model, trained).keys() == load_file(slim / "model.safetensors").keys()
        with pytest.raises(ValueError, match=r"lacks \d+ weights that no base model has, as lsm\.projector\."):
            trained_state_dict(model, {name: tensor for name, tensor in trained.items() if ".lora_" in name})

    def test_several_files(self, composed, tmp_path):
        model, processor = composed
        train(model, ["projector", "llm"], lora=True)
        slim = save(model, processor, tmp_path / "slim", slim=True)
        sharded = save(model, processor, tmp_path / "sharded", slim=True, max_shard_size="20KB")
        assert len(list(sharded.glob("model-*.safetensors"))) > 2
        assert_same_model(load(sharded), load(slim))

    def test_one_after_the_other_in_one_folder(self, composed, tmp_path):
        model, processor = composed
        train(model, ["projector"])
        kinds = [{"slim": True}, {"max_shard_size": "50KB"}, {"slim": True, "max_shard_size": "20KB"}, {}]
        for kind in [*kinds, *reversed(kinds)]:
            save(model, processor, tmp_path / "lsm", **kind)
            assert_same_model(load(tmp_path / "lsm"), model)

    def test_a_loaded_model_is_whole(self, slim, composed, tmp_path):
        _, processor = composed
        loaded = load(slim)
        config = loaded.config
        assert (config.slim, config.lora_scaling, config.trained_parts) == (False, None, ["projector", "llm"])
        whole = save(loaded, processor, tmp_path / "whole")
        saved = json.loads((whole / "config.json").read_text())
        assert saved["slim"] is False and saved["lora_scaling"] is None
        shutil.rmtree(tmp_path / "bases")
        check_checkpoint(whole, loaded)

    def test_saving_leaves_the_model_in_training(self, composed, tmp_path):
        model, processor = composed
        train(model, ["projector", "llm"], lora=True)
        before, config = dict(model.named_parameters()), model.config.to_dict()
        save(model, processor, tmp_path / "slim", slim=True)
        save(model, processor, tmp_path / "whole")
        after = dict(model.named_parameters())
        assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
        changed = {key for key, value in model.config.to_dict().items() if config.get(key) != value}
        assert changed <= {"custom_pipelines", "architectures", "auto_map"}

    def test_a_second_run(self, slim, composed, tmp_path):
        """What an earlier run trained is no longer its base: it is saved whole, whatever trains now."""
        _, processor = composed
        for lora in (True, False):
            model = load(slim)
            train(model, ["projector", "llm"] if lora else ["projector"], lora, seed=1)
            again = save(model, processor, tmp_path / f"again-{lora}", slim=True)
            names = set(load_file(again / "model.safetensors"))
            assert any(name.startswith("lsm.language_model.model.embed") for name in names)
            assert not any(".lora_" in name or name.startswith(ENCODER) for name in names)
            saved = json.loads((again / "config.json").read_text())
            assert saved["slim"] and saved["lora_scaling"] is None
            assert saved["trained_parts"] == ["projector", "llm"]
            torch.testing.assert_close(logits(load(again), processor), logits(model, processor), atol=1e-5, rtol=0.0)


class TestDtypes:
    def test_of_composing_and_training(self, bases, tmp_path):
        """Bases in float32, composed in bfloat16: rounded once, and so they were when the fingerprint was taken."""
        model, processor = compose(str(bases.speech), str(bases.text), dtype="bfloat16", **SMALL)
        train(model, ["projector", "llm"], lora=True)
        slim = save(model, processor, tmp_path / "slim", slim=True)
        whole = save(model, processor, tmp_path / "whole")
        loaded = load(slim)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        assert_same_model(loaded, load(whole))
        assert_same_model(load(slim, dtype="float32"), load(whole, dtype="float32"))
        assert load(slim, dtype="auto").dtype == torch.bfloat16  # that of the model that was saved
        assert load(slim, dtype="float32").dtype == torch.float32

    @pytest.mark.parametrize("auto_class", [LsmForConditionalGeneration, AutoModelForMultimodalLM])
    def test_asked_for(self, slim, composed, tmp_path, auto_class):
        whole = save(*composed, tmp_path / "whole")
        for dtype in (torch.bfloat16, "float16"):
            loaded = auto_class.from_pretrained(slim, dtype=dtype)
            assert_same_model(loaded, auto_class.from_pretrained(whole, dtype=dtype))
            assert str(loaded.dtype).endswith(str(dtype).removeprefix("torch."))

    def test_trained_in_less_than_composed(self, composed, tmp_path):
        model, processor = composed
        folder = save(model, processor, tmp_path / "lsm")
        model = load(folder, dtype="bfloat16")
        train(model, ["projector", "llm"], lora=True)
        slim = save(model, processor, tmp_path / "slim", slim=True)
        assert_same_model(load(slim), load(save(model, processor, tmp_path / "whole")))


class TestArguments:
    """`from_pretrained` takes what it always takes."""

    def test_loading_info(self, slim, composed):
        model, info = load(slim, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(logits(model, composed[1]), logits(load(slim), composed[1]))

    def test_generation_config_is_the_checkpoints(self, slim, composed):
        assert load(slim).generation_config.suppress_tokens == [composed[0].config.audio_token_id]
        assert load(slim).generation_config.to_dict() == composed[0].generation_config.to_dict()

    def test_config_settings(self, slim):
        loaded = load(slim, encoder_padding="max_length", attn_implementation="eager", device_map="cpu")
        assert loaded.config.encoder_padding == "max_length"
        assert loaded.config.text_config._attn_implementation == "eager"
        assert loaded.lsm.language_model.config._attn_implementation == "eager"
        assert loaded.name_or_path == loaded.config.name_or_path == str(slim)

    def test_subfolder(self, slim, composed):
        inner = slim.parent / "outer" / "inner"
        shutil.copytree(slim, inner)
        assert torch.equal(logits(load(inner.parent, subfolder="inner"), composed[1]), logits(load(slim), composed[1]))

    def test_without_the_head(self, slim, composed):
        inputs = ask(composed[1], make_chat("Say.", audio=noise(1)))
        expected = load(slim).lsm(**inputs).last_hidden_state
        for loaded in (AutoModel.from_pretrained(slim), LsmModel.from_pretrained(slim)):
            assert isinstance(loaded, LsmModel)
            assert torch.equal(loaded(**inputs).last_hidden_state, expected)

    def test_a_whole_checkpoint_does_not_mind(self, tiny_checkpoint):
        assert_same_model(load(tiny_checkpoint, base_folders={"text": "nowhere"}), load(tiny_checkpoint))
        model = load(tiny_checkpoint)
        assert_same_model(load(None, config=model.config, state_dict=model.state_dict()), model)


class TestBases:
    def test_moved(self, slim, bases, composed, tmp_path):
        reference = logits(load(slim), composed[1])
        elsewhere = {"speech": tmp_path / "ears", "text": tmp_path / "mind"}
        bases.speech.rename(elsewhere["speech"])
        bases.text.rename(elsewhere["text"])
        for key in elsewhere:
            with pytest.raises(OSError, match="It needs its base model tiny-"):
                load(slim, base_folders={key: elsewhere[key]}, local_files_only=True)
        loaded = load(slim, base_folders=elsewhere)
        assert torch.equal(logits(loaded, composed[1]), reference)
        # A slim checkpoint that a further run saves knows the new place.
        train(loaded, ["projector"])
        again = save(loaded, composed[1], tmp_path / "again", slim=True)
        assert load(again).config.base_models["speech"]["path"] == str(elsewhere["speech"])

    def test_missing(self, slim, bases):
        shutil.rmtree(bases.text)
        with pytest.raises(OSError) as error:
            load(slim, local_files_only=True)
        for part in (
            str(slim),
            "base model tiny-llm",
            f"was in {bases.text}",
            'base_folders={"text": "path/to/tiny-llm',
        ):
            assert part in str(error.value)

    def test_another_model(self, slim, tmp_path):
        tiny.make_llm(seed=1).save_pretrained(tmp_path / "other")
        with pytest.raises(
            ValueError, match=r"text model that was found is not the tiny-llm that the slim checkpoint"
        ):
            load(slim, base_folders={"text": tmp_path / "other"})
        tiny.make_whisper(seed=1).save_pretrained(tmp_path / "other-ears")
        with pytest.raises(ValueError, match=r"speech model that was found is not the tiny-whisper that the slim"):
            load(slim, base_folders={"speech": tmp_path / "other-ears"})
        with pytest.raises(ValueError, match="is a llama model; the speech model must be a Whisper"):
            load(slim, base_folders={"speech": tmp_path / "other"})

    def test_changed_in_its_place(self, slim, bases):
        llm = AutoModelForCausalLM.from_pretrained(bases.text)
        with torch.no_grad():
            llm.model.layers[1].mlp.up_proj.weight[3, 3] += 0.01
        llm.save_pretrained(bases.text)
        with pytest.raises(ValueError, match=r"or it has changed: the fingerprint of its weights is \w{12}, expected"):
            load(slim)

    def test_a_base_that_is_not_needed_is_not_looked_for(self, composed, bases, tmp_path):
        model, processor = composed
        train(model, ["projector", "llm"])
        slim = save(model, processor, tmp_path / "slim", slim=True)
        shutil.rmtree(bases.text)
        assert_same_model(load(slim, local_files_only=True), model)

    def test_unknown_key(self, slim):
        with pytest.raises(ValueError, match=r"`base_folders` has \['llm'\]; expected 'speech' or 'text'"):
            load(slim, base_folders={"llm": "somewhere"})

    def test_from_the_hub_at_its_revision(self, composed, bases, tmp_path):
        """As the Hub's client would have cached it; the main branch has moved on since."""
        model, processor = composed
        revision, newer = "a" * 40, "b" * 40
        for key, folder in (("speech", bases.speech), ("text", bases.text)):
            cached = tmp_path / "cache" / f"models--someone--{folder.name}"
            shutil.copytree(folder, cached / "snapshots" / revision)
            (tiny.make_llm(seed=1) if key == "text" else tiny.make_whisper(seed=1)).save_pretrained(
                cached / "snapshots" / newer
            )
            (cached / "refs").mkdir()
            (cached / "refs" / "main").write_text(newer)
            model.config.base_models[key].update(id=f"someone/{folder.name}", revision=revision, path=None)
        train(model, ["projector"])
        slim = save(model, processor, tmp_path / "slim", slim=True)
        shutil.rmtree(tmp_path / "bases")
        arguments = {"cache_dir": tmp_path / "cache", "local_files_only": True}
        assert_same_model(load(slim, **arguments), model)
        model.config.base_models["text"]["revision"] = newer
        slim = save(model, processor, tmp_path / "newer", slim=True)
        with pytest.raises(ValueError, match="is not the someone/tiny-llm that"):
            load(slim, **arguments)


class TestRefusals:
    def test_everything_has_trained(self, composed, tmp_path):
        model, processor = composed
        train(model, ["encoder", "projector", "llm"])
        assert not can_be_slim(model)
        with pytest.raises(
            ValueError, match="cannot be saved slim: all of its parts have been trained. Save it whole"
        ):
            save(model, processor, tmp_path, slim=True)

    @pytest.mark.parametrize("missing", ["id", "fingerprint", "dtype"])
    def test_unknown_bases(self, composed, missing):
        model, _ = composed
        del model.config.base_models["speech"][missing]
        assert not can_be_slim(model)
        with pytest.raises(ValueError, match=f"config does not say of the encoder's base model: {missing}"):
            trained_state_dict(model)
        model.config.trained_parts = ["encoder"]
        assert can_be_slim(model)
        model.config.base_models = None
        assert not can_be_slim(model)

    def test_a_trained_llm_that_is_quantized(self, composed):
        model, _ = composed
        model.config.quantization_config = {"load_in_4bit": True}
        assert can_be_slim(model)
        model.config.trained_parts = ["projector", "llm"]
        with pytest.raises(ValueError, match="has been trained and then quantized, so that its weights are lost"):
            trained_state_dict(model)

    def test_a_weight_is_missing(self, slim):
        tensors = load_file(slim / "model.safetensors")
        del tensors["lsm.projector.queries"]
        save_file(tensors, slim / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lack 1 weights, as lsm\.projector\.queries\. Save it anew"):
            load(slim)

    def test_lora_on_quantized_weights_cannot_be_merged(self, composed):
        model, _ = composed
        train(model, ["projector", "llm"], lora=True)
        name = "lsm.language_model.model.layers.0.mlp.up_proj.base_layer.weight"
        state_dict = {**model.state_dict(), name: torch.zeros(1024, 1, dtype=torch.uint8)}
        with pytest.raises(ValueError, match=r"merged into lsm\..*\.layers\.0\.mlp\.up_proj.*quantized"):
            merged_state_dict(model, state_dict)
        assert trained_state_dict(model, state_dict)


class TestFingerprint:
    def test_of_an_llm_that_did_not_train(self, composed, bases, tmp_path):
        model, processor = composed
        train(model, ["projector"])
        slim = save(model, processor, tmp_path / "slim", slim=True)
        assert fingerprint_llm(str(slim)) == fingerprint_llm(str(bases.text))

    def test_of_one_that_did(self, composed, bases, tmp_path):
        model, processor = composed
        train(model, ["llm"])
        slim = save(model, processor, tmp_path / "slim", slim=True)
        whole = save(model, processor, tmp_path / "whole")
        assert fingerprint_llm(str(slim)) == fingerprint_llm(str(whole)) != fingerprint_llm(str(bases.text))

    def test_of_one_with_lora(self, slim):
        with pytest.raises(ValueError, match=r"with LoRA, which must be merged.*composing --merge \S*slim "):
            fingerprint_llm(str(slim))


class TestPublishing:
    def published_config(self, monkeypatch, pipe, **kwargs) -> dict:
        seen = {}

        class Api:
            def __init__(self, token=None):
                pass

            def create_repo(self, repo_id, **_):
                return type("Repo", (), {"repo_id": repo_id})

            def upload_folder(self, folder_path, **_):
                seen.update(json.loads(Path(folder_path, "config.json").read_text()))
                return type("Commit", (), {"commit_url": "https://hub.example/commit/1"})

        monkeypatch.setattr("modeling_lsm.saving_lsm.HfApi", Api)
        pipe.push_to_hub("someone/lsm", **kwargs)
        return seen

    def test_folders_are_nobodys_business(self, composed, monkeypatch, bases):
        model, processor = composed
        pipe = LsmPipeline(model=model, processor=processor, device="cpu")
        published = self.published_config(monkeypatch, pipe)
        assert str(bases.text.parent) not in json.dumps(published)
        assert published["base_models"]["text"]["id"] == "tiny-llm"
        assert model.config.base_models["text"]["path"] == str(bases.text)

    def test_bases_that_nobody_else_has(self, composed, monkeypatch):
        model, processor = composed
        train(model, ["projector"])
        pipe = LsmPipeline(model=model, processor=processor, device="cpu")
        for key in ("speech", "text"):
            with pytest.raises(
                ValueError, match=rf"The {key} model of this slim checkpoint is known only as the folder"
            ):
                self.published_config(monkeypatch, pipe, slim=True)
            # the mend that the message names
            pipe.model.config.base_models[key].update(id=f"someone/{key}", revision=None, path=None)
        published = self.published_config(monkeypatch, pipe, slim=True)
        assert published["slim"] is True
        assert [published["base_models"][key]["id"] for key in ("speech", "text")] == [
            "someone/speech",
            "someone/text",
        ]


class TestCard:
    def table(self, card: str) -> dict[str, tuple[int, str]]:
        lines = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
        return {line[0]: (int(line[3].replace(",", "")), line[4]) for line in lines[2:-1]}

    def test_with_lora(self, composed):
        model, _ = composed
        before = self.table(model_card(model, "lsm"))
        train(model, ["projector", "llm"], lora=True)
        card = model_card(model, "lsm", slim=True)
        lora = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
        rows = self.table(card)
        assert rows["LoRA on the LLM"] == (lora, "yes") and rows["LLM"] == before["LLM"]
        assert rows["speech encoder"] == before["speech encoder"] == (75_904, "no")
        assert rows["qformer projector"] == (before["qformer projector"][0], "yes")
        total, trained = sum(size for size, _ in rows.values()), lora + rows["qformer projector"][0]
        assert f"**{total:,}** | **{trained:,}**" in card
        assert "What did not train is fetched when it is loaded: `tiny-whisper` and `tiny-llm`." in card

        # Merged, the LLM is another one.
        whole = self.table(model_card(model, "lsm"))
        assert whole.keys() == before.keys() and whole["LLM"] == (before["LLM"][0], "yes")
        assert "slim" not in model_card(model, "lsm")

    def test_only_what_is_left_out_is_fetched(self, composed):
        model, _ = composed
        train(model, ["projector", "llm"])
        assert "is fetched when it is loaded: `tiny-whisper`." in model_card(model, "lsm", slim=True)


def test_command_line_merges(slim, bases, composed, tmp_path, monkeypatch, capsys, caplog):
    ears, whole = tmp_path / "ears", tmp_path / "whole"
    bases.speech.rename(ears)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["composing", "--merge", str(slim), *map(str, arguments)])
        composing.main()

    with caplog.at_level("INFO"):
        run("--output_dir", whole, "--base_speech", ears)
    assert f"{whole}: " in caplog.text and "reloaded and checked" in caplog.text
    assert_same_model(load(whole), load(slim, base_folders={"speech": ears}))
    processor = LsmProcessor.from_pretrained(whole)
    torch.testing.assert_close(logits(load(whole), processor), logits(composed[0], processor), atol=1e-5, rtol=0.0)

    with pytest.raises(SystemExit):
        run("--output_dir", slim)
    assert "--output_dir is the slim checkpoint itself" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["composing", "--output_dir", str(whole), "--text_model", str(bases.text)])
    with pytest.raises(SystemExit):
        composing.main()
    assert "composing needs --speech_model and --text_model" in capsys.readouterr().err


ISOLATED = """
sys.modules |= dict.fromkeys(("peft", "trl"))  # not importable either
import json, torch
from transformers import AutoModelForMultimodalLM, pipeline

folder, bases, clip, results = sys.argv[1:5]
kwargs = {"base_folders": json.loads(bases)}
model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)
pipe = pipeline("audio-text-to-text", model=folder, trust_remote_code=True, device="cpu", model_kwargs=kwargs)
answers = pipe(clip, text="Say.", max_new_tokens=8)
torch.save({"answers": answers, "weights": model.state_dict(), "module": type(model).__module__}, results)
pipe.save_pretrained("whole")
"""


def test_in_a_fresh_process(slim, bases, composed, librivox, tmp_path):
    isolated = tmp_path / "isolated"
    isolated.mkdir()
    slim = slim.rename(isolated / "slim")
    elsewhere = {key: str(folder.rename(isolated / key)) for key, folder in bases._asdict().items()}
    run_isolated(isolated, ISOLATED, slim, json.dumps(elsewhere), librivox[0].path, isolated / "results.pt")
    results = torch.load(isolated / "results.pt", weights_only=False)
    assert results["module"].startswith("transformers_modules.")
    loaded = load(slim, base_folders=elsewhere)
    pipe = LsmPipeline(model=loaded, processor=composed[1], device="cpu")
    assert results["answers"] == pipe(librivox[0].path, text="Say.", max_new_tokens=8)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(results["weights"][name], tensor, atol=1e-7, rtol=0.0)
    check_checkpoint(isolated / "whole", load(isolated / "whole"))


@pytest.mark.slow
def test_real_models(real_speech_model, real_text_model, librivox, tmp_path):
    """SmolLM2-135M and Whisper tiny.en, LoRA of rank 8: under 8 % of the whole, and the same answers."""
    model, processor = compose(str(real_speech_model), str(real_text_model), projector_hidden_size=384)
    add_lora(model, peft.LoraConfig(r=8, lora_alpha=16))
    set_trained_parts(model, ["projector", "llm"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.01)
    whole = save(model, processor, tmp_path / "whole")
    slim = save(model, processor, tmp_path / "slim", slim=True)
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (slim, whole)]
    print(json.dumps({"slim": sizes[0], "whole": sizes[1], "share": round(sizes[0] / sizes[1], 4)}))
    assert sizes[0] < 0.08 * sizes[1]
    assert_same_model(load(slim), load(whole))
    answers = [
        LsmPipeline(model=load(folder), processor=processor, device="cpu")(
            [clip.path for clip in librivox], text="Transcribe the speech.", max_new_tokens=16
        )
        for folder in (slim, whole)
    ]
    assert answers[0] == answers[1] and any(answer[0]["generated_text"] for answer in answers[0])


PARTITIONED = """
import sys
import deepspeed, torch
from safetensors.torch import load_file
from transformers.integrations import HfDeepSpeedConfig
from modeling_lsm import LsmForConditionalGeneration
from modeling_lsm.card_lsm import model_card

slim, whole = sys.argv[1:]
deepspeed.init_distributed("gloo")
settings = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "train_batch_size": 2}
kept_alive = HfDeepSpeedConfig(settings)
model = LsmForConditionalGeneration.from_pretrained(slim)
assert all(parameter.numel() == 0 for parameter in model.parameters()), "not partitioned"
expected = load_file(f"{whole}/model.safetensors")
assert expected.keys() == dict(model.named_parameters()).keys()
for name, parameter in model.named_parameters():
    with deepspeed.zero.GatheredParameters([parameter]):
        assert torch.equal(parameter, expected[name]), name
assert f"**{sum(tensor.numel() for tensor in expected.values()):,}**" in model_card(model, "lsm")
print(f"process {torch.distributed.get_rank()} is content")
"""


@pytest.mark.slow
def test_zero3_takes_the_bases_apart_only_when_they_are_together(slim, composed, tmp_path):
    whole = save(*composed, tmp_path / "whole")
    (tmp_path / "script.py").write_text(PARTITIONED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [*launcher, tmp_path / "script.py", slim, whole],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    assert "process 0 is content" in process.stdout and "process 1 is content" in process.stdout
