"""The model beside what transformers has around models: attention, losses, compiling, offloading, parallelism."""

import copy
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from accelerate import cpu_offload, disk_offload
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from modeling_lsm import LsmForConditionalGeneration, make_chat, projectors_lsm
from modeling_lsm.data.collating import predicts_label
from tests import tiny
from tests.families import family_config
from tests.tiny import ask, noise


ROOT = Path(__file__).parent.parent
PROJECTORS = {
    "qformer": {},
    "mlp": {"projector_type": "mlp"},
    "conv": {"projector_type": "conv", "window_size": 16},
    "transformer": {"projector_type": "transformer"},
}
both_checkpointings = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
all_projectors = pytest.mark.parametrize("settings", PROJECTORS.values(), ids=PROJECTORS)
FLASH = "stand-in/flash-attention"  # named like a kernel of the Hub
TOLERANCE = {"atol": 2e-5, "rtol": 0.0}


@pytest.fixture
def inputs(processor):
    """A short clip, one of two chunks, and text alone."""
    return three_chats(processor)


def three_chats(processor, **kwargs):
    chats = [make_chat("Say.", audio=noise(2, 1)), make_chat("And at length?", audio=noise(40, 2))]
    return ask(processor, *chats, [{"role": "user", "content": "No speech."}], **kwargs)


def logits(model, inputs) -> torch.Tensor:
    """Those of all rows without their padding, `(tokens, vocab_size)`."""
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


class TestCapabilities:
    """What `generate` and the `Trainer` ask a model about itself."""

    @pytest.mark.parametrize(
        "family", ["bamba", "falcon_h1", "gpt_neo", "jamba", "llama", "nemotron_h", "qwen3_5_text", "qwen3_next"]
    )
    def test_are_the_llms_own(self, family):
        model = tiny.make_model(text_config=family_config(family).to_dict())
        llm = model.lsm.language_model
        for part in (model, model.lsm):
            assert part._is_stateful is type(llm)._is_stateful
            assert part._can_compile_fullgraph is type(llm)._can_compile_fullgraph
            assert part.supports_context_parallel is llm.supports_context_parallel
        assert model._supports_default_dynamic_cache() is llm._supports_default_dynamic_cache()
        assert model._skip_keys_device_placement == llm._skip_keys_device_placement
        assert llm._no_split_modules <= model._no_split_modules

    def test_a_refusal_of_context_parallelism(self, monkeypatch):
        monkeypatch.setattr(LlamaForCausalLM, "_supports_context_parallel", False)
        assert not tiny.make_model().supports_context_parallel


class TestLoss:
    def test_shifted_labels_are_labels(self, model, inputs):
        """Context and sequence parallelism shift before they split, and pass both or the shifted ones alone."""
        labels = inputs["input_ids"].masked_fill(torch.rand(inputs["input_ids"].shape) < 0.7, -100)
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        expected = model(**inputs, labels=labels).loss
        torch.testing.assert_close(model(**inputs, shift_labels=shifted).loss, expected)
        torch.testing.assert_close(model(**inputs, labels=labels, shift_labels=shifted).loss, expected)
        kept = model(**inputs, shift_labels=shifted, logits_to_keep=shifted != -100)
        torch.testing.assert_close(kept.loss, expected)
        assert kept.logits.shape[0] == (shifted != -100).sum()

    def test_a_mask_says_which_logits_are_kept(self, model, inputs):
        kept = torch.rand(inputs["input_ids"].shape) < 0.3
        some, everywhere = model(**inputs, logits_to_keep=kept).logits, model(**inputs).logits
        torch.testing.assert_close(some, everywhere[kept], **TOLERANCE)
        labels = inputs["input_ids"].masked_fill(kept, -100)
        some = model(**inputs, labels=labels, logits_to_keep=predicts_label(labels))
        torch.testing.assert_close(some.loss, model(**inputs, labels=labels).loss)

    def test_the_argument_of_the_first_release_is_gone(self):
        assert "labelled_logits_only" not in inspect.signature(LsmForConditionalGeneration.forward).parameters


class TestAttention:
    @all_projectors
    def test_reaches_every_part(self, tmp_path, settings):
        model, processor = tiny.make_pair(**settings)
        inputs = three_chats(processor)
        expected = logits(model, inputs)
        model.save_pretrained(tmp_path, processor=processor)
        loaded = LsmForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
        assert implementations(loaded) == ["eager", "eager", "eager"]
        torch.testing.assert_close(logits(loaded, inputs), expected, **TOLERANCE)
        loaded.set_attn_implementation("sdpa")
        assert implementations(loaded) == ["sdpa", "sdpa", "sdpa"]
        torch.testing.assert_close(logits(loaded, inputs), expected, atol=0.0, rtol=0.0)
        loaded.set_attn_implementation({"projector_config": "eager", "text_config": "eager"})
        assert implementations(loaded) == ["sdpa", "eager", "eager"]
        torch.testing.assert_close(logits(loaded, inputs), expected, **TOLERANCE)
        parts = {"audio_config": "eager", "projector_config": "sdpa"}
        loaded = LsmForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=parts)
        assert implementations(loaded)[:2] == ["eager", "sdpa"]

    @pytest.mark.parametrize("settings", [{}, {"projector_type": "transformer"}], ids=["qformer", "transformer"])
    def test_is_what_the_projector_uses(self, monkeypatch, settings):
        """Its layers, not its config alone: with attention that is none, other embeddings come out."""
        model = tiny.make_model(**settings)
        features = torch.randn(1, 80, 400)
        expected = model.get_audio_features(features).pooler_output

        def deaf(module, query, key, value, attention_mask, **kwargs):
            return torch.zeros_like(query).transpose(1, 2), None

        register(monkeypatch, "deaf", deaf)
        model.set_attn_implementation({"projector_config": "deaf"})
        embeds = model.get_audio_features(features).pooler_output
        assert not torch.equal(embeds, expected)

    @all_projectors
    @pytest.mark.parametrize("when", ["made", "set"])
    def test_flash(self, monkeypatch, settings, when):
        """A stand-in for flash attention, which is not installed here: who is given it, and who says no."""
        warnings, users = [], set()
        monkeypatch.setattr(projectors_lsm.logger, "warning_once", warnings.append)
        monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", lambda *_, **__: None)

        def flash(module, *args, **kwargs):
            users.add(type(module).__name__)
            return sdpa_attention_forward(module, *args, **kwargs)

        register(monkeypatch, FLASH, flash)
        if when == "made":
            model, processor = tiny.make_pair(**settings, attn_implementation=FLASH)
        else:
            model, processor = tiny.make_pair(**settings)
            model.set_attn_implementation(FLASH)
        inputs = three_chats(processor)
        found = logits(model, inputs)
        has_none = settings == {}
        assert implementations(model) == [FLASH, "sdpa" if has_none else FLASH, FLASH]
        assert users == {"WhisperAttention", "LlamaAttention"}
        assert bool(warnings) is has_none and all("Q-Former has no flash attention" in text for text in warnings)
        torch.testing.assert_close(found, logits(tiny.make_model(**settings), inputs), **TOLERANCE)


def register(monkeypatch, name: str, attention) -> None:
    """Makes `attention`, with SDPA's masks, known to transformers as `name`."""
    monkeypatch.setitem(AttentionInterface._global_mapping, name, attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, sdpa_mask)


def implementations(model) -> list[str]:
    """Of encoder, projector and LLM: what their modules say, all of which must agree."""
    found = []
    for part in (model.lsm.audio_tower, model.lsm.projector, model.lsm.language_model):
        configs = [module.config for module in part.modules() if hasattr(module, "config")]
        (name,) = {config._attn_implementation for config in configs}
        found.append(name)
    return found


class TestOffloading:
    @pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
    @all_projectors
    def test_by_accelerate(self, tmp_path, settings, offload):
        model, processor = tiny.make_pair(**settings)
        inputs = three_chats(processor)
        expected = logits(model, inputs)
        folder = {"offload_dir": str(tmp_path)} if offload is disk_offload else {}
        model = offload(model, execution_device=torch.device("cpu"), **folder)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        torch.testing.assert_close(logits(model, inputs), expected, atol=0.0, rtol=0.0)

    @pytest.mark.parametrize(
        "device_map",
        [{"": "disk"}, {"lsm.audio_tower": "disk", "lsm.projector": "cpu", "lsm.language_model": "cpu"}],
        ids=["all", "encoder"],
    )
    def test_at_loading(self, tmp_path, model, processor, inputs, device_map):
        model.save_pretrained(tmp_path / "model", processor=processor)
        loaded = LsmForConditionalGeneration.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
        )
        assert loaded.lsm.audio_tower.conv1.weight.is_meta
        torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), atol=0.0, rtol=0.0)
        answers = [m.generate(**inputs, max_new_tokens=4, eos_token_id=None) for m in (loaded, model)]
        assert torch.equal(*answers)


class TestCompiling:
    def step(self, model, inputs) -> dict:
        """Inputs of one decode step after a prompt, as `generate` makes them, with a static cache of their own."""
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=inputs["input_ids"].shape[1] + 8)
        with torch.no_grad():
            token = model(**inputs, past_key_values=cache).logits[:, -1:].argmax(-1)
        return model.prepare_inputs_for_generation(
            torch.cat([inputs["input_ids"], token], dim=1),
            next_sequence_length=1,
            past_key_values=cache,
            attention_mask=torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
            use_cache=True,
        )

    @pytest.mark.parametrize(
        "backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
    )  # the latter needs a C++ compiler
    def test_a_decode_step_is_one_graph(self, model, inputs, backend):
        torch._dynamo.reset()
        with torch.no_grad():
            expected = model(**self.step(model, inputs)).logits
            compiled = torch.compile(model, fullgraph=True, backend=backend)
            torch.testing.assert_close(compiled(**self.step(model, inputs)).logits, expected, **TOLERANCE)

    @pytest.mark.slow
    @all_projectors
    def test_a_prompt_with_speech(self, settings):
        model, processor = tiny.make_pair(**settings)
        inputs = three_chats(processor)
        expected = logits(model, inputs)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(logits(compiled, inputs), expected, **TOLERANCE)

    @pytest.mark.slow
    @all_projectors
    def test_export(self, settings):
        model, processor = tiny.make_pair(**settings)
        # SDPA's wrapper asks whether there is more than one window, which only the clips' lengths say.
        model.set_attn_implementation({"projector_config": "eager"})
        inputs = {**three_chats(processor), "use_cache": False}
        with torch.no_grad():
            exported = torch.export.export(model, (), inputs, strict=False).module()
        torch.testing.assert_close(logits(exported, inputs), logits(model, inputs), **TOLERANCE)
        others = {**inputs, "input_features": inputs["input_features"].flip(-1)}
        assert (logits(exported, others) - logits(exported, inputs)).abs().max() > 0.01


TWO_PROCESSES = """
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from modeling_lsm import LsmForConditionalGeneration

folder = sys.argv[1]
parallel = DistributedConfig(tp_plan="auto")
model = LsmForConditionalGeneration.from_pretrained(folder, distributed_config=parallel).eval()
for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
    assert isinstance(weight, DTensor) and weight.to_local().shape[0] * 2 == weight.shape[0]
inputs = torch.load(f"{folder}/inputs.pt")
with torch.no_grad():
    logits = model(**inputs).logits
answers = model.generate(**inputs, max_new_tokens=6, eos_token_id=None)
if dist.get_rank() == 0:
    torch.save({"logits": logits, "answers": answers}, f"{folder}/found.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tensor_parallelism(tmp_path, tied):
    model, processor = tiny.make_pair(text_config=tiny.llm_config(tie_word_embeddings=tied).to_dict())
    inputs = three_chats(processor)
    model.save_pretrained(tmp_path, processor=processor)
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    run_in_two_processes(TWO_PROCESSES, tmp_path)
    found = torch.load(tmp_path / "found.pt")
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(found["logits"][valid], logits(model, inputs), **TOLERANCE)
    assert torch.equal(found["answers"], model.generate(**inputs, max_new_tokens=6, eos_token_id=None))


DATA_PARALLEL = """
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from modeling_lsm import LsmForConditionalGeneration

folder, reentrant = sys.argv[1], sys.argv[2] == "True"
dist.init_process_group("gloo")
model = LsmForConditionalGeneration.from_pretrained(folder)
model.lsm.audio_tower.requires_grad_(False)
model.gradient_checkpointing_enable({"use_reentrant": reentrant})
model.enable_input_require_grads()
parallel = DistributedDataParallel(model.train())
inputs = torch.load(f"{folder}/inputs-{dist.get_rank()}.pt")
parallel(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
if dist.get_rank() == 0:
    torch.save({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, f"{folder}/found.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
@both_checkpointings
def test_data_parallelism_with_checkpointing(tmp_path, model, processor, reentrant):
    """One process has speech, the other text alone: gradients are the mean of both, and none is missing."""
    model.lsm.audio_tower.requires_grad_(False)
    model.save_pretrained(tmp_path, processor=processor)
    batches = [
        ask(processor, make_chat("Say.", audio=noise(2, 1))),
        ask(processor, [{"role": "user", "content": "No speech."}]),
    ]
    for rank, batch in enumerate(batches):
        torch.save(dict(batch), tmp_path / f"inputs-{rank}.pt")
        (model.train()(**batch, labels=batch["input_ids"]).loss / 2).backward()
    run_in_two_processes(DATA_PARALLEL, tmp_path, str(reentrant))
    found = torch.load(tmp_path / "found.pt")
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() and all(gradient is not None for gradient in found.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: n + m)


@both_checkpointings
@all_projectors
def test_checkpointing_beside_a_frozen_encoder(settings, reentrant):
    model, processor = tiny.make_pair(**settings)
    inputs = three_chats(processor)
    gradients = []
    for checkpointing in (False, True):
        candidate = copy.deepcopy(model)
        candidate.lsm.audio_tower.requires_grad_(False)
        if checkpointing:
            candidate.gradient_checkpointing_enable({"use_reentrant": reentrant})
            candidate.enable_input_require_grads()
        candidate.train()(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in candidate.named_parameters() if p.requires_grad})
    assert any(gradient.abs().max() > 1e-4 for name, gradient in gradients[1].items() if "projector" in name)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: n + m)


def run_in_two_processes(script: str, folder: Path, *arguments: str) -> None:
    (folder / "script").mkdir()  # apart from the code that the checkpoint carries
    (folder / "script" / "run.py").write_text(script, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(folder / "script" / "run.py"), str(folder), *arguments]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


class TestConventions:
    def test_parts(self, model):
        llm = model.lsm.language_model
        for part in (model, model.lsm):
            assert part.get_input_embeddings() is llm.model.embed_tokens
            assert part.get_decoder() is llm.model
            assert part.get_encoder(modality="audio") is model.lsm.audio_tower
        assert model.get_output_embeddings() is llm.lm_head
        assert model.base_model is model.lsm
        assert model.config.get_text_config(decoder=True) is llm.config

    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    def test_resized_embeddings(self, tmp_path, tied):
        model, processor = tiny.make_pair(text_config=tiny.llm_config(tie_word_embeddings=tied).to_dict())
        inputs = three_chats(processor)
        expected = logits(model, inputs)
        model.resize_token_embeddings(280)
        assert model.config.text_config.vocab_size == 280
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
        found = logits(model, inputs)
        assert found.shape[-1] == 280
        torch.testing.assert_close(found[:, :264], expected, **TOLERANCE)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        model.save_pretrained(tmp_path, processor=processor)
        reloaded = LsmForConditionalGeneration.from_pretrained(tmp_path)
        torch.testing.assert_close(logits(reloaded, inputs), found, atol=0.0, rtol=0.0)

    def test_copies(self, model, inputs):
        expected = logits(model, inputs)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(logits(other, inputs), expected, atol=0.0, rtol=0.0)
            assert other.get_output_embeddings().weight is other.get_input_embeddings().weight
        assert pickle.loads(pickle.dumps(model.config)).to_dict() == model.config.to_dict()
