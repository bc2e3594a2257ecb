"""Families whose models transformers implements."""
