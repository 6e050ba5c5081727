"""Two pretrained models into one checkpoint: weights, rows, templates, refusals; and with real ones (slow)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from modeling_lsm import (
    AUDIO_TOKEN,
    LsmForConditionalGeneration,
    LsmPipeline,
    LsmProcessor,
    composing,
    load_waveform,
    make_chat,
)
from modeling_lsm.composing import check_checkpoint, compose
from tests import tiny
from tests.tiny import ask, noise


SMALL = {"projector_hidden_size": 32, "projector_num_attention_heads": 4}


def save_llm(folder: Path, llm, tokenizer=None) -> Path:
    llm.save_pretrained(folder)
    (tokenizer or tiny.make_tokenizer()).save_pretrained(folder)
    return folder


def words(processor) -> dict[str, torch.Tensor]:
    return processor.tokenizer("The quick brown fox, and so on.", return_tensors="pt")


@pytest.mark.parametrize("projector", ["qformer", "mlp", "conv", "transformer"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parts_are_the_bases(tiny_bases, tmp_path, tied, projector):
    llm = tiny.make_llm(tie_word_embeddings=tied)
    text_model = save_llm(tmp_path / "llm", llm)
    settings = {"projector_type": projector, **SMALL}
    if projector == "conv":  # its convolutions are made for widths in the hundreds
        settings |= {"window_size": 16, "projector_hidden_size": 256}
    model, processor = compose(tiny_bases.speech, text_model, **settings)
    whisper = WhisperForConditionalGeneration.from_pretrained(tiny_bases.speech).model.encoder.state_dict()
    encoder = model.lsm.audio_tower.state_dict()
    assert set(encoder) == set(whisper) and all(torch.equal(encoder[name], whisper[name]) for name in whisper)
    assert torch.equal(model(**words(processor)).logits, llm(**words(processor)).logits)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert not model.training and model.config.trained_parts in (None, [])
    assert not any(parameter.is_meta for parameter in model.parameters())

    # What the projector writes is as loud as the LLM's own embeddings, and depends on the audio and the seed.
    inputs = ask(processor, make_chat("Say.", audio=noise(9)))
    embeds = model(**inputs).audio_hidden_states
    own = model.get_input_embeddings().weight
    assert 0.5 < (embeds.pow(2).mean().sqrt() / own.pow(2).mean().sqrt()).item() < 2
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 1
    again = compose(tiny_bases.speech, text_model, seed=0, **settings)[0]
    other = compose(tiny_bases.speech, text_model, seed=1, **settings)[0]
    assert torch.equal(again(**inputs).audio_hidden_states, embeds)
    assert not torch.equal(other(**inputs).audio_hidden_states, embeds)

    folder = tmp_path / "lsm"
    LsmPipeline(model=model, processor=processor, device="cpu").save_pretrained(folder)
    check_checkpoint(folder, model)


def test_command_line(tiny_bases, tmp_path):
    folder = tmp_path / "lsm"
    bases = ["--speech_model", str(tiny_bases.speech), "--text_model", str(tiny_bases.text)]
    settings = ["--projector_hidden_size", "32", "--projector_num_attention_heads", "4", "--num_queries", "2"]
    settings += ["--projector_dropout", "0.2"]
    process = subprocess.run(
        [sys.executable, "-m", "modeling_lsm.composing", *bases, *settings, "--output_dir", str(folder)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    assert f"{folder}: " in process.stderr and "reloaded and checked" in process.stderr
    model, processor = LsmForConditionalGeneration.from_pretrained(folder), LsmProcessor.from_pretrained(folder)
    assert model.config.num_queries == processor.num_queries == 2 and model.config.projector_config.dropout == 0.2
    llm = AutoModelForCausalLM.from_pretrained(tiny_bases.text)
    assert torch.equal(model(**words(processor)).logits, llm(**words(processor)).logits)
    assert model.config.base_models["speech"]["id"] == "tiny-whisper"
    assert model.config.base_models["text"]["id"] == "tiny-llm"


def test_licences_are_read_from_the_cards(tiny_bases, tmp_path):
    speech = shutil.copytree(tiny_bases.speech, tmp_path / "speech")
    (speech / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# Speech\n")
    model, _ = compose(speech, tiny_bases.text, **SMALL)
    bases = {part: {key: base[key] for key in ("id", "license")} for part, base in model.config.base_models.items()}
    assert bases["speech"] == {"id": "speech", "license": "apache-2.0"}
    assert bases["text"] == {"id": "tiny-llm", "license": None}


class TestAudioToken:
    def test_spare_rows_are_used(self, tiny_bases):
        model, processor = compose(tiny_bases.speech, tiny_bases.text, **SMALL)
        assert len(processor.tokenizer) == 262 and processor.audio_token_id == 261
        assert model.config.text_config.vocab_size == 264 == len(model.get_input_embeddings().weight)
        original = AutoModelForCausalLM.from_pretrained(tiny_bases.text).get_input_embeddings().weight
        assert torch.equal(model.get_input_embeddings().weight, original)

    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    def test_a_row_is_added_where_none_is_spare(self, tiny_bases, tmp_path, tied):
        llm = tiny.make_llm(vocab_size=261, tie_word_embeddings=tied)
        model, processor = compose(tiny_bases.speech, save_llm(tmp_path / "llm", llm), **SMALL)
        assert processor.audio_token_id == 261
        assert model.config.text_config.vocab_size == 262 == model.get_output_embeddings().out_features
        for matrix, original in (
            (model.get_input_embeddings().weight, llm.get_input_embeddings().weight),
            (model.get_output_embeddings().weight, llm.lm_head.weight),
        ):
            assert torch.equal(matrix[:261], original)
            torch.testing.assert_close(matrix[261], original.mean(0))
        assert torch.equal(model(**words(processor)).logits[..., :261], llm(**words(processor)).logits)
        LsmPipeline(model=model, processor=processor, device="cpu").save_pretrained(tmp_path / "lsm")
        check_checkpoint(tmp_path / "lsm", model)

    def test_the_placeholder_is_never_generated(self, tiny_bases, tmp_path):
        model, processor = compose(tiny_bases.speech, tiny_bases.text, **SMALL)
        LsmPipeline(model=model, processor=processor, device="cpu").save_pretrained(tmp_path)
        model = LsmForConditionalGeneration.from_pretrained(tmp_path)
        inputs = ask(processor, make_chat("Say.", audio=noise(1)))
        with torch.no_grad():  # so that it would like nothing better
            model.get_output_embeddings().weight = torch.nn.Parameter(model.get_output_embeddings().weight.clone())
            states = model.lsm(**inputs).last_hidden_state[0, -1]
            model.get_output_embeddings().weight[processor.audio_token_id] = 100 * states
        assert model(**inputs).logits[0, -1].argmax() == processor.audio_token_id
        answer = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert processor.audio_token_id not in answer

    def test_pad_token_is_set_everywhere(self, tiny_bases, tmp_path):
        tokenizer = tiny.make_tokenizer()
        tokenizer.pad_token = None
        text_model = save_llm(tmp_path / "llm", tiny.make_llm(pad_token_id=None), tokenizer)
        model, processor = compose(tiny_bases.speech, text_model, **SMALL)
        assert processor.tokenizer.pad_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id
        batch = ask(processor, make_chat("Say.", audio=noise(1)), make_chat("Say more.", audio=noise(2)))
        assert len(model.generate(**batch, max_new_tokens=3)) == 2


class TestChatTemplate:
    @pytest.fixture
    def bare_llm(self, tmp_path) -> Path:
        return save_llm(tmp_path / "bare", tiny.make_llm(), tiny.make_tokenizer(chat_template=False))

    def test_llm_without_one(self, tiny_bases, bare_llm):
        with pytest.raises(ValueError, match=r"bare has no chat template\. Name one with --chat_template: .* vicuna"):
            compose(tiny_bases.speech, bare_llm, **SMALL)

    def test_vicuna(self, tiny_bases, bare_llm, tmp_path):
        model, processor = compose(tiny_bases.speech, bare_llm, chat_template="vicuna", **SMALL)
        LsmPipeline(model=model, processor=processor, device="cpu").save_pretrained(tmp_path / "lsm")
        check_checkpoint(tmp_path / "lsm", model)
        reloaded = LsmProcessor.from_pretrained(tmp_path / "lsm")
        prompt = reloaded.apply_chat_template(make_chat("Say.", audio="a.wav"), add_generation_prompt=True)
        assert prompt.startswith("<s>A chat between") and prompt.endswith(f"USER: Say.\n\n{AUDIO_TOKEN} ASSISTANT:")

    def test_a_file(self, tiny_bases, bare_llm, tmp_path):
        template = tmp_path / "mine.jinja"
        template.write_text("{% for message in messages %}[{{ message.content }}]{% endfor %}")
        _, processor = compose(tiny_bases.speech, bare_llm, chat_template=str(template), **SMALL)
        assert processor.apply_chat_template(make_chat("Say.", audio="a.wav")) == f"[Say.\n\n{AUDIO_TOKEN}]"

    def test_unknown(self, tiny_bases, bare_llm):
        with pytest.raises(ValueError, match="no chat template 'vicuña'; expected a Jinja file or one of vicuna"):
            compose(tiny_bases.speech, bare_llm, chat_template="vicuña", **SMALL)


class TestRefusals:
    def test_speech_model_that_is_none(self, tiny_bases, tmp_path):
        with pytest.raises(ValueError, match="tiny-llm is a llama model; the speech model must be a Whisper"):
            compose(tiny_bases.text, tiny_bases.text, **SMALL)
        BartForConditionalGeneration(
            BartConfig(vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16)
        ).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is a bart model; the speech model must be a Whisper"):
            compose(tmp_path, tiny_bases.text, **SMALL)

    @pytest.mark.parametrize("trust", [False, True])
    def test_code_of_the_llms_repository(self, tiny_bases, tmp_path, trust):
        """Its model is not: one that transformers has is not needed, another would have to travel."""
        folder = save_llm(tmp_path / "llm", tiny.make_llm())
        config = json.loads((folder / "config.json").read_text())
        code = "from transformers import LlamaConfig\nclass Own(LlamaConfig): ...\n" if trust else "raise SystemExit"
        (folder / "modeling_own.py").write_text(code)
        own = {"auto_map": {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.OwnLM"}}
        (folder / "config.json").write_text(json.dumps({**config, **own}))
        model, _ = compose(tiny_bases.speech, folder, trust_remote_code=trust, **SMALL)
        assert type(model.lsm.language_model).__module__.startswith("transformers.")
        (folder / "config.json").write_text(json.dumps({**config, **own, "model_type": "own"}))
        with pytest.raises(ValueError, match="cannot be the LLM: transformers itself does not have its architecture"):
            compose(tiny_bases.speech, folder, trust_remote_code=trust, **SMALL)

    def test_unknown_projector(self, tiny_bases):
        with pytest.raises(
            ValueError, match="`projector_type` is 'linear'; expected one of 'qformer', 'mlp', 'conv', 'transformer'"
        ):
            compose(tiny_bases.speech, tiny_bases.text, projector_type="linear", **SMALL)

    @pytest.mark.parametrize("kind", ["granite", "gemma2", "gptj"])
    def test_llms_with_logits_of_their_own_kind(self, tiny_bases, tmp_path, kind):
        """Granite divides its logits, Gemma 2 caps them, GPT-J adds a bias: the LLM is held with what it does."""
        common = {key: value for key, value in tiny.llm_config().to_diff_dict().items() if key != "model_type"}
        llm = {
            "granite": lambda: GraniteForCausalLM(GraniteConfig(**common, logits_scaling=8.0)),
            "gemma2": lambda: Gemma2ForCausalLM(
                Gemma2Config(**common, final_logit_softcapping=2.0, query_pre_attn_scalar=8)
            ),
            "gptj": lambda: GPTJForCausalLM(
                GPTJConfig(
                    vocab_size=264, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, bos_token_id=0, eos_token_id=4
                )
            ),
        }[kind]()
        model, processor = compose(tiny_bases.speech, save_llm(tmp_path / kind, tiny.enliven(llm)), **SMALL)
        assert torch.equal(model(**words(processor)).logits, llm(**words(processor)).logits)

    def test_gpt2_is_no_such_llm(self, tiny_bases, tmp_path):
        llm = tiny.enliven(GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=4)))
        model, processor = compose(tiny_bases.speech, save_llm(tmp_path / "gpt2", llm), **SMALL)
        assert torch.equal(model(**words(processor)).logits, llm(**words(processor)).logits)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    def test_tokenizer_of_another_llm(self, tiny_bases, tmp_path):
        model, processor = compose(tiny_bases.speech, tiny_bases.text, **SMALL)
        folder = tmp_path / "lsm"
        LsmPipeline(model=model, processor=processor, device="cpu").save_pretrained(folder)
        longer = tiny.make_tokenizer()
        longer.add_tokens([f"<extra_{index}>" for index in range(40)])
        tiny.make_processor(longer).save_pretrained(folder)
        with pytest.raises(ValueError, match="disagree on audio token id: 301 and 261. Load both from the same"):
            LsmPipeline(
                model=LsmForConditionalGeneration.from_pretrained(folder),
                processor=LsmProcessor.from_pretrained(folder),
                device="cpu",
            )

    def test_a_checkpoint_that_does_not_reload_to_the_same(self, tiny_bases, tmp_path):
        model, processor = compose(tiny_bases.speech, tiny_bases.text, **SMALL)
        LsmPipeline(model=model, processor=processor, device="cpu").save_pretrained(tmp_path / "lsm")
        with torch.no_grad():
            model.lsm.projector.output.bias += 1.0
        with pytest.raises(RuntimeError, match="does not reload to what was saved: 1 weights differ"):
            check_checkpoint(tmp_path / "lsm", model)


def test_nothing_is_there_until_it_is_checked(tiny_bases, tmp_path, monkeypatch):
    model, processor = compose(tiny_bases.speech, tiny_bases.text, **SMALL)
    folder, check = tmp_path / "lsm", composing.check_checkpoint

    def fail(*args):
        raise RuntimeError("It does not reload.")

    monkeypatch.setattr(composing, "check_checkpoint", fail)
    with pytest.raises(RuntimeError, match="does not reload"):
        composing.save_checked(model, processor, folder)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(composing, "check_checkpoint", check)
    composing.save_checked(model, processor, folder)
    (folder / "notes.txt").write_text("mine")
    before = {path.name for path in folder.iterdir()}
    with torch.no_grad():
        model.lsm.projector.output.bias += 1
    composing.save_checked(model, processor, folder)  # over an older one
    assert {path.name for path in folder.iterdir()} == before and [path.name for path in tmp_path.iterdir()] == ["lsm"]
    check(folder, model)


def test_answers_are_greedy_whatever_the_llm_likes(tiny_bases, tmp_path):
    llm = tiny.make_llm()
    sampling = {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "top_k": 100, "repetition_penalty": 1.3}
    llm.generation_config.update(**sampling)
    model, processor = compose(tiny_bases.speech, save_llm(tmp_path / "llm", llm), **SMALL)
    config = model.generation_config
    assert not config.do_sample and config.temperature is None and config.top_p is None and config.top_k is None
    assert config.repetition_penalty == 1.3 and config.eos_token_id == llm.generation_config.eos_token_id
    pipe = LsmPipeline(model=model, processor=processor, device="cpu")
    clips = [noise(1, seed) for seed in range(4)]
    first, again, together = (pipe(clips, text="Say.", max_new_tokens=8, batch_size=size) for size in (1, 1, 4))
    assert first == again == together


@pytest.mark.parametrize("projector", ["qformer", "mlp", "transformer"])
def test_speech_is_as_loud_as_words(tiny_bases, tmp_path, projector):
    """Gemma multiplies what it looks up by the root of its width."""
    common = {key: value for key, value in tiny.llm_config().to_diff_dict().items() if key != "model_type"}
    llm = tiny.enliven(Gemma2ForCausalLM(Gemma2Config(**{**common, "hidden_size": 256}, query_pre_attn_scalar=8)))
    text_model = save_llm(tmp_path / "llm", llm)
    model, processor = compose(tiny_bases.speech, text_model, projector_type=projector, **SMALL, seed=1)
    words = llm.get_input_embeddings()(torch.arange(200)).pow(2).mean().sqrt()
    assert words > 8 * llm.get_input_embeddings().weight.pow(2).mean().sqrt()
    inputs = ask(processor, make_chat("Say.", audio=noise(8)))
    speech = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"]).pooler_output
    assert 0.5 < speech.pow(2).mean().sqrt() / words < 2


def test_revisions_on_the_hub(tiny_bases, tmp_path, monkeypatch):
    """The cache of the Hub as it is on disk, with two revisions of an LLM."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for seed, (commit, ref) in enumerate({"a" * 40: "main", "b" * 40: "v1"}.items()):
        repository = cache / "models--someone--llm"
        save_llm(repository / "snapshots" / commit, tiny.make_llm(seed))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    for revision, seed in ((None, 0), ("v1", 1)):
        model, _ = compose(tiny_bases.speech, "someone/llm", text_revision=revision, **SMALL)
        assert torch.equal(model.get_input_embeddings().weight, tiny.make_llm(seed).get_input_embeddings().weight)
        assert model.config.base_models["text"]["revision"] == "ab"[seed] * 40


def test_dtype(tiny_bases, tmp_path):
    model, _ = compose(tiny_bases.speech, tiny_bases.text, dtype="bfloat16", **SMALL)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model, _ = compose(
        tiny_bases.speech, save_llm(tmp_path / "half", tiny.make_llm().to(torch.float16)), **SMALL
    )  # the LLM's own
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


@pytest.mark.slow
class TestRealModels:
    @pytest.fixture(scope="class")
    def lsm(self, real_speech_model, real_text_model):
        return compose(str(real_speech_model), str(real_text_model), dtype="float32")

    def test_without_audio_it_is_its_llm(self, lsm, real_text_model):
        model, processor = lsm
        llm = AutoModelForCausalLM.from_pretrained(real_text_model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(real_text_model)
        chats = [
            [{"role": "user", "content": "Translate into French: he was not an ill disposed young man"}],
            make_chat("Who wrote this?", transcript="It is a truth universally acknowledged."),
        ]
        for chat in chats:
            strings = [{**message, "content": processor_text(message)} for message in chat]
            prompt = tokenizer.apply_chat_template(strings, tokenize=False, add_generation_prompt=True)
            assert processor.apply_chat_template(chat, add_generation_prompt=True) == prompt
            inputs = ask(processor, chat)
            assert inputs["input_ids"].tolist() == tokenizer(prompt, return_tensors="pt")["input_ids"].tolist()
            with torch.no_grad():
                logits = model(**inputs).logits
                reference = llm(**inputs).logits
            assert (logits[..., : reference.shape[-1]] - reference).abs().max() <= 1e-4
        expected = llm.generate(**inputs, max_new_tokens=20, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), expected)

    def test_batches_of_real_recordings(self, lsm, librivox):
        model, processor = lsm
        chats = [make_chat("Transcribe the speech.", audio=clip.path) for clip in librivox]
        batch = ask(processor, *chats)
        with torch.no_grad():
            together = model(**batch).logits[:, -1]
            alone = torch.cat([model(**ask(processor, chat)).logits[:, -1] for chat in chats])
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=0.0)

    def test_encoder_padding(self, real_speech_model, real_text_model, librivox):
        """At 30 s it is Whisper's. At a clip's own length most of it stays as it was: the frames mean the same."""
        whisper = WhisperModel.from_pretrained(real_speech_model, dtype=torch.float32).encoder.eval()
        extractor = WhisperFeatureExtractor.from_pretrained(real_speech_model)
        models = {
            padding: compose(str(real_speech_model), str(real_text_model), dtype="float32", encoder_padding=padding)
            for padding in ("longest", "max_length")
        }
        for clip in librivox:
            waveform = load_waveform(clip.path)
            states = {}
            for padding, (model, processor) in models.items():
                inputs = ask(processor, make_chat("Transcribe.", audio=waveform))
                audio = {key: inputs[key] for key in ("input_features", "input_features_mask")}
                with torch.no_grad():
                    states[padding] = model.get_audio_features(**audio).last_hidden_state[0]
            features = extractor(waveform, sampling_rate=16_000, return_tensors="pt")["input_features"]
            with torch.no_grad():
                reference = whisper(features).last_hidden_state[0]
            torch.testing.assert_close(states["max_length"], reference, atol=1e-5, rtol=0.0)
            valid = models["longest"][0].config.timing.encoder_frames(-(-len(waveform) // 160))
            difference = (states["longest"][:valid] - reference[:valid]).norm() / reference[:valid].norm()
            assert 0.0 < difference < 0.5, clip.path


def processor_text(message: dict) -> str:
    """The text of a message whose content is a string or a list of text items."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(item["text"] for item in content)
