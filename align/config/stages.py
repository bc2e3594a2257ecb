"""The stages of a recipe, one class per kind, and their union."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from align.config.evaluation import EvaluateDuring, EvaluationTask, TaskOptions, Tasks
from align.config.filters import DuplicateFilter, PromptFilters
from align.config.lora import Lora
from align.config.parts import Data, Optimizer, Source
from align.config.ppo import PpoStage
from align.config.rewards import ModelReward, Rewards
from align.config.rollout import Rollout
from align.config.section import RUNTIME, EarlierDefault, FiniteValues, Fraction, Positive
from align.config.stage import (
    COMPLETIONS,
    LANGUAGE_MODEL,
    PAIRS,
    REPORT,
    REWARD_MODEL,
    Benchmarks,
    Reference,
    StageBase,
    StageWithParent,
    benchmarks_during,
)


class TrainingStage(StageWithParent):
    """Settings of every stage that trains on rows: `pretrain`, `sft`, `reward_model`, `dpo` and `kto`."""

    makes = LANGUAGE_MODEL
    reads = (PAIRS,)
    trains = True
    sequences_per_row: ClassVar[int] = 1
    """Sequences per row of the batch; a preference pair has two."""

    data: Data
    """Training and held-out data."""
    optimizer: Optimizer = Optimizer()
    """AdamW and its learning-rate schedule."""
    lora: Lora | None = None
    """Train adapters instead of all weights. `lora.save` decides what the stage saves."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training data. Ignored if `max_steps` is set."""
    max_steps: Positive | None = None
    """Number of optimizer steps. Overrides `epochs`."""
    batch_size: Positive = 8
    """Rows (or pairs) per optimizer step, over all processes."""
    micro_batch_tokens: Positive | None = None
    """Maximum tokens per forward pass and process. Whole rows are packed into passes without padding; a longer row has
    a pass of its own. Default: `micro_batch_size` rows of `max_length` tokens. Lower it if GPU memory runs out."""
    micro_batch_size: Positive = 8
    """Rows (or pairs) of `max_length` tokens per forward pass and process. A pass takes more rows if they are shorter.
    Ignored if `micro_batch_tokens` is set."""
    group_by_length: bool = False
    """Put rows of similar length into the same optimizer step. The order of the steps stays random."""
    checkpoint_every: Annotated[Positive, RUNTIME] = 100
    """Optimizer steps between the checkpoints that an interrupted run resumes from."""
    gradient_checkpointing: Annotated[bool, RUNTIME] = False
    """Recompute activations in the backward pass, which saves memory and takes longer."""
    evaluate: EvaluateDuring | None = None
    """Evaluate the weights on tasks during training."""

    def benchmarks(self) -> Iterator[Benchmarks]:
        yield from benchmarks_during(self.evaluate)

    @model_validator(mode="after")
    def _can_stream(self) -> TrainingStage:
        if self.data.streams:
            if self.max_steps is None:
                raise ValueError("data.train streams, so its number of rows is not known; set max_steps")
            if self.group_by_length:
                raise ValueError("group_by_length needs the lengths of all rows; remove it, or remove streaming")
            if any(isinstance(settings, DuplicateFilter) for settings in self.data.filters):
                raise ValueError("the filter 'duplicates' compares all rows; remove it, or remove streaming")
            if self.data.mixture.temperature is not None:
                raise ValueError("data.mixture.temperature needs the number of rows; set weights, or remove streaming")
            if self.needs_reference:
                raise ValueError(
                    "the reference's log-probabilities of all rows are computed before training; remove streaming "
                    "(the rows are tokenised on disk, not in memory)"
                )
        return self

    @property
    def needs_reference(self) -> bool:
        """True if the loss needs a forward pass of the frozen parent (under LoRA: of the policy without adapters)."""
        return False

    @property
    def forward_passes(self) -> int:
        """Forward passes without a gradient per row and epoch, of the reference or the policy."""
        return int(self.needs_reference)

    @property
    def needs_whole_batch(self) -> str | None:
        """Reason why a whole batch must be computed in one forward pass; None if it may be split."""
        return None

    @property
    def pass_tokens(self) -> int:
        """Maximum tokens per forward pass and process, except for a single row that is longer."""
        return self.micro_batch_tokens or self.micro_batch_size * self.row_tokens

    @property
    def row_tokens(self) -> int:
        """Maximum tokens per row; a preference pair has two sequences."""
        return self.sequences_per_row * self.data.max_length


class PretrainStage(TrainingStage):
    """Next-token prediction on plain text, packed into full sequences."""

    title = "pretraining"
    reads = (COMPLETIONS,)

    kind: Literal["pretrain"]
    """Selects next-token prediction."""
    attend_across: Annotated[bool, EarlierDefault(True)] = False
    """Let a token see the documents before its own in the same row, and continue their positions. false: each document
    is a sequence of its own."""


class SftStage(TrainingStage):
    """Supervised fine-tuning on conversations or prompt/completion rows."""

    title = "supervised fine-tuning"
    reads = (COMPLETIONS,)

    kind: Literal["sft"]
    """Selects supervised fine-tuning."""
    assistant_only_loss: bool = True
    """Compute the loss on assistant turns or completions only. false: on all tokens."""


class SamplingStage(StageWithParent):
    """Settings of the stages that sample completions and write them as rows: `sample` and `rejection_sample`."""

    train: list[Source] = Field(min_length=1)
    """Sources of prompts for the training rows."""
    held_out: list[Source] = Field(default_factory=list)
    """Sources of prompts for the held-out rows."""
    filters: PromptFilters = Field(default_factory=list)
    """Filters of the training prompts, applied in order. They judge prompts, not reference answers."""
    rollout: Rollout = Rollout()
    """Generation of the completions."""

    @property
    def generates_with(self) -> str:
        return self.init_from

    @model_validator(mode="after")
    def _prompts_fit(self) -> SamplingStage:
        self.rollout.require_room_for_prompts()
        return self


class SampleStage(SamplingStage):
    """Generation of preference pairs: the reference answer of a prompt is preferred to the model's own. Rows without a
    reference answer (`reference`, `completion` or `chosen`) make no pair."""

    title = "sampling of preference pairs"
    makes = PAIRS

    kind: Literal["sample"]
    """Selects the generation of preference pairs."""
    neighbours: Fraction = 0.5
    """Fraction of pairs whose rejected answer is another prompt's reference instead of a sample."""

    @model_validator(mode="after")
    def _samples_differ(self) -> SampleStage:
        self.rollout.require_sampling("sample")
        return self


class RejectionSampleStage(SamplingStage):
    """Rejection sampling: of several completions per prompt, those with good scores become rows of a later stage."""

    title = "rejection sampling"
    makes = COMPLETIONS

    kind: Literal["rejection_sample"]
    """Selects rejection sampling."""
    rewards: Rewards
    """Rewards. The score of a completion is their weighted sum."""
    samples: Annotated[int, Field(ge=2)] = 8
    """Completions sampled per prompt."""
    keep: Literal["best", "threshold", "correct", "pairs"] = "best"
    """best: the completion with the highest score. threshold: all with a score of at least `threshold`. correct: all
    with the full score, which is 1 from every reward. pairs: the best as chosen and the worst as rejected answer of a
    preference pair. The first three make rows for `sft`, the last for `dpo`, `reward_model` and `kto`."""
    threshold: float | None = None
    """Lowest score of a completion that is kept, or chosen. Required for `keep: threshold`."""
    per_prompt: Positive | None = None
    """Maximum rows per prompt, those with the highest scores. Default: no limit; `best` and `pairs` make one."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """For `keep: pairs`: least difference of the two scores. Equal scores never make a pair."""
    micro_batch_tokens: Annotated[Positive, RUNTIME] = 4096
    """Maximum tokens per forward pass of a reward model."""

    @property
    def result(self) -> str:
        return PAIRS if self.keep == "pairs" else COMPLETIONS

    @property
    def lowest(self) -> float | None:
        """Lowest score of a completion that is kept, or chosen."""
        return sum(reward.weight for reward in self.rewards) if self.keep == "correct" else self.threshold

    def checkpoints(self) -> Iterator[Reference]:
        yield from super().checkpoints()
        for reward in self.rewards:
            if isinstance(reward, ModelReward):
                yield Reference("rewards", reward.init_from, (REWARD_MODEL,))

    @model_validator(mode="after")
    def _rule_is_complete(self) -> RejectionSampleStage:
        self.rollout.require_sampling("rejection_sample")
        if self.keep == "threshold" and self.threshold is None:
            raise ValueError("keep threshold needs a lowest score; set threshold")
        if self.keep == "correct" and self.threshold is not None:
            raise ValueError(
                "keep correct keeps the full score, so threshold is not used; remove it, or set keep to threshold"
            )
        if self.keep in ("best", "pairs") and self.per_prompt is not None:
            raise ValueError(f"keep {self.keep} makes one row per prompt, so per_prompt is not used; remove it")
        if self.keep != "pairs" and self.margin:
            raise ValueError(
                f"margin is the difference of a pair, but keep is {self.keep}; remove it, or set keep to pairs"
            )
        for reward in self.rewards:
            if reward.normalise != "none":
                raise ValueError(
                    f"reward '{reward.label}': normalise makes a score depend on the completions before it; remove "
                    "normalise"
                )
        return self


class RewardModelStage(TrainingStage):
    """Training of a reward model: a scalar head on preference pairs (Bradley-Terry loss)."""

    title = "training of a reward model"
    makes = REWARD_MODEL
    starts_from = (LANGUAGE_MODEL, REWARD_MODEL)
    sequences_per_row = 2

    kind: Literal["reward_model"]
    """Selects reward-model training."""
    center_coef: Annotated[float, Field(ge=0)] = 0.01
    """Weight of a penalty that keeps scores centred on zero: (chosen score + rejected score)^2 per pair."""

    @model_validator(mode="after")
    def _scores_only(self) -> RewardModelStage:
        if self.evaluate is not None:
            raise ValueError(
                "evaluate needs a language model, but a reward model gives scores only; remove evaluate (data.held_out "
                "measures its accuracy, and `align eval --pairs` its bias)"
            )
        return self


LossType = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "aot",
    "aot_unpaired",
    "simpo",
]
"""The keys of `align.losses.preference.PREFERENCE_LOSSES`."""

LOSS_OPTIONS: dict[str, dict[str, float]] = {
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 1e-3},
    "discopop": {"discopop_tau": 0.05},
    "aot": {"label_smoothing": 0.0},
    "aot_unpaired": {"label_smoothing": 0.0},
    "simpo": {"simpo_gamma": 0.5},
}
"""Options of each `loss_type` besides `beta`, with their defaults."""

WHOLE_BATCH = ("aot", "aot_unpaired")
"""Values of `loss_type` that sort over the whole batch, so that splitting it into micro-batches changes the loss."""

WITHOUT_REFERENCE = ("simpo",)
"""Values of `loss_type` that use no reference model."""


class DpoStage(TrainingStage):
    """Training on preference pairs: direct preference optimisation and its variants, with the parent as reference."""

    title = "preference optimisation (DPO)"
    sequences_per_row = 2

    kind: Literal["dpo"]
    """Selects direct preference optimisation."""
    loss_type: LossType = "sigmoid"
    """Loss of a pair, by TRL's names; `sigmoid` is DPO. `simpo` has no reference. align/losses/preference.py has the
    equations and papers."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Factor of the implicit reward, `beta * log(policy / reference)`; larger values keep the policy nearer to
    the reference. Under `simpo`, factor of the mean log-probability per token (2 to 10 in its paper)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """Assumed share of flipped labels, for `robust` (default 0.1), `exo_pair` (0.001), `aot` and `aot_unpaired` (0)."""
    discopop_tau: Annotated[float, Field(gt=0)] | None = None
    """Temperature of the gate of `discopop` (default 0.05)."""
    simpo_gamma: Annotated[float, Field(ge=0)] | None = None
    """Target reward margin of `simpo` (default 0.5)."""
    sft_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the negative log-likelihood of the chosen completions per token, added to the loss."""

    @property
    def loss_options(self) -> dict[str, float]:
        """{option: value} of the loss besides `beta`."""
        defaults = LOSS_OPTIONS.get(self.loss_type, {})
        return {name: default if (v := getattr(self, name)) is None else v for name, default in defaults.items()}

    @property
    def needs_reference(self) -> bool:
        return self.loss_type not in WITHOUT_REFERENCE

    @property
    def needs_whole_batch(self) -> str | None:
        return f"loss_type {self.loss_type} sorts over the whole batch" if self.loss_type in WHOLE_BATCH else None

    @model_validator(mode="after")
    def _options_fit_the_loss(self) -> DpoStage:
        for name in ("label_smoothing", "discopop_tau", "simpo_gamma"):
            users = [loss for loss, options in LOSS_OPTIONS.items() if name in options]
            if getattr(self, name) is not None and self.loss_type not in users:
                *first, last = users
                others = f"loss_type to {', '.join(first)} or {last}" if first else f"loss_type to {last}"
                raise ValueError(f"loss_type {self.loss_type} does not use {name}; remove it, or set {others}")
        if self.loss_type == "exo_pair" and self.label_smoothing == 0:
            raise ValueError("loss_type exo_pair takes the logarithm of label_smoothing; set it above 0, such as 0.001")
        return self


class KtoStage(TrainingStage):
    """Training on completions that are labelled desirable or undesirable (KTO), with the parent as reference."""

    title = "preference optimisation (KTO)"

    kind: Literal["kto"]
    """Selects training on labelled completions."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """Loss of a completion, by TRL's names. `kto` compares its implicit reward with an estimate of the KL between
    policy and reference, which takes two more forward passes per row; `apo_zero_unpaired` compares it with zero."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Factor of the implicit reward, `beta * log(policy / reference)`; larger values keep the policy nearer to
    the reference."""
    desirable_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the losses of desirable completions. `align data stats` prints the weights that balance the data."""
    undesirable_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the losses of undesirable completions."""

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_kl(self) -> bool:
        """True if the loss needs the estimate of the KL, from each prompt with the completion of another."""
        return self.loss_type == "kto"

    @property
    def forward_passes(self) -> int:
        return 3 if self.needs_kl else 1  # reference; policy and reference on the mismatched completions

    @model_validator(mode="after")
    def _can_compare(self) -> KtoStage:
        if self.needs_kl and self.batch_size == 1:
            raise ValueError(
                "loss_type kto estimates the KL from the completions of other prompts in the batch; set batch_size to "
                "2 or more, or loss_type to apo_zero_unpaired"
            )
        if not (self.desirable_weight or self.undesirable_weight):
            raise ValueError("desirable_weight and undesirable_weight are both 0; set one of them above 0")
        return self


def _named_once(models: list[str]) -> list[str]:
    for model in models:
        if models.count(model) > 1:
            raise ValueError(f"'{model}' is listed {models.count(model)} times; list each model once")
    return models


class EvaluateStage(StageBase):
    """Compare checkpoints on held-out prompts and tasks, and write the report."""

    title = "evaluation"
    makes = REPORT

    kind: Literal["evaluate"]
    """Selects the comparison of checkpoints."""
    models: Annotated[list[str], Field(min_length=1), AfterValidator(_named_once)]
    """Stages (or `base`, or checkpoint folders) to compare; the first is the baseline."""
    prompts: list[Source] = Field(default_factory=list)
    """Held-out prompts for the reward model's score, the KL to the reference, completion lengths and, for rows with a
    reference answer, word F1."""
    tasks: Tasks = Field(default_factory=list)
    """Benchmarks. A text is a task of `align eval`: a task of lm-evaluation-harness, `suite:NAME`, or a .yaml or .py
    file. A section has prompts, sampling settings and verifiers as metrics."""
    options: TaskOptions = TaskOptions()
    """Settings of the tasks that are texts."""
    reward_model: str | None = None
    """A reward_model stage or folder that scores the completions of `prompts`."""
    preferences: list[Source] = Field(default_factory=list)
    """Held-out pairs on which each model's implicit preference accuracy is measured."""
    rollout: Rollout = Rollout()
    """Generation of completions by the compared models. `temperature: 0` is greedy decoding."""
    reference: str | None = None
    """Reference model of the KL, which is estimated on each model's own samples. Default: the first of `models`."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples for the 95 % confidence intervals."""
    chat_template_kwargs: FiniteValues = Field(default_factory=dict)
    """Values for the chat template's own variables in this stage, for example `{reasoning_effort: high}`. They replace
    `model.chat_template_kwargs`."""
    samples: Annotated[int, Field(ge=0)] = 8
    """Prompts shown side by side in the report."""

    def checkpoints(self) -> Iterator[Reference]:
        for model in self.models:
            yield Reference("models", model, (LANGUAGE_MODEL,))
        if self.reward_model is not None:
            yield Reference("reward_model", self.reward_model, (REWARD_MODEL,))
        if self.reference is not None:
            yield Reference("reference", self.reference, (LANGUAGE_MODEL,))

    @property
    def generates_with(self) -> str:
        return self.models[0]

    def benchmarks(self) -> Iterator[Benchmarks]:
        if self.task_names:
            yield Benchmarks("tasks", self.task_names, self.options)

    @property
    def prompt_tasks(self) -> list[EvaluationTask]:
        """The tasks that the recipe defines by prompts and metrics."""
        return [task for task in self.tasks if isinstance(task, EvaluationTask)]

    @property
    def task_names(self) -> list[str]:
        """The tasks with these names, as in `align eval`."""
        return [task for task in self.tasks if isinstance(task, str)]

    @model_validator(mode="after")
    def _prompts_fit(self) -> EvaluateStage:
        self.rollout.require_room_for_prompts()
        return self

    @model_validator(mode="after")
    def _tasks_can_run(self) -> EvaluateStage:
        if not self.task_names and self.options != TaskOptions():
            raise ValueError("options are settings of tasks such as gsm8k_cot, but tasks has none; remove options")
        if self.task_names and self.rollout.engine == "remote":
            raise ValueError(
                f"the task '{self.task_names[0]}' needs log-probabilities and stop strings, which rollout.engine "
                "remote does not return; set rollout.engine to vllm or huggingface"
            )
        return self

    @model_validator(mode="after")
    def _has_something_to_measure(self) -> EvaluateStage:
        if not (self.prompts or self.tasks):
            raise ValueError("an evaluate stage needs prompts or tasks; add one of them")
        if not self.prompts:
            for key, other in (("reference", ()), ("reward_model", self.preferences)):
                if getattr(self, key) is not None and not other:
                    raise ValueError(f"{key} needs completions, but prompts is empty; add prompts, or remove {key}")
        if self.reference is not None and self.rollout.temperature == 0:
            raise ValueError(
                "reference needs samples to estimate the KL, but rollout.temperature 0 is greedy decoding; remove "
                "reference, or set a temperature above 0"
            )
        return self


Stage = Annotated[
    PretrainStage
    | SftStage
    | SampleStage
    | RejectionSampleStage
    | RewardModelStage
    | DpoStage
    | KtoStage
    | PpoStage
    | EvaluateStage,
    Field(discriminator="kind"),
]
