"""The table of metrics: title, unit and definition of each key of metrics.jsonl.

The report, the live panel and docs/metrics.md are made from this table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

HELD_OUT = "eval_"
"""Prefix of a metric that is measured on held-out rows."""
DURING = "evaluation/"
"""Prefix of a metric of an evaluation during training."""
SHARE = "share"
"""Unit of values between 0 and 1."""
PER_TOKEN, PER_COMPLETION = "nats per token", "nats per completion"
PHASES = ("generate", "score", "logprobs", "update", "sync")
"""Phases of a PPO iteration, in order. `time/` metrics with other names are parts of these."""


@dataclass(frozen=True)
class MetricInfo:
    """One key of metrics.jsonl.

    key: the key; NAME and PHASE stand for any name.
    title: short title, for a chart or a line of the panel.
    unit: unit of the values; "" if they have none.
    meaning: the definition.
    """

    key: str
    title: str
    unit: str
    meaning: str

    def matches(self, key: str) -> bool:
        return self._match(key) is not None

    def title_of(self, key: str) -> str:
        """The title with the name in place of NAME or PHASE. key: a key that the metric matches."""
        found = self._match(key)
        named = found.groupdict() if found else {}
        return re.sub("NAME|PHASE", lambda place: named.get(place[0]) or place[0], self.title)

    def _match(self, key: str) -> re.Match[str] | None:
        pattern = re.escape(self.key).replace("NAME", "(?P<NAME>.+)").replace("PHASE", "(?P<PHASE>[a-z]+)")
        return re.fullmatch(pattern, key)


STEPS = (
    MetricInfo("step", "Optimizer step", "", "Stages that train on given rows: the last optimizer step."),
    MetricInfo("step", "Iteration", "", "PPO: the last iteration of sampling, scoring and update."),
)


TRAINING = (
    MetricInfo(
        "loss",
        "Loss",
        "",
        "Training loss of the optimizer step, router losses included. A mean over the "
        "tokens that count in the loss; over the pairs (reward model, DPO); over the rows, each with the weight of its "
        "label (KTO). `eval_loss` excludes the router losses.",
    ),
    MetricInfo(
        "grad_norm",
        "Gradient norm",
        "",
        "L2 norm of the gradient of all trained parameters, before clipping. Not available from DeepSpeed at "
        "`parallel.zero_stage: 0` in float32.",
    ),
    MetricInfo(
        "learning_rate", "Learning rate", "", "Learning rate of the parameters that do not belong to routed experts."
    ),
    MetricInfo(
        "entropy",
        "Entropy",
        PER_TOKEN,
        "Entropy of the model's distribution, a mean over the tokens that count in the loss (DPO: over the tokens of "
        "both completions). PPO: over the sampled tokens, at the sampling temperature.",
    ),
    MetricInfo(
        "mean_token_accuracy",
        "Token accuracy",
        SHARE,
        "Share of tokens that are the model's most probable token, over the tokens that count in the loss (DPO: over "
        "the tokens of the chosen completions; KTO: of the desirable ones).",
    ),
    MetricInfo(
        "accuracy",
        "Accuracy on pairs",
        SHARE,
        "Reward model: share of pairs in which the chosen completion scores higher than the rejected one.",
    ),
    MetricInfo(
        "margin",
        "Margin",
        "",
        "Reward model: mean of the chosen completion's score minus the rejected one's.",
    ),
    MetricInfo("mean_reward", "Mean score", "", "Reward model: mean score of chosen and rejected completions."),
    MetricInfo(
        "min_reward",
        "Smallest score",
        "",
        "Reward model: smallest score of chosen and rejected completions.",
    ),
    MetricInfo("max_reward", "Largest score", "", "Reward model: largest score of chosen and rejected completions."),
    MetricInfo(
        "rewards/accuracies",
        "Accuracy of the implicit reward",
        SHARE,
        "DPO: share of pairs in which the chosen completion has the higher implicit reward.",
    ),
    MetricInfo(
        "rewards/margins",
        "Margin of the implicit reward",
        "",
        "DPO: mean of the chosen completion's implicit reward minus the rejected one's. KTO: mean over the desirable "
        "completions minus mean over the undesirable ones; missing in a step that has only one kind.",
    ),
    MetricInfo(
        "rewards/chosen",
        "Implicit reward, chosen",
        "",
        "DPO: mean implicit reward of the chosen completions, beta * log(policy / reference). KTO: of the desirable "
        "ones.",
    ),
    MetricInfo(
        "rewards/rejected",
        "Implicit reward, rejected",
        "",
        "DPO: mean implicit reward of the rejected completions. KTO: of the undesirable ones.",
    ),
    MetricInfo(
        "logps/chosen",
        "Log-probability, chosen",
        PER_COMPLETION,
        "DPO: log-probability of the chosen completions, summed over a completion's tokens. KTO: of the desirable "
        "ones.",
    ),
    MetricInfo(
        "logps/rejected",
        "Log-probability, rejected",
        PER_COMPLETION,
        "DPO: log-probability of the rejected completions, summed over a completion's tokens. KTO: of the undesirable "
        "ones.",
    ),
    MetricInfo(
        "logits/chosen",
        "Mean logit, chosen",
        "",
        "DPO: logits of the chosen completions, a mean over tokens and vocabulary. KTO: of the desirable ones.",
    ),
    MetricInfo(
        "logits/rejected",
        "Mean logit, rejected",
        "",
        "DPO: logits of the rejected completions, a mean over tokens and vocabulary. KTO: of the undesirable ones.",
    ),
    MetricInfo(
        "kto_kl",
        "KL to the reference, estimated by KTO",
        PER_COMPLETION,
        "KTO: mean of log(policy / reference) of the completions of other prompts of the step, summed over a "
        "completion's tokens; 0 if the mean is negative or no prompt differs. TRL calls it `kl`.",
    ),
)

ROUTERS = (
    MetricInfo(
        "aux_loss",
        "Router balance loss",
        "",
        "Balance loss before its coefficient: E * sum over experts of (share of assignments * mean router "
        "probability). 1 if both are uniform.",
    ),
    MetricInfo("router_z_loss", "Router z-loss", "", "Mean squared log-sum-exp of the router's logits."),
    MetricInfo(
        "router_entropy",
        "Router entropy",
        PER_TOKEN,
        "Entropy of the router's distribution over experts. It is log E for a uniform router.",
    ),
    MetricInfo(
        "expert_load_max",
        "Load of the busiest expert",
        "× uniform load",
        "Share of assignments that go to the busiest expert, times E; mean over layers. 1 is uniform; the maximum, "
        "E / k, means that every token of a layer chose the busiest expert.",
    ),
    MetricInfo(
        "recycled_share",
        "Recycled assignments",
        SHARE,
        "Share of assignments whose expert was at capacity and that went to another expert.",
    ),
    MetricInfo(
        "dropped_share",
        "Dropped assignments",
        SHARE,
        "Share of assignments whose expert was at capacity and that were dropped.",
    ),
)

SPEED = (
    MetricInfo(
        "time/step",
        "Time per step",
        "s",
        "Time of the step, loading of its rows included. Not logged for a step that is followed by an evaluation.",
    ),
    MetricInfo(
        "speed/train",
        "Throughput",
        "tokens/s",
        "Tokens of the step on all ranks, without padding, per second of `time/step`.",
    ),
    MetricInfo(
        "memory/peak_gib",
        "Peak memory",
        "GiB",
        "Peak memory of rank 0 since its start. On a CPU: resident memory; on a GPU: memory allocated for tensors.",
    ),
)

PPO = (
    MetricInfo(
        "score_mean",
        "Score, mean",
        "",
        "Score per completion: the weighted sum of the rewards minus the penalties. Mean over the rollout batch.",
    ),
    MetricInfo("score_std", "Score, standard deviation", "", "Standard deviation of the score over the rollout batch."),
    MetricInfo(
        "reward/NAME",
        "Reward NAME, mean",
        "",
        "Mean of one reward before normalisation, clipping and weight, over all completions sampled in the iteration.",
    ),
    MetricInfo(
        "reward/NAME/std",
        "Reward NAME, standard deviation",
        "",
        "Standard deviation of the values averaged in `reward/NAME`.",
    ),
    MetricInfo("reward/NAME/min", "Reward NAME, smallest", "", "Smallest of the values averaged in `reward/NAME`."),
    MetricInfo("reward/NAME/max", "Reward NAME, largest", "", "Largest of the values averaged in `reward/NAME`."),
    MetricInfo(
        "reward/NAME/failures",
        "Reward NAME, failures",
        SHARE,
        "Share of completions that this reward could not score: a function or server with a `failure_score` failed, or "
        "a `math` reward found no final answer.",
    ),
    MetricInfo(
        "kl",
        "KL of the policy to the reference, k1",
        PER_COMPLETION,
        "k1 estimate of KL(policy || reference) on the samples: log(policy / reference), summed over a completion's "
        "tokens. Mean over completions.",
    ),
    MetricInfo(
        "kl_k3",
        "KL of the policy to the reference, k3",
        PER_COMPLETION,
        "k3 estimate of KL(policy || reference), summed and averaged like `kl`. It is never negative.",
    ),
    MetricInfo("kl_coef", "KL coefficient", "", "Coefficient of the KL penalty in the iteration."),
    MetricInfo(
        "mismatch_mean",
        "Mismatch of sampler and trainer, mean",
        "nats",
        "Absolute difference between the sampler's and the trainer's log-probability of a sampled token. With "
        "`old_logprobs: rollout` it is measured, like `entropy`, on one completion in 16.",
    ),
    MetricInfo(
        "mismatch_max",
        "Mismatch of sampler and trainer, largest",
        "nats",
        "Largest of the differences averaged in `mismatch_mean`.",
    ),
    MetricInfo(
        "policy_loss",
        "Policy loss",
        "",
        "Loss of the policy (`policy_loss` in the recipe), without the KL loss and router losses.",
    ),
    MetricInfo(
        "clip_fraction",
        "Clipped tokens, policy",
        SHARE,
        "Share of tokens whose clipped term is larger than the unclipped one, so that they have no gradient. With "
        "`policy_loss: cispo`: share of tokens whose ratio is clipped.",
    ),
    MetricInfo(
        "dual_clip_fraction",
        "Tokens at the dual clip",
        SHARE,
        "Share of tokens with a negative advantage whose loss is bounded by `dual_clip`.",
    ),
    MetricInfo("policy_grad_norm", "Gradient norm, policy", "", "L2 norm of the policy's gradient, before clipping."),
    MetricInfo(
        "update_kl",
        "KL of the update, k3",
        PER_TOKEN,
        "k3 estimate of KL(policy before the update || policy), a mean over tokens.",
    ),
    MetricInfo(
        "kl_loss",
        "KL loss",
        PER_TOKEN,
        "With `kl.apply_to: loss`: KL to the reference in the loss, before its coefficient.",
    ),
    MetricInfo(
        "policy_updates", "Policy updates", "optimizer steps", "Optimizer steps of the policy in the iteration."
    ),
    MetricInfo(
        "skipped_updates",
        "Skipped updates",
        "optimizer steps",
        "Updates that were skipped: `mask_truncated` left no completion, or (DeepSpeed in bf16) gradients overflowed.",
    ),
    MetricInfo(
        "value_loss",
        "Value loss",
        "",
        "Half the squared error of the values, a mean over tokens. The larger of the errors with and without value "
        "clipping counts.",
    ),
    MetricInfo(
        "value_clip_fraction",
        "Clipped tokens, value",
        SHARE,
        "Share of tokens whose clipped value has the larger error.",
    ),
    MetricInfo("critic_grad_norm", "Gradient norm, critic", "", "L2 norm of the critic's gradient, before clipping."),
    MetricInfo(
        "explained_variance",
        "Explained variance of the returns",
        "",
        "1 - var(returns - values) / var(returns), with the values before the update. 1 is perfect, 0 is no better "
        "than a constant, below 0 is worse.",
    ),
    MetricInfo(
        "informative_groups",
        "Informative groups",
        SHARE,
        "With several completions per prompt: share of groups whose completions do not all have the same score, among "
        "all groups sampled.",
    ),
    MetricInfo(
        "drawn_completions",
        "Drawn completions",
        "completions",
        "With several completions per prompt: completions sampled, including those that `dynamic_sampling` replaced.",
    ),
    MetricInfo(
        "overlong_penalty",
        "Overlong penalty",
        "",
        "Overlong penalty per completion, averaged over all completions. It is positive only within the last "
        "`overlong_buffer` tokens before max_new_tokens.",
    ),
    MetricInfo("completion_length", "Completion length", "tokens", "Mean completion length, including the stop token."),
    MetricInfo(
        "eos_rate", "Completions that end with a stop token", SHARE, "Share of completions that end with a stop token."
    ),
    MetricInfo("truncated_share", "Truncated completions", SHARE, "Share of completions truncated at max_new_tokens."),
    MetricInfo(
        "time/PHASE",
        "Time in PHASE",
        "s",
        "Time that an iteration spends in `generate`, `score`, `logprobs` (old and reference log-probabilities, "
        "values), `update` and `sync`.",
    ),
    MetricInfo("time/reward/NAME", "Time in reward NAME", "s", "Part of `time/score` that one reward takes."),
    MetricInfo("time/weights", "Time to transfer weights", "s", "Part of `time/sync` that the weight transfer takes."),
    MetricInfo(
        "speed/PHASE",
        "Speed of PHASE",
        "tokens/s",
        "Tokens of the rollout batch per second of the phase: sampled tokens for `generate`; prompts and completions "
        "for `score`, `logprobs` and `update`. Not logged for `sync`.",
    ),
    MetricInfo("speed/rollout", "Speed of the engine", "tokens/s", "Sampled tokens per second within the engine."),
    MetricInfo(
        "rollout/prompt_tokens", "Prompt tokens", "tokens", "Prompt tokens sent to the engine, once per completion."
    ),
    MetricInfo(
        "rollout/cached_share", "Cached prompt tokens", SHARE, "Share of prompt tokens served from the prefix cache."
    ),
    MetricInfo(
        "rollout/retried",
        "Restarted completions",
        "completions",
        "Completions that were started again because their server failed.",
    ),
    MetricInfo("sync/mib", "Transferred weights", "MiB", "Size of the last weight transfer to the engines."),
    MetricInfo("sync/buckets", "Transfer buckets", "buckets", "Number of buckets in the last weight transfer."),
    MetricInfo("sync/engines", "Updated engines", "engines", "Engines that received the new weights."),
)

EVALUATION = (
    MetricInfo(
        "scores",
        "Reward-model score",
        "",
        "Score of `reward_model` per completion.",
    ),
    MetricInfo(
        "f1",
        "Token F1",
        SHARE,
        "Harmonic mean of word precision and recall against the reference answer, over the prompts with a reference.",
    ),
    MetricInfo(
        "preference",
        "Preference accuracy",
        SHARE,
        "Share of held-out pairs in which the model gives the chosen completion the higher log-probability, summed "
        "over tokens. A tie counts half.",
    ),
    MetricInfo(
        "kl",
        "KL to REFERENCE",
        PER_COMPLETION,
        "k1 estimate of KL(model || reference) on the model's own samples, summed over a completion's tokens. The "
        "reference is `reference` of the stage. Not measured with greedy decoding, whose completions are not samples.",
    ),
    MetricInfo("lengths", "Completion length", "tokens", "Completion length, including the stop token."),
    MetricInfo(
        "eos", "Completions that end with a stop token", SHARE, "Share of completions that end with a stop token."
    ),
    MetricInfo(
        "TASK/METRIC",
        "TASK: METRIC",
        "",
        "Mean of one metric of a task over its scored prompts. A `math` metric counts a completion without a final "
        "answer as 0.",
    ),
    MetricInfo("TASK/truncated", "TASK: truncated", SHARE, "Share of completions truncated at max_new_tokens."),
    MetricInfo(
        "reward_model_accuracy",
        "Accuracy of the reward model",
        SHARE,
        "Share of held-out pairs in which the reward model scores the chosen completion higher. A tie counts half.",
    ),
)

DURING_TRAINING = (
    MetricInfo(
        f"{DURING}NAME",
        "Evaluation: NAME",
        "",
        "`evaluate` of a training stage: mean of one metric of a task, TASK/METRIC, after the step.",
    ),
    MetricInfo(f"{DURING}NAME/low", "Evaluation: NAME, low end", "", "Low end of its 95 % interval."),
    MetricInfo(f"{DURING}NAME/high", "Evaluation: NAME, high end", "", "High end of its 95 % interval."),
    MetricInfo(
        f"{DURING}step", "Step of the weights", "steps", "In the manifest: step of the weights of the stage's result."
    ),
)

ALL = TRAINING + ROUTERS + SPEED + PPO + DURING_TRAINING


@dataclass(frozen=True)
class MetricGroup:
    """Metrics with one unit that share a chart.

    title: title of the chart, without the unit.
    series: (key, label) of each metric.
    band: key of the standard deviation around the first one; "" for none.
    """

    title: str
    series: tuple[tuple[str, str], ...]
    band: str = ""


IMPLICIT_REWARDS = MetricGroup("Implicit rewards", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")))
IMPLICIT_REWARDS_OF_LABELS = MetricGroup(
    "Implicit rewards", (("rewards/chosen", "desirable"), ("rewards/rejected", "undesirable"))
)
SCORE = MetricGroup("Score", (("score_mean", "mean"),), band="score_std")
POLICY_KL = MetricGroup("KL of the policy to the reference", (("kl", "k1"), ("kl_k3", "k3")))
ENDS = MetricGroup("How completions end", (("eos_rate", "stop token"), ("truncated_share", "truncated")))
CLIPPED = MetricGroup("Clipped tokens", (("clip_fraction", "policy"), ("value_clip_fraction", "value")))
POLICY_LOSSES = MetricGroup("Losses", (("policy_loss", "policy"), ("value_loss", "value")))
MISMATCH = MetricGroup("Mismatch of sampler and trainer", (("mismatch_mean", "mean"), ("mismatch_max", "largest")))
TIMES = MetricGroup("Time per iteration", tuple((f"time/{phase}", phase) for phase in PHASES))
THROUGHPUT = MetricGroup(
    "Throughput",
    (*((f"speed/{phase}", phase) for phase in PHASES if phase != "sync"), ("speed/rollout", "engine")),
)
GROUPS = (
    IMPLICIT_REWARDS,
    IMPLICIT_REWARDS_OF_LABELS,
    SCORE,
    POLICY_KL,
    ENDS,
    CLIPPED,
    POLICY_LOSSES,
    MISMATCH,
    TIMES,
    THROUGHPUT,
)


def metric_info(key: str) -> MetricInfo | None:
    """The metric of a key of metrics.jsonl, with or without the held-out prefix; None for an unknown key."""
    key = key.removeprefix(HELD_OUT)
    exact = next((metric for metric in ALL if metric.key == key), None)
    if exact is not None:
        return exact
    matching = [metric for metric in ALL if metric.matches(key)]
    return max(matching, key=lambda metric: len(metric.key), default=None)


def title_of(key: str) -> str:
    """Title, without the unit, of a key of metrics.jsonl or of a training stage's manifest; an unknown key itself."""
    metric = metric_info(key)
    if metric is None:
        return key
    title = metric.title_of(key.removeprefix(HELD_OUT))
    return f"{title}, held out" if key.startswith(HELD_OUT) else title


def titled(key: str) -> str:
    """`title_of` with the unit."""
    metric = metric_info(key)
    return with_unit(title_of(key), metric.unit if metric is not None else "")


def titled_of_model(key: str) -> str:
    """Title with the unit of a key MODEL/KEY of an evaluate stage's manifest, after the model's name."""
    model, slash, rest = key.partition("/")
    metric = next((metric for metric in EVALUATION if metric.key == (rest if slash else key)), None)
    if metric is not None:
        title = with_unit(metric.title.replace("REFERENCE", "the reference"), metric.unit)
        return f"{model}: {title}" if slash else title
    return f"{model}: {rest.replace('/', ': ')}" if slash else key


def step_axis(kind: str) -> str:
    """Title of the axis of steps of a kind of stage."""
    return STEPS[kind == "ppo"].title


def with_unit(title: str, unit: str) -> str:
    return f"{title} ({unit})" if unit else title
