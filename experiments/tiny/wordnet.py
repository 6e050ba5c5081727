"""How two files of `sentences/` were made: `python -m experiments.tiny.wordnet --wordnet /usr/share/wordnet`.

Only needed to change what is taken; the files are part of the repository. WordNet 3.0's database files are those of
Debian's package `wordnet-base`. Glosses carry examples in quotes, of which some are sentences ("he worked at home")
and more are not ("a lousy play"); the rules here keep what is surely a sentence, and lose many that are. Definitions
("a gradual decline") become something to say with the word that they define ("A gradual decline, or ebb.").
"""

import argparse
import functools
import re
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from demo.fetch_models import fetch_text_model
from experiments.tiny.write_sentences import DEFINITIONS_FILE, WORDNET_FILE


PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
MIN_WORDS, MAX_WORDS = 3, 20
MIN_CHARACTERS, MAX_CHARACTERS = 16, 100
# A word that the tokenizer cuts into more pieces is one that few people say, and that voices read wrongly.
MAX_TOKENS_PER_WORD = 2
MIN_DEFINITION_WORDS, MAX_DEFINITION_WORDS = 2, 11

SUBJECTS = r"(?:I|he|she|it|we|you|they|there|that|here|what|who)"
BEGINS_WITH_SUBJECT = re.compile(rf"{SUBJECTS}('(?:s|m|re|ll|d|ve))? ", re.IGNORECASE)
FINITE_VERBS = frozenset(
    """
    is are was were am has have had will would can could should must does do did may might cannot
    isn't aren't wasn't weren't hasn't haven't hadn't won't wouldn't can't couldn't shouldn't doesn't don't didn't
    came went took gave knew grew drew flew threw wrote drove rode rose spoke broke chose froze stole woke ate fell
    forgot got saw became began drank rang sang sank swam ran sat stood told sold thought brought bought caught taught
    fought sought felt kept left lost met paid said sent slept spent won wore tore swore hid shook blew held led lay
    """.split()  # noqa: SIM905
)
# After these the verb may belong to a clause inside a phrase: "the man who was late".
CLAUSE_OPENERS = frozenset(
    """
    who whom whose which that what when where while if as than because although though since before after until to
    he she they we i you
    """.split()  # noqa: SIM905
)
# Examples that a reader would not want to hear, that quote poetry and old usage, or that hold an abbreviation.
UNWANTED = re.compile(
    r"\b(?:negro|nigg|gyps|slut|whore|prostitut|harlot|sex|rape\b|rapist|raping|raped|molest|incest|lust\b|lustful|erotic|genital"
    r"|peni[ls]|vagina|breast|nipple|nude|naked|porn|orgasm|copulat|masturbat|homosexual|queer|gays?\b|lesbian|fuck|shit"
    r"|piss|bastard|bitch|damn|crap\b|fart|defecat|urin|suicid|nazi|hitler|terroris|retard|crippl|midget|jews?\b|jewish"
    r"|redskin|savages|thou\b|thee\b|thy\b|hath\b|doth\b|ye\b|unto\b|shalt\b|mr|mrs\b|ms\b|dr\b|st\b|etc\b|vs\b)",
    re.IGNORECASE,
)


def read_synsets(wordnet_dir: Path) -> list[tuple[str, list[str], str]]:
    """All sets of synonyms, as part of speech, the words and their gloss."""
    synsets = []
    for part_of_speech in PARTS_OF_SPEECH:
        # Lines of the licence, at the head of each file, begin with spaces.
        for line in (wordnet_dir / f"data.{part_of_speech}").read_text(encoding="latin-1").splitlines():
            if not line.startswith(" "):
                head, gloss = line.split("|", 1)
                fields = head.split()
                num_words = int(fields[3], 16)  # the format of wndb(5WN): words and numbers take turns
                synsets.append((part_of_speech, fields[4 : 4 + 2 * num_words : 2], gloss))
    return synsets


def read_examples(wordnet_dir: Path) -> list[tuple[str, str]]:
    """The examples in WordNet's glosses, as pairs of part of speech and text."""
    return [
        (part_of_speech, text.strip())
        for part_of_speech, _, gloss in read_synsets(wordnet_dir)
        for text in re.findall(r'"([^"]+)"', gloss)
    ]


def read_definitions(wordnet_dir: Path) -> list[tuple[str, str]]:
    """One word of each set of synonyms, if there is one in small letters, and how its gloss begins: its definition."""
    definitions = []
    for _, words, gloss in read_synsets(wordnet_dir):
        words = [re.sub(r"\(.*", "", word) for word in words]  # adjectives say in brackets where they may stand
        word = next((word for word in words if re.fullmatch("[a-z]{3,}", word)), None)
        if word is not None:
            definition = re.split('[;:"]', re.sub(r"\([^)]*\)", "", gloss))[0]
            definitions.append((word, " ".join(definition.split()).rstrip(",")))
    return definitions


def as_sentence(part_of_speech: str, text: str, count_tokens: Callable[[str], int]) -> str | None:
    """Make a sentence of an example.

    Args:
        part_of_speech: `"noun"`, `"verb"`, `"adj"` or `"adv"`: whose example it is.
        text: The example.
        count_tokens: How many tokens a word has.

    Returns:
        The sentence with a capital and a full stop, or None where the example is a phrase, or not something that
        everybody could say and any voice would read as it is written.
    """
    words = text.split()
    if not MIN_WORDS <= len(words) <= MAX_WORDS or not MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
        return None
    if not _is_plain(text, count_tokens) or not _is_sentence(part_of_speech, text):
        return None
    text = re.sub(r"\bi\b", "I", text)
    return text[0].upper() + text[1:] + ("" if text[-1] in ".?!" else ".")


def as_saying(word: str, definition: str, count_tokens: Callable[[str], int]) -> str | None:
    """Make something to say of a word and its definition.

    Args:
        word: `"ebb"`.
        definition: `"a gradual decline"`.
        count_tokens: How many tokens a word has.

    Returns:
        `"A gradual decline, or ebb."`, or None where not everybody could say it, or not any voice would read it right.
    """
    if not MIN_DEFINITION_WORDS <= len(definition.split()) <= MAX_DEFINITION_WORDS:
        return None
    text = f"{definition[0].upper()}{definition[1:]}, or {word}."
    return text if len(text) <= MAX_CHARACTERS and _is_plain(text, count_tokens) else None


def _is_plain(text: str, count_tokens: Callable[[str], int]) -> bool:
    """Letters and plain punctuation: no digits, abbreviations with dots, quotations or asides; and no rare words."""
    if not re.fullmatch(r"[A-Za-z]+(?:(?:, |'|-| )[A-Za-z]+)*[.?!]?", text) or re.search(
        r"[A-Z]{2}|\b[B-HJ-Z]\b", text
    ):
        return False
    words = re.findall(r"[A-Za-z']+", text)
    return not UNWANTED.search(text) and all(count_tokens(word) <= MAX_TOKENS_PER_WORD for word in words)


def _is_sentence(part_of_speech: str, text: str) -> bool:
    if BEGINS_WITH_SUBJECT.match(text) or text[-1] in "?!":
        return True
    # Verbs are shown in whole sentences, and those who wrote them so gave them a capital.
    if part_of_speech == "verb" and text[0].isupper():
        return True
    for word in text.lower().rstrip(".").replace(",", "").split()[1:]:
        if word in CLAUSE_OPENERS:
            return False
        if word in FINITE_VERBS:
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun, data.verb, ...")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(fetch_text_model())

    @functools.cache
    def count_tokens(word: str) -> int:
        return len(tokenizer.tokenize(f" {word.lower()}"))

    sentences = {}
    for part_of_speech, text in read_examples(args.wordnet):
        sentence = as_sentence(part_of_speech, text, count_tokens)
        if sentence:
            sentences.setdefault(sentence.lower().rstrip(".?!"), sentence)
    WORDNET_FILE.write_text("".join(f"{text}\n" for text in sorted(sentences.values())), encoding="utf-8")

    sayings = {}  # one for each word, as many words matter more than all that one can mean
    for word, definition in read_definitions(args.wordnet):
        saying = as_saying(word, definition, count_tokens)
        if saying:
            sayings.setdefault(word, saying)
    DEFINITIONS_FILE.write_text("".join(f"{text}\n" for text in sorted(sayings.values())), encoding="utf-8")


if __name__ == "__main__":
    main()
