"""All that `align run` imports, for the process from which `forked` forks."""

from __future__ import annotations

import os

# Variables that libraries read when they are imported, as `align.run.environment` sets them.
os.environ |= {"DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}

import deepspeed  # noqa: F401

import align.cli
import align.eval.evaluation
import align.eval.report.write
import align.parallel.export
import align.parallel.load
import align.recipes.base
import align.recipes.dpo
import align.recipes.kto
import align.recipes.ppo
import align.recipes.pretrain
import align.recipes.reward_model
import align.recipes.sft
import align.rollout.hf_engine
import align.train.sharded_learner  # noqa: F401
