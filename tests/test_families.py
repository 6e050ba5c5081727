"""Any causal LLM of transformers in an LSM: tiny random models of its families, each through all that an LSM does."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modeling_lsm import LsmForConditionalGeneration, LsmProcessor, make_chat
from modeling_lsm.augmentation import TextModel, check_provenance
from modeling_lsm.composing import compose
from modeling_lsm.data.collating import predicts_label
from modeling_lsm.training import add_lora, set_trained_parts
from tests import tiny
from tests.families import FAMILIES, MULTIMODAL, REFUSED, make_family
from tests.tiny import ask, noise


SMALL = {"projector_hidden_size": 32, "projector_num_attention_heads": 4}
FAST = ("gemma2", "gpt2", "granite", "llama", "mixtral", "qwen3_5_text")
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
TABLE = Path(__file__).parents[1] / "docs" / "llm_families.md"
COLUMNS = ("text", "batch", "answers", "static cache", "slim", "trains", "LoRA", "own targets")
found: dict[str, dict[str, str]] = {}  # what the tests of this run have seen, for the table

PAGE = """\
# LLM families

Any causal LM of transformers that reads embeddings and caches as others do can be the LLM of an LSM; of a multimodal
model, the text part. `tests/test_families.py` composes a tiny random model of each of these {count} families and
writes this page.

- *text*: without audio, logits are the LLM's own.
- *batch*: a row does not depend on its batch, padded on either side.
- *answers*: equal with a cache and without, in a batch and alone, greedy and with beams.
- *static cache*: equal in one (–: transformers has none for the family).
- *slim*: whole and slim checkpoints reload to the same weights.
- *trains*, *LoRA*: the loss falls (–: the family keeps its weights transposed, which LoRA is not merged into).
- *own targets*: what the LLM wrote is accepted for training, what another wrote is not.

{table}

## Not these

{refused}
"""

families = pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=[] if family in FAST else pytest.mark.slow) for family in (*FAMILIES, *MULTIMODAL)],
    scope="module",
)


@pytest.fixture(scope="module")
def composed(family, tiny_bases, tmp_path_factory):
    """The LLM's folder, the LSM composed with it, and its processor."""
    folder = tmp_path_factory.mktemp(family) / family
    make_family(family).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    model, processor = compose(str(tiny_bases.speech), str(folder), **SMALL)
    with torch.no_grad():  # so that speech differs from speech as words differ from words
        tiny.enliven(model.lsm.audio_tower)
    return folder, model, processor


def chats() -> list[list[dict]]:
    """Clips of different length, text alone, two clips in a prompt."""
    two = [{"type": "audio", "audio": noise(0.4, 3)}, {"type": "text", "text": "and"}]
    two.append({"type": "audio", "audio": noise(1.9, 4)})
    return [
        make_chat("What is said?", audio=noise(0.3, 1)),
        make_chat("And at length?", audio=noise(5.1, 2)),
        [{"role": "user", "content": "No speech at all."}],
        [{"role": "user", "content": two}],
    ]


def load_whole(folder: Path) -> PreTrainedModel:
    """The LLM as transformers loads it, with its other parts if it has some."""
    auto_class = AutoModelForMultimodalLM if folder.name in MULTIMODAL else AutoModelForCausalLM
    return auto_class.from_pretrained(folder).eval()


def answers(model: PreTrainedModel, processor: LsmProcessor, *chats: list[dict], **kwargs) -> list[list[int]]:
    inputs = ask(processor, *chats)
    # Tiny LLMs like to say one token for ever, whatever they hear: no token comes twice.
    never = [processor.tokenizer.pad_token_id, processor.audio_token_id]
    settings = {"max_new_tokens": 6, "eos_token_id": None, "no_repeat_ngram_size": 1, "suppress_tokens": never}
    sequences = model.generate(**inputs, **settings, **kwargs)
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture
def note(family):
    """Notes what has been seen of a family, for the table."""

    def note(column: str, value: str = "✓") -> None:
        found.setdefault(family, {})[column] = value

    return note


@families
def test_text_is_the_llm_itself(composed, note):
    folder, model, processor = composed
    llm = load_whole(folder)
    inputs = ask(processor, make_chat("Translate.", transcript="he was not an ill disposed young man"))
    with torch.no_grad():
        logits, expected = model(**inputs).logits, llm(**inputs).logits
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, **TOLERANCE)
    note("text")
    note("class", type(model.lsm.language_model).__name__)


@families
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_row_does_not_depend_on_its_batch(composed, padding_side, note):
    _, model, processor = composed
    kwargs = {"processor_kwargs": {"padding_side": padding_side}}
    batch = ask(processor, *chats(), **kwargs)
    with torch.no_grad():
        rows = model(**batch).logits
        for row, mask, chat in zip(rows, batch["attention_mask"], chats(), strict=True):
            alone = model(**ask(processor, chat, **kwargs)).logits[0]
            torch.testing.assert_close(row[mask.bool()], alone, **TOLERANCE)
    note("batch")


@families
def test_answers(composed, note):
    """Greedy ones: with a cache and without, in a batch and alone, with beams, several at once, in a static cache."""
    _, model, processor = composed
    expected = [answers(model, processor, chat)[0] for chat in chats()]
    assert len({tuple(answer) for answer in expected}) > 1
    assert answers(model, processor, *chats()) == expected
    assert answers(model, processor, *chats(), use_cache=False) == expected
    note("static cache", "✓" if model._can_compile_fullgraph else "–")
    if model._can_compile_fullgraph:
        assert answers(model, processor, *chats(), cache_implementation="static", disable_compile=True) == expected
    several = {"num_beams": 3, "num_return_sequences": 2}
    alone = [answer for chat in chats() for answer in answers(model, processor, chat, **several)]
    assert answers(model, processor, *chats(), **several) == alone
    note("answers")


@families
def test_whole_and_slim_reload(composed, tmp_path, note):
    folder, model, processor = composed
    set_trained_parts(model, ["projector"])
    inputs = ask(processor, *chats())
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        logits = model(**inputs).logits
    for slim in (False, True):
        model.save_pretrained(tmp_path / f"{slim}", processor=processor, slim=slim)
        loaded, report = LsmForConditionalGeneration.from_pretrained(tmp_path / f"{slim}", output_loading_info=True)
        assert not any(report.values()), report
        assert loaded.state_dict().keys() == expected.keys()
        for name, weight in loaded.state_dict().items():
            assert torch.equal(weight, expected[name]), name
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(**inputs).logits, logits, **TOLERANCE)
    again = tmp_path / "again"  # what was loaded is saved under the same names
    loaded.save_pretrained(again, processor=processor)
    reloaded, report = LsmForConditionalGeneration.from_pretrained(again, output_loading_info=True)
    assert not any(report.values()), report
    assert all(torch.equal(weight, expected[name]) for name, weight in reloaded.state_dict().items())
    note("slim")


@pytest.mark.parametrize("family", ["jamba", "mixtral", "qwen3_next", "qwen3_5"], scope="module")
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_slim_with_a_trained_llm(composed, tiny_bases, tmp_path, lora):
    """Of experts, checkpoints hold one by one what is one tensor in memory."""
    folder, _, _ = composed
    model, processor = compose(str(tiny_bases.speech), str(folder), **SMALL)
    if lora:
        add_lora(model, peft.LoraConfig(r=4))
    set_trained_parts(model, ["projector", "llm"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    for slim in (False, True):
        model.save_pretrained(tmp_path / f"{slim}", processor=processor, slim=slim)
    whole, slim = (LsmForConditionalGeneration.from_pretrained(tmp_path / f"{slim}") for slim in (False, True))
    for name, weight in slim.state_dict().items():
        torch.testing.assert_close(weight, whole.state_dict()[name], atol=1e-6, rtol=1e-6)
    inputs = ask(processor, *chats())
    with torch.no_grad():
        torch.testing.assert_close(slim.eval()(**inputs).logits, model.eval()(**inputs).logits, atol=1e-3, rtol=1e-3)
    if not lora:
        names = [
            {*load_file(file)} for file in (tmp_path / "True" / "model.safetensors", folder / "model.safetensors")
        ]
        of_llm = {name for name in names[0] if name.startswith("lsm.language_model.")}
        if folder.name not in MULTIMODAL:
            assert of_llm == {f"lsm.language_model.{name}" for name in names[1]}


@families
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_trains(composed, tiny_bases, lora, note):
    folder, _, _ = composed
    model, processor = compose(str(tiny_bases.speech), str(folder), **SMALL)
    if lora and any(isinstance(module, Conv1D) for module in model.lsm.language_model.modules()):
        with pytest.raises(ValueError, match="keeps its weights in Conv1D layers"):
            add_lora(model, peft.LoraConfig(r=4))
        note("LoRA", "–")
        return
    if lora:
        add_lora(model, peft.LoraConfig(r=4))
    set_trained_parts(model, ["projector", "llm"])
    inputs = ask(processor, *chats()[:2])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.audio_token_id, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(4):
        model.train()
        loss = model(**inputs, labels=labels, logits_to_keep=predicts_label(labels), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        for part in (model.lsm.projector, model.lsm.language_model):
            gradients = [p.grad for p in part.parameters() if p.grad is not None]
            assert all(gradient.isfinite().all() for gradient in gradients)
            assert any(gradient.abs().max() > 0 for gradient in gradients)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    note("LoRA" if lora else "trains")


@families
def test_own_targets_are_accepted_and_no_others(composed, tmp_path, note):
    folder, model, processor = composed
    lsm = tmp_path / "lsm"
    model.save_pretrained(lsm, processor=processor)
    for name in (lsm, folder):
        targets = tmp_path / f"targets-{name.name}"
        targets.mkdir()
        (targets / "provenance.json").write_text(json.dumps({"llm": TextModel(str(name)).provenance()}))
        check_provenance(str(targets), model.config, str(lsm), processor.chat_template)
    llm = load_whole(folder)
    with torch.no_grad():
        llm.get_input_embeddings().weight.mul_(-3)
    other = tmp_path / "other"
    llm.save_pretrained(other)
    AutoTokenizer.from_pretrained(folder).save_pretrained(other)
    (targets / "provenance.json").write_text(json.dumps({"llm": TextModel(str(other)).provenance()}))
    with pytest.raises(ValueError, match="which is not the LLM of"):
        check_provenance(str(targets), model.config, str(lsm), processor.chat_template)
    note("own targets")


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_is_refused(family, tiny_bases, tmp_path):
    folder, reason = tmp_path / family, REFUSED[family][1]
    make_family(family).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match=rf"\({family}\) cannot be the LLM: {re.escape(reason)}\.$"):
        compose(str(tiny_bases.speech), str(folder), **SMALL)


def test_table():
    """`docs/llm_families.md` is written here, from what the tests above have seen: a line of each family that ran."""
    tested = [*FAMILIES, *MULTIMODAL]
    assert len(tested) >= 40
    before = TABLE.read_text(encoding="utf-8") if TABLE.is_file() else ""
    lines = dict(re.findall(r"^(\| `(\w+)` \| `\w+` \|.*)$", before, re.MULTILINE))
    lines = {family: line for line, family in lines.items()}
    for family, seen in found.items():
        if seen.keys() >= {"class", *COLUMNS}:
            lines[family] = f"| `{family}` | `{seen['class']}` | {' | '.join(seen[column] for column in COLUMNS)} |"
    head = [f"| family | class | {' | '.join(COLUMNS)} |", f"| --- | --- | {' | '.join(':---:' for _ in COLUMNS)} |"]
    table = "\n".join([*head, *(lines[family] for family in sorted(tested) if family in lines)])
    refused = "\n".join(f"| `{family}` | {reason} |" for family, (_, reason) in sorted(REFUSED.items()))
    refused = f"| family | cannot be the LLM, because |\n| --- | --- |\n{refused}"
    text = PAGE.format(count=len(tested), table=table, refused=refused)
    if text != before:
        TABLE.write_text(text, encoding="utf-8")
        pytest.fail(f"{TABLE.name} was not what the tests have seen, and has been written anew. Commit it.")
    assert lines.keys() == set(tested)
