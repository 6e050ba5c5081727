"""Manifests and datasets → rows, and rows → batches with labels."""

import os
from pathlib import Path
from typing import Any

import torch
from datasets import Audio, Dataset, load_dataset

from .processing_lsm import LsmProcessor, make_chat


# What `datasets` calls the readers of manifest files.
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
IGNORED_LABEL = -100


def load_rows(source: str | os.PathLike, split: str = "train", columns: tuple[str, ...] = ()) -> Dataset:
    """
    Opens a set of rows, wherever it is.

    Args:
        source (`str` or `os.PathLike`):
            A manifest (JSONL, JSON, Parquet or CSV), a folder with a `metadata.jsonl`, a folder that `augment.py`
            wrote, or the id of a dataset on the Hub. Audio paths may be relative to the manifest.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a dataset on the Hub.
        columns (`tuple[str, ...]`, *optional*):
            Columns that must be there.

    Returns:
        `datasets.Dataset`: Rows whose `audio` is a path or a `{"path", "bytes"}` dict; it is not decoded.

    Raises:
        ValueError: If the file is of an unknown kind, or a column is missing.
    """
    path = Path(source)
    if path.is_dir() and (path / "accepted").is_dir():
        files = sorted(path.glob("accepted/*.parquet"))
    elif path.is_dir() and (path / "metadata.jsonl").is_file():
        files = [path / "metadata.jsonl"]
    else:
        files = [path]
    if not files:
        raise ValueError(f"{source} holds no accepted rows. Look into its report.md for why they were rejected.")
    if all(file.is_file() for file in files):
        suffix = files[0].suffix
        if suffix not in READERS:
            raise ValueError(f"{source} is a '{suffix}' file; expected one of {', '.join(READERS)}, or a folder.")
        rows = load_dataset(READERS[suffix], data_files=[str(file) for file in files], split="train")
        folder = files[0].parent
    elif path.is_dir():
        raise ValueError(f"The folder {source} has neither a metadata.jsonl nor an accepted/ folder of augment.py.")
    elif path.suffix in READERS:
        raise FileNotFoundError(f"There is no file {source}. Relative paths start at {os.getcwd()}.")
    else:
        rows, folder = load_dataset(str(source), split=split), None

    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(f"{source} lacks the column(s) {missing}; it has {rows.column_names}.")
    if isinstance(rows.features.get("audio"), Audio):
        rows = rows.cast_column("audio", Audio(decode=False))
    elif folder is not None and "audio" in rows.column_names:
        rows = rows.map(lambda row: {"audio": resolve_audio(row["audio"], folder)})
    return rows


def resolve_audio(audio: Any, folder: Path) -> Any:
    """`audio` with a relative path made absolute, starting at `folder`."""
    if isinstance(audio, str) and "://" not in audio:
        return str((folder / audio).resolve())
    return audio


def row_to_chat(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The chat of a row, which is in its `messages`, or made of its `instruction`, `audio` and `target`."""
    if row.get("messages") is not None:
        return row["messages"]
    return make_chat(row["instruction"], audio=row["audio"], target=row["target"])


class SpeechTextCollator:
    """
    Turns rows into a training batch. Only the assistant's last answer and its end token carry labels.

    Args:
        processor ([`LsmProcessor`]): Renders, tokenizes and extracts features, as at inference.
        max_length (`int`, *optional*): Longest sequence that fits into the context, in tokens.
        end_tokens (`list[int]`, *optional*): Tokens that end an answer, as the model's generation config lists them.
            Defaults to the tokenizer's end token.

    Raises:
        ValueError: If a chat does not end in an answer, the template does not end answers with the end token, or a
            sequence is longer than `max_length`.
    """

    def __init__(
        self, processor: LsmProcessor, max_length: int | None = None, end_tokens: int | list[int] | None = None
    ):
        self.processor = processor
        end_tokens = [end_tokens] if isinstance(end_tokens, int) else end_tokens or []
        self.end_tokens = torch.tensor([*end_tokens, processor.tokenizer.eos_token_id])
        self.max_length = max_length

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        chats = [row_to_chat(row) for row in rows]
        batch = self.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding_side": "right", "return_offsets_mapping": True},
        )
        offsets = batch.pop("offset_mapping")
        labels = torch.full_like(batch["input_ids"], IGNORED_LABEL)
        for index, chat in enumerate(chats):
            answer = self.answer_positions(chat, batch["input_ids"][index], offsets[index])
            if self.max_length is not None and answer[-1] >= self.max_length:
                raise ValueError(
                    f"A row has {int(answer[-1]) + 1} tokens, more than max_length={self.max_length}: "
                    f"{str(chat[-1]['content'])[:80]!r}. Raise --max_length or filter the row out."
                )
            labels[index, answer] = batch["input_ids"][index, answer]
        return {**batch, "labels": labels}

    def answer_positions(self, chat: list[dict], input_ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Positions in `input_ids` of the last answer of `chat`, up to and with its end token."""
        prompt = self.processor.apply_chat_template(chat[:-1], add_generation_prompt=True)
        text = self.processor.apply_chat_template(chat)
        if chat[-1]["role"] != "assistant" or not text.startswith(prompt):
            raise ValueError(
                "A training chat must be its prompt followed by the assistant's answer, but this one is not: "
                f"{text[-200:]!r}. Check the roles of its messages and the chat template."
            )
        # Every placeholder of the rendered prompt stands for many in `input_ids`, all of them before the answer.
        audio_token = self.processor.audio_token
        extra = int((input_ids == self.processor.audio_token_id).sum()) - prompt.count(audio_token)
        start = len(prompt) + extra * len(audio_token)
        positions = torch.nonzero(offsets[:, 1] > start).flatten()
        ends = torch.nonzero(torch.isin(input_ids[positions], self.end_tokens)).flatten()
        if len(ends) == 0:
            raise ValueError(
                "The chat template does not end an answer with any of the end tokens "
                f"{self.processor.tokenizer.convert_ids_to_tokens(self.end_tokens)}, so a model trained with it would "
                "never stop. Give the processor a template that does."
            )
        return positions[: ends[0] + 1]


__all__ = ["SpeechTextCollator", "load_rows", "resolve_audio", "row_to_chat"]
