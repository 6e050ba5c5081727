"""What makes a target unfit to learn from."""

import re
import unicodedata

from .tasks import Task


TERMINAL_PUNCTUATION = tuple(".!?…。！？।؟۔”\"'»」』)]*`")
REFUSAL = re.compile(
    r"\b(as an? (ai|artificial intelligence|language model|(?:digital|virtual|text-based)? ?(?:chatbot|assistant))"
    r"|i(?:'m| am) (?:just |only )?an? (?:ai|language model|chatbot|(?:digital |virtual )?assistant)"
    r"|i(?:'m| am) (?:so |very )?sorry(?:,? but| for (?:any|the) (?:confusion|inconvenience|misunderstanding))"
    r"|i apologi[sz]e(?:,? but| for (?:any|the))|i(?:'m| am) (?:here to|not equipped|designed|programmed|ready to)"
    r"|i (?:can(?:no|')t|am unable to|'m unable to|(?:do not|don't) have the (?:ability|capability) to)"
    r" (?:assist|help|fulfil|comply|hear|listen|access|process|provide|translate|transcribe|carry)"
    r"|please provide (?:me with )?(?:the|a|more|some) (?:text|passage|sentence|context|audio|information))",
    re.IGNORECASE,
)
# The writing systems that `unicodedata` names the letters of these languages after. Of others nothing is said.
LATIN = (
    "afrikaans albanian basque catalan croatian czech danish dutch english estonian filipino finnish french german "
    "hungarian icelandic indonesian irish italian latin latvian lithuanian malay norwegian polish portuguese romanian "
    "slovak slovenian spanish swahili swedish turkish vietnamese welsh"
)
SCRIPTS = {
    **dict.fromkeys(LATIN.split(), "LATIN"),
    "arabic": "ARABIC",
    "armenian": "ARMENIAN",
    "belarusian": "CYRILLIC",
    "bengali": "BENGALI",
    "bulgarian": "CYRILLIC",
    "cantonese": "CJK",
    "chinese": "CJK",
    "georgian": "GEORGIAN",
    "greek": "GREEK",
    "hebrew": "HEBREW",
    "hindi": "DEVANAGARI",
    "japanese": "CJK HIRAGANA KATAKANA",
    "kazakh": "CYRILLIC",
    "korean": "HANGUL",
    "macedonian": "CYRILLIC",
    "mandarin": "CJK",
    "marathi": "DEVANAGARI",
    "nepali": "DEVANAGARI",
    "farsi": "ARABIC",
    "persian": "ARABIC",
    "russian": "CYRILLIC",
    "serbian": "CYRILLIC LATIN",
    "tamil": "TAMIL",
    "telugu": "TELUGU",
    "thai": "THAI",
    "ukrainian": "CYRILLIC",
    "urdu": "ARABIC",
}


def normalize(text: str) -> str:
    """Lower case, without punctuation and extra spaces, for comparisons."""
    text = unicodedata.normalize("NFKC", text).lower()
    return " ".join(re.sub(r"[^\w\s]|_", " ", text).split())


def has_loop(text: str) -> bool:
    """
    Whether the same run stands again and again in a row: four times a run of one to three words, three times a longer
    one, up to twenty words; or, where words are not spaced, six times a run of up to twenty characters.
    """
    words = normalize(text).split()
    for size in range(1, 21):
        needed = (4 if size <= 3 else 3) * size - size  # words that equal the word `size` places before them
        matched = 0
        for index in range(size, len(words)):
            matched = matched + 1 if words[index] == words[index - size] else 0
            if matched >= needed:
                return True
    return re.search(r"([^\W\d_][^\n]{0,19}?)\1{5}", text) is not None


def in_script_of(text: str, language: str) -> bool:
    """
    Whether most letters of `text` are of the writing system of `language`, an English name like `"Japanese"` or
    `"Simplified Chinese"`. True for a language whose writing system is not known here.
    """
    known = [SCRIPTS[word] for word in re.findall(r"[a-z]+", language.lower()) if word in SCRIPTS]
    if not known:
        return True
    scripts = tuple(known[0].split())
    letters = [character for character in text if character.isalpha()]
    return 2 * sum(unicodedata.name(letter, "").startswith(scripts) for letter in letters) >= len(letters)


def rejection_reason(
    task: Task,
    instruction: str,
    transcript: str,
    target: str,
    finished: bool,
    target_language: str = "English",
    require_terminal_punctuation: bool = True,
) -> str | None:
    """
    Why a target is rejected, or `None` if it is fit to learn from.

    Args:
        task ([`Task`]): The task.
        instruction (`str`): The instruction that was followed.
        transcript (`str`): The transcript that it was followed on.
        target (`str`): The answer.
        finished (`bool`): Whether the LLM ended its answer itself.
        target_language (`str`, *optional*): Language of the tasks that are answered in one.
        require_terminal_punctuation (`bool`, *optional*, defaults to `True`): Whether tasks may ask for it.
    """
    if not target.strip():
        return "empty"
    if not task.generated:
        return None
    if has_loop(target):
        return "loop"
    if not finished:
        return "no end token"
    if not any(character.isalnum() for character in target):
        return "too short"
    if task.max_length_ratio is not None and len(target) > task.max_length_ratio * max(len(transcript), 20):
        return "too long"
    if REFUSAL.search(target):
        return "refusal"
    plain = normalize(target)
    if normalize(instruction) in plain:
        return "echo of the instruction"
    if not task.may_repeat and plain == normalize(transcript):
        return "same as the transcript"
    if task.in_target_language and not in_script_of(target, target_language):
        return "wrong script"
    ends_openly = not target.rstrip().endswith(TERMINAL_PUNCTUATION)
    if require_terminal_punctuation and task.terminal_punctuation and ends_openly:
        return "no terminal punctuation"
    return None
