"""The tasks, their instructions, and which row gets which."""

import hashlib
import random
import re
from dataclasses import dataclass, fields
from pathlib import Path

import yaml


INSTRUCTIONS_FILE = Path(__file__).with_name("instructions.yaml")
PLACEHOLDER = "{target_language}"


@dataclass(frozen=True)
class Task:
    """
    A kind of instruction. `instructions.yaml` says what the fields mean.

    Args:
        name (`str`): Its name, like `"translation"`.
        instructions (`tuple[str, ...]`): Wordings to draw from.
        generated (`bool`): Whether the LLM writes the target; otherwise it is the transcript.
        may_repeat (`bool`): Whether the transcript itself is a fit answer.
        terminal_punctuation (`bool`): Whether an answer ends in punctuation.
        in_target_language (`bool`): Whether an answer is in the script of the target language.
        max_length_ratio (`float`, *optional*): Longest answer, in lengths of the transcript.
    """

    name: str
    instructions: tuple[str, ...]
    generated: bool = True
    may_repeat: bool = False
    terminal_punctuation: bool = True
    in_target_language: bool = False
    max_length_ratio: float | None = None


def load_tasks(names: list[str], target_language: str, instructions_file: str | None = None) -> list[Task]:
    """
    Reads the tasks called `names`.

    Args:
        names (`list[str]`): Which tasks; all there are if empty.
        target_language (`str`): Language that `{target_language}` stands for.
        instructions_file (`str`, *optional*): A YAML file that adds to the tasks that come with the package.

    Raises:
        ValueError: If a task is unknown, has no instructions, a setting that does not exist, or a wording without the
            placeholder that its task needs or with one that does not exist.
    """
    entries = yaml.safe_load(INSTRUCTIONS_FILE.read_text(encoding="utf-8"))
    if instructions_file is not None:
        more = yaml.safe_load(Path(instructions_file).read_text(encoding="utf-8"))
        if not isinstance(more, dict) or not all(isinstance(entry, dict) for entry in more.values()):
            raise ValueError(f"{instructions_file} must map tasks to their settings, as instructions.yaml does.")
        entries |= more
    return [load_task(name, entries, target_language) for name in names or entries]


def load_task(name: str, entries: dict[str, dict], target_language: str) -> Task:
    """The task called `name`, checked, with its placeholders filled."""
    if name not in entries:
        raise ValueError(f"There is no task {name!r}; expected some of {', '.join(entries)}.")
    entry = dict(entries[name])
    wordings = entry.pop("instructions", None)
    if not wordings or not isinstance(wordings, list) or not all(isinstance(wording, str) for wording in wordings):
        raise ValueError(f"The task {name!r} has no instructions. Give it a list of wordings.")
    known = {field.name for field in fields(Task)} - {"name", "instructions"}
    if unknown := set(entry) - known:
        raise ValueError(f"The task {name!r} has the settings {sorted(unknown)}; expected some of {sorted(known)}.")
    for wording in wordings:
        if entry.get("in_target_language") and PLACEHOLDER not in wording:
            raise ValueError(f"The task {name!r} has the wording {wording!r}, which lacks {PLACEHOLDER}.")
        if unknown := set(re.findall(r"\{\w*\}", wording)) - {PLACEHOLDER}:
            raise ValueError(
                f"The task {name!r} has the wording {wording!r} with {sorted(unknown)}; the only placeholder is "
                f"{PLACEHOLDER}."
            )
    return Task(name, tuple(wording.replace(PLACEHOLDER, target_language) for wording in wordings), **entry)


def row_identity(audio: str | dict, text: str) -> str:
    """
    An id for a row that depends on its content alone: 16 hexadecimal digits.

    Args:
        audio (`str` or `dict`): A path, or embedded audio as a `{"path", "bytes"}` dict.
        text (`str`): The transcript.
    """
    if isinstance(audio, dict):
        audio = audio.get("path") or hashlib.sha256(audio["bytes"]).hexdigest()
    return hashlib.sha256(f"{audio}\0{text}".encode(errors="surrogatepass")).hexdigest()[:16]


def assign_instructions(
    row_id: str, tasks: list[Task], weights: list[float], num_targets: int, seed: int
) -> list[tuple[Task, str]]:
    """
    Draws different tasks for a row, and an instruction for each.

    The draw depends on the arguments alone, so it is the same in whatever order, batch or process a row comes up.

    Args:
        row_id (`str`): Identity of the row.
        tasks (`list[Task]`): Tasks to draw from.
        weights (`list[float]`): How often each is drawn, relative to the others.
        num_targets (`int`): How many tasks to draw.
        seed (`int`): Seed.
    """
    draw = random.Random(f"{seed}:{row_id}")
    # Sampling without replacement by weight: the largest u ** (1 / w) win (Efraimidis and Spirakis, 2006).
    keys = [draw.random() ** (1 / weight) for weight in weights]
    best = sorted(range(len(tasks)), key=lambda index: -keys[index])[:num_targets]
    return [(tasks[index], draw.choice(tasks[index].instructions)) for index in best]
