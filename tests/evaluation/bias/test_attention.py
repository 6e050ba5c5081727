"""Attention shares: those of hand-built models, computed by hand, and where the parts of a prompt are."""

import json

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from modeling_lsm import LsmForConditionalGeneration
from modeling_lsm.evaluation.bias.attention import (
    ANSWER,
    INSTRUCTION,
    PADDING,
    PARTS,
    SPEECH,
    TEMPLATE,
    attention_shares,
    encode,
    measure_attention,
)
from modeling_lsm.evaluation.bias.suite import ratio_bounds, summarize_attention
from modeling_lsm.evaluation.systems import LsmSystem, TextSystem
from tests import tiny


LAYERS, HEADS, KV_HEADS, HIDDEN, HEAD_SIZE = 2, 4, 2, 8, 2
ROW = {"instruction": "Name it.", "text": "a red fox", "audio": tiny.noise(0.7)}


def hand_built_llm() -> LlamaForCausalLM:
    """Two layers whose weights are a formula, in double precision."""
    llm = LlamaForCausalLM(
        tiny.llm_config(
            hidden_size=HIDDEN, intermediate_size=4, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS
        )
    ).double()
    with torch.no_grad():
        for index, parameter in enumerate(llm.parameters()):
            steps = torch.arange(parameter.numel(), dtype=torch.double).reshape(parameter.shape)
            parameter.copy_(torch.sin(steps * (index + 1) + index) + (parameter.ndim == 1) * 1.5)
    return llm.eval()


def attention_by_hand(weights: dict[str, np.ndarray], embeddings: np.ndarray) -> np.ndarray:
    """A Llama's attention, written out: `(layers, heads, tokens, tokens)`."""

    def norm(states, weight):
        return states / np.sqrt((states**2).mean(-1, keepdims=True) + 1e-6) * weight

    def turn(heads):  # rotary positions; the two halves of a head are the two coordinates
        angles = np.arange(heads.shape[0])[:, None, None]  # one frequency, 1, for two coordinates
        x, y = heads[..., :1], heads[..., 1:]
        return np.concatenate([x * np.cos(angles) - y * np.sin(angles), y * np.cos(angles) + x * np.sin(angles)], -1)

    states, tokens, attentions = embeddings, len(embeddings), []
    for layer in range(LAYERS):
        at = {name.split(f"layers.{layer}.")[1]: w for name, w in weights.items() if f"layers.{layer}." in name}
        normed = norm(states, at["input_layernorm.weight"])
        query, key, value = (
            (normed @ at[f"self_attn.{name}_proj.weight"].T).reshape(tokens, -1, HEAD_SIZE) for name in "qkv"
        )
        query, key = turn(query), turn(key)
        attention, outputs = np.zeros((HEADS, tokens, tokens)), []
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            for position in range(tokens):
                scores = key[: position + 1, shared] @ query[position, head] / np.sqrt(HEAD_SIZE)
                scores = np.exp(scores - scores.max())
                attention[head, position, : position + 1] = scores / scores.sum()
            outputs.append(attention[head] @ value[:, shared])
        attentions.append(attention)
        states = states + np.concatenate(outputs, -1) @ at["self_attn.o_proj.weight"].T
        normed = norm(states, at["post_attention_layernorm.weight"])
        gate, up = (normed @ at[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        states = states + (gate / (1 + np.exp(-gate)) * up) @ at["mlp.down_proj.weight"].T
    return np.stack(attentions)


def shares_by_hand(attention: np.ndarray, parts: list[int]) -> np.ndarray:
    """`(layers, groups, parts)`: for each token of the answer, what it gives each part; then the means."""
    shares = np.zeros((LAYERS, KV_HEADS, len(PARTS)))
    queries = [at for at, part in enumerate(parts) if part == ANSWER]
    for layer in range(LAYERS):
        for head in range(HEADS):
            for query in queries:
                for key, part in enumerate(parts):
                    weight = attention[layer, head, query, key]
                    shares[layer, head // (HEADS // KV_HEADS), part] += weight / len(queries) / (HEADS // KV_HEADS)
    return shares


def weights_of(llm) -> dict[str, np.ndarray]:
    return {name: parameter.detach().double().numpy() for name, parameter in llm.named_parameters()}


def test_bias_attention_of_a_hand_built_model_that_reads(processor):
    llm = hand_built_llm()
    system = TextSystem(llm, processor)
    ids = processor.tokenizer(
        "<|im_start|>system\nYou listen.<|im_end|>\n<|im_start|>user\nName it.\n\na red fox<|im_end|>\n"
        "<|im_start|>assistant\nfox!"
    )["input_ids"]
    # A token for every byte, and one for every marker.
    parts = [TEMPLATE] * (1 + 18 + 1 + 1 + 1 + 5) + [INSTRUCTION] * 8 + [TEMPLATE] * 2 + [SPEECH] * 9
    parts += [TEMPLATE] * (1 + 1 + 1 + 10) + [ANSWER] * 4
    tokens, found, clip = encode(system, ROW, "fox!")
    assert tokens == ids and found == parts and clip is None

    embeddings = weights_of(llm)["model.embed_tokens.weight"][ids]
    expected = shares_by_hand(attention_by_hand(weights_of(llm), embeddings), parts)
    (measured,) = measure_attention(system, [ROW], ["fox!"])
    assert measured.shape == (LAYERS, KV_HEADS, 4)
    assert measured == pytest.approx(expected, abs=1e-6)
    assert measured.sum(-1) == pytest.approx(np.ones((LAYERS, KV_HEADS)), abs=1e-6)
    assert (
        np.ptp(expected, axis=(0, 1)).min() > 1e-3
    )  # layers and groups differ, or the test could not tell them apart


def test_bias_attention_of_a_hand_built_model_that_hears(processor):
    config = tiny.model_config()
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 4, "num_attention_heads": HEADS, "head_dim": HEAD_SIZE}
    config = tiny.model_config(text_config={**config.text_config.to_dict(), **sizes, "num_key_value_heads": KV_HEADS})
    model = tiny.enliven(LsmForConditionalGeneration(config).double())
    system = LsmSystem(model, processor)
    tokens, parts, clip = encode(system, ROW, "fox!")
    heard = [at for at, token in enumerate(tokens) if token == processor.audio_token_id]
    assert heard == [at for at, part in enumerate(parts) if part == SPEECH]
    assert len(heard) == processor.timing.audio_tokens_of_clip(len(clip)) > 1
    assert (
        processor.tokenizer.decode([t for t, p in zip(tokens, parts, strict=True) if p == INSTRUCTION]) == "Name it."
    )

    audio = processor(audio=[clip])
    speech = model.get_audio_features(audio["input_features"].double(), audio["input_features_mask"]).pooler_output
    llm = weights_of(model.lsm.language_model)
    embeddings = llm["model.embed_tokens.weight"][tokens]
    embeddings[heard] = speech.detach().numpy()
    (measured,) = measure_attention(system, [ROW], ["fox!"])
    assert measured == pytest.approx(shares_by_hand(attention_by_hand(llm, embeddings), parts), abs=1e-6)
    assert measured.sum(-1) == pytest.approx(np.ones((LAYERS, KV_HEADS)), abs=1e-6)


@pytest.mark.parametrize("kind", ["lsm", "text"])
def test_bias_attention_does_not_depend_on_the_batch(kind, model, processor):
    system = {"lsm": LsmSystem, "text": TextSystem}[kind](model, processor)
    rows = [{**ROW, "audio": tiny.noise(seconds, 1), "text": "word " * n} for n, seconds in enumerate((0.4, 2, 1), 1)]
    answers = ["one", "a longer answer", "  "]
    alone = measure_attention(system, rows, answers)
    together = measure_attention(system, rows, answers, batch_size=3)
    assert alone[2] is together[2] is None  # nothing was said
    for one, other in zip(alone[:2], together[:2], strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    assert np.abs(alone[0] - alone[1]).max() > 1e-3
    assert model.lsm.language_model.config._attn_implementation == "sdpa"  # as it was before


def test_bias_attention_shares_leave_out_padding_on_either_side():
    torch.manual_seed(0)
    attention = torch.rand(1, 2, 4, 4).tril().double()
    attention /= attention.sum(-1, keepdim=True)
    parts = torch.tensor([[TEMPLATE, INSTRUCTION, SPEECH, ANSWER]])
    expected = attention_shares((attention,), parts, groups=2)
    assert expected[0, 0, :, [TEMPLATE, INSTRUCTION, SPEECH, ANSWER]].tolist() == attention[0, :, 3].tolist()
    for left, right in ((2, 0), (0, 3), (1, 2)):
        padded = torch.nn.functional.pad(attention, (left, right, left, right))
        with_padding = torch.nn.functional.pad(parts, (left, right), value=PADDING)
        assert attention_shares((padded,), with_padding, groups=2).equal(expected)
    assert attention_shares((attention,), parts, groups=1)[0, 0, 0].allclose(expected[0, 0].mean(0))


def test_bias_attention_parts_end_where_words_do(model, processor):
    row = {
        **ROW,
        "instruction": " Name it; Name it.\n",
        "text": " Name it. ",
    }  # the transcript repeats the instruction
    tokens, parts, _ = encode(TextSystem(model, processor), row, "it<|im_end|>it")
    words = {
        part: processor.tokenizer.decode([t for t, p in zip(tokens, parts, strict=True) if p == part])
        for part in (INSTRUCTION, SPEECH, ANSWER)
    }
    assert words == {INSTRUCTION: "Name it; Name it.", SPEECH: "Name it.", ANSWER: "it"}  # up to the end token
    shouting = "{% for m in messages %}{{ m.content[0].text | upper }}{% endfor %}"
    system = TextSystem(model, tiny.make_processor(chat_template=shouting))
    with pytest.raises(ValueError, match="The chat template does not leave the instruction"):
        measure_attention(system, [ROW], ["fox"])


def test_bias_attention_needs_an_llm_that_shows_it(processor):
    config = MambaConfig(vocab_size=264, hidden_size=8, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="--measured_rows 0"):
        measure_attention(TextSystem(MambaForCausalLM(config).eval(), processor), [ROW], ["fox"])


def test_bias_attention_of_an_llm_with_positions_of_its_own(processor):
    """GPT-2 names its parts otherwise and adds learnt positions."""
    text_config = GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=512, eos_token_id=4)
    model = tiny.make_model(text_config=text_config.to_dict())
    (shares,) = measure_attention(LsmSystem(model, processor), [ROW], ["fox"])
    assert shares.shape == (2, 4, 4) and shares.sum(-1) == pytest.approx(np.ones((2, 4)), abs=1e-6)


def test_bias_attention_summary_by_hand():
    shares = np.array([[[[0.1, 0.3, 0.4, 0.2]]], [[[0.3, 0.1, 0.4, 0.2]]]])  # two answers, a layer, a group
    summary = summarize_attention(shares, 200, 0, 0.95)
    assert summary["in_all"]["value"] == pytest.approx([0.2, 0.2, 0.4, 0.2])
    assert summary["by_group"]["low"][0][0] == pytest.approx([0.1, 0.1, 0.4, 0.2])
    assert summary["by_layer"]["high"][0] == pytest.approx([0.3, 0.3, 0.4, 0.2])
    assert summary["instruction_to_both"] == pytest.approx({"value": 0.5, "low": 0.25, "high": 0.75})
    json.dumps(summary)
    bounded = ratio_bounds(np.array([[2.0], [6.0]]), np.array([[1.0], [3.0]]), 50, 0, 0.9)
    assert [figure.tolist() for figure in bounded.values()] == [[2]] * 3  # the ratio is the same in every row
