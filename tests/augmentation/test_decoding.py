"""Many prompts decoded together: the same answers as one at a time, in no more room than was given."""

import random

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from modeling_lsm.augmentation import decoding
from modeling_lsm.augmentation.decoding import batches_under_budget, greedy_decode
from modeling_lsm.augmentation.seat_cache import SeatCache
from tests import tiny


SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 4,
    "pad_token_id": 2,
}


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=4, pad_token_id=2
    )
    return GPT2LMHeadModel(config)


MODELS = {
    "llama": tiny.make_llm,
    "llama untied": lambda: tiny.make_llm(tie_word_embeddings=False),
    "llama eager": lambda: tiny.make_llm(attn_implementation="eager"),
    "gpt2": lambda: tiny.enliven(gpt2()),
    "lsm": tiny.make_model,
    "sliding window": lambda: tiny.enliven(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6))),
    "some layers with a sliding window": lambda: tiny.enliven(
        Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1))
    ),
}


def random_prompts(count: int, prefix: int = 0, shortest: int = 1, longest: int = 40) -> list[list[int]]:
    """Prompts of mixed lengths that have their first tokens in common."""
    draw = random.Random(count)
    shared = draw.choices(range(5, 260), k=prefix)
    return [shared + draw.choices(range(5, 260), k=draw.randint(shortest, longest)) for _ in range(count)]


def one_at_a_time(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    return [
        model.generate(torch.tensor([prompt]), max_new_tokens=max_new_tokens, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        for prompt in prompts
    ]


def end_often(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Makes end tokens of what the model likes to say, such that its answers are of many lengths."""
    model.generation_config.eos_token_id = None
    answers = one_at_a_time(model, prompts, max_new_tokens)

    def count_lengths(ends: list[int]) -> int:
        return len({next((at for at, token in enumerate(answer) if token in ends), None) for answer in answers})

    ends: list[int] = []
    for token in sorted({token for answer in answers for token in answer}):
        if count_lengths([*ends, token]) > count_lengths(ends):
            ends.append(token)
    model.generation_config.eos_token_id = ends


@pytest.fixture
def pools(monkeypatch) -> list[tuple[int, int]]:
    """The seats and columns of every cache that is made."""
    sizes = []
    resize = SeatCache.resize

    def record(self, seats, columns, in_use):
        sizes.append((seats, columns))
        resize(self, seats, columns, in_use)

    monkeypatch.setattr(SeatCache, "resize", record)
    return sizes


@pytest.mark.parametrize("prefix", [0, 9])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_one_prompt_at_a_time(name, prefix, pools):
    model = MODELS[name]()
    prompts = random_prompts(20, prefix)
    end_often(model, prompts, 16)
    alone = one_at_a_time(model, prompts, 16)
    assert len({len(answer) for answer in alone}) > 5, "the answers are too alike to test much"
    seen = {}
    answers = greedy_decode(model, prompts, 16, batch_tokens=300, on_answer=lambda *answer: seen.update([answer]))
    assert answers == alone
    assert [seen[index] for index in range(len(prompts))] == answers
    assert bool(pools) == ("window" not in name)


@pytest.mark.parametrize("batch_tokens", [1, 40, 130, 500, 100_000])
def test_room_is_kept_to_and_matters_to_no_answer(batch_tokens, pools):
    model = tiny.make_llm()
    prompts = random_prompts(30, prefix=3)
    end_often(model, prompts, 12)
    assert greedy_decode(model, prompts, 12, batch_tokens) == one_at_a_time(model, prompts, 12)
    assert all(seats == 1 or seats * columns <= batch_tokens for seats, columns in pools)
    longest = max(map(len, prompts)) + 12
    assert max(seats for seats, _ in pools) <= 30 and max(columns for _, columns in pools) == longest
    if batch_tokens == 130:
        assert pools[0][0] < pools[-1][0], "shorter prompts should have got more seats"


def test_answer_is_called_once_per_prompt_also_for_equal_prompts():
    model = tiny.make_llm()
    prompts = [[7, 8, 9]] * 5 + [[7]]
    calls = []
    answers = greedy_decode(model, prompts, 6, 40, lambda index, answer: calls.append(index))
    assert sorted(calls) == list(range(6))
    assert answers == one_at_a_time(model, prompts, 6)


def test_rows_that_end_at_once_and_rows_that_never_end():
    model = tiny.make_llm()
    prompts = random_prompts(9, shortest=5)
    model.generation_config.eos_token_id = None
    free = greedy_decode(model, prompts, 10, 200)
    assert [len(answer) for answer in free] == [10] * 9
    model.generation_config.eos_token_id = sorted({answer[0] for answer in free})
    assert greedy_decode(model, prompts, 10, 200) == [answer[:1] for answer in free]
    assert greedy_decode(model, prompts, 1, 200) == [answer[:1] for answer in free]


@pytest.mark.parametrize("settings", [{"suppress_tokens": [3, 50, 51]}, {"repetition_penalty": 1.7}])
@pytest.mark.parametrize("name", ["llama", "sliding window"])
def test_generation_config_is_obeyed(name, settings, pools):
    model = MODELS[name]()
    prompts = random_prompts(8)
    without = greedy_decode(model, prompts, 12, 300)
    if "suppress_tokens" in settings:
        settings = {"suppress_tokens": [*{token for answer in without for token in answer[:2]} - {4}]}
    model.generation_config.update(**settings, do_sample=True, temperature=0.3, top_k=7)
    answers = greedy_decode(model, prompts, 12, 300)
    assert answers == one_at_a_time(model, prompts, 12) != without
    assert bool(pools) == (name == "llama")


def test_generation_config_with_other_settings_is_left_to_generate(pools):
    model = tiny.make_llm()
    model.generation_config.update(min_new_tokens=4)
    prompts = random_prompts(8)
    assert greedy_decode(model, prompts, 8, 200) == one_at_a_time(model, prompts, 8)
    assert not pools


def test_settings_that_the_decoder_names_exist():
    """A setting that it does not name makes it leave the work to `generate`; one misspelt would, too."""
    known = tiny.make_llm().generation_config.to_dict().keys()
    assert known >= decoding.OBEYED | decoding.IRRELEVANT


def test_no_prompts_and_empty_prompts():
    model = tiny.make_llm()
    assert greedy_decode(model, [], 8, 100) == []
    with pytest.raises(ValueError, match="Prompt 1 has no tokens; expected one at least"):
        greedy_decode(model, [[5], [], [6]], 8, 100)


def test_batches_hold_every_row_once_within_the_budget():
    lengths = [7, 120, 30, 30, 500, 1, 64, 64, 64, 2]
    batches = list(batches_under_budget(lengths, budget=200))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 200
