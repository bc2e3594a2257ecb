"""Write docs/metrics.md from the table of metrics in align/run/metrics.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from align.run import metrics
from align.run.charts import grouped
from align.run.metrics import MetricInfo

PAGE = Path(__file__).parent / "metrics.md"

INTRO = """# Metrics

Written by `python docs/make_metrics.py` from `align/run/metrics.py`.

`metrics.jsonl` of a stage has one JSON object per line: one per optimizer step (PPO: per iteration), and one per
evaluation on held-out rows, with the number of the step before it. With the same seed all values are reproducible,
except those that begin with `time/`, `speed/`, `memory/` or `rollout/`.
"""
TRAINING = """`eval_KEY` is the same metric on held-out rows: once before the first step and once after the last.

All values are those of the whole optimizer step on all ranks. They do not depend on how its rows are split into forward
passes, except for the router's balance loss, the load of the busiest expert, and what expert capacity changes. These
are computed per pass, then averaged with the passes' tokens as weights.
"""
ROUTERS = """Logged by every stage that trains a mixture of experts. Means over the MoE layers, without padding.
"""
SPEED = """Logged by every training stage; PPO logs `memory/peak_gib` and the times and speeds of its phases.
"""
PPO = """NAME is the name of a reward, PHASE the name of a phase. Metrics of updates are means over the mini-batches of
an iteration.
"""
DURING = """With `evaluate` in a training stage: on lines of their own, with the number of the step before them. Step 0
is the model before training. The manifest has the values of the stage's result.
"""
EVALUATION = """Final metrics of an evaluate stage, as `MODEL/KEY` in its manifest and as columns of the report. Values
per prompt are in `results.json`.
"""
STEPS = """The axis of every curve is the `step` of its line.
"""
SECTIONS: tuple[tuple[str, str, Sequence[MetricInfo]], ...] = (
    ("Training stages (pretrain, sft, reward_model, dpo, kto)", TRAINING, metrics.TRAINING),
    ("Steps", STEPS, metrics.STEPS),
    ("Routers", ROUTERS, metrics.ROUTERS),
    ("Speed and memory", SPEED, metrics.SPEED),
    ("PPO", PPO, metrics.PPO),
    ("Evaluation during training", DURING, metrics.DURING_TRAINING),
    ("Evaluation", EVALUATION, metrics.EVALUATION),
)


def page() -> str:
    blocks = [INTRO]
    for title, about, rows in SECTIONS:
        lines = [f"| `{row.key}` | {row.title} | {row.unit or '–'} | {row.meaning} |\n" for row in rows]
        blocks.append(f"## {title}\n\n{about}\n| key | title | unit | meaning |\n|---|---|---|---|\n{''.join(lines)}")
    rows = []
    for group in metrics.GROUPS:
        series = ", ".join(f"`{key}` ({label})" for key, label in group.series)
        rows.append(f"| {group.title} | {grouped(group).unit or '–'} | {series} |\n")
    head = "| title | unit | metrics (label) |\n|---|---|---|\n"
    blocks.append(
        f"## Charts of several metrics\n\nAll other charts have the title of their metric.\n\n{head}{''.join(rows)}"
    )
    return "\n".join(blocks)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
