"""Checks of one adopted family against transformers' own model, at a tiny size.

Each returns its largest error or raises `AssertionError`.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config.families import TABLE
from align.config.lora import Lora
from align.models.adopted.routing import RoutingPass
from align.models.experts import Experts
from align.models.family import family, routed_layers
from align.models.lora.adapters import add_lora
from align.models.lora.experts import adapt_by_row
from align.models.packing import Packing
from align.models.weights import check_weights, load_published, published_weights
from tests.tiny_families import VOCABULARY, save_tiny, tiny_config, tiny_model

LENGTHS = [5, 17, 30]
"""Tokens per sequence; the windows of the tiny families are 8."""
PROBE = [("embeddings", "model.embed_tokens.weight"), ("norm", "model.norm.weight")]


EXPERTS_KEY = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts")
"""Keys of configurations with the number of routed experts."""


def has_experts(config: Any) -> bool:
    """True for a mixture of experts, whatever align finds in its model."""
    counts = [value for key, value in config.to_dict().items() if EXPERTS_KEY.fullmatch(key)]
    return any(isinstance(count, int) and count > 1 for count in counts)


def require_dense(model: Any) -> None:
    """Raise `AssertionError` for a mixture of experts, whose routers align has not found."""
    assert not has_experts(model.config), (
        "align finds no routers in this mixture of experts, so it would train without balance loss, routing replay and "
        "router metrics"
    )


def rows(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def adopted(model_type: str, reference: Any, **changes: Any) -> Any:
    """align's model with the weights of transformers'."""
    model: Any = family(model_type).policy(tiny_config(model_type, **changes))
    model.load_state_dict(reference.state_dict())
    return model.eval()


def token_logprobs(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities [T - 1] of a sequence's tokens but the first, from transformers' logits."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def packed_logprobs(model: Any, sequences: list[Tensor], **options: Any) -> tuple[Tensor, Any]:
    """The same for all sequences of one packed row, from align's trunk and head; and the trunk's output."""
    packing = Packing([len(ids) for ids in sequences])
    tokens = torch.cat(sequences)
    output = model.model(input_ids=tokens[None], packing=packing, use_cache=False, **options)
    keep = torch.ones(len(tokens), dtype=torch.bool)
    keep[packing.last_S] = False
    following = torch.cat([ids[1:] for ids in sequences])
    logprobs, *_ = model.lm_head(output.last_hidden_state[0][keep], following, 1.0)
    return logprobs, output


def check_forward(model_type: str) -> float:
    """Packed log-probabilities equal those of transformers, sequence by sequence."""
    reference = tiny_model(model_type)
    model = adopted(model_type, reference)
    sequences = rows()
    with torch.no_grad():
        expected = torch.cat([token_logprobs(reference, ids) for ids in sequences])
        found, _ = packed_logprobs(model, sequences)
    error: float = (found - expected).abs().max().item()
    assert error < 1e-5, error
    return error


def check_bfloat16(model_type: str, folder: Path) -> float:
    """Mean error of packed log-probabilities in bf16, as a multiple of that of transformers' own model in bf16."""
    from transformers import AutoModelForCausalLM

    reference = save_tiny(model_type, folder)
    attention = reference_attention(reference.config)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attention)
    ours: Any = family(model_type).policy.from_pretrained(folder, dtype=torch.bfloat16)
    sequences = [ids for seed in range(4) for ids in rows(seed)]
    with torch.no_grad():
        exact, plain = (
            torch.cat([token_logprobs(model, ids) for ids in sequences]) for model in (reference, theirs.eval())
        )
        found, _ = packed_logprobs(ours.eval(), sequences)
    error: float = ((found.float() - exact).abs().mean() / (plain - exact).abs().mean()).item()
    assert error < 1.5, error
    return error


def check_packing(model_type: str) -> float:
    """Logits of a sequence do not depend on its neighbours in a packed row, and are those of the sequence alone."""
    model = adopted(model_type, tiny_model(model_type))
    sequences = rows()
    last = LENGTHS[2]
    with torch.no_grad():
        packed = [packed_logits(model, [*first, sequences[2]])[-last:] for first in (sequences[:2], rows(seed=2)[:2])]
        alone = packed_logits(model, sequences[2:])
        padded = torch.cat((sequences[2], sequences[0]))[None]
        mask = torch.ones_like(padded)
        mask[:, last:] = 0
        hidden = model.model(input_ids=padded, attention_mask=mask, use_cache=False).last_hidden_state
        unpacked = model.lm_head(hidden)[0, :last]
    error: float = max((logits - alone).abs().max().item() for logits in (*packed, unpacked))
    assert error < 1e-5, error
    return error


def packed_logits(model: Any, sequences: list[Tensor]) -> Tensor:
    """Logits [T, V] of the tokens of one packed row, without scale and soft cap."""
    packing = Packing([len(ids) for ids in sequences])
    hidden = model.model(input_ids=torch.cat(sequences)[None], packing=packing, use_cache=False).last_hidden_state
    logits: Tensor = model.lm_head(hidden)[0]
    return logits


def check_scorer(model_type: str) -> float:
    """Scores of a reward model's packed rows equal a linear head on transformers' own trunk, and those of transformers'
    classifier, if the family has one, which loads the saved reward model."""
    from transformers import AutoModelForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    reference = tiny_model(model_type)
    config = tiny_config(model_type, num_labels=1)
    scorer: Any = family(model_type).scorer(config).eval()
    trunk = {name: tensor for name, tensor in reference.state_dict().items() if name.startswith("model.")}
    missing, unexpected = scorer.load_state_dict(trunk, strict=False)
    assert (missing, unexpected) == (["score.weight"], [])
    sequences = rows()
    packing = Packing([len(ids) for ids in sequences])
    with torch.no_grad():
        hidden = scorer.model(input_ids=torch.cat(sequences)[None], packing=packing, use_cache=False).last_hidden_state
        found = scorer.score(hidden[0, packing.last_S])[:, 0]
        states = [reference.model(input_ids=ids[None], use_cache=False).last_hidden_state[0, -1] for ids in sequences]
        expected = [torch.stack(states) @ scorer.score.weight[0]]
        if model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            with tempfile.TemporaryDirectory() as folder:
                scorer.save_pretrained(folder)
                plain: Any = AutoModelForSequenceClassification.from_pretrained(
                    folder, dtype=torch.float32, attn_implementation=reference_attention(config)
                ).eval()
            expected.append(torch.cat([plain(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences]))
    error: float = max((found - scores).abs().max().item() for scores in expected)
    assert error < 1e-5, error
    return error


def check_gradients(model_type: str) -> float:
    """Gradients of the packed log-probabilities' sum equal those of transformers' logits; relative to the largest."""
    reference = tiny_model(model_type)
    model = adopted(model_type, reference)
    sequences = rows()
    torch.stack([token_logprobs(reference, ids).sum() for ids in sequences]).sum().backward()
    packed_logprobs(model, sequences)[0].sum().backward()
    worst = 0.0
    gradients = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        ours = gradients[name].grad
        if parameter.grad is None:
            assert ours is None or not ours.any(), name
            continue
        assert ours is not None, name
        scale = parameter.grad.abs().max().clamp_min(1e-3)
        worst = max(worst, ((ours - parameter.grad).abs().max() / scale).item())
    assert worst < 1e-4, worst
    return worst


def check_replay(model_type: str) -> float | None:
    """Replayed own choices change nothing, and other replayed experts are used exactly; None for a dense family."""
    model = adopted(model_type, tiny_model(model_type))
    layers = routed_layers(model.config)
    sequences = rows()
    with torch.no_grad():
        _, own = packed_logprobs(model, sequences, output_router_logits=True)
        if own.routed_experts is None:
            require_dense(model)
            assert all(layer.experts == 1 for layer in layers)
            return None
        _, again = packed_logprobs(model, sequences, routed_experts=own.routed_experts)
        wanted = torch.where(own.routed_experts < 0, -1, (own.routed_experts + 1) % layers[-1].experts)
        _, other = packed_logprobs(model, sequences, routed_experts=wanted)
    error: float = (again.last_hidden_state - own.last_hidden_state).abs().max().item()
    assert error < 1e-5, error
    assert (other.last_hidden_state - own.last_hidden_state).abs().max() > 0.01
    assert torch.equal(other.routed_experts, wanted)
    return error


def check_weighting(model_type: str) -> float | None:
    """The reported scores are those that the family weighs its experts by; None for a dense family.

    Whatever a router's normalisation and scaling, the weights of two experts of a token have the ratio of their scores.
    """
    model = adopted(model_type, tiny_model(model_type))
    routing = RoutingPass(None)
    worst = 0.0
    with torch.no_grad():
        model.model(input_ids=rows()[2][None], use_cache=False, routing=routing)
        if not routing.routings:
            require_dense(model)
        for found in routing.routings.values():
            scores = found.scores_TE.softmax(-1).gather(1, found.chosen_Tk)
            ratios = found.weights_Tk / found.weights_Tk[:, :1], scores / scores[:, :1]
            worst = max(worst, (ratios[0] / ratios[1] - 1).abs().max().item())
    assert worst < 1e-4, f"{worst}; experts are weighed by other scores than those reported: is Facts.sigmoid right?"
    return worst if routing.routings else None


def check_balance(model_type: str) -> float | None:
    """The balance loss of a packed row and of a padded batch is the mean over layers of E sum(load_e p_e), computed
    here from transformers' own routers, sequence by sequence; relative. None for a dense family."""
    reference = tiny_model(model_type)
    model = adopted(model_type, reference)
    sequences = rows()
    tokens = max(LENGTHS)
    ids = torch.stack([torch.cat((one, one.new_zeros(tokens - len(one)))) for one in sequences])
    mask = torch.stack([(torch.arange(tokens) < length).long() for length in LENGTHS])
    with torch.no_grad():
        packed = packed_logprobs(model, sequences, output_router_logits=True)[1].router
        if packed is None:
            require_dense(model)
            return None
        padded = model.model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True).router
        expected = balance_by_hand(reference, sequences, sigmoid=TABLE[model_type].sigmoid)
    error: float = max(abs(float(report.balance_loss) / expected - 1) for report in (packed, padded))
    assert error < 1e-5, error
    return error


def balance_by_hand(reference: Any, sequences: list[Tensor], *, sigmoid: bool) -> float:
    """Mean over layers of E sum(load_e p_e) over all tokens, from the outputs of transformers' routers."""
    router = reference.model._can_record_outputs["router_logits"].target_class
    seen: dict[Any, list[Any]] = {module: [] for module in reference.modules() if isinstance(module, router)}
    handles = [module.register_forward_hook(lambda module, _, output: seen[module].append(output)) for module in seen]
    for ids in sequences:
        reference.model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    losses = []
    for module, outputs in seen.items():
        experts, chosen = module.num_experts, []
        logits = torch.cat([next(part for part in output if is_logits(part, experts)) for output in outputs])
        for output in outputs:
            indices = next((part for part in output if not part.is_floating_point()), None)
            # Llama 4's routers return scores, which are zero for the other experts.
            chosen.append(output[0].nonzero()[:, 1] if indices is None else indices.flatten())
        scores = logits.sigmoid() if sigmoid else logits.exp()
        p = scores / scores.sum(1, keepdim=True)
        load = torch.cat(chosen).bincount(minlength=experts) / torch.cat(chosen).numel()
        losses.append(experts * float((load * p.mean(0)).sum()))
    return sum(losses) / len(losses)


def is_logits(part: Tensor, experts: int) -> bool:
    """True for values of all experts that are not zero for most of them, as scores of chosen experts are."""
    return part.is_floating_point() and part.shape[1] == experts and bool((part != 0).all())


def check_names(model_type: str, folder: Path) -> int:
    """Published names, shapes and values are those of transformers' checkpoint, in both directions; their number."""
    from safetensors.torch import load_file

    reference = save_tiny(model_type, folder)
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    policy: Any = family(model_type).policy
    model = policy.from_pretrained(folder, dtype=torch.float32).eval()
    check_weights(folder, model.config)
    published = dict(published_weights(model))
    assert published.keys() == stored.keys(), published.keys() ^ stored.keys()
    assert all(torch.equal(published[name], stored[name]) for name in stored)
    empty: Any = policy(model.config)
    load_published(empty, iter(stored.items()))
    expected = reference.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in empty.state_dict().items())
    return len(stored)


def check_export(model_type: str, folder: Path) -> float:
    """A saved policy loads in plain transformers with the same log-probabilities."""
    from transformers import AutoModelForCausalLM

    save_tiny(model_type, folder / "source")
    kind = family(model_type)
    policy: Any = kind.policy.from_pretrained(folder / "source", dtype=torch.float32)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.01)
        policy.save_pretrained(folder / "saved")
        plain: Any = AutoModelForCausalLM.from_pretrained(
            folder / "saved", dtype=torch.float32, attn_implementation=reference_attention(policy.config)
        )
        assert type(plain).__module__.startswith("transformers.")
        assert "align" not in type(plain).__mro__[1].__module__
        found = token_logprobs(plain.eval(), rows()[2])
        error: float = (found - token_logprobs(policy.eval(), rows()[2])).abs().max().item()
    assert error < 1e-5, error
    return error


def reference_attention(config: Any) -> str:
    """transformers' attention that computes soft caps and sinks."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) or config.model_type == "gpt_oss" else "sdpa"


def check_lora(model_type: str) -> float:
    """Merged adapters, and adapters applied row by row, equal PEFT's own; every trained parameter has a gradient."""
    model = adopted(model_type, tiny_model(model_type))
    has_experts = any(isinstance(module, Experts) for module in model.modules())
    wrapped = add_lora(model, Lora(rank=2, experts=has_experts, train_router=True), task="CAUSAL_LM")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    with torch.no_grad():
        found, _ = packed_logprobs(wrapped.get_base_model(), rows())
    merged = {name: tensor.clone() for name, tensor in published_weights(wrapped)}
    adapt_by_row(wrapped)
    by_row, _ = packed_logprobs(wrapped.get_base_model(), rows())
    by_row.sum().backward()
    missing = [name for name, p in wrapped.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, missing[0]
    plain: Any = family(model_type).policy(tiny_config(model_type)).eval()
    load_published(plain, iter(merged.items()))
    with torch.no_grad():
        expected, _ = packed_logprobs(plain, rows())
        base, _ = packed_logprobs(adopted(model_type, tiny_model(model_type)), rows())
    error: float = max((found - expected).abs().max().item(), (by_row - found).abs().max().item())
    assert error < 1e-4, error
    assert (expected - base).abs().max() > 1e-2
    return error
