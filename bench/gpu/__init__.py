"""Parity, sanitizer and speed on a GPU: `python bench/gpu`."""
