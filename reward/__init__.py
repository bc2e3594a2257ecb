"""Rewards that are not models: text scores and users' functions."""

if __name__ != "align.reward":
    raise ImportError("import it as align.reward")
