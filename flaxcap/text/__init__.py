"""Captions as words and token ids."""
