"""Files that are there whole or not at all, and folders that hold the work of one job only."""

import json
import os
import uuid
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all, also after a power cut."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Which settings differ and how, for a person to read; empty if none does."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r:.200}, now {now.get(key)!r:.200}" for key in keys)


def claim_folder(folder: Path, note: str, settings: dict[str, Any]) -> None:
    """
    Notes in an output folder what job it belongs to, or makes sure that it is the one that is noted there.

    Args:
        folder (`Path`): The output folder.
        note (`str`): Name of the JSON file in it.
        settings (`dict`): Whatever decides what the job's outcome will be.

    Raises:
        ValueError: If the folder holds the beginnings of a job with other settings.
    """
    path, settings = folder / note, json.loads(json.dumps(settings))
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(settings, indent=2).encode())
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if changes := describe_changes(before, settings):
        raise ValueError(
            f"{folder} holds a job with other settings: {changes}. Go on with the old ones, or choose another "
            "--output_dir."
        )


__all__ = ["claim_folder", "describe_changes", "write_atomically"]
