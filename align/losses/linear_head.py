"""Cross entropy and log-probabilities from hidden states, without materialising the [N, V] logits.

Logits are computed for one chunk of tokens at a time. Cross entropy computes the gradients of hidden states and weight
during the forward pass. For log-probabilities the forward pass computes d logprob / d hidden per token. The gradient of
the weight depends on the incoming gradient; the backward pass computes it in a second pass over the chunks, if needed.

In bf16 the operands of matrix products are bf16: hidden states, weight and the gradient of the logits. Logits, softmax
and the sum of the weight's gradient over the chunks are fp32. The gradient of the logits, including its one-hot term,
is computed in fp32 and then rounded once. As p(token) approaches 1, the two terms of
d logprob / d hidden = weight[token] - sum_v p_v weight[v] become equal, so they must not be rounded before they are
subtracted. Under autocast the operands of the products have autocast's dtype.

Shapes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 96 * 2**20
"""Maximum size of one chunk's fp32 logits in bytes. A chunk has at least one token."""

BLOCK = 512
"""Rows of the weight that a CPU converts to fp32 at a time. At a hidden size of 1,024 they take 2 MiB, which fits in
the L2 cache."""


class TokenScores(NamedTuple):
    """Results of the head for N tokens; only the log-probabilities are differentiable.

    logprobs_N: log softmax(hidden @ weight.T / temperature)[token], in fp32.
    entropy_N: entropy of the distribution in nats, in fp32.
    top1_N: True if no token is more probable.
    mean_logits_N: mean of the logits over the vocabulary, in fp32; None unless asked for.
    """

    logprobs_N: Tensor
    entropy_N: Tensor
    top1_N: Tensor
    mean_logits_N: Tensor | None = None


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, tokens_N: Tensor, count: float | None = None, temperature: float = 1.0
) -> tuple[Tensor, TokenScores]:
    """Sum of -log softmax(hidden @ weight.T / temperature)[token] divided by `count`, and the scores of the tokens.

    The sum is a scalar in fp32; the scores have no gradient. It takes three matrix products of the size of the logits,
    one fewer than `linear_logprobs`, because the loss has the same gradient for every log-probability.

    count: N by default.
    """
    loss, *scores = _CrossEntropy.apply(hidden_ND, weight_VD, tokens_N, temperature, _product_dtype(hidden_ND))
    return loss / (max(1, len(tokens_N)) if count is None else count), TokenScores(*scores)


def linear_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, tokens_N: Tensor, temperature: float = 1.0, *, mean_logits: bool = False
) -> TokenScores:
    """Log-probabilities of the tokens, the distributions' entropies, and whether the tokens are the most probable."""
    scores = TokenScores(*_Logprobs.apply(hidden_ND, weight_VD, tokens_N, temperature, _product_dtype(hidden_ND)))
    if not mean_logits:
        return scores
    mean_D = weight_VD.detach().mean(0, dtype=torch.float32)
    return scores._replace(mean_logits_N=hidden_ND.detach().float() @ mean_D / temperature)


class LogitTransform(NamedTuple):
    """Scale and soft cap of logits: cap * tanh(scale * logits / cap), or scale * logits without a cap."""

    scale: float = 1.0
    cap: float | None = None


def transformed_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    tokens_N: Tensor,
    temperature: float,
    transform: LogitTransform,
    *,
    mean_logits: bool = False,
) -> TokenScores:
    """Like `linear_logprobs`, for a head with a bias or a soft cap.

    Gradients come from autograd, which is slower. Logits are computed for one chunk of tokens at a time, and again in
    the backward pass. Products are computed in fp32.
    """

    def chunk(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = torch.nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
            logits = logits * transform.scale
            if transform.cap is not None:
                logits = transform.cap * (logits / transform.cap).tanh()
            logprobs = (logits / temperature).log_softmax(-1)
            entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
            own = logprobs.gather(1, tokens[:, None])[:, 0]
            top1 = own.detach() == logprobs.detach().amax(-1)
            means = (logits.detach().mean(-1) / temperature,) if mean_logits else ()
            return own, entropy, top1, *means

    size = max(1, CHUNK_BYTES // (4 * len(weight_VD)))
    parts = [
        checkpoint(chunk, hidden, weight_VD, bias_V, tokens, use_reentrant=False)
        for hidden, tokens in zip(hidden_ND.split(size), tokens_N.split(size), strict=True)
    ]
    return TokenScores(*(torch.cat(values) for values in zip(*parts, strict=True)))


def linear_logits(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """hidden @ weight.T [N, V], computed and returned in fp32."""
    logits = hidden_ND.new_empty(len(hidden_ND), len(weight_VD), dtype=torch.float32)
    _write_logits(hidden_ND, weight_VD, logits)
    return logits


def _write_logits(hidden_ND: Tensor, weight_VD: Tensor, out_NV: Tensor) -> None:
    """Write hidden @ weight.T to `out_NV` in fp32, without rounding the product to the operands' dtype."""
    if hidden_ND.dtype == torch.float32:
        torch.mm(hidden_ND, weight_VD.T, out=out_NV)
    elif hidden_ND.is_cuda:
        torch.mm(hidden_ND, weight_VD.T, out_dtype=torch.float32, out=out_NV)
    else:  # torch has no bf16 product with fp32 output on other devices
        wide_ND = hidden_ND.float()
        for weight_BD, out_NB in zip(weight_VD.split(BLOCK), out_NV.split(BLOCK, dim=1), strict=True):
            torch.mm(wide_ND, weight_BD.float().T, out=out_NB)


def _add_outer(sum_VD: Tensor, left_NV: Tensor, right_ND: Tensor) -> None:
    """Add left.T @ right to `sum_VD` in fp32, without rounding the product to the operands' dtype."""
    if left_NV.dtype == torch.float32:
        sum_VD.addmm_(left_NV.T, right_ND)
    elif left_NV.is_cuda:
        torch.addmm(sum_VD, left_NV.T, right_ND, out_dtype=torch.float32, out=sum_VD)
    else:
        wide_ND = right_ND.float()
        for sum_BD, left_NB in zip(sum_VD.split(BLOCK), left_NV.split(BLOCK, dim=1), strict=True):
            sum_BD.addmm_(left_NB.float().T, wide_ND)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the products' operands: autocast's dtype under autocast, otherwise that of `hidden`."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _Chunks:
    """Softmax of the logits chunk by chunk, in two reused buffers."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, temperature: float = 1.0):
        self.hidden, self.weight, self.temperature = hidden_ND, weight_VD, temperature
        self.size = max(1, min(len(hidden_ND), CHUNK_BYTES // (4 * len(weight_VD))))
        self.logits = hidden_ND.new_empty(self.size, len(weight_VD), dtype=torch.float32)
        self.exponentials = torch.empty_like(self.logits)

    def __iter__(self) -> Any:
        for start in range(0, len(self.hidden), self.size):
            yield slice(start, min(start + self.size, len(self.hidden)))

    def softmax(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(logits - max, their exponentials, the exponentials' sum [n, 1]) of `rows`.

        The next call overwrites the first two.
        """
        count = rows.stop - rows.start
        shifted, exponentials = self.logits[:count], self.exponentials[:count]
        _write_logits(self.hidden[rows], self.weight, shifted)
        if self.temperature != 1.0:
            shifted.div_(self.temperature)
        shifted.sub_(shifted.amax(-1, keepdim=True))
        torch.exp(shifted, out=exponentials)
        return shifted, exponentials, exponentials.sum(-1, keepdim=True)


class _Scores:
    """Buffers for the scores of N tokens, written chunk by chunk."""

    def __init__(self, hidden_ND: Tensor):
        self.logprobs, self.entropy = (hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32) for _ in range(2))
        self.top1 = hidden_ND.new_empty(len(hidden_ND), dtype=torch.bool)

    def write(self, rows: slice, tokens: Tensor, shifted: Tensor, exponentials: Tensor, total: Tensor) -> None:
        """Write the scores of `rows`, given the result of `_Chunks.softmax`; tokens: [n, 1]."""
        own = shifted.gather(1, tokens)
        self.logprobs[rows] = (own - total.log())[:, 0]
        self.top1[rows] = own[:, 0] == 0
        # E[shifted] = sum_v exp_v shifted_v / total, as a batched product so that no third buffer is needed.
        expected = torch.bmm(exponentials[:, None], shifted[:, :, None])[:, 0] / total
        self.entropy[rows] = (total.log() - expected)[:, 0]


class _CrossEntropy(torch.autograd.Function):
    """(sum of -log p[token], log-probabilities, entropies, top 1); the forward pass computes the gradients too."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, tokens_N: Tensor, temperature: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
        d_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        ctx.weight_dtype = weight_VD.dtype
        scores = _Scores(hidden_ND)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        chunks = _Chunks(hidden_ND, weight_VD, temperature)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for rows in chunks:
                tokens = tokens_N[rows, None]
                shifted, exponentials, total = chunks.softmax(rows)
                scores.write(rows, tokens, shifted, exponentials, total)
                if d_hidden is None and d_weight is None:
                    continue
                d_logits = exponentials.div_(total * temperature)
                d_logits = d_logits.scatter_add_(1, tokens, torch.full_like(total, -1 / temperature)).to(dtype)
                if d_hidden is not None:
                    d_hidden[rows] = (d_logits @ weight_VD).to(d_hidden.dtype)
                if d_weight is not None:
                    _add_outer(d_weight, d_logits, hidden_ND[rows])
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(scores.logprobs, scores.entropy, scores.top1)
        return -scores.logprobs.sum(), scores.logprobs, scores.entropy, scores.top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else _scaled(d_hidden, grad.view(1, 1)),
            None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


class _Logprobs(torch.autograd.Function):
    """(log-probabilities, entropies, top 1).

    d logprob / d hidden = (weight[token] - sum_v p_v weight[v]) / temperature.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, tokens_N: Tensor, temperature: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores = _Scores(hidden_ND)
        direction = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        hidden, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
        chunks = _Chunks(hidden, weight, temperature)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in chunks:
                tokens = tokens_N[rows, None]
                shifted, exponentials, total = chunks.softmax(rows)
                scores.write(rows, tokens, shifted, exponentials, total)
                if direction is None:
                    continue
                if dtype == torch.float32:
                    # In fp32 this difference is accurate enough. It takes one pass fewer over the chunk than the
                    # gradient of the logits.
                    mean = exponentials @ weight / total
                    direction[rows] = (weight[tokens_N[rows]] - mean) / temperature
                else:
                    d_logits = exponentials.div_(total * -temperature)
                    d_logits.scatter_add_(1, tokens, torch.full_like(total, 1 / temperature))
                    direction[rows] = (d_logits.to(dtype) @ weight).to(direction.dtype)
        ctx.save_for_backward(hidden, weight_VD, tokens_N, direction)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(scores.entropy, scores.top1)
        return scores.logprobs, scores.entropy, scores.top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, *others: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_ND, weight_VD, tokens_N, direction = ctx.saved_tensors
        d_hidden = None if direction is None else _scaled(direction, grad_N[:, None])
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
            chunks = _Chunks(hidden_ND, weight_VD.to(hidden_ND.dtype), ctx.temperature)
            for rows in chunks:
                _, exponentials, total = chunks.softmax(rows)
                grad = grad_N[rows, None] / ctx.temperature
                d_logits = exponentials.mul_(-grad / total).scatter_add_(1, tokens_N[rows, None], grad)
                _add_outer(d_weight, d_logits.to(hidden_ND.dtype), hidden_ND[rows])
            d_weight = d_weight.to(weight_VD.dtype)
        return d_hidden, d_weight, None, None, None


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor in fp32, rounded once to the gradient's dtype."""
    return (gradient * factor).to(gradient.dtype)
