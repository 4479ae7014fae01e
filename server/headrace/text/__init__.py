"""Strings to token ids and back: templates, tokenizers, stop strings; imports no torch."""
