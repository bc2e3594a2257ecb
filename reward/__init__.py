"""Everything that gives a score: reward models, functions, servers and verifiers, and their weighted mixture."""

if __name__ != "align.reward":
    raise ImportError("import it as align.reward")
