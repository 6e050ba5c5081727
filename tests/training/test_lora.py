"""LoRA on the LLM: where it goes, what trains, what is refused, and the LLM as it was without it."""

import peft
import pytest
import torch
import trl
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import BitsAndBytesConfig, GPT2Config

from modeling_lsm import LsmForConditionalGeneration, LsmPipeline, make_chat
from modeling_lsm.composing import compose
from modeling_lsm.slim_lsm import merged_state_dict, trained_state_dict
from modeling_lsm.training import add_lora, set_trained_parts, without_lora
from tests import tiny
from tests.tiny import ask, noise


def stir(model) -> None:
    """Gives LoRA an effect: it begins with none."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.2)


def adapted(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.fixture
def inputs(processor):
    return ask(processor, make_chat("Say.", audio=noise(1)))


class TestWhere:
    def test_every_linear_layer_of_the_llm_and_nothing_else(self, model):
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        add_lora(model, peft.LoraConfig())
        assert adapted(model) == {name for name in linear if name.startswith("lsm.language_model.model.")}
        assert len(adapted(model)) == 14

    def test_named_layers(self, model):
        add_lora(model, peft.LoraConfig(target_modules=r".*\.1\.self_attn\.(q|out)_proj"))
        assert adapted(model) == {"lsm.language_model.model.layers.1.self_attn.q_proj"}

    def test_with_the_arguments_of_trl(self, model):
        """`out_proj` and `k_proj` are names of Whisper's layers, too."""
        arguments = trl.ModelConfig(
            use_peft=True, lora_r=4, lora_alpha=8, lora_target_modules=["k_proj", "v_proj"], use_rslora=True
        )
        add_lora(model, trl.get_peft_config(arguments))
        assert len(adapted(model)) == 4 and all(name.startswith("lsm.language_model.") for name in adapted(model))
        assert model.config.lora_scaling == pytest.approx(8 / 4**0.5)

    def test_no_arguments_of_trl(self, model):
        add_lora(model, trl.get_peft_config(trl.ModelConfig(use_peft=True)))
        assert len(adapted(model)) == 14 and model.config.lora_scaling == 2.0


class TestTraining:
    @pytest.mark.parametrize(
        ("parts", "prefixes"),
        [
            (["projector", "llm"], ("lsm.projector.",)),
            (["llm"], ()),
            (["encoder", "llm"], ("lsm.audio_tower.",)),
        ],
    )
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    def test_what_trains(self, parts, prefixes, tied):
        model = tiny.make_model(text_config=tiny.llm_config(tie_word_embeddings=tied).to_dict())
        add_lora(model, peft.LoraConfig())
        set_trained_parts(model, parts)
        trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trains == {
            name
            for name, _ in model.named_parameters()
            if ".lora_" in name or (name.startswith(prefixes) and "embed_positions" not in name)
        }
        assert model.config.trained_parts == [part for part in ("encoder", "projector") if part in parts] + ["lora"]

    def test_alone_it_leaves_the_other_parts_as_they_are(self, model):
        set_trained_parts(model, ["projector"])
        add_lora(model, peft.LoraConfig())
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad is (".lora_" in name or ".projector." in name), name
        assert model.config.trained_parts == ["projector", "lora"]

    def test_gradients_reach_lora_and_projector(self, model, inputs):
        add_lora(model, peft.LoraConfig())
        set_trained_parts(model, ["projector", "llm"])
        stir(model)
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) is parameter.requires_grad, name
            if ".lora_" in name or name == "lsm.projector.queries":
                assert parameter.grad.any(), name

    def test_it_is_in_float32_whatever_the_llm_is_in(self, model, inputs):
        model.to(torch.bfloat16)
        add_lora(model, peft.LoraConfig())
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        assert {dtype for name, dtype in dtypes.items() if ".lora_" in name} == {torch.float32}
        assert {dtype for name, dtype in dtypes.items() if ".lora_" not in name} == {torch.bfloat16}
        assert model(**inputs.to(torch.bfloat16)).logits.dtype == torch.bfloat16


class TestMerging:
    @pytest.mark.parametrize("settings", [{"lora_alpha": 3}, {"use_rslora": True, "lora_alpha": 5}])
    def test_merged_weights_say_the_same(self, model, inputs, settings):
        before = model(**inputs).logits
        add_lora(model, peft.LoraConfig(r=4, **settings))
        assert torch.equal(model(**inputs).logits, before)
        stir(model)
        expected = model(**inputs).logits
        assert (expected - before).abs().max() > 0.1
        merged = merged_state_dict(model)
        whole = tiny.make_model()
        assert merged.keys() == whole.state_dict().keys()
        whole.load_state_dict(merged)
        torch.testing.assert_close(whole(**inputs).logits, expected, atol=1e-5, rtol=0.0)

    def test_merging_agrees_with_peft(self, model):
        add_lora(model, peft.LoraConfig(r=4, lora_alpha=3))
        stir(model)
        merged = merged_state_dict(model)
        for name in adapted(model):
            layer = model.get_submodule(name)
            expected = layer.base_layer.weight + layer.get_delta_weight("default")
            torch.testing.assert_close(merged[f"{name}.weight"], expected, atol=1e-6, rtol=1e-6)

    def test_on_an_llm_that_an_earlier_run_trained(self, model):
        """Then LoRA alone would not do: no base model has those weights."""
        base = {"id": "a", "fingerprint": "b", "dtype": "float32"}
        model.config.base_models = {"speech": base, "text": base}
        model.config.trained_parts = ["projector", "llm"]
        add_lora(model, peft.LoraConfig(r=4))
        stir(model)
        set_trained_parts(model, ["projector", "llm"])
        assert model.config.trained_parts == ["projector", "llm", "lora"]
        trained, merged = trained_state_dict(model), merged_state_dict(model)
        expected = {n for n in merged if not n.startswith("lsm.audio_tower.") and not n.endswith("lm_head.weight")}
        assert trained.keys() == expected and all(torch.equal(trained[name], merged[name]) for name in trained)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        with pytest.raises(ValueError, match=r"lacks \d+ weights that no base model has, as lsm\.language_model\."):
            trained_state_dict(model, {n: tensor for n, tensor in model.state_dict().items() if n not in frozen})


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "setting"),
        [
            ({"use_dora": True}, "use_dora=True"),
            ({"modules_to_save": ["projector"]}, r"modules_to_save=\['projector'\]"),
            ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
            ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern="),
            ({"bias": "all"}, "bias='all'"),
            ({"lora_bias": True}, "lora_bias=True"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
            ({"trainable_token_indices": [1]}, "trainable_token_indices="),
            ({"target_parameters": ["mlp.weight"]}, "target_parameters="),
            ({"inference_mode": True}, "inference_mode=True"),
            ({"layers_to_transform": [1]}, r"layers_to_transform=\[1\]"),
        ],
    )
    def test_what_cannot_be_merged(self, model, settings, setting):
        before = dict(model.named_parameters())
        with pytest.raises(ValueError, match=f"LoRA takes no {setting}.*must merge.* Leave `"):
            add_lora(model, peft.LoraConfig(**settings))
        assert dict(model.named_parameters()).keys() == before.keys()

    @pytest.mark.parametrize(
        ("targets", "wrong"),
        [
            (["q_proj", "lm_head"], "lm_head"),
            (["embed_tokens"], r"model\.embed_tokens"),
            (["q_proj", "self_attn"], r"model\.layers\.0\.self_attn"),
            (r".*layers\.0\.mlp", r"model\.layers\.0\.mlp"),
        ],
    )
    def test_targets_that_are_not_linear_layers(self, model, targets, wrong):
        with pytest.raises(ValueError, match=f"`target_modules` names {wrong}.*LoRA goes into linear layers"):
            add_lora(model, peft.LoraConfig(target_modules=targets))
        assert not adapted(model)

    def test_an_llm_without_linear_layers(self):
        config = GPT2Config(vocab_size=264, n_embd=32, n_layer=1, n_head=4)
        model = tiny.make_model(text_config=config.to_dict())
        with pytest.raises(ValueError, match=r"The LLM \(gpt2\) keeps its weights in Conv1D layers"):
            add_lora(model, peft.LoraConfig())

    def test_twice(self, model):
        add_lora(model, peft.LoraConfig())
        with pytest.raises(ValueError, match="has LoRA already. Save the model and load it again: that merges it"):
            add_lora(model, peft.LoraConfig())


class TestWithoutLora:
    def test_it_is_the_llm_as_it_was(self, model, inputs):
        before = model(**inputs).logits
        add_lora(model, peft.LoraConfig())
        stir(model)
        after = model(**inputs).logits
        trains = [parameter.requires_grad for parameter in model.parameters()]
        with without_lora(model), torch.no_grad():
            assert torch.equal(model(**inputs).logits, before)
            assert [parameter.requires_grad for parameter in model.parameters()] == trains
        assert torch.equal(model(**inputs).logits, after) and not torch.equal(after, before)

    def test_it_ends_with_an_error_too(self, model, inputs):
        add_lora(model, peft.LoraConfig())
        stir(model)
        after = model(**inputs).logits
        with pytest.raises(KeyError), without_lora(model):
            raise KeyError
        assert torch.equal(model(**inputs).logits, after)

    def test_without_any_nothing_changes(self, model, inputs):
        with without_lora(model):
            inside = model(**inputs).logits
        assert torch.equal(inside, model(**inputs).logits)


class TestQuantized:
    """QLoRA. It runs where bitsandbytes is installed."""

    def test_lora_of_a_quantized_llm_is_merged_into_the_whole_one(self, tiny_bases, tmp_path):
        pytest.importorskip("bitsandbytes")
        model, processor = compose(
            tiny_bases.speech, tiny_bases.text, projector_hidden_size=32, projector_num_attention_heads=4
        )
        LsmPipeline(model=model, processor=processor, device="cpu").save_pretrained(tmp_path / "lsm")
        inputs = ask(processor, make_chat("Say.", audio=noise(1)))
        own = model.state_dict()
        model = LsmForConditionalGeneration.from_pretrained(
            tmp_path / "lsm",
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_compute_dtype=torch.float32,
                llm_int8_skip_modules=["lsm.audio_tower", "lsm.projector", "lm_head"],
            ),
        )
        quantized = model(**inputs).logits
        add_lora(model, peft.LoraConfig(r=4))
        set_trained_parts(model, ["projector", "llm"])
        stir(model)
        assert not torch.equal(model(**inputs).logits, quantized)
        with without_lora(model):
            assert torch.equal(model(**inputs).logits, quantized)
        lora = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
        assert len(lora) == 28 and all(tensor.dtype == torch.float32 for tensor in lora.values())

        pipe = LsmPipeline(model=model, processor=processor, device="cpu")
        pipe.save_pretrained(tmp_path / "slim", slim=True)
        loaded = LsmForConditionalGeneration.from_pretrained(tmp_path / "slim")
        for name, weight in loaded.state_dict().items():
            module = name.removesuffix(".weight")
            if f"{module}.lora_A.default.weight" in lora:
                update = lora[f"{module}.lora_B.default.weight"] @ lora[f"{module}.lora_A.default.weight"]
                torch.testing.assert_close(weight, own[name] + 2.0 * update, atol=1e-6, rtol=1e-6)
            else:
                assert torch.equal(weight, own[name]), name
        with pytest.raises(ValueError, match="its weights are quantized"):
            pipe.save_pretrained(tmp_path / "whole")
