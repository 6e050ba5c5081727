"""Measures of what an LSM says about speech."""

from .metrics import normalize_english, word_error_rate


__all__ = ["normalize_english", "word_error_rate"]
