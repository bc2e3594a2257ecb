"""One module per kind of stage, and the shipped YAML recipes."""

if __name__ != "align.recipes":
    raise ImportError("import it as align.recipes")
