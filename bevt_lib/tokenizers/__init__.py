"""Frozen visual tokenizers and their training objectives. Imports base, model and weights."""
