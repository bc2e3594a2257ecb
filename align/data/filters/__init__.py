"""Filters of training data, named in a recipe's `filters`.

A filter judges the texts of one row, except `duplicates`, which compares all rows. Filters with an expensive state (the
language model, the index of an evaluation set) create it once per process.
"""
