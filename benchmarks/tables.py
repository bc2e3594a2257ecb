"""Write the tables of the guides from benchmarks/results/*.json; no figure in them is typed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluation_tables
import model_tables
import training_tables

ROOT = Path(__file__).parents[1]
GUIDES = (
    "adapters.md",
    "data.md",
    "evaluation.md",
    "families.md",
    "model.md",
    "parallel.md",
    "ppo.md",
    "rewards.md",
    "rollouts.md",
    "runs.md",
    "serving.md",
    "training.md",
    "watch.md",
)
PAGES = [ROOT / "docs" / name for name in GUIDES]
RESULTS = ROOT / "benchmarks" / "results"

RENDER: dict[str, Callable[[dict[str, Any]], str]] = {
    "parity": model_tables.parity,
    "moe_block": model_tables.moe_block,
    "families": model_tables.families,
    "families_chain": model_tables.families_chain,
    "launches": model_tables.launches,
    "loss_head": model_tables.loss_head,
    "decoding": model_tables.decoding,
    "loading": model_tables.loading,
    "tokenizer": model_tables.tokenizer,
    "trainers": training_tables.trainers,
    "parallel_equality": training_tables.parallel_equality,
    "ppo_vs_trl": training_tables.ppo_vs_trl,
    "ppo_vs_trl_dense": training_tables.ppo_vs_trl,
    "ppo_curves_vs_trl": training_tables.ppo_curves_vs_trl,
    "rollout": training_tables.rollout,
    "serve": training_tables.serve,
    "expert_parallel": training_tables.expert_parallel,
    "real_runs": training_tables.real_runs,
    "filters": training_tables.filters,
    "accuracies": evaluation_tables.accuracies,
    "over_optimisation": evaluation_tables.over_optimisation,
    "reference_solutions": evaluation_tables.reference_solutions,
    "eval": evaluation_tables.evaluation,
    "reward_models_vs_trl": evaluation_tables.reward_models_vs_trl,
    "watch": training_tables.watch,
    "data": training_tables.data_preparation,
    "share_trunk": model_tables.share_trunk,
    "lora": model_tables.lora,
    "qlora_accuracy": model_tables.qlora_accuracy,
    "bf16_head": model_tables.bf16_head,
    "bf16_curves": training_tables.bf16_curves,
}
"""{name of a result: function that renders it as Markdown tables}."""


def fill(page: str) -> str:
    """The page with every `<!-- table NAME -->` section rendered from NAME.json."""

    def section(match: re.Match[str]) -> str:
        path = RESULTS / f"{match[1]}.json"
        if not path.exists():
            return f"<!-- table {match[1]} -->\nNot measured yet.\n<!-- end -->"
        facts = json.loads(path.read_text(encoding="utf-8"))
        hardware = facts["hardware"]
        where = hardware["accelerator"] or f"{hardware['cores']} cores of {hardware['cpu']}"
        source = f"`{facts['command']}`, {facts['date'][:10]}, {where}, torch {facts['packages']['torch']}."
        return f"<!-- table {match[1]} -->\n{RENDER[match[1]](facts['results'])}\n\n{source}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", section, page, flags=re.DOTALL)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
