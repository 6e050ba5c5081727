"""The one form that rows have, whatever they were read from, and the chats that they stand for."""

import json
from pathlib import Path
from typing import Any

from datasets import Features, Value
from transformers import BatchEncoding

from ..placeholders_lsm import mark_literals, tokenizer_of
from ..processing_lsm import LsmProcessor, make_chat
from .manifests import Unparsable


TEXT_COLUMNS = ("text", "task", "instruction", "target")
# `messages` is JSON, as chats have no common schema. `problem` is why a row cannot be used.
FEATURES = Features(
    {
        "audio": {"path": Value("string"), "bytes": Value("binary")},
        **{column: Value("string") for column in (*TEXT_COLUMNS, "messages", "source", "problem")},
    }
)
REPLACED_BY_MESSAGES = ("instruction", "target")
# What a webdataset calls its audio and its transcripts: their file name endings.
COLUMN_OF_ENDING = {**dict.fromkeys(("flac", "wav", "mp3", "ogg", "opus"), "audio"), "txt": "text"}
AUDIO_KEYS = ("audio", "path", "url")


def to_row(
    record: dict[str, Any] | Unparsable, source: str, folder: Path | None = None, columns: tuple[str, ...] = ()
) -> dict[str, Any]:
    """
    Brings a record into the form of all rows.

    Args:
        record (`dict` or `Unparsable`): A record as its manifest holds it.
        source (`str`): Where it stands.
        folder (`Path`, *optional*): Where relative audio paths start.
        columns (`tuple[str, ...]`, *optional*): What a row must have to be of use. `messages` takes the place of
            `instruction` and `target`.

    Returns:
        `dict`: A value for each of `FEATURES`. `audio` is a dict, or `None` for a row of text; a clip that stands in a
        chat by itself is moved there. What cannot be used has a `problem`.
    """
    row = {**dict.fromkeys(FEATURES), "source": encodable(source)}
    if isinstance(record, Unparsable):
        return {**row, "problem": encodable(record)}
    try:
        record = with_usual_names(record)
        for column in TEXT_COLUMNS:
            if record.get(column) is not None:
                row[column] = to_text(record[column], column)
        row["audio"] = to_audio(record.get("audio"), folder)
        if record.get("messages"):
            messages, row["audio"] = to_messages(record["messages"], row["audio"], folder)
            row["messages"] = to_text(json.dumps(messages, ensure_ascii=False), "messages")
    except (ValueError, TypeError) as error:  # a TypeError from what JSON cannot hold
        return {**row, "problem": encodable(str(error))}
    replaced = REPLACED_BY_MESSAGES if row["messages"] else ()
    missing = [column for column in columns if row[column] is None and column not in replaced]
    return {**row, "problem": f"missing {', '.join(missing)}" if missing else None}


def encodable(text: str) -> str:
    """`text` without halves of characters, which no file can hold."""
    return text.encode(errors="replace").decode()


def with_usual_names(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with the names that a webdataset gives its columns changed to those of all other forms."""
    if isinstance(record.get("json"), dict):
        record = {**record, **record["json"]}
    usual = {COLUMN_OF_ENDING[name]: value for name, value in record.items() if name in COLUMN_OF_ENDING}
    return {**usual, **record}


def to_text(value: Any, column: str) -> str:
    """`value`, if it is a string that a file can hold."""
    if not isinstance(value, str):
        raise ValueError(f"{column} is not a string: {value!r:.80}")
    if encodable(value) != value:
        raise ValueError(f"{column} holds half a character: {value!r:.80}")
    return value


def to_audio(audio: Any, folder: Path | None) -> dict[str, Any] | None:
    """`audio` as a `{"path", "bytes"}` dict, a relative path made absolute; `None` if there is none."""
    if isinstance(audio, bytes):
        audio = {"bytes": audio}
    if isinstance(audio, str):
        audio = {"path": audio}
    if not (audio is None or isinstance(audio, dict) and {"path", "bytes"} & audio.keys()):
        raise ValueError(f"audio is not a path: {audio!r:.80}")
    path, content = (audio.get("path"), audio.get("bytes")) if audio else (None, None)
    if content:
        return {"path": path and encodable(path), "bytes": content}
    if not path:
        return None
    path = to_text(path, "audio")
    if folder is not None and "://" not in path:
        path = str((folder / path).resolve())
    return {"path": path, "bytes": None}


def to_messages(
    messages: Any, audio: dict[str, Any] | None, folder: Path | None
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """
    A chat and the audio of its row. An audio item has a `"path"`, or nothing where it stands for the row's audio.
    """
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except json.JSONDecodeError as error:
            raise ValueError(f"messages: broken JSON: {error}") from error
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"messages is not a list of messages: {messages!r:.80}")
    # Parquet gives every item the keys of all.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    items = []
    for message in messages:
        if isinstance(message.get("content"), list):
            message["content"] = [
                {key: value for key, value in item.items() if value is not None} if isinstance(item, dict) else item
                for item in message["content"]
            ]
            items += [item for item in message["content"] if isinstance(item, dict) and item.get("type") == "audio"]
    for item in items:
        clip = to_audio(next((item[key] for key in AUDIO_KEYS if key in item), None), folder)
        for key in AUDIO_KEYS:
            item.pop(key, None)
        if clip and audio is None and len(items) == 1:
            audio = clip
        elif clip and clip["bytes"]:
            raise ValueError("messages hold embedded audio of several clips; name their files instead")
        elif clip:
            item["path"] = clip["path"]
        elif audio is None:
            raise ValueError("messages hold an audio item without a path, and the row has no audio")
    if audio and not any("path" not in item for item in items):
        raise ValueError("the row has audio, but its messages hold no {'type': 'audio'} item that stands for it")
    return messages, audio


def row_to_chat(row: dict[str, Any]) -> list[dict[str, Any]]:
    """
    The chat of a row: what is in its `messages`, or made of its `instruction`, its `audio` and its `target`.

    In a row without audio its `text` takes the audio's place, or the instruction stands alone.
    """
    audio = row.get("audio")
    if row.get("messages") is not None:
        messages = json.loads(row["messages"]) if isinstance(row["messages"], str) else row["messages"]

        clips = [audio if clip is None else clip for clip in chat_clips(messages)]
        if any(clip is None for clip in clips):
            raise ValueError("the messages of a row hold an audio item without a path, and the row has no audio")
        return replace_clips(messages, [{"type": "audio", "audio": clip} for clip in clips])
    if row.get("instruction") is None or row.get("target") is None:
        raise ValueError("the row has neither messages, nor an instruction and a target")
    if audio is None and row.get("text") is None:
        question = {"role": "user", "content": [{"type": "text", "text": row["instruction"]}]}
        return [question, {"role": "assistant", "content": [{"type": "text", "text": row["target"]}]}]
    return make_chat(row["instruction"], audio, row.get("text") if audio is None else None, row["target"])


def chat_clips(chat: list[dict[str, Any]]) -> list[Any]:
    """The clips of a chat, in order: what its audio items hold, as [`load_waveform`] takes it, or `None`."""
    contents = [message["content"] for message in chat if isinstance(message.get("content"), list)]
    clips = []
    for item in (item for content in contents for item in content if item.get("type") == "audio"):
        clip = next((item[key] for key in AUDIO_KEYS if item.get(key) is not None), None)
        clips.append((clip, item["sampling_rate"]) if item.get("sampling_rate") is not None else clip)
    return clips


def replace_clips(chat: list[dict[str, Any]], replacements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy of `chat` whose audio items are `replacements`, in order."""
    following = iter(replacements)
    return [
        {
            **message,
            "content": [next(following) if item.get("type") == "audio" else item for item in message["content"]],
        }
        if isinstance(message.get("content"), list)
        else message
        for message in chat
    ]


def render(
    processor: LsmProcessor,
    chat: list[dict[str, Any]],
    num_audio_tokens: list[int],
    add_generation_prompt: bool = False,
) -> str:
    """
    The text of a chat, with as many placeholders for its clips, in order, as `num_audio_tokens` says.

    This and `tokenize` are what [`LsmProcessor.apply_chat_template`] does with a chat, for when its audio is known by
    its length alone.
    """
    marked = mark_literals(chat, processor.audio_token)
    text = processor.apply_chat_template(marked, add_generation_prompt=add_generation_prompt)
    start, *pieces = text.split(processor.audio_token)
    clips = chat_clips(chat)
    if len(pieces) != len(clips):
        raise ValueError(
            f"A chat has {len(clips)} clips, but its text {len(pieces)} placeholders ({processor.audio_token}) of "
            f"audio: {text[:200]!r}. Check the chat template."
        )
    counts = num_audio_tokens[: len(pieces)]
    return start + "".join(processor.audio_token * count + piece for count, piece in zip(counts, pieces, strict=True))


def tokenize(processor: LsmProcessor, texts: list[str], **kwargs) -> BatchEncoding:
    """Tokens of rendered chats; `kwargs` are those of the tokenizer."""
    bos_token = processor.tokenizer.bos_token
    has_bos = bos_token is not None and texts[0].startswith(bos_token)
    tokenizer = tokenizer_of(texts, processor.tokenizer, processor.audio_token)
    return tokenizer(texts, add_special_tokens=not has_bos, **kwargs)


__all__ = [
    "FEATURES",
    "REPLACED_BY_MESSAGES",
    "chat_clips",
    "encodable",
    "render",
    "replace_clips",
    "row_to_chat",
    "to_row",
    "tokenize",
    "with_usual_names",
]
