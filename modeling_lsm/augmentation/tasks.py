"""The tasks, their instructions, and which row gets which."""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import yaml


INSTRUCTIONS_FILE = Path(__file__).with_name("instructions.yaml")


@dataclass(frozen=True)
class Task:
    """
    A kind of instruction.

    Args:
        name (`str`): Its name, like `"translation"`.
        generated (`bool`): Whether the LLM writes the target; otherwise it is the transcript.
        instructions (`tuple[str, ...]`): Wordings to draw from.
    """

    name: str
    generated: bool
    instructions: tuple[str, ...]


def load_tasks(names: list[str], target_language: str, instructions_file: str | None = None) -> list[Task]:
    """
    Reads the tasks called `names`.

    Args:
        names (`list[str]`): Which tasks.
        target_language (`str`): Language that `{target_language}` stands for.
        instructions_file (`str`, *optional*): A YAML file that adds to the tasks that come with the package.

    Raises:
        ValueError: If a task is unknown or has no instructions.
    """
    entries = yaml.safe_load(INSTRUCTIONS_FILE.read_text(encoding="utf-8"))
    if instructions_file is not None:
        entries |= yaml.safe_load(Path(instructions_file).read_text(encoding="utf-8"))
    tasks = []
    for name in names:
        if name not in entries:
            raise ValueError(f"There is no task {name!r}; expected some of {', '.join(entries)}.")
        wordings = entries[name].get("instructions")
        if not wordings:
            raise ValueError(f"The task {name!r} has no instructions. Give it a list of wordings.")
        wordings = tuple(wording.replace("{target_language}", target_language) for wording in wordings)
        tasks.append(Task(name, bool(entries[name].get("generated", True)), wordings))
    return tasks


def row_identity(audio: str, text: str) -> str:
    """An id for a row that depends on its content alone: 16 hexadecimal digits."""
    return hashlib.sha256(f"{audio}\0{text}".encode()).hexdigest()[:16]


def assign_instruction(row_id: str, draw: int, tasks: list[Task], seed: int) -> tuple[Task, str]:
    """
    Draws a task and one of its instructions for a row.

    The draw depends on the arguments alone, so it is the same in whatever order, batch or process a row comes up.

    Args:
        row_id (`str`): Identity of the row.
        draw (`int`): Which of the row's targets this is, from 0. The targets of a row are of different tasks.
        tasks (`list[Task]`): Tasks to draw from; `draw` must be less than their number.
        seed (`int`): Seed.
    """
    order = random.Random(f"{seed}:{row_id}").sample(tasks, len(tasks))
    task = order[draw]
    return task, random.Random(f"{seed}:{row_id}:{task.name}").choice(task.instructions)
