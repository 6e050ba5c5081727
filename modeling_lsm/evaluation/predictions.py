"""
Answers on disk: JSON lines, appended as they come, from which every figure is computed.

The first line of a file says which system gave the answers, to what, and how. Whatever stops a run, answers that were
written stay; a last line that was cut off does not count, and its row is answered again.
"""

import json
import os
from pathlib import Path
from typing import Any

from ..files import describe_changes


class Predictions:
    """
    The answers of one system, in a folder that it may share with others and with other processes.

    Args:
        folder (`Path`): The folder, made if need be.
        system (`str`): Name of the system.
        meta (`dict`): Whatever decides what the answers will be. All files of a system have the same, but for `run`,
            the record of the run that began the file.
        process_index (`int`, *optional*, defaults to 0): Every process has a file of its own.

    Raises:
        ValueError: If there are answers of the system already, and another model or other settings gave them.
    """

    def __init__(self, folder: Path, system: str, meta: dict[str, Any], process_index: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.meta = json.loads(json.dumps({"system": system, **meta}))
        self.path = folder / (f"{system}.jsonl" if process_index == 0 else f"{system}.{process_index}.jsonl")
        self.rows: dict[str, dict[str, Any]] = {}
        for path in find_files(folder):
            before, rows, _ = read_file(path)
            if before is not None and before["system"] == system:
                check_meta(path, before, self.meta)
                add_rows(self.rows, rows)
        before = None
        if self.path.is_file():
            before, _, size = read_file(self.path)
            os.truncate(self.path, size)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 -- closed by `close`
        if before is None:
            self._write([self.meta])

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Writes rows with their `id` and `prediction`."""
        self._write(rows)
        add_rows(self.rows, rows)

    def _write(self, objects: list[dict[str, Any]]) -> None:
        # Unbuffered and at the end of the file: a kill tears the last line at most. In ASCII, JSON holds any text.
        self._file.write("".join(json.dumps(item) + "\n" for item in objects).encode("ascii"))

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def add_rows(known: dict[str, dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Adds rows by id: a clip that could not be read at first may have been heard later, whichever file says so."""
    known |= {row["id"]: row for row in rows if "problem" not in row or "problem" in known.get(row["id"], row)}


def find_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def read_file(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]], int]:
    """
    Reads a file of answers.

    Returns:
        Its first line (`None` if it was cut off), its rows, and how many bytes of it are whole lines.

    Raises:
        ValueError: If a line before the last is damaged.
    """
    content = path.read_bytes()
    size = content.rfind(b"\n") + 1
    objects = []
    for number, line in enumerate(content[:size].splitlines(), 1):
        try:
            objects.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{path}:{number} is damaged: {error}. Remove that line: its row is answered again."
            ) from error
    if objects and "system" not in objects[0]:
        raise ValueError(f"{path} does not begin with the line that says which system answered. Remove the file.")
    return (objects[0] if objects else None), objects[1:], size


def check_meta(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises a `ValueError` that names what differs."""
    if changes := describe_changes({**before, "run": None}, {**now, "run": None}):
        raise ValueError(
            f"{path} holds answers of another model or other settings: {changes}. Choose another --output_dir, or "
            "remove that folder's predictions/."
        )


def read_predictions(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """
    All answers in a folder.

    Returns:
        For each system, the ceiling last, what its files begin with, and its rows by id, sorted.

    Raises:
        ValueError: If there are none, files of a system disagree, or some rows were not answered yet.
    """
    systems: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {}
    for path in find_files(folder):
        meta, rows, _ = read_file(path)
        if meta is None:
            continue
        known, by_id = systems.setdefault(meta["system"], (meta, {}))
        check_meta(path, known, meta)
        add_rows(by_id, rows)
    if not systems:
        raise ValueError(f"{folder} holds no predictions. Run without --recompute first.")
    for system, (meta, rows) in systems.items():
        if len(rows) != meta["num_rows"]:
            raise ValueError(
                f"{folder} holds {len(rows)} of the {meta['num_rows']} answers of the system {system!r}. Run the same "
                "command again, without --recompute: it answers the others."
            )
        systems[system] = (meta, dict(sorted(rows.items())))
    order = sorted(systems, key=lambda name: (name == "text", name == "cascade", name != "lsm", name))
    return {name: systems[name] for name in order}


__all__ = ["Predictions", "read_predictions"]
