"""Choose what the experiment's clips say: `python -m experiments.tiny.write_sentences --size small --output-dir run`.

Three sources, all kept beside this file, so that the same size and seed give the same sentences everywhere:

- `sentences/wordnet.txt`: example sentences of WordNet 3.0, written by lexicographers to show words in use. Plain
  English on every subject, with a vocabulary that no set of templates has. The licence is `sentences/LICENSE.wordnet`.
- `sentences/definitions.txt`: WordNet's definitions of 25,000 words, for the warm-up alone. The projector knows
  no word that it has not heard, and the examples of training lack 6.6 % of the words of those for validation; with
  the definitions it is 2.7 %.
- `sentences/requests.yaml`: spoken questions and commands, from templates written for this experiment.

Letting the small LLM write them was tried. SmolLM2-135M-Instruct, asked for one sentence with a given word, more often
talked about the task than wrote a sentence, and it wrote two of them a second.

A sentence's own hash decides whether it is for training, validation or test, whatever the size: training sentences of
one size are never test sentences of another.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

import yaml


FOLDER = Path(__file__).with_name("sentences")
WORDNET_FILE = FOLDER / "wordnet.txt"
DEFINITIONS_FILE = FOLDER / "definitions.txt"
REQUESTS_FILE = FOLDER / "requests.yaml"

# The sentences of `warm_up` and `words` are more for training, in the cheapest voices. Only the warm-up learns from
# them.
SPLITS = ("train", "warm_up", "words", "validation", "test")
FOR_TRAINING = ("train", "warm_up", "words")
SIZES = {
    "smoke": {"train": 48, "warm_up": 24, "words": 24, "validation": 6, "test": 6},
    "small": {"train": 3_600, "warm_up": 8_000, "words": 28_000, "validation": 200, "test": 500},
    "full": {"train": 12_000, "warm_up": 1_000, "words": 28_000, "validation": 500, "test": 800},
}
# Of each part, so many come from the templates; there are too few in WordNet that ask for anything.
SHARES = {"question": 0.16, "command": 0.16}
WORDS_SHARES = {"question": 0.03, "command": 0.03, "definition": 0.72}
MAX_PER_TEMPLATE = 160


@dataclass(frozen=True)
class Sentence:
    """One sentence to speak.

    Args:
        text: The sentence, with its capital and its full stop.
        source: `"wordnet"`, `"definition"`, `"question"` or `"command"`: the list it comes from.
    """

    text: str
    source: str


def choose_sentences(size: str, seed: int = 0) -> dict[str, list[Sentence]]:
    """The sentences of every part, in an order that mixes the sources.

    Args:
        size: A key of `SIZES`.
        seed: Chooses the sentences and their order. It does not move a sentence into another part.

    Returns:
        Split → its sentences.

    Raises:
        ValueError: The size is unknown, or the sources hold too few sentences for it.
    """
    if size not in SIZES:
        raise ValueError(f"expected a size among {sorted(SIZES)}, got {size!r}")
    files = {"wordnet": WORDNET_FILE, "definition": DEFINITIONS_FILE}
    sources = {source: file.read_text(encoding="utf-8").splitlines() for source, file in files.items()}
    sources |= read_requests()
    by_split = {source: {split: set() for split in ("train", "validation", "test")} for source in sources}
    for source, texts in sources.items():
        for text in texts:
            by_split[source][split_of(text)].add(text)

    chosen = {}
    for split, count in SIZES[size].items():
        shares = WORDS_SHARES if split == "words" else SHARES
        counts = {source: round(share * count) for source, share in shares.items()}
        counts["wordnet"] = count - sum(counts.values())
        chosen[split] = []
        for source, wanted in counts.items():
            pool = by_split[source]["train" if split in FOR_TRAINING else split]
            texts = sorted(pool, key=lambda text: _digest(f"{seed}:{text}"))
            if split in FOR_TRAINING:
                texts = texts[sum(sentence.source == source for taken in chosen.values() for sentence in taken) :]
            if len(texts) < wanted:
                raise ValueError(f"{size!r} needs {wanted} {split} sentences of {source!r}, there are {len(texts)}")
            chosen[split] += [Sentence(text, source) for text in texts[:wanted]]
        chosen[split].sort(key=lambda sentence: _digest(f"{seed}:{sentence.text}"))
    return chosen


def split_of(text: str) -> str:
    """The part a sentence belongs to: one in twenty is for validation, one in twenty for test.

    Capitals and punctuation do not count, for they cannot be heard.
    """
    bucket = int(_digest(" ".join(re.findall(r"[a-z']+", text.lower())))[:8], 16) % 20
    return {0: "validation", 1: "test"}.get(bucket, "train")


def read_requests(path: Path = REQUESTS_FILE) -> dict[str, list[str]]:
    """What the templates of a file can say.

    Returns:
        `"question"` and `"command"` → sentences.
    """
    grammar = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {
        kind: [text for template in grammar[key] for text in fill(template, grammar["slots"])]
        for kind, key in (("question", "questions"), ("command", "commands"))
    }


def fill(template: str, slots: dict[str, list[str]]) -> list[str]:
    """The sentences that a template can give, or some of them where there are many: none shall crowd out the others.

    Args:
        template: `"What is a {thing} for?"`. `{thing2}` is one more of the slot's words, and never the same one.
        slots: Name of a slot → the words for it.
    """
    names = re.findall(r"{(\w+)}", template)
    combinations = math.prod(len(slots[name]) for name in names)
    texts = []
    for index in random.Random(template).sample(range(combinations), min(combinations, MAX_PER_TEMPLATE)):
        words = {}
        for name in names:
            index, position = divmod(index, len(slots[name]))
            words[name] = slots[name][position]
        if len(set(words.values())) == len(words):
            texts.append(re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", template.format(**words)))
    return texts


def write_sentences(size: str, output_dir: Path, seed: int = 0) -> None:
    """Write `sentences-<split>.jsonl` with `text` and `source` for every part."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, sentences in choose_sentences(size, seed).items():
        rows = [{"text": sentence.text, "source": sentence.source} for sentence in sentences]
        write_rows(rows, output_dir / f"sentences-{split}.jsonl")


def write_rows(rows: list[dict], path: Path) -> None:
    """Write a JSON Lines file that appears under its name only once it is whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="how many sentences")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the sentences of every part")
    parser.add_argument("--seed", type=int, default=0, help="chooses the sentences within their parts")
    args = parser.parse_args()
    write_sentences(args.size, args.output_dir, seed=args.seed)


if __name__ == "__main__":
    main()
