"""The model's invariants on tiny random models: batches, lengths, caches, chunks, gradients, dtypes, refusals."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import GPT2Config, LlamaForCausalLM, Qwen2Config, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from modeling_lsm import LsmForConditionalGeneration, LsmModel, make_chat
from modeling_lsm.data.collating import predicts_label
from tests import tiny
from tests.tiny import ask, noise


PROJECTORS = {
    "qformer": {"projector_type": "qformer"},
    "qformer-3-queries": {"projector_type": "qformer", "num_queries": 3, "window_size": 50},
    "mlp": {"projector_type": "mlp"},
    "conv": {"projector_type": "conv", "window_size": 16},
    "transformer": {"projector_type": "transformer"},
}
all_projectors = pytest.mark.parametrize("settings", PROJECTORS.values(), ids=PROJECTORS)
both_paddings = pytest.mark.parametrize("encoder_padding", ["longest", "max_length"])
# float32 sums differ in their order; logits have a standard deviation of about 0.6.
TOLERANCE = {"atol": 2e-5, "rtol": 0.0}


def chats_of_all_kinds() -> list[list[dict]]:
    """A very short clip beside a very long one, two clips in a prompt, text alone, clips of odd lengths."""
    lengths = torch.rand(2, generator=torch.Generator().manual_seed(3)) * 12
    two_clips = [{"type": "audio", "audio": noise(1.37, 5)}, {"type": "text", "text": " and then "}]
    two_clips += [{"type": "audio", "audio": noise(0.021, 6)}, {"type": "text", "text": " differ how?"}]
    return [
        make_chat("What is said?", audio=noise(0.1, 1)),
        make_chat("And here, at length?", audio=noise(40, 2)),
        [{"role": "user", "content": "No speech at all."}],
        [{"role": "user", "content": two_clips}],
        *(make_chat("Translate.", audio=noise(float(length), 7)) for length in lengths),
    ]


def logits_of_rows(model, inputs) -> list[torch.Tensor]:
    """Logits `(tokens, vocab_size)` of every row, without the padding."""
    with torch.no_grad():
        logits = model(**inputs).logits
    return [row[mask.bool()] for row, mask in zip(logits, inputs["attention_mask"], strict=True)]


def test_tiny_models_listen():
    """What the other tests rest on: other audio gives clearly other logits, and another answer."""
    model, processor = tiny.make_pair()
    inputs = ask(processor, make_chat("Say.", audio=noise(2, 1)), make_chat("Say.", audio=noise(2, 2)))
    one, other = logits_of_rows(model, inputs)
    assert (one[-1] - other[-1]).abs().max() > 0.1
    one, other = model.generate(**inputs, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :]
    assert not torch.equal(one, other)


@both_paddings
@all_projectors
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_save_and_reload_give_equal_logits(tmp_path, settings, tied, encoder_padding):
    text_config = tiny.llm_config(tie_word_embeddings=tied).to_dict()
    model, processor = tiny.make_pair(text_config=text_config, encoder_padding=encoder_padding, **settings)
    inputs = ask(processor, make_chat("What is said?", audio=noise(1.9)), make_chat("And?", audio=noise(0.4)))
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    reloaded, report = LsmForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(reloaded(**inputs).logits, expected)
    same = reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight
    assert same is tied


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(
    "settings",
    [*PROJECTORS.values(), {"encoder_padding": "max_length"}],
    ids=[*PROJECTORS, "encoder-padded"],
)
def test_a_row_does_not_depend_on_its_batch(settings, padding_side):
    model, processor = tiny.make_pair(**settings)
    chats = chats_of_all_kinds()
    kwargs = {"processor_kwargs": {"padding_side": padding_side}}
    batch = ask(processor, *chats, **kwargs)
    padding_at = 0 if padding_side == "left" else -1
    assert batch["attention_mask"][2, padding_at] == 0
    singles = [logits_of_rows(model, ask(processor, chat, **kwargs))[0] for chat in chats]
    for single, batched in zip(singles, logits_of_rows(model, batch), strict=True):
        torch.testing.assert_close(batched, single, **TOLERANCE)


@all_projectors
def test_audio_embeddings_do_not_depend_on_longer_neighbours(settings):
    """The same at the level of features, with garbage where the mask says that there is padding."""
    model = tiny.make_model(**settings)
    lengths = [3, 200, 1, 641, 34, 340]
    features = torch.randn(len(lengths), 80, 1000)
    mask = (torch.arange(1000) < torch.tensor(lengths)[:, None]).long()
    packed = model.get_audio_features(features * 100, mask).pooler_output
    singles = [
        model.get_audio_features(features[i : i + 1, :, :length] * 100).pooler_output
        for i, length in enumerate(lengths)
    ]
    torch.testing.assert_close(packed, torch.cat(singles), **TOLERANCE)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_without_audio_it_is_its_llm(tied):
    model, processor = tiny.make_pair(text_config=tiny.llm_config(tie_word_embeddings=tied).to_dict())
    llm = LlamaForCausalLM(model.config.text_config).eval()
    llm.load_state_dict(model.lsm.language_model.state_dict())
    chats = [
        [{"role": "user", "content": "Who wrote this?"}],
        make_chat("Translate.", transcript="he was not an ill disposed young man"),
    ]
    for chat in chats:
        inputs = ask(processor, chat)
        assert set(inputs) == {"input_ids", "attention_mask"}
        assert torch.equal(model(**inputs).logits, llm(**inputs).logits)
    inputs = ask(processor, *chats)  # of which the LSM counts positions without padding, as the LLM does in `generate`
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(model(**inputs).logits, llm(**inputs, position_ids=positions).logits)
    answer = llm.generate(**inputs, max_new_tokens=12, pad_token_id=2, suppress_tokens=[processor.audio_token_id])
    assert torch.equal(model.generate(**inputs, max_new_tokens=12), answer)


def test_other_llms(tmp_path):
    """An LLM whose embeddings have another name (GPT-2, tied) and one of another family (Qwen2, untied)."""
    gpt2 = GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=512, tie_word_embeddings=True)
    qwen2 = Qwen2Config(**{**tiny.llm_config().to_diff_dict(), "model_type": "qwen2", "tie_word_embeddings": False})
    for text_config in (gpt2, qwen2):
        model, processor = tiny.make_pair(text_config=text_config.to_dict())
        tied = text_config.tie_word_embeddings
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
        inputs = ask(processor, *chats_of_all_kinds()[2:4])
        folder = tmp_path / text_config.model_type
        model.save_pretrained(folder)
        reloaded, report = LsmForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        assert (reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight) is tied
        assert torch.equal(reloaded(**inputs).logits, model(**inputs).logits)
        answers = [model.generate(**inputs, max_new_tokens=6, use_cache=use_cache) for use_cache in (True, False)]
        assert torch.equal(*answers)


@all_projectors
def test_audio_tokens_for_every_mel_length(settings):
    """As many audio embeddings as `AudioTiming` counts, for every length that the encoder can see."""
    # What counts are the convolutions and the windows. Nothing else need be large, or be there.
    encoder = tiny.whisper_config(d_model=4, encoder_layers=0, encoder_attention_heads=1, num_mel_bins=4)
    projector = {"projector_hidden_size": 4, "projector_num_attention_heads": 1, "projector_num_layers": 1}
    model = tiny.make_model(audio_config=encoder.to_dict(), **projector, **settings)
    for first in range(1, 3001, 50):
        lengths = torch.arange(first, first + 50)
        features = torch.randn(1, 4, int(lengths.max())).expand(50, -1, -1)
        mask = (torch.arange(features.shape[-1]) < lengths[:, None]).long()
        with torch.no_grad():
            outputs = model.get_audio_features(features, mask)
        embeds = outputs.pooler_output.split([model.config.timing.audio_tokens(int(length)) for length in lengths])
        assert outputs.last_hidden_state.shape[1] == model.config.timing.encoder_frames(features.shape[-1])
        assert embeds[0].isfinite().all()


@pytest.mark.parametrize(
    "samples",
    [1, 159, 160, 161, 319, 320, 321, 5439, 5440, 5441, 478_719, 478_720, 478_721, 479_999, 480_000, 480_001, 957_441],
)
@both_paddings
def test_audio_tokens_end_to_end_at_the_borders(samples, encoder_padding):
    check_end_to_end(samples, {"encoder_padding": encoder_padding})


@all_projectors
def test_audio_tokens_end_to_end_at_random(settings):
    for samples in torch.randint(1, 90 * 16_000, (6,), generator=torch.Generator().manual_seed(5)).tolist():
        check_end_to_end(samples, settings)


def check_end_to_end(samples: int, settings: dict) -> None:
    """The processor's placeholders take exactly the model's embeddings, each its own."""
    model, processor = tiny.make_pair(**settings)
    inputs = ask(processor, make_chat("Listen.", audio=noise(samples / 16_000)))
    placeholders = inputs["input_ids"] == processor.audio_token_id
    assert placeholders.sum() == model.config.timing.audio_tokens_of_clip(samples)
    assert inputs["input_features_mask"].sum() == -(-samples // 160)
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    assert len(outputs.audio_hidden_states) == placeholders.sum()
    assert torch.equal(outputs.hidden_states[0][placeholders], outputs.audio_hidden_states)


@all_projectors
def test_long_audio_is_its_chunks_in_order(settings):
    """70 s give the windows of three pieces encoded by themselves, one after another; nothing is cut off."""
    model, processor = tiny.make_pair(**settings)
    timing = model.config.timing
    clip = noise(70, 8)
    bounds = timing.chunk_bounds(len(clip))
    assert len(bounds) == 3

    def embed(audio):
        with torch.no_grad():
            return model(**ask(processor, make_chat("Listen.", audio=audio))).audio_hidden_states

    whole = embed(clip)
    pieces = [embed(clip[start:end]) for start, end in bounds]
    torch.testing.assert_close(whole, torch.cat(pieces), **TOLERANCE)
    assert (whole - torch.cat(pieces[::-1])).abs().max() > 0.1  # the windows differ, so that order matters
    changed = clip.copy()
    changed[-1600:] = 0.0
    assert (
        embed(changed)[-settings.get("num_queries", 1) :] - whole[-settings.get("num_queries", 1) :]
    ).abs().max() > 0.01


@all_projectors
def test_decoding_with_a_cache_is_decoding_without(settings):
    model, processor = tiny.make_pair(**settings)
    inputs = ask(processor, *chats_of_all_kinds()[2:])
    kwargs = {"max_new_tokens": 10, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    cached = model.generate(**inputs, use_cache=True, **kwargs)
    uncached = model.generate(**inputs, use_cache=False, **kwargs)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), **TOLERANCE)
    # Step by step is also what one look at the whole says.
    attention_mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 10), value=1)
    with torch.no_grad():
        whole = model(**{**inputs, "input_ids": cached.sequences, "attention_mask": attention_mask}).logits
    torch.testing.assert_close(torch.stack(cached.logits, dim=1), whole[:, -11:-1], **TOLERANCE)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"num_beams": 2, "num_return_sequences": 1},
    ],
    ids=["sampling", "beams", "one-of-two-beams"],
)
def test_several_sequences_each_hear_their_own_audio(kwargs):
    """With several chunks and clips in a prompt, every copy of a row gets them all, in order."""
    model, processor = tiny.make_pair()
    chats = [*chats_of_all_kinds(), make_chat("Long.", audio=noise(70, 9))]
    inputs = ask(processor, *chats)
    options = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    copies = max(kwargs.get("num_return_sequences", 1), kwargs.get("num_beams", 1))
    one = model.generate(**inputs, **options)
    several = model.generate(**inputs, **options, **kwargs)
    torch.testing.assert_close(several.logits[0], one.logits[0].repeat_interleave(copies, dim=0), **TOLERANCE)
    assert len(several.sequences) == kwargs["num_return_sequences"] * len(chats)
    if "top_k" in kwargs:  # sampling from one candidate is greedy
        assert torch.equal(several.sequences, one.sequences.repeat_interleave(copies, dim=0))
    alone = [model.generate(**ask(processor, chat), **options, **kwargs).sequences[:, -5:] for chat in chats]
    assert torch.equal(several.sequences[:, -5:], torch.cat(alone))


def test_sampling_follows_the_seed():
    model, processor = tiny.make_pair()
    inputs = ask(processor, make_chat("Say.", audio=noise(1)))
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(model.generate(**inputs, max_new_tokens=16, do_sample=True, top_k=0, eos_token_id=None))
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@all_projectors
def test_gradient_checkpointing_gives_the_same_gradients(settings, reentrant):
    model, processor = tiny.make_pair(**settings)
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    inputs = ask(processor, *chats_of_all_kinds()[:4])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.audio_token_id, -100)
    gradients = []
    for candidate in (model, checkpointed):
        candidate.train()
        loss = candidate(**inputs, labels=labels).loss
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in candidate.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is None:
            assert gradients[1][name] is None, name
        else:
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: n + m)
    unused = {name for name, gradient in gradients[0].items() if gradient is None}
    assert unused <= {"lsm.audio_tower.embed_positions.weight"}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_no_autograd_through_a_frozen_encoder(checkpointing):
    model, processor = tiny.make_pair(audio_config=tiny.whisper_config(dropout=0.5, encoder_layerdrop=0.5).to_dict())
    model.lsm.audio_tower.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    assert model.training and model.lsm.projector.training
    assert not any(module.training for module in model.lsm.audio_tower.modules())

    seen = []
    model.lsm.audio_tower.register_forward_hook(lambda _, __, outputs: seen.append(outputs.last_hidden_state))
    inputs = ask(processor, make_chat("Say.", audio=noise(3)))
    for _ in range(2):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert not any(states.requires_grad for states in seen)
    assert torch.equal(*seen)  # no dropout
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {f"lsm.audio_tower.{name}" for name, _ in model.lsm.audio_tower.named_parameters()}

    model.lsm.audio_tower.requires_grad_(True)
    model.train()
    assert model.lsm.audio_tower.training
    assert not model.eval().lsm.audio_tower.training


def test_an_encoder_that_trains_gets_gradients():
    model, processor = tiny.make_pair()
    model.train()
    inputs = ask(processor, make_chat("Say.", audio=noise(3)))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.lsm.audio_tower.conv1.weight.grad.abs().max() > 0


def test_loss_is_cross_entropy_over_the_labels(model, processor):
    inputs = ask(processor, make_chat("Say.", audio=noise(1)), make_chat("Speak.", audio=noise(2)))
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    labels[0, -1] = -100
    outputs = model(**inputs, labels=labels)
    picked = outputs.logits[:, :-1][labels[:, 1:] != -100].log_softmax(-1)
    targets = labels[:, 1:][labels[:, 1:] != -100]
    assert len(targets) == 7
    losses = -picked.gather(-1, targets[:, None])
    torch.testing.assert_close(outputs.loss, losses.mean())
    summed = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(70)).loss
    torch.testing.assert_close(summed, losses.sum() / 70)


def test_logits_to_keep(model, processor):
    inputs = ask(processor, make_chat("Say.", audio=noise(1)))
    every = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=3).logits, every[:, -3:])
    torch.testing.assert_close(model(**inputs, logits_to_keep=torch.tensor([0, 5])).logits, every[:, [0, 5]])


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.21"), reason="a mask for `logits_to_keep` needs transformers 5.21"
)
def test_logits_at_labels_only(model, processor):
    inputs = ask(processor, *chats_of_all_kinds()[:3])
    labels = inputs["input_ids"].masked_fill(torch.rand(inputs["input_ids"].shape) < 0.7, -100)
    with torch.no_grad():
        everywhere = model(**inputs, labels=labels)
        some = model(**inputs, labels=labels, logits_to_keep=predicts_label(labels))
    assert some.logits.shape == ((labels[:, 1:] != -100).sum(), model.config.text_config.vocab_size)
    torch.testing.assert_close(some.logits, everywhere.logits[:, :-1][labels[:, 1:] != -100])
    torch.testing.assert_close(some.loss, everywhere.loss)


@pytest.mark.parametrize("settings", [{}, {"encoder_padding": "max_length"}])
def test_known_encoder_output_takes_the_place_of_features(settings):
    model, processor = tiny.make_pair(**settings)
    inputs = ask(processor, *chats_of_all_kinds()[:3])
    with torch.no_grad():
        expected = model(**inputs).logits
        features, mask = inputs.pop("input_features"), inputs["input_features_mask"]
        known = model.get_audio_features(features, mask).last_hidden_state
        assert torch.equal(model(**inputs, encoder_hidden_states=known).logits, expected)
        with pytest.raises(ValueError, match="`encoder_hidden_states` needs `input_features_mask`"):
            model.get_audio_features(encoder_hidden_states=known)


def test_text_alone_runs_every_part_in_training(model, processor):
    inputs = ask(processor, [{"role": "user", "content": "Hello."}])
    with torch.no_grad():
        expected = model(**inputs).logits
    model.train()
    torch.testing.assert_close(model(**inputs).logits, expected)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.lsm.projector.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@all_projectors
def test_dtypes(tmp_path, settings, dtype):
    model, processor = tiny.make_pair(**settings)
    model.save_pretrained(tmp_path)
    inputs = ask(processor, make_chat("Say.", audio=noise(3)), make_chat("Speak up.", audio=noise(31)))
    loaded = LsmForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    with torch.no_grad():
        expected = model(**inputs).logits
        for features in (inputs["input_features"], inputs["input_features"].to(dtype)):  # cast or not
            logits = loaded(**{**inputs, "input_features": features}).logits
            assert logits.dtype == dtype and logits.isfinite().all()
    # Half precision keeps 8 (bfloat16) or 11 bits.
    bound = {torch.float32: 2e-5, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]
    valid = inputs["attention_mask"].bool()
    assert (logits.float() - expected)[valid].abs().mean() < bound
    assert loaded.generate(**inputs, max_new_tokens=3, eos_token_id=None).shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}], ids=str)
def test_device_maps(tmp_path, model, processor, device_map):
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path)
    inputs = ask(processor, make_chat("Say.", audio=noise(1)))
    loaded = LsmForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@all_projectors
def test_attention_implementations_agree(tmp_path, settings):
    model, processor = tiny.make_pair(**settings)
    model.save_pretrained(tmp_path)
    inputs = ask(processor, *chats_of_all_kinds())
    eager, sdpa = (
        LsmForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=name) for name in ("eager", "sdpa")
    )
    for loaded, name in ((eager, "eager"), (sdpa, "sdpa")):
        parts = [loaded.lsm.audio_tower, loaded.lsm.language_model]
        assert [part.config._attn_implementation for part in parts] == [name, name]
    for one, other in zip(logits_of_rows(eager, inputs), logits_of_rows(sdpa, inputs), strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_attention_can_be_chosen_per_part(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded = LsmForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation={"text_config": "eager", "audio_config": "sdpa"}
    )
    assert loaded.lsm.language_model.config._attn_implementation == "eager"
    assert loaded.lsm.audio_tower.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_speech_encoder_is_whispers_at_30_seconds(model, implementation):
    encoder = model.lsm.audio_tower
    whisper = WhisperEncoder(encoder.config).eval()
    whisper.load_state_dict(encoder.state_dict())
    for module in (encoder, whisper):
        module.set_attn_implementation(implementation)
    features = torch.randn(2, 80, 3000)
    expected = whisper(features).last_hidden_state
    assert torch.equal(encoder(features).last_hidden_state, expected)
    masked = encoder(features, input_features_mask=torch.ones(2, 3000, dtype=torch.long)).last_hidden_state
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=0.0)


def test_new_models_have_whispers_positions():
    model = LsmForConditionalGeneration(tiny.model_config())
    positions = model.lsm.audio_tower.embed_positions
    assert torch.equal(positions.weight, WhisperModel(tiny.whisper_config()).encoder.embed_positions.weight)
    assert positions.weight.std() > 0.5 and not positions.weight.requires_grad


def test_encoder_padding_decides_whether_silence_is_attended(processor):
    """With `"max_length"` the encoder sees 30 s as Whisper does: its output is Whisper's, bit for bit."""
    model = tiny.make_model(encoder_padding="max_length")
    whisper = WhisperEncoder(model.config.audio_config).eval()
    whisper.load_state_dict(model.lsm.audio_tower.state_dict())
    features = processor.feature_extractor(noise(4), sampling_rate=16_000, return_tensors="pt")["input_features"]
    mask = (torch.arange(3000) < 400).long()[None]
    states = model.get_audio_features(features, mask).last_hidden_state
    assert torch.equal(states, whisper(features).last_hidden_state)
    model.config.encoder_padding = "longest"
    longest = model.get_audio_features(features, mask).last_hidden_state
    assert (longest[:, :200] - states[:, :200]).abs().max() > 1e-3


def test_captured_states(model, processor):
    inputs = ask(processor, make_chat("Say.", audio=noise(1)))
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3
    features = model.get_audio_features(
        inputs["input_features"], inputs["input_features_mask"], output_hidden_states=True
    )
    assert len(features.hidden_states) == 3
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], outputs.logits)


def test_base_model_gives_what_the_head_reads(model, processor):
    inputs = ask(processor, make_chat("Say.", audio=noise(1)))
    assert isinstance(model.base_model, LsmModel)
    states = model.base_model(**inputs).last_hidden_state
    assert torch.equal(model.get_output_embeddings()(states), model(**inputs).logits)


class TestRefusals:
    def test_placeholders_without_audio(self, model, processor):
        inputs = ask(processor, make_chat("Say.", audio=noise(1)))
        del inputs["input_features"], inputs["input_features_mask"]
        with pytest.raises(ValueError, match=r"holds 3 audio placeholders .* gives 0 audio embeddings.*`Lsm"):
            model(**inputs)
        with pytest.raises(ValueError, match="holds 3 audio placeholders"):
            model.generate(**inputs, max_new_tokens=2)

    def test_audio_without_placeholders(self, model, processor):
        inputs = ask(processor, make_chat("Say.", audio=noise(1)))
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.audio_token_id, 7)
        with pytest.raises(ValueError, match=r"holds 0 audio placeholders .* gives 3 audio embeddings"):
            model(**inputs)
        with pytest.raises(ValueError, match=r"holds 0 audio placeholders .* gives 3 audio embeddings"):
            model.generate(**inputs, max_new_tokens=2, num_beams=2)

    def test_truncated_placeholders(self, model, processor):
        inputs = ask(processor, make_chat("Say.", audio=noise(1)))
        first = int((inputs["input_ids"] == processor.audio_token_id).nonzero()[0, 1])
        inputs["input_ids"] = inputs["input_ids"][:, : first + 1]
        inputs["attention_mask"] = inputs["attention_mask"][:, : first + 1]
        with pytest.raises(ValueError, match=r"holds 1 audio placeholders .* gives 3 .*do not truncate"):
            model(**inputs)

    def test_more_mel_frames_than_positions(self, model):
        with pytest.raises(ValueError, match="has 3001 mel frames, more than the 3000 .*`LsmProcessor`"):
            model.get_audio_features(torch.zeros(1, 80, 3001))

    @pytest.mark.parametrize("given", ["neither", "both"])
    def test_ids_or_embeddings(self, model, given):
        ids = torch.tensor([[5, 6]])
        embeds = model.get_input_embeddings()(ids)
        kwargs = {} if given == "neither" else {"input_ids": ids, "inputs_embeds": embeds}
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            model(**kwargs)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"projector_type": "linear"},
                "`projector_type` is 'linear'; expected one of 'qformer', 'mlp', 'conv', 'transformer'",
            ),
            ({"projector_type": "conv"}, "power of two, got 17. Use 8 or 16"),
            ({"projector_type": "conv", "window_size": 1}, "power of two, got 1"),
            (
                {"projector_type": "transformer", "projector_hidden_size": 32, "projector_num_attention_heads": 12},
                "`projector_hidden_size` is 32, which 12 attention heads cannot share evenly.*a multiple of 12",
            ),
            ({"projector_type": "mlp", "num_queries": 2}, "`num_queries` is 2, but the mlp projector .*num_queries=1"),
            ({"projector_type": "conv", "window_size": 16, "num_queries": 3}, "`num_queries` is 3, but the conv"),
        ],
    )
    def test_projector_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            tiny.make_model(**settings)


def test_embeddings_alone_are_enough(model):
    ids = torch.tensor([[5, 6, 7]])
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids=ids).logits)


@all_projectors
def test_learns_to_tell_two_sounds_apart(settings):
    """Forty steps on two prompts that differ in their audio alone: a low and a high tone, to be called so."""
    model, processor = tiny.make_pair(**settings)
    model.lsm.audio_tower.requires_grad_(False)
    model.train()
    sounds = {"low": tiny.tone(300, 1), "top": tiny.tone(3000, 1)}
    chats = [make_chat("Which?", audio=sound, target=name) for name, sound in sounds.items()]
    inputs = ask(processor, *chats, add_generation_prompt=False)
    labels = inputs["input_ids"].clone()
    labels[:, :-5] = -100  # left are three letters, the end of the answer, and a line break
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(40):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    inputs = ask(processor, *(make_chat("Which?", audio=sound) for sound in sounds.values()))
    answers = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    assert processor.batch_decode(answers, skip_special_tokens=True) == list(sounds)
