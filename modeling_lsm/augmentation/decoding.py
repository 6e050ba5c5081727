"""
Greedy decoding of many prompts: what `model.generate(do_sample=False)` answers to each by itself, in less time.

`generate` goes on until the last row of its batch ends. Here a row that ends gives its seat to a waiting prompt, what
all prompts begin with goes through the model once, and keys and values are written in place.
"""

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, RepetitionPenaltyLogitsProcessor
from transformers.cache_utils import Cache, DynamicLayer

from .seat_cache import SeatCache


# Prompts are let in once one seat in eight is free, as several go through the model faster than one after the other.
REFILL_SHARE = 8
# Settings of a generation config that `greedy_decode` obeys, and those that do not matter to greedy decoding.
OBEYED = {"eos_token_id", "suppress_tokens", "repetition_penalty"}
IRRELEVANT = {
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "max_length", "max_new_tokens"),
    *("bos_token_id", "pad_token_id", "use_cache", "cache_implementation", "output_attentions"),
    *("output_hidden_states", "return_dict_in_generate", "transformers_version", "_from_model_config"),
}


@dataclass
class Row:
    """A prompt that is being answered; `tokens` holds it and the answer so far, of which the last is yet to be fed."""

    index: int
    tokens: list[int]
    ended: bool = False


# transformers' own continuous batching, `model.generate_batch`, gives the same answers, but takes over twice as long
# on a CPU (64 prompts to SmolLM2 135M, 225 new tokens, two cores: 81 s; here 35 s).
@torch.inference_mode()
def greedy_decode(
    model: PreTrainedModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_tokens: int,
    on_answer: Callable[[int, list[int]], None] = lambda index, answer: None,
) -> list[list[int]]:
    """
    Continues every prompt by its likeliest next token, again and again, under the model's generation config.

    Args:
        model ([`PreTrainedModel`]): A causal LM, or an LSM.
        prompts (`list[list[int]]`): Token ids of each prompt, at least one.
        max_new_tokens (`int`): Longest answer.
        batch_tokens (`int`): Tokens to have room for at a time: seats times longest prompt with longest answer. A
            prompt for which that is too little is answered alone.
        on_answer (*optional*): Called with the index of a prompt and its answer as soon as the answer is there.

    Returns:
        `list[list[int]]`: The answers, each up to and with its end token if it has one.
    """
    if not all(prompts):
        raise ValueError(f"Prompt {prompts.index([])} has no tokens; expected one at least, like the BOS token.")
    if not prompts:
        return []
    # What all prompts begin with. The last token of each is kept back: the first step of its answer begins with it.
    shared = os.path.commonprefix(prompts)[: min(map(len, prompts)) - 1]
    shared_cache = DynamicCache(config=model.config)
    feed(model, [shared or prompts[0][:1]], shared_cache)
    if not is_plain(model, shared_cache):
        return generate_in_batches(model, prompts, max_new_tokens, batch_tokens, on_answer)
    cache = SeatCache(layers=copy.deepcopy(shared_cache.layers))
    if not shared:
        shared_cache.reset()

    end_tokens = read_end_tokens(model)
    answers: list[list[int]] = [[] for _ in prompts]
    # The longest come first: later ones need less room, which makes more seats, and those let in together are alike.
    waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    rows: list[Row] = []
    seats = 0
    while waiting or rows:
        if waiting:
            in_play = [waiting[-1], *(row.index for row in rows)]
            columns = max(len(prompts[index]) for index in in_play) + max_new_tokens
            affordable = min(max(batch_tokens // columns, 1), len(waiting) + len(rows))
            if affordable > 1.25 * seats:  # not for every single one: it copies the cache
                seats = affordable
                cache.resize(seats, columns, len(rows))
        free = seats - len(rows)
        if waiting and REFILL_SHARE * free >= seats:
            entering = [waiting.pop() for _ in range(min(free, len(waiting)))]
            entered = copy.deepcopy(shared_cache)
            entered.batch_repeat_interleave(len(entering))
            feed(model, [prompts[index][len(shared) : -1] for index in entering], entered)
            cache.fill(len(rows), entered)
            rows += [Row(index, list(prompts[index])) for index in entering]

        for row, token in zip(rows, likeliest_tokens(model, rows, cache), strict=True):
            row.tokens.append(token)
            answer = row.tokens[len(prompts[row.index]) :]
            if token in end_tokens or len(answer) == max_new_tokens:
                row.ended = True
                answers[row.index] = answer
                on_answer(row.index, answer)
        # The last rows move to the seats of those that ended, and the first seats are again those in use.
        in_use = sum(not row.ended for row in rows)
        targets = [seat for seat, row in enumerate(rows[:in_use]) if row.ended]
        sources = [seat for seat, row in enumerate(rows) if seat >= in_use and not row.ended]
        if sources:
            cache.move(sources, targets)
        for source, target in zip(sources, targets, strict=True):
            rows[target] = rows[source]
        del rows[in_use:]
    return answers


def is_plain(model: PreTrainedModel, cache: DynamicCache) -> bool:
    """
    Whether keys and values by position, like those in `cache`, are all that `model` needs of the past, and its
    generation config asks for nothing that is not done here. Sliding windows, recurrent states and layers that share
    keys need more, and so does the local attention of GPT-Neo, which takes columns of a batch for positions.
    """
    layers_are_plain = all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)
    is_local = "local" in getattr(model.config.get_text_config(), "attention_layers", ())
    return layers_are_plain and not is_local and model.generation_config.to_diff_dict().keys() <= OBEYED | IRRELEVANT


def feed(model: PreTrainedModel, prompts: list[list[int]], cache: Cache) -> None:
    """
    Puts the keys and values of `prompts` into `cache`. Padding on the right is seen by no token before it, and is
    written over by the tokens to come.
    """
    width = max(1, *map(len, prompts))
    input_ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=model.device)
    model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def likeliest_tokens(model: PreTrainedModel, rows: list[Row], cache: SeatCache) -> list[int]:
    """Feeds the last token of every row and returns the ones to follow."""
    input_ids = torch.tensor([row.tokens[-1:] for row in rows], device=model.device)
    positions = torch.tensor([len(row.tokens) - 1 for row in rows], device=model.device)
    width = max(len(row.tokens) for row in rows)
    cache.expect(positions, width)
    outputs = model(
        input_ids=input_ids,
        attention_mask=(torch.arange(width, device=model.device) <= positions[:, None]).long(),
        position_ids=positions[:, None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits = outputs.logits[:, -1].float()
    config = model.generation_config
    if config.repetition_penalty not in (None, 1.0):
        # Padded with a token that stands in the row anyway, which changes nothing: a token is penalized once.
        seen = torch.tensor([row.tokens + row.tokens[-1:] * (width - len(row.tokens)) for row in rows])
        logits = RepetitionPenaltyLogitsProcessor(config.repetition_penalty)(seen.to(logits.device), logits)
    if config.suppress_tokens:
        logits[:, config.suppress_tokens] = -torch.inf
    return logits.argmax(-1).tolist()


def generate_in_batches(
    model: PreTrainedModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_tokens: int,
    on_answer: Callable[[int, list[int]], None],
) -> list[list[int]]:
    """What [`greedy_decode`] does with a model or a generation config that is not for it: `model.generate`."""
    end_tokens = read_end_tokens(model)
    pad_token = model.generation_config.pad_token_id or 0
    answers: list[list[int]] = [[] for _ in prompts]
    for batch in batches_under_budget([len(prompt) + max_new_tokens for prompt in prompts], batch_tokens):
        width = max(len(prompts[index]) for index in batch)
        padding = [width - len(prompts[index]) for index in batch]
        rows = [[pad_token] * pad + prompts[index] for index, pad in zip(batch, padding, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        sequences = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad_token,
        )
        for index, answer in zip(batch, sequences[:, width:].tolist(), strict=True):
            length = next((at for at, token in enumerate(answer, start=1) if token in end_tokens), max_new_tokens)
            answers[index] = answer[:length]
            on_answer(index, answers[index])
    return answers


def read_end_tokens(model: PreTrainedModel) -> set[int]:
    """The tokens that end an answer."""
    end_tokens = model.generation_config.eos_token_id
    return {end_tokens} if isinstance(end_tokens, int) else set(end_tokens or ())


def batches_under_budget(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """
    Indices of `lengths` in batches of similar length, longest first, each at most `budget` tokens with padding.

    A length above the budget makes a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
