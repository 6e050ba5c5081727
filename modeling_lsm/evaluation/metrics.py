"""Metrics, computed from predictions and references alone."""

import jiwer
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer


# Whisper's normalizer (https://huggingface.co/papers/2212.04356, appendix C), without its table of British spellings,
# which comes with Whisper's tokenizer and not with the library.
normalize_english = EnglishTextNormalizer({})


def word_error_rate(predictions: list[str], references: list[str]) -> float:
    """
    Word error rate after Whisper's English normalization: word edits over all clips ÷ words of all references.

    Args:
        predictions (`list[str]`): What was recognized. An empty answer counts as deletions.
        references (`list[str]`): What was said.

    Returns:
        `float`: 0 is perfect; above 1 where there are more insertions than words were said.

    Raises:
        ValueError: If the lists differ in length, or no reference has a word in it.
    """
    if len(predictions) != len(references):
        raise ValueError(f"There are {len(predictions)} predictions for {len(references)} references.")
    references = [normalize_english(text) for text in references]
    predictions = [normalize_english(text) for text in predictions]
    words = sum(len(text.split()) for text in references)
    if words == 0:
        raise ValueError("No reference has a word in it, so there is no word error rate.")
    # An empty reference is legitimate (silence): whatever was recognized there counts as insertions.
    pairs = list(zip(references, predictions, strict=True))
    insertions = sum(len(hypothesis.split()) for text, hypothesis in pairs if not text)
    spoken = [(text, hypothesis) for text, hypothesis in pairs if text]
    output = jiwer.process_words([text for text, _ in spoken], [hypothesis for _, hypothesis in spoken])
    return (output.substitutions + output.deletions + output.insertions + insertions) / words
