"""Cross entropy and log-probabilities from hidden states, without materialising the [N, V] logits.

Logits are computed for one chunk of tokens at a time. Cross entropy computes both of its gradients during the forward
pass. For log-probabilities the forward pass computes d logprob / d hidden per token; the gradient of the weight, if it
is needed, depends on the incoming gradient and takes a second pass over the chunks.

Shapes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 96 * 2**20
"""Size of one chunk's fp32 logits."""

IGNORED = -100


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, ignore_index: int = IGNORED, count: float | None = None
) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T)[target] over targets that are not ignored, divided by `count`.

    The result is a scalar in fp32, 0 if all targets are ignored. count: by default the targets that are not ignored.
    """
    kept = targets_N != ignore_index
    loss: Tensor = _CrossEntropy.apply(hidden_ND[kept], weight_VD, targets_N[kept])
    return loss / (kept.sum().clamp_min(1) if count is None else count)


def linear_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, tokens_N: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature)[token] and the distribution's entropy in nats, both [N] in fp32.

    Only the log-probabilities are differentiable.
    """
    output: tuple[Tensor, Tensor] = _Logprobs.apply(hidden_ND, weight_VD, tokens_N, temperature)
    return output


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
        """(logits - max, their exponentials, the exponentials' sum [n, 1]) of `rows`; overwritten by the next call."""
        count = rows.stop - rows.start
        shifted, exponentials = self.logits[:count], self.exponentials[:count]
        if self.hidden.dtype == torch.float32:
            torch.mm(self.hidden[rows], self.weight.T, out=shifted)
        else:
            shifted.copy_(self.hidden[rows] @ self.weight.T)
        if self.temperature != 1.0:
            shifted.div_(self.temperature)
        shifted.sub_(shifted.amax(-1, keepdim=True))
        torch.exp(shifted, out=exponentials)
        return shifted, exponentials, exponentials.sum(-1, keepdim=True)


class _CrossEntropy(torch.autograd.Function):
    """Sum of -log p[target]; the forward pass computes the gradients too."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
        d_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        chunks = _Chunks(hidden_ND, weight_VD)
        for rows in chunks:
            targets = targets_N[rows, None]
            shifted, exponentials, total = chunks.softmax(rows)
            loss += (total.log() - shifted.gather(1, targets)).sum()
            d_logits = exponentials.div_(total).scatter_add_(1, targets, torch.full_like(total, -1.0))
            d_logits = d_logits.to(weight_VD.dtype)
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ weight_VD
            if d_weight is not None:
                _add_outer(d_weight, d_logits, hidden_ND[rows])
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype),
            None,
        )


class _Logprobs(torch.autograd.Function):
    """Log-probabilities and entropies; d logprob / d hidden = (weight[token] - sum_v p_v weight[v]) / temperature."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, tokens_N: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy = (hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32) for _ in range(2))
        direction = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        chunks = _Chunks(hidden_ND, weight_VD, temperature)
        for rows in chunks:
            tokens = tokens_N[rows, None]
            shifted, exponentials, total = chunks.softmax(rows)
            logprobs[rows] = (shifted.gather(1, tokens) - total.log())[:, 0]
            # E[logit] = sum_v exp_v logit_v / total, as a batched product so that no third buffer is needed.
            expected = torch.bmm(exponentials[:, None], shifted[:, :, None])[:, 0] / total
            entropy[rows] = (total.log() - expected)[:, 0]
            if direction is not None:
                mean = exponentials.to(weight_VD.dtype) @ weight_VD / total.to(weight_VD.dtype)
                direction[rows] = (weight_VD[tokens_N[rows]] - mean) / temperature
        ctx.save_for_backward(hidden_ND, weight_VD, tokens_N, direction)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_ND, weight_VD, tokens_N, direction = ctx.saved_tensors
        d_hidden = None if direction is None else direction * grad_N[:, None].to(direction.dtype)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
            chunks = _Chunks(hidden_ND, weight_VD, ctx.temperature)
            for rows in chunks:
                _, exponentials, total = chunks.softmax(rows)
                grad = grad_N[rows, None] / ctx.temperature
                d_logits = exponentials.mul_(-grad / total).scatter_add_(1, tokens_N[rows, None], grad)
                _add_outer(d_weight, d_logits.to(weight_VD.dtype), hidden_ND[rows])
            d_weight = d_weight.to(weight_VD.dtype)
        return d_hidden, d_weight, None, None


def _add_outer(sum_VD: Tensor, left_NV: Tensor, right_ND: Tensor) -> None:
    """sum += left.T @ right, in fp32."""
    if left_NV.dtype == torch.float32:
        sum_VD.addmm_(left_NV.T, right_ND)
    else:
        sum_VD.add_(left_NV.T @ right_ND)
