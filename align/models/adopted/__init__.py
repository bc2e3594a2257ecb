"""Model families that transformers implements, adopted by align; `align/config/families.py` lists them."""
