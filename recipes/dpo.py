"""Direct preference optimisation and its variants: make the chosen completion likelier than the rejected one."""

from __future__ import annotations

from typing import Any, get_args

from torch import Tensor
from trl import DPOConfig, DPOTrainer

from align.config.stages import DpoStage, TrlLossType
from align.data.prepare import prepare_dpo_pairs
from align.losses.preference import preference_loss, sft_loss
from align.models.lora.adapters import AnyModel, without_reference_adapter
from align.run.context import StageContext, StageResult
from align.train.checkpoint import load_policy, load_tokenizer
from align.train.fit import train_and_save
from align.train.shared_batches import ROW_WEIGHT
from align.train.trl import AlignTrainer, trainer_arguments

BY_TRL = frozenset(get_args(TrlLossType))
"""Values of `loss_type` that TRL computes; the others are computed by `align.losses.preference`."""

CHOSEN_WEIGHT = "chosen_weight"
"""Key in a micro-batch for its weight in a mean over the step's chosen tokens."""


class AlignDpoTrainer(AlignTrainer, DPOTrainer):  # type: ignore[misc]  # both have an attribute `optimizer`
    """TRL's DPO trainer for pairs that are already tokenised, with additional losses from `align.losses.preference`.

    TRL averages the SFT term over the chosen tokens of each micro-batch. Here each micro-batch's term is weighted by
    its number of chosen tokens, so that the step's term is the mean over all chosen tokens.
    """

    align_stage: DpoStage

    def __init__(self, *, stage: DpoStage, model: AnyModel, **kwargs: Any):
        with without_reference_adapter(model):
            super().__init__(stage=stage, model=model, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        micros, items = super().get_batch_samples(*args, **kwargs)
        if micros and self.align_stage.sft_coef:
            self._set_weights(micros, CHOSEN_WEIGHT, [int(chosen_mask(micro).sum()) for micro in micros])
        return micros, items

    def compute_loss(self, model: AnyModel, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        row_weight = inputs.get(ROW_WEIGHT, 1.0)
        chosen_weight = inputs.pop(CHOSEN_WEIGHT, row_weight)
        if self.align_stage.sft_coef:
            # `AlignTrainer.compute_loss` multiplies the sum of both terms by ROW_WEIGHT.
            relative = chosen_weight / row_weight if row_weight else 0.0
            self.loss_weights = [1.0, self.align_stage.sft_coef * relative]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _compute_loss(self, model: AnyModel, inputs: dict[str, Any], return_outputs: bool) -> Any:
        stage = self.align_stage
        if stage.loss_type in BY_TRL:
            return super()._compute_loss(model, inputs, return_outputs)
        completions = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(completions == 0, -100)
        passed = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        logprobs_BT = model(**passed, use_cache=False, labels=labels, fused_lm_head=True).log_probs
        tensors = by_side(logprobs_BT.sum(1), "logprobs_B") | by_side(completions[:, 1:].sum(1), "tokens_B")
        if stage.needs_reference:
            references = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            tensors |= dict(zip(("ref_chosen_logprobs_B", "ref_rejected_logprobs_B"), references, strict=True))
        loss, metrics = preference_loss(stage.loss_type, tensors, {"beta": stage.beta, **stage.loss_options})
        if stage.sft_coef:
            mask = chosen_mask(inputs)
            loss = loss + self.loss_weights[1] * sft_loss(logprobs_BT[: len(mask)], mask)[0]
        metrics |= {f"logps/{side}": tensors[f"{side}_logprobs_B"].detach().mean() for side in ("chosen", "rejected")}
        mode = "train" if model.training else "eval"
        for name, value in self._mean_over_ranks(metrics).items():
            self._metrics[mode][name].append(value)
        return loss

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        """Return the rows unchanged.

        `run` sets `precompute_ref_log_probs` only for losses without a reference, to keep TRL from loading a reference.
        """
        return dataset


def by_side(values: Tensor, name: str) -> dict[str, Tensor]:
    """The two halves of a batch, with the keys "chosen_" + name and "rejected_" + name."""
    return dict(zip((f"chosen_{name}", f"rejected_{name}"), values.chunk(2), strict=True))


def chosen_mask(inputs: dict[str, Any]) -> Tensor:
    """1 on the predicted tokens of the chosen completions, [B, T - 1]."""
    mask: Tensor = inputs["completion_mask"][:, 1:].chunk(2)[0]
    return mask


def run(stage: DpoStage, context: StageContext) -> StageResult:
    parent = context.checkpoint(stage.init_from)
    tokenizer = load_tokenizer(parent)
    data = prepare_dpo_pairs(stage.data, tokenizer, seed=context.seed, stage_dirs=context.stage_dirs)
    context.say(f"  data: {data.report.summary()}")
    dtype, parallel = context.trained_dtype(stage.lora), context.recipe.parallel
    model = load_policy(parent, dtype, parallel, stage.lora)
    # With LoRA the reference is the model with its adapters disabled. Otherwise a second copy is loaded.
    ref_model = load_policy(parent, dtype, parallel) if stage.needs_reference and not stage.lora else None
    trainer = AlignDpoTrainer(
        stage=stage,
        model=model,
        ref_model=ref_model,
        args=DPOConfig(
            **trainer_arguments(stage, context),
            **loss_arguments(stage),
            router_aux_loss_coef=0.0,
            max_length=stage.data.max_length,
        ),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=tokenizer,
    )
    return train_and_save(trainer, data.report, context)


def loss_arguments(stage: DpoStage) -> dict[str, Any]:
    """Keyword arguments for `DPOConfig` that select the loss."""
    arguments: dict[str, Any] = {"beta": stage.beta}
    if stage.loss_type in BY_TRL:
        losses = [stage.loss_type, "sft"] if stage.sft_coef else [stage.loss_type]
        arguments |= {"loss_type": losses, **stage.loss_options}
    if not stage.needs_reference:
        arguments["precompute_ref_log_probs"] = True
    return arguments
