"""Model families that transformers implements, adopted by align: one line per `model_type` in `table.py`."""
