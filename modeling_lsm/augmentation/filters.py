"""What makes a target unfit to learn from."""

import re
import unicodedata

from .tasks import Task


MIN_LOOP_REPEATS = 4
TERMINAL_PUNCTUATION = tuple(".!?…。！？”\"'»)]*`")
REFUSAL = re.compile(
    r"\b(as an? (ai|language model|digital assistant)|i(?:'m| am) (?:just |only )?an? (?:ai|language model)"
    r"|i(?:'m| am) sorry,? but|i (?:can(?:no|')t|am unable to) (?:assist|help|fulfil|comply|hear|listen))",
    re.IGNORECASE,
)
# Instructions and labels end as their authors end them; these answers end in words.
NO_PUNCTUATION_NEEDED = {"transcription", "keyword"}


def normalize(text: str) -> str:
    """Lower case, without punctuation and extra spaces, for comparisons."""
    text = unicodedata.normalize("NFKC", text).lower()
    return " ".join(re.sub(r"[^\w\s]|_", " ", text).split())


def has_loop(text: str) -> bool:
    """Whether a run of one to eight words stands `MIN_LOOP_REPEATS` times in a row."""
    words = normalize(text).split()
    for size in range(1, 9):
        for start in range(len(words) - size * MIN_LOOP_REPEATS + 1):
            run = words[start : start + size]
            if all(words[start + i * size : start + (i + 1) * size] == run for i in range(1, MIN_LOOP_REPEATS)):
                return True
    return False


def rejection_reason(task: Task, instruction: str, transcript: str, target: str, finished: bool) -> str | None:
    """
    Why a target is rejected, or `None` if it is fit to learn from.

    Args:
        task ([`Task`]): The task.
        instruction (`str`): The instruction that was followed.
        transcript (`str`): The transcript that it was followed on.
        target (`str`): The answer.
        finished (`bool`): Whether the LLM ended its answer itself.
    """
    if not target.strip():
        return "empty"
    if not task.generated:
        return None
    if not finished:
        return "unfinished"
    if has_loop(target):
        return "loop"
    if REFUSAL.search(target):
        return "refusal"
    if normalize(instruction) in normalize(target):
        return "echo of the instruction"
    if task.name != "repetition" and normalize(target) == normalize(transcript):
        return "transcript"
    if task.name not in NO_PUNCTUATION_NEEDED and not target.rstrip().endswith(TERMINAL_PUNCTUATION):
        return "no terminal punctuation"
    return None
