"""Rows of speech and text: manifest → row → batch."""
