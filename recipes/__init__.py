"""Recipes: one module per kind of stage, and the YAML recipes."""

if __name__ != "align.recipes":
    raise ImportError("import it as align.recipes")
