"""Evaluation: tasks and metrics, comparison of models, and the run report.

from align.eval import evaluate

results = evaluate(["runs/a/sft", "runs/a/dpo"], ["gsm8k_cot"], out="out")
print(results.table())
"""

from typing import TYPE_CHECKING, Any

if __name__ != "align.eval":
    raise ImportError("import it as align.eval")

if TYPE_CHECKING:
    from align.eval.evaluation import Options, evaluate

__all__ = ["Options", "evaluate"]


def __getattr__(name: str) -> Any:
    """Import `evaluate` and `Options` on first use, so that importing a module of this package stays fast."""
    if name in __all__:
        from align.eval import evaluation

        return getattr(evaluation, name)
    raise AttributeError(f"module 'align.eval' has no attribute '{name}'")
