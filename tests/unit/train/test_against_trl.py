"""Packed passes against TRL's trainers, which pad: the loss and every gradient of a step are equal."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from align.config.stages import DpoStage
from align.data.tokenizer import train_tokenizer
from align.models.family import family
from align.train.objectives import BradleyTerry, CrossEntropy, Objective, Preference, can_share
from align.train.passes import PackedPass, parts_of_rank, totals_of
from tests.tiny_families import tiny_config
from tests.unit.train.one_step import SIZES, WORDS

FAMILIES = ("hunyuan", "llama", "qwen3_moe")
PROMPTS, ANSWERS, OTHERS = (5, 1, 12, 3), (4, 9, 1, 17), (7, 2, 6, 17)
"""Tokens of the prompt, the answer and the rejected answer of each row."""


def model_of(model_type: str, *, scorer: bool) -> Any:
    known = family(model_type)
    if model_type == "hunyuan":
        config = known.config(vocab_size=300, pad_token_id=0, router_aux_loss_coef=0.0, **SIZES)
    else:
        config = tiny_config(model_type)
    config.num_labels = 1
    torch.manual_seed(0)
    return (known.scorer if scorer else known.policy)(config).eval()


def rows() -> list[dict[str, list[int]]]:
    """Rows with the columns of all trainers. In the last one, the answers begin with the same two tokens."""
    draw = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 256, (count,), generator=draw).tolist()

    made = []
    for sizes in zip(PROMPTS, ANSWERS, OTHERS, strict=True):
        prompt, chosen, rejected = map(tokens, sizes)
        if sizes == (3, 17, 17):
            rejected[:2] = chosen[:2]
        labels = [-100] * len(prompt) + [-100 if number % 5 == 2 else token for number, token in enumerate(chosen)]
        made.append({"input_ids": prompt + chosen, "labels": labels, "prompt_ids": prompt})
        made[-1] |= {"chosen_ids": chosen, "rejected_ids": rejected}
        made[-1] |= {"chosen_labels": chosen, "rejected_labels": rejected}
    return made


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def theirs(kind: str, model: Any, reference: Any, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of one padded batch in TRL's trainer."""
    from datasets import Dataset

    shared = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "max_length": None}
    columns = {"sft": ["input_ids", "labels"], "reward": ["chosen_ids", "rejected_ids"]}
    data = [dict(row) for row in rows()]
    if kind == "reward":
        data = [{name: row["prompt_ids"] + row[name] for name in columns["reward"]} for row in data]
    made = Dataset.from_list(data)
    tokenizer = train_tokenizer([" ".join(WORDS)], 300)
    given = {"train_dataset": made, "processing_class": tokenizer}
    trainer: Any
    if kind == "sft":
        config: Any = SFTConfig(**shared, router_aux_loss_coef=0.0, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = SFTTrainer(model, args=config, **given)
    elif kind == "reward":
        trainer = RewardTrainer(model, args=RewardConfig(**shared, center_rewards_coefficient=0.3), **given)
    else:
        tokenised = type("Tokenised", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *_, **__: dataset})
        loss = {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
        config = DPOConfig(**shared, **loss, router_aux_loss_coef=0.0)
        trainer = tokenised(model, ref_model=reference, args=config, **given)
    batch = trainer.data_collator(data)
    result = trainer.compute_loss(model, batch)
    result.backward()
    return result.item(), gradients(model)


def ours(
    objective: Objective, model: Any, data: list[dict[str, list[int]]], capacity: int
) -> tuple[float, dict[str, torch.Tensor]]:
    examples = [objective.example(row, number) for number, row in enumerate(data)]
    total = torch.zeros(())
    for part in parts_of_rank(examples, capacity, 0, 1):
        packed = PackedPass([examples[item] for item in part.items], torch.device("cpu"))
        loss = objective.measure(model, packed, totals_of(examples)).loss
        loss.backward()
        total += loss.detach()
    return total.item(), gradients(model)


def sequence_logprob(model: Any, prompt: list[int], completion: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum().item()


@pytest.mark.parametrize("capacity", [1000, 40, 1])
@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_passes_have_the_loss_and_gradient_of_padded_batches(
    model_type: str, kind: str, capacity: int, tmp_path: Path, tolerance: float
) -> None:
    model, data = model_of(model_type, scorer=kind == "reward"), rows()
    reference = deepcopy(model)
    if kind == "dpo":
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    objective: Any = CrossEntropy()
    if kind == "reward":
        objective = BradleyTerry(0.3)
        data = [{name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")} for row in data]
    if kind == "dpo":
        stage = DpoStage.model_validate(
            {"kind": "dpo", "data": {"train": [{"path": "x.jsonl"}]}, "beta": 0.3, "sft_coef": 0.5}
        )
        sides = ("chosen_ids", "rejected_ids")
        known = [[sequence_logprob(reference, row["prompt_ids"], row[side]) for side in sides] for row in data]
        objective = Preference(stage, np.array(known))
    padded, expected = theirs(kind, deepcopy(model), reference, tmp_path)
    loss, found = ours(objective, model, data, capacity)
    assert loss == pytest.approx(padded, rel=tolerance)
    assert found.keys() == expected.keys()
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm().item()
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype == torch.float32
        assert (found[name] - gradient).norm().item() < tolerance * whole, name


def test_only_labelled_tokens_of_an_answer_count() -> None:
    """Witness: log-probabilities by the model, summed by hand over the tokens with a label."""
    model, row = model_of("llama", scorer=False), rows()[3]
    sums = []
    for side in ("chosen", "rejected"):
        row[f"{side}_labels"] = [-100 if n in (1, 4, 5) else token for n, token in enumerate(row[f"{side}_ids"])]
        ends = [n for n in range(17) if n not in (1, 4, 5)]
        ids, start = row[f"{side}_ids"], row["prompt_ids"]
        sums.append(sum(sequence_logprob(model, start + ids[:n], ids[n : n + 1]) for n in ends))
    stage = DpoStage.model_validate({"kind": "dpo", "data": {"train": [{"path": "x.jsonl"}]}, "beta": 0.3})
    loss, _ = ours(Preference(stage, np.zeros((1, 2))), model, [row], 1000)
    assert loss == pytest.approx(np.log1p(np.exp(-0.3 * (sums[0] - sums[1]))), rel=1e-5)


def test_tokens_that_both_sides_share_are_computed_once() -> None:
    row = rows()[3]
    pair = Preference(None).example(row, 0)  # type: ignore[arg-type]  # the stage is not needed
    assert pair.shared == 3 + 2  # prompt and the common start of the answers
    assert pair.tokens == 2 * (3 + 17)
    assert PackedPass([pair], torch.device("cpu")).tokens_1P.shape == (1, 40 - 5)


def test_nothing_is_shared_under_a_capacity_limit() -> None:
    config = family("hunyuan").config
    assert can_share(config(**SIZES))
    assert not can_share(config(moe_drop_tokens=True, **SIZES))
