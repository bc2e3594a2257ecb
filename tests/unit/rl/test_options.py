"""Early stop, dynamic sampling, loss averages, EMA weights, overlap; non-finite values; batches without a signal."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from rich.console import Console
from torch import nn

from align.config.lora import Lora
from align.errors import UserError
from align.losses.reduce import averaging_weights, masked_mean
from align.models.forward import policy_output
from align.models.hunyuan.modeling import DecoderLayer
from align.models.lora.adapters import add_lora, is_lora_weight
from align.pipeline import run
from align.recipes import ppo
from align.rl.complete import complete_batch
from align.rl.panel import Panel
from align.rl.score import score_batch, to_experience
from align.rollout.base import Completion
from align.train.learner import Learner, LocalLearner
from tests.unit.rl import small
from tests.unit.rl.runs import lines, recipe
from tests.unit.rl.tables import Task


def logits(task: Task) -> torch.Tensor:
    return task.policy.lm_head.weight.detach().clone()


def test_policy_updates_stop_at_the_kl_limit_and_the_critic_continues() -> None:
    def task(stop: float | None) -> Task:
        kl = {"coef": 0.0, "stop": stop}
        return Task(lambda ids: ids[0], horizon=1, tokens=4, learning_rate=0.5, kl=kl, epochs=2)

    _, free = task(None).iterate(0)
    stopped_task = task(0.01)
    _, stopped = stopped_task.iterate(0)
    assert free["policy_updates"] == 4
    # The first mini-batch has ratio 1. The second exceeds the limit, so the policy skips it and all later mini-batches.
    assert stopped["policy_updates"] == 1
    assert stopped_task.policy.lm_head.weight.grad is None  # no gradient is left for the next iteration
    assert stopped_task.models.critic.optimizer.state[stopped_task.models.critic.model.score.weight]["step"] == 4


def test_dynamic_sampling_replaces_groups_without_a_signal() -> None:
    def reward(ids: list[int]) -> float:
        return float(ids[0] == 3)

    def first_batch(extra: int):
        task = Task(
            reward, horizon=1, tokens=4, advantage_estimator="grpo", completions_per_prompt=2, batch_size=32,
            mini_batch_size=32, dynamic_sampling=extra,
        )  # fmt: skip
        return score_batch(task.stage, task.sampler, task.sampler.sample(), task.scorer), task.sampler.position

    plain, position = first_batch(0)
    share = plain.metrics["informative_groups"]
    assert 0.1 < share < 0.7  # expected: 2 * 1/4 * 3/4 = 0.375
    assert position == 16
    filled, position = first_batch(8)
    assert (filled.group_scores(2).std(dim=1) > 0).all()
    assert len(filled.experience) == 32
    assert filled.metrics["drawn_completions"] == 2 * position > 32
    some, _ = first_batch(1)
    useful = (some.group_scores(2).std(dim=1) > 0).float().mean().item()
    assert share < useful < 1  # one more draw is not enough; the batch is filled up with uninformative groups
    assert len(some.experience) == 32


def test_loss_averages_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [10.0, 0.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])

    def average(how: str) -> float:
        weights = averaging_weights(mask, how, count=4, completions=2, max_tokens=5)
        return masked_mean(values if weights is None else values * weights, mask, 4).item()

    assert average("tokens") == pytest.approx(16 / 4)
    assert average("completions") == pytest.approx((2 + 10) / 2)
    assert average("constant") == pytest.approx(16 / 10)


def test_ema_weights_equal_the_closed_form() -> None:
    model = nn.Linear(1, 1, bias=False)
    values = [1.0, 3.0, -2.0]
    model.weight.data.fill_(values[0])
    learner = LocalLearner(model, small.settings().optimizer, total=1, ema_decay=0.75)
    for value in values[1:]:
        model.weight.data.fill_(value)
        learner.update_ema()
    expected = 0.75**2 * 1.0 + 0.25 * 0.75 * 3.0 + 0.25 * -2.0
    learner.swap_ema()
    assert model.weight.item() == pytest.approx(expected)
    learner.swap_ema()
    assert model.weight.item() == -2.0


def test_the_saved_model_has_the_ema_weights(tmp_path, start) -> None:
    plain, averaged = start("plain"), start("averaged")
    for folder, settings in ((plain, {}), (averaged, {"ema_decay": 0.999999})):
        run(recipe(tmp_path, **settings), folder, say=lambda line: None)
    assert lines(plain) == lines(averaged)
    from safetensors.torch import load_file

    base, last, average = (load_file(path / "model/model.safetensors") for path in
                           (plain / "base", plain / "ppo", averaged / "ppo"))  # fmt: skip
    name = "model.layers.1.self_attn.q_proj.weight"
    assert (last[name] - base[name]).abs().max() > 1e-3
    assert (average[name] - base[name]).abs().max() < 1e-5


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_recomputed_activations_change_no_result(tmp_path, start, monkeypatch, lora) -> None:
    passes = Counter()
    forward = DecoderLayer.forward

    def counted(self, *arguments, **named):
        passes[folder.name] += 1
        return forward(self, *arguments, **named)

    monkeypatch.setattr(DecoderLayer, "forward", counted)
    for recompute in (False, True):
        folder = start(str(recompute))
        settings = {"gradient_checkpointing": recompute, "lora": lora, "critic": {"lora": lora}, "steps": 2}
        run(recipe(tmp_path, **settings), folder, say=lambda line: None)
    assert lines(tmp_path / "True") == lines(tmp_path / "False")
    # 2 iterations * 2 epochs * 2 mini-batches = 8 recomputed passes, through 2 layers of each of policy and critic.
    assert passes["True"] - passes["False"] == 8 * 2 * 2


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(score) -> None:
    task = Task(lambda ids: score, horizon=1, tokens=4)
    before = logits(task)
    with pytest.raises(UserError, match="PPO step 1, policy: policy_loss is nan"):
        task.iterate(0)
    assert torch.equal(logits(task), before)


def overflow(monkeypatch: pytest.MonkeyPatch, learner: Learner, turns: set[int]) -> list[int]:
    """Make these steps (0-based) of the learner report non-finite gradients; return a list with an entry per step."""
    steps: list[int] = []
    real = learner._step

    def step() -> float | None:
        steps.append(1)
        if len(steps) - 1 not in turns:
            return real()
        learner.discard()
        return None

    monkeypatch.setattr(learner, "_step", step)
    return steps


def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch) -> None:
    task = Task(lambda ids: ids[0], horizon=1, tokens=4)
    steps = overflow(monkeypatch, task.models.critic, {1})
    with pytest.raises(UserError, match="PPO step 1, critic: the gradient norm is not finite"):
        task.iterate(0)
    assert len(steps) == 2


def test_single_overflows_in_bf16_are_skipped_and_three_in_a_row_stop_the_run(monkeypatch) -> None:
    task = Task(lambda ids: ids[0], horizon=1, tokens=4)
    task.models.policy.skips_overflow = True
    overflow(monkeypatch, task.models.policy, {0, 1, 3, 4, 6, 7, 8})  # an iteration has four steps
    _, metrics = task.iterate(0)
    assert (metrics["skipped_updates"], metrics["policy_updates"]) == (3, 1)
    assert metrics["policy_grad_norm"] > 0
    with pytest.raises(UserError, match="PPO step 3, policy: the bf16 gradients overflowed in 3 steps in a row"):
        [task.iterate(step) for step in (1, 2)]


@pytest.mark.parametrize("model", ["reference", "critic", "policy"])
def test_a_forward_pass_that_is_not_finite_stops_the_run(model) -> None:
    task = Task(lambda ids: ids[0], horizon=1, tokens=4)
    samples = task.sampler.sample()
    task.sampler.sample = lambda: samples
    table = {"reference": task.reference, "policy": task.policy, "critic": task.models.critic.model}[model]
    (table.score if model == "critic" else table.lm_head).weight.data[0, 0] = float("nan")
    what = "values of the critic" if model == "critic" else f"log-probabilities of the {model}"
    with pytest.raises(UserError, match=f"PPO: .* of 32 {what} are infinite or not a number"):
        task.iterate(0)


def test_a_batch_of_truncated_completions_changes_nothing_if_they_are_masked() -> None:
    task = Task(lambda ids: ids[0], horizon=2, tokens=4, mask_truncated=True)
    draw = task.sampler.sample

    def truncated():
        drawn = draw()
        drawn.completions[:] = [Completion(c.prompt_ids, c.token_ids, c.logprobs, False, 0) for c in drawn.completions]
        return drawn

    task.sampler.sample = truncated
    before = logits(task)
    _, metrics = task.iterate(0)
    assert torch.equal(logits(task), before)
    assert metrics["truncated_share"] == 1
    assert metrics["skipped_updates"] == 8


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_equal_rewards_move_no_group_based_policy(estimator) -> None:
    task = Task(
        lambda ids: 0.7, horizon=1, tokens=4, advantage_estimator=estimator, completions_per_prompt=4, kl={"coef": 0.0}
    )
    _, metrics = task.iterate(0)
    assert logits(task).abs().max() == 0
    assert metrics["informative_groups"] == 0


def test_an_empty_completion_has_a_score_and_no_tokens() -> None:
    task = Task(lambda ids: len(ids), horizon=2, tokens=4, batch_size=4, mini_batch_size=4)
    draw = task.sampler.sample

    def with_an_empty_one():
        drawn = draw()
        drawn.completions[0] = Completion([0], [], [], True, 0)
        return drawn

    task.sampler.sample = with_an_empty_one
    scored, metrics = task.iterate(0)
    assert scored.experience.mask.sum(1).tolist() == [0, 2, 2, 2]
    assert scored.experience.score.tolist() == [0, 2, 2, 2]
    assert metrics["policy_updates"] > 0
    assert logits(task).isfinite().all()
    nothing = to_experience([Completion([0], [], [], True, 0)])
    assert policy_output(task.policy, nothing, 1.0).logprobs.shape == (1, 1)


def test_overlapped_sampling_is_one_version_behind_and_resumes(tmp_path, start, monkeypatch) -> None:
    made = recipe(tmp_path)
    stage = made.stages["ppo"].model_copy(update={"overlap": True})
    made = made.model_copy(update={"stages": {"ppo": stage}})
    uninterrupted, interrupted = start("uninterrupted"), start("interrupted")
    run(made, uninterrupted, say=lambda line: None)
    versions = {(line["step"], line["weight_version"]) for line in lines(uninterrupted, "samples.jsonl")}
    assert versions == {(1, 0), (2, 0), (3, 1), (4, 2)}
    with monkeypatch.context() as patched:
        calls = []

        def stopping(*args, **kwargs):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return update(*args, **kwargs)

        update = ppo.update
        patched.setattr(ppo, "update", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(made, interrupted, say=lambda line: None)
    run(made, interrupted, resume=True, say=lambda line: None)
    assert lines(interrupted) == lines(uninterrupted)


def test_trackers_receive_every_iteration(tmp_path, start) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = recipe(tmp_path).model_copy(update={"report_to": ["tensorboard"]})
    folder = start("run")
    run(made, folder, say=lambda line: None)
    (events,) = (folder / "ppo" / "tensorboard").glob("events.out.tfevents*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    found = [(event.step, event.value) for event in accumulator.Scalars("train/score_mean")]
    assert found == [(line["step"], pytest.approx(line["score_mean"], rel=1e-6)) for line in lines(folder)]


def test_the_panel_shows_phases_metrics_and_a_sample() -> None:
    console = Console(width=90, force_terminal=True, record=True)
    panel = Panel("ppo", 10, ("generate", "update"), console)
    panel.phase(3, "update")
    panel.finish_iteration(
        3,
        {"score_mean": 1.25, "score_std": 0.5, "time/generate": 1.0, "speed/generate": 12345.0, "time/update": 3.0},
        {"score": 0.75, "prompt": "What is it?", "completion": "A test."},
    )
    panel.close()
    text = console.export_text()
    for shown in (
        "step 3/10",
        "generate",
        "1.0 s",
        "12,345 tokens/s",
        "Score: mean, standard deviation 1.25 0.5",
        "What is it? → A test.",
    ):
        assert shown in " ".join(text.split(" ")) or shown in " ".join(text.split()), shown
    assert "mismatch" not in text


def test_passes_through_adapted_experts_are_not_concurrent() -> None:
    # PEFT replaces stacked experts during a forward pass. Concurrent passes could adapt them twice or permanently.
    threads = torch.get_num_threads()
    models = small.build()
    policy = add_lora(models.policy.model, Lora(rank=2), task="CAUSAL_LM").eval()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if is_lora_weight(name):
                parameter.normal_(std=0.3)
    models.policy, models.reference = LocalLearner(policy, small.settings().optimizer, total=1), None
    models.critic = None
    batch = to_experience(small.completions(*[([5, 6], [7, 8 + row % 4, row % 7], True) for row in range(32)]))
    batch.score = torch.zeros(32)
    with torch.no_grad():
        truth = policy_output(policy, batch, 1.0).logprobs
        with policy.disable_adapter():
            reference = policy_output(policy, batch, 1.0).logprobs
    stage = small.settings(advantage_estimator="reinforce_plus_plus", micro_batch_tokens=5)
    torch.set_num_threads(2)
    try:
        complete_batch(stage, models, batch, 0.05)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(batch.old_logprobs, truth)
    torch.testing.assert_close(batch.ref_logprobs, reference)
    assert (truth - reference).abs().max() > 0.1
    assert not any("parametrizations" in name for name, _ in policy.named_parameters())
