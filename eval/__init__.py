"""Evaluation: tasks and metrics, comparison of models, and the run report."""

if __name__ != "align.eval":
    raise ImportError("import it as align.eval")
