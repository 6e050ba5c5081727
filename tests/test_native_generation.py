"""Ways of generating: caches, assistants, prompts in pieces, known embeddings; and what each costs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessorList

from modeling_lsm import make_chat, modeling_lsm
from tests import tiny
from tests.families import family_config
from tests.tiny import ask, noise


NEW = {"max_new_tokens": 6, "eos_token_id": None}


@pytest.fixture
def inputs(processor):
    """A prompt with one clip."""
    return ask(processor, make_chat("What is said?", audio=noise(2, 1)))


@pytest.fixture
def batch(processor):
    """Text alone, several clips, a clip of several chunks: in all two and two and three chunks of audio."""
    two = [{"type": "audio", "audio": noise(1.4, 5)}, {"type": "text", "text": "or"}]
    two.append({"type": "audio", "audio": noise(0.02, 6)})
    chats = [
        [{"role": "user", "content": "No speech."}],
        [{"role": "user", "content": two}],
        make_chat("At length?", audio=noise(65, 2)),
    ]
    return ask(processor, *chats)


@pytest.fixture
def heard(model) -> list[int]:
    """Chunks of each call of the encoder."""
    calls = []
    model.lsm.audio_tower.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return calls


class Steps:
    """Tokens that each call of `model` is fed."""

    def __init__(self, model):
        self.fed = []
        model.register_forward_pre_hook(
            lambda _, args, kwargs: self.fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )


class TestAssistants:
    @pytest.mark.parametrize("family", ["bamba", "jamba", "nemotron_h", "qwen3_5_text"])
    def test_stateful_llms_have_none(self, family):
        """They cannot take tokens back: an answer with guesses would differ from one without."""
        model, processor = tiny.make_pair(text_config=family_config(family).to_dict() | {"vocab_size": 264})
        inputs = ask(processor, make_chat("What?", audio=noise(1)))
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(**inputs, **NEW, prompt_lookup_num_tokens=3)

    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
    def test_guesses_from_the_prompt(self, family):
        model, processor = tiny.make_pair(text_config=family_config(family).to_dict() | {"vocab_size": 264})
        options = {"max_new_tokens": 24, "eos_token_id": None}
        inputs = ask(processor, make_chat("What, what, what is, what is said?", audio=noise(2, 1)))
        expected = model.generate(**inputs, **options)
        steps = Steps(model)
        guesses = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
        assert torch.equal(model.generate(**inputs, **options, **guesses), expected)
        assert max(steps.fed[1:]) > 1  # there were some

    def test_no_guess_is_a_placeholder(self, model, inputs):
        """Even where the answer begins as what stands before the speech in the prompt, which would go on with it."""
        ids = inputs["input_ids"]
        before = ids[0, (ids[0] == model.config.audio_token_id).nonzero()[0, 0] - 1]

        def begin_with_it(tokens, scores):
            is_first = tokens.shape[1] == ids.shape[1]
            return torch.full_like(scores, -torch.inf).index_fill(1, before, 0.0) if is_first else scores

        options = {**NEW, "logits_processor": LogitsProcessorList([begin_with_it])}
        expected = model.generate(**inputs, **options)
        assert expected[0, ids.shape[1]] == before
        guesses = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
        assert torch.equal(model.generate(**inputs, **options, **guesses), expected)

    def test_another_lsm(self, model, inputs, heard):
        expected = model.generate(**inputs, **NEW)
        assistant = tiny.make_model(seed=1)
        asked = Steps(assistant)
        heard.clear()
        assert torch.equal(model.generate(**inputs, **NEW, assistant_model=assistant), expected)
        assert heard == [1]
        assert asked.fed[0] == inputs["input_ids"].shape[1] and max(asked.fed[1:]) <= 3

    @pytest.mark.parametrize("given", ["features", "encoded", "embedded", "in-pieces"])
    def test_one_that_is_always_right(self, model, inputs, given):
        """The model itself: it hears the same, so that every guess is taken and the calls of the model are few."""
        expected = model.generate(**inputs, **NEW)
        options = {"prefill_chunk_size": 7} if given == "in-pieces" else {}
        assistant = tiny.make_model()
        assistant.generation_config.update(num_assistant_tokens=2, num_assistant_tokens_schedule="constant")
        assistant.generation_config.update(assistant_confidence_threshold=0.0)
        steps = Steps(model)
        answers = model.generate(**known(model, inputs, given), **NEW, **options, assistant_model=assistant)
        assert torch.equal(answers, expected)
        assert len(steps.fed) == 2  # three tokens each

    @pytest.mark.parametrize("given", ["features", "encoded", "embedded"])
    def test_a_text_llm(self, model, inputs, given):
        """One of the same tokenizer guesses from what it can read."""
        expected = model.generate(**inputs, **NEW)
        assistant = tiny.make_llm(seed=0)
        asked = Steps(assistant)
        answers = model.generate(**known(model, inputs, given), **NEW, assistant_model=assistant)
        assert torch.equal(answers, expected)
        assert asked.fed[0] == inputs["input_ids"].shape[1]

    def test_an_lsm_of_a_text_llm(self, model, processor):
        """For text, as a model of the same vocabulary."""
        llm = tiny.make_llm(seed=3)
        inputs = ask(processor, [{"role": "user", "content": "No speech."}])
        expected = llm.generate(**inputs, **NEW)
        assert torch.equal(llm.generate(**inputs, **NEW, assistant_model=model), expected)


def known(model, inputs, given: str) -> dict:
    """`inputs` with the encoder's output or the audio embeddings in the place of features."""
    inputs = dict(inputs)
    if given in ("features", "in-pieces"):
        return inputs
    with torch.no_grad():
        audio = model.get_audio_features(inputs.pop("input_features"), inputs["input_features_mask"])
    if given == "encoded":
        return {**inputs, "encoder_hidden_states": audio.last_hidden_state}
    del inputs["input_features_mask"]
    return {**inputs, "audio_embeds": audio.pooler_output}


class TestCaches:
    def test_static(self, model, batch):
        expected = model.generate(**batch, **NEW)
        assert torch.equal(model.generate(**batch, **NEW, cache_implementation="static"), expected)
        beams = {"num_beams": 3, "num_return_sequences": 2}
        expected = model.generate(**batch, **NEW, **beams)
        assert torch.equal(model.generate(**batch, **NEW, **beams, cache_implementation="static"), expected)

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_a_token_costs_no_more_syncs_than_the_llms(self, model, inputs, cache):
        """Reading a number off a tensor makes a GPU wait. `generate` does so itself; the LSM must not add to it."""
        llm = tiny.make_llm()
        text = {**inputs, "input_ids": inputs["input_ids"].clamp(max=250)}
        del text["input_features"], text["input_features_mask"]
        options = {"cache_implementation": cache, "suppress_tokens": None, "pad_token_id": 2, "eos_token_id": None}
        assert syncs_per_token(model, inputs, options) == syncs_per_token(llm, text, options)


class CountSyncs(TorchDispatchMode):
    """Counts operators whose outcome is needed on the CPU before anything else can go on."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
        self.count += function.overloadpacket.__name__ in names
        return function(*args, **(kwargs or {}))


def syncs_per_token(model, inputs, options) -> float:
    counts = []
    for tokens in (4, 12):
        with CountSyncs() as mode:
            model.generate(**inputs, max_new_tokens=tokens, **options)
        counts.append(mode.count)
    assert counts[0] > 0
    return (counts[1] - counts[0]) / 8


class TestPromptsInPieces:
    @pytest.mark.parametrize("given", ["features", "encoded", "embedded"])
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
    def test_are_the_prompt(self, model, batch, heard, given, options):
        expected = model.generate(**batch, **NEW, **options)
        for size in (16, 10_000):
            heard.clear()
            fed = Steps(model)
            inputs = known(model, batch, given)
            answers = model.generate(**inputs, **NEW, **options, prefill_chunk_size=size)
            assert torch.equal(answers, expected)
            assert heard == [5]  # once, for all pieces, by the model or by the one who knows
            assert fed.fed[0] == min(size, batch["input_ids"].shape[1])

    def test_placeholders_without_enough_audio(self, model, batch):
        batch["input_features"], batch["input_features_mask"] = (
            batch["input_features"][1:],
            batch["input_features_mask"][1:],
        )
        with pytest.raises(ValueError, match="audio placeholders .* gives .* audio embeddings"):
            model.generate(**batch, **NEW, prefill_chunk_size=16)


class TestClipsAreHeardOnce:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"num_beams": 5},
            {"num_beams": 4, "num_return_sequences": 3},
            {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
            {"do_sample": True, "num_beams": 2},
        ],
        ids=["greedy", "beams", "several-beams", "samples", "beam-samples"],
    )
    def test_whatever_is_made_of_them(self, model, batch, heard, options):
        answers = model.generate(**batch, **NEW, **options)
        assert heard == [5]
        if options.get("top_k") == 1:
            expected = model.generate(**batch, **NEW)
            assert torch.equal(answers, expected.repeat_interleave(3, dim=0))

    @pytest.mark.parametrize("given", ["encoded", "embedded"])
    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
    def test_or_not_at_all(self, model, batch, heard, given, use_cache, options):
        """Where encoder output or embeddings are known, answers are those from the features."""
        expected = model.generate(**batch, **NEW, **options)
        inputs = known(model, batch, given)
        heard.clear()
        assert torch.equal(model.generate(**inputs, **NEW, **options, use_cache=use_cache), expected)
        assert not heard

    def test_without_a_cache_nothing_else_is_said(self, model, batch):
        for options in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}):
            answers = [model.generate(**batch, **NEW, **options, use_cache=cache) for cache in (True, False)]
            assert torch.equal(*answers)

    def test_at_once_under_zero3(self, model, heard):
        """Processes that run a part that is spread over them unequally often would wait for each other for ever."""
        model.get_input_embeddings().weight.ds_id = 0  # as DeepSpeed marks what it has spread
        with torch.no_grad():
            model.get_audio_features(torch.randn(41, 80, 20))
        assert heard == [41]

    def test_long_clips_are_heard_bit_by_bit(self, monkeypatch, model, heard):
        """As many chunks as twenty minutes have (short ones): memory for a few, and what one call would give."""
        features, mask = torch.randn(41, 80, 300), torch.ones(41, 300, dtype=torch.long)
        mask[-1, 70:] = 0
        with torch.no_grad():
            pieces = model.get_audio_features(features, mask, output_hidden_states=True)
            assert heard == [16, 16, 9]
            monkeypatch.setattr(modeling_lsm, "CHUNKS_AT_A_TIME", 1000)
            whole = model.get_audio_features(features, mask, output_hidden_states=True)
        assert heard[3:] == [41]
        torch.testing.assert_close(pieces.pooler_output, whole.pooler_output, atol=2e-5, rtol=0.0)
        assert len(pieces.hidden_states) == len(whole.hidden_states)
        for piece, states in zip(pieces.hidden_states, whole.hidden_states, strict=True):
            torch.testing.assert_close(piece, states, atol=2e-5, rtol=0.0)
