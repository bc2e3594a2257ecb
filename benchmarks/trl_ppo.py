"""TRL 1.12's PPOTrainer on one case of bench_ppo.py; runs in TRL's own environment (requirements/bench-trl.lock).

python benchmarks/trl_ppo.py CASE.json RESULT.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
STARTED = time.perf_counter()

from datasets import Dataset  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # noqa: E402

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")


class SurplusOfEvenWords(nn.Module):
    """The reward of `even_words.py` as a model with a score at every position of the sequence.

    hidden_states[-1] [B, L, 1] has at each position the score of a completion that ends there.
    """

    base_model_prefix = "backbone"

    def __init__(self, prompt_length: int, stop_id: int | None):
        super().__init__()
        self.prompt_length, self.stop_id = prompt_length, stop_id
        self.score = nn.Identity()

    def backbone(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        counts = attention_mask.bool()
        counts[:, : self.prompt_length] = False
        if self.stop_id is not None:
            counts &= input_ids != self.stop_id
        surplus = ((1 - 2 * (input_ids % 2)) * counts).cumsum(1)
        return SimpleNamespace(hidden_states=[(surplus / counts.cumsum(1).clamp_min(1))[..., None]])


class Phases(TrainerCallback):
    """Seconds of each phase in each PPO iteration, measured around the functions that TRL calls in `train`."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []
        self.cpu_ends: list[float] = []
        self.current: dict[str, float] = {}
        self.update_began: float | None = None

    def watch(self, trainer: PPOTrainer) -> None:
        trained, reward_model = trainer.model, trainer.reward_model
        forward, get_reward, generate = ppo_trainer.forward, ppo_trainer.get_reward, ppo_trainer.batch_generation

        def timed(phase: Callable[[Any], str], function: Callable[..., Any]) -> Callable[..., Any]:
            def call(model: Any, *arguments: Any) -> Any:
                with self._as(phase(model)):
                    return function(model, *arguments)

            return call

        def forward_or_update(model: Any, *arguments: Any) -> Any:
            if model is not trained:
                with self._as("logprobs"):
                    return forward(model, *arguments)
            if self.update_began is None:
                self.update_began = time.perf_counter()
            return forward(model, *arguments)

        ppo_trainer.batch_generation = timed(lambda _: "generate", generate)
        ppo_trainer.get_reward = timed(lambda model: "score" if model is reward_model else "logprobs", get_reward)
        ppo_trainer.forward = forward_or_update

    @contextmanager
    def _as(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.current[phase] = self.current.get(phase, 0.0) + time.perf_counter() - start

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = self.round_began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.current["update"] = now - (self.update_began or now)
        self.current["other"] = now - self.round_began - sum(self.current.values())
        self.rounds.append(self.current)
        self.cpu_ends.append(time.process_time())
        self.current, self.update_began, self.round_began = {}, None, now


def train(case: dict[str, Any]) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(case["trl_model"])
    # A pad id outside the vocabulary cannot be sampled; TRL never passes it to a model.
    stop_id = tokenizer.eos_token_id
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if stop_id is None:
        tokenizer.eos_token = tokenizer.pad_token  # TRL counts the responses that contain it: none
    policy, reference = (AutoModelForCausalLM.from_pretrained(case["trl_model"], dtype="float32") for _ in range(2))
    critic = AutoModelForSequenceClassification.from_pretrained(case["trl_model"], num_labels=1, dtype="float32")
    nn.init.zeros_(critic.score.weight)
    for model in (policy, reference, critic) if "experts_implementation" in case else ():
        model.set_experts_implementation(case["experts_implementation"])
    policy.generation_config.pad_token_id = stop_id
    prompts = [json.loads(line)["prompt"] for line in Path(case["prompts"]).read_text().splitlines()]
    arguments = PPOConfig(
        output_dir=case["work_dir"],
        seed=case["seed"],
        total_episodes=case["rounds"] * case["batch_size"],
        # No accumulation, with which TRL would make fewer optimizer steps than mini-batches.
        per_device_train_batch_size=case["batch_size"],
        gradient_accumulation_steps=1,
        num_mini_batches=case["batch_size"] // case["mini_batch_size"],
        local_rollout_forward_batch_size=case["batch_size"],
        num_ppo_epochs=case["epochs"],
        response_length=case["max_new_tokens"],
        stop_token=None if stop_id is None else "eos",
        temperature=1.0,
        learning_rate=case["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-5,
        weight_decay=0.0,
        kl_coef=case["kl_coef"],
        vf_coef=1.0,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    phases = Phases()
    trainer = PPOTrainer(
        arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=SurplusOfEvenWords(case["prompt_length"], stop_id),
        value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": [tokenizer(p)["input_ids"] for p in prompts]}),
        callbacks=[phases],
    )
    phases.watch(trainer)
    start_up = time.perf_counter() - STARTED
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    log = [line for line in trainer.state.log_history if "objective/scores" in line]
    return {
        "start_up": start_up,
        "seconds": seconds,
        "cpu_seconds_after_first_round": phases.cpu_ends[-1] - phases.cpu_ends[0],
        "rounds": phases.rounds,
        "score": [line["objective/scores"] for line in log],
        "kl": [line["objective/kl"] for line in log],
        "packages": {name: version(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    # The number of threads is OMP_NUM_THREADS.
    Path(sys.argv[2]).write_text(json.dumps(train(json.loads(Path(sys.argv[1]).read_text()))), encoding="utf-8")
