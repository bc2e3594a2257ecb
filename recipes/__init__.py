"""Recipes: one module a stage, and the YAML recipes beside them."""

if __name__ != "align.recipes":
    raise ImportError("import it as align.recipes")
