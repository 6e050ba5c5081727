"""
What a user writes is text, be it the audio token: it is neither a placeholder nor encoded as one.

Before a chat is rendered, the audio token in what users wrote is marked: replaced by as many characters that nobody
can guess, so that the placeholders of the template stand out and all offsets stay. A copy of the tokenizer puts it
back when it has found its special tokens. Texts without marks never see that copy.
"""

import secrets
from copy import deepcopy
from typing import Any
from weakref import WeakKeyDictionary


# Characters of CJK's extension B, which no template strips, escapes or changes the case of.
MARK = "".join(chr(0x20000 + secrets.randbelow(0xA6D0)) for _ in range(64))

_copies = WeakKeyDictionary()  # tokenizer → its length and its copy


def mark_of(audio_token: str) -> str:
    """What stands for the audio token as text: as long as it is."""
    return (MARK * (len(audio_token) // len(MARK) + 1))[: len(audio_token)]


def mark_literals(written: Any, audio_token: str) -> Any:
    """A copy of a chat, of tools or of documents in which the audio token is marked wherever it is text."""
    if isinstance(written, str):
        return written.replace(audio_token, mark_of(audio_token))
    if isinstance(written, dict):
        return {key: mark_literals(value, audio_token) for key, value in written.items()}
    if isinstance(written, (list, tuple)):
        return [mark_literals(value, audio_token) for value in written]
    return written


def tokenizer_of(texts: list[str], tokenizer: Any, audio_token: str) -> Any:
    """
    The tokenizer for `texts`: `tokenizer` itself, or, if there are marks in them, a copy that encodes a mark as the
    audio token's characters.

    Raises:
        ValueError: If that is not possible with this tokenizer.
    """
    mark = mark_of(audio_token)
    if not any(mark in text for text in texts):
        return tokenizer
    size, marking = _copies.get(tokenizer, (None, None))
    if size != len(tokenizer):
        marking = copy_that_reads(mark, tokenizer, audio_token)
        _copies[tokenizer] = (len(tokenizer), marking)
    return marking


def copy_that_reads(mark: str, tokenizer: Any, audio_token: str) -> Any:
    """A copy of `tokenizer` whose normalizer, which comes after the search for special tokens, replaces the mark."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"A text holds {audio_token!r}, which a {type(tokenizer).__name__} cannot tell from a placeholder. Load "
            "the fast tokenizer, or take it out of the text."
        )
    from tokenizers import normalizers

    marking = deepcopy(tokenizer)
    backend = marking.backend_tokenizer
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Replace(mark, audio_token), *own])
    if tokenizer.convert_tokens_to_ids(audio_token) in marking(mark, add_special_tokens=False)["input_ids"]:
        raise ValueError(
            f"A text holds {audio_token!r}, which this tokenizer encodes as a placeholder even as text. Take it out."
        )
    return marking


__all__ = ["mark_literals", "tokenizer_of"]
