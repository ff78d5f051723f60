"""The forward pass of a `Mamba2ForCausalLM` for training on CPUs. It uses the library's parameters and none of its code.

Mamba-2: Dao and Gu, arXiv 2405.21060. One group (B and C are shared by all heads), no biases but the convolution's. The
scan itself (`chunked_scan`) takes any number of groups.

Shapes: B batch, T tokens, D width, E = 2 D inner width, H heads of P dims, G groups, N state size, V pieces; M chunks of
Q = CHUNK tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # tokens whose mutual influence is one matrix
ROWS = 512  # tokens whose logits are in memory at once
SHAPES = 64  # a function is compiled for so many shapes; torch's own limit is 8, and more run uncompiled


class Forward:
    """Hidden states of the library's model, with gradients to its parameters.

    compiled: torch.compile fuses the elementwise work between matrix products, once for all blocks and each input shape.
    dtype: the dtype of the operands of matrix products.
    """

    def __init__(self, model: Any, compiled: bool = False, dtype: torch.dtype = torch.float32) -> None:
        config = model.config
        if config.n_groups != 1 or config.use_bias or config.hidden_act != "silu":
            raise ValueError("this forward pass knows only one group, no biases, and SiLU")
        self.model, self.head = model, model.get_output_embeddings().weight  # (V, D)
        self.kernels = Kernels().compiled() if compiled else Kernels()
        self.dtype = dtype

    def states(self, ids: Tensor) -> Iterator[Tensor]:
        """ids (B, T) → the hidden state after each block, (B, T, D)."""
        h = self.model.backbone.embeddings(ids)
        for block in self.model.backbone.layers:
            h = h + self._block(block, h)
            yield h

    def _block(self, block: Any, h: Tensor) -> Tensor:
        """What a block adds to its input h (B, T, D): norm, then Mamba-2's mixer from an empty state."""
        mixer, tokens = block.mixer, h.shape[1]
        inner, heads = mixer.intermediate_size, mixer.num_heads
        taps = mixer.conv1d.weight[:, 0].T.contiguous()  # (W, C), contiguous, since strided reads are several times slower
        before = len(taps) - 1
        # The convolution reads zeros before the first token: without biases, the projection of zeros is zeros. Zeros after
        # the last token fill its chunk, and no token sees them.
        h = F.pad(h, (0, 0, before, -tokens % CHUNK))
        normed = self.kernels.norm(h, block.norm.variance_epsilon, self.dtype)
        projected = F.linear(normed, self._after(block.norm, mixer.in_proj))
        z, xBC, dt = projected.split([inner, mixer.conv_dim, heads], dim=-1)
        xBC = Convolution.apply(xBC, taps, mixer.conv1d.bias, self.kernels)  # type: ignore[no-untyped-call]
        scan = (mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.variance_epsilon)
        y = self.kernels.scan(xBC, dt[:, before:], z[:, before:], *scan)
        return F.linear(y, self._after(mixer.norm, mixer.out_proj))[:, :tokens]

    def _after(self, norm: Any, projection: Any) -> Tensor:
        """The projection's matrix times the scale of the norm before it, so that the scale's gradient needs no tokens."""
        scaled: Tensor = projection.weight * norm.weight
        return scaled.to(self.dtype)

    def last(self, ids: Tensor) -> Tensor:
        """ids (B, T) → the hidden state after the last block, (B, T, D)."""
        *_, h = self.states(ids)
        return h

    def read(self, h: Tensor) -> Tensor:
        """The model's final norm of h (B, T, D), which the head is multiplied with."""
        norm = self.model.backbone.norm_f
        scale: Tensor = norm.weight
        return rms_norm(h, norm.variance_epsilon, h.dtype) * scale

    def loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in nats a token, of the head's logits for h (B, T, D) with targets (B, T)."""
        rows = self.read(h).flatten(0, 1)
        loss: Tensor = HeadLoss.apply(rows, self.head, targets.flatten(), self.dtype)  # type: ignore[no-untyped-call]
        return loss

    @torch.no_grad()
    def surprise(self, h: Tensor, targets: Tensor) -> Tensor:
        """−log p in nats of each target: h (B, T, D) and targets (B, T) → (B, T)."""
        parts = []
        for rows, wanted in zip(self.read(h).flatten(0, 1).split(ROWS), targets.flatten().split(ROWS), strict=True):
            parts.append(F.cross_entropy(rows @ self.head.T, wanted, reduction="none"))
        return torch.cat(parts).view_as(targets)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of softmax(h Wᵀ) with the targets: h (n, D), W (V, D), targets (n,).

    The forward pass computes the gradient too, `ROWS` rows at a time, so that the logits never leave the processor's cache.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        total = h.new_zeros((), dtype=torch.float64)
        grad_h, grad_weight = torch.empty_like(h), torch.zeros_like(weight)
        h, weight = h.to(dtype), weight.to(dtype)
        for rows in torch.arange(len(h)).split(ROWS):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            inputs, wanted = h[part], targets[part, None]
            logp = torch.log_softmax((inputs @ weight.T).float(), dim=-1)
            total -= logp.gather(1, wanted).sum()
            grad = logp.exp_()
            grad.scatter_add_(1, wanted, grad.new_full(wanted.shape, -1.0))
            grad = grad.to(dtype)
            grad_h[part] = grad @ weight
            grad_weight += grad.T @ inputs
        ctx.save_for_backward(grad_h.div_(len(h)), grad_weight.div_(len(h)))
        return (total / len(h)).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_h, grad_weight = ctx.saved_tensors
        return grad * grad_h, grad * grad_weight, None, None


class Convolution(torch.autograd.Function):
    """Depthwise causal convolution, bias, SiLU: x (B, W − 1 + T, C), taps (W, C), bias (C,) → (B, T, C).

    It is a sum of shifted products, and so is its gradient. Torch's own convolution, and the gradient that the compiler
    derives from such a sum, take several times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, bias: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x, taps, bias)
        ctx.kernels = kernels
        convolved: Tensor = kernels.convolve(x, taps, bias)
        return convolved

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, taps, bias = ctx.saved_tensors
        before = len(taps) - 1
        padded = grad.new_zeros(len(x), x.shape[1] + before, x.shape[2])
        padded[:, before : x.shape[1]] = ctx.kernels.activation_gradient(grad, x, taps, bias)
        grad_x, *grad_others = ctx.kernels.convolution_gradients(padded, x, taps)
        return grad_x, *grad_others, None


def preactivation(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """The convolution before its SiLU: x (B, W − 1 + T, C) → (B, T, C)."""
    tokens = x.shape[1] - len(taps) + 1
    return sum(x[:, tap : tap + tokens] * taps[tap] for tap in range(len(taps))) + bias


def convolve(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """The convolution and its SiLU: x (B, W − 1 + T, C) → (B, T, C)."""
    return F.silu(preactivation(x, taps, bias)).to(x.dtype)


def activation_gradient(grad: Tensor, x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """The gradient before the SiLU from that after it, grad (B, T, C) → (B, T, C)."""
    y = preactivation(x, taps, bias)
    gate = torch.sigmoid(y)
    return (grad * gate * (1 + y * (1 - gate))).to(x.dtype)


def convolution_gradients(grad: Tensor, x: Tensor, taps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, taps and bias from the gradient of the output, which has W − 1 zeros before and after it."""
    before = len(taps) - 1
    shifted = (grad[:, before - tap : before - tap + x.shape[1]] * taps[tap] for tap in range(len(taps)))
    grad_x = cast(Tensor, sum(shifted))
    grad = grad[:, before : x.shape[1]]
    # Sums run over tokens first, then over the batch: a sequence's rows lie together in memory.
    grad_taps = torch.stack([(grad * x[:, tap : tap + grad.shape[1]]).sum(1) for tap in range(len(taps))])
    return grad_x.to(x.dtype), grad_taps.sum(1), grad.float().sum(1).sum(0)


def rms_norm(x: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """x / √(mean x² + ε) over the last dim, in `dtype`."""
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)).to(dtype)


def gated_scan(
    xBC: Tensor,
    dt: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    epsilon: float,
) -> Tensor:
    """The scan, the gate z (B, T, E), and the norm after it, without its scale."""
    inner = z.shape[-1]
    dims, size = inner // len(A_log), (xBC.shape[-1] - inner) // 2
    y = chunked_scan(xBC, F.softplus(dt + dt_bias), -torch.exp(A_log), D, dims, size)
    return rms_norm((y * F.silu(z)).float(), epsilon, z.dtype)


def chunked_scan(xBC: Tensor, dt: Tensor, A: Tensor, D: Tensor, dims: int, size: int) -> Tensor:
    """Section 6 of the paper: attention within a chunk, a recurrence from chunk to chunk.

    xBC (B, T, E + 2 G N) and dt (B, T, H), T a multiple of `CHUNK` → y (B, T, E). G is 1 or H.
    """
    batch, tokens, heads = dt.shape
    chunks, inner = tokens // CHUNK, heads * dims
    groups = (xBC.shape[-1] - inner) // (2 * size)
    parts = xBC.reshape(batch * chunks, CHUNK, -1).split([inner, groups * size, groups * size], dim=-1)
    x, (B, C) = parts[0], (part.unflatten(2, (groups, size)).transpose(1, 2) for part in parts[1:])  # (M, G, Q, N)
    dt = dt.reshape(batch * chunks, CHUNK, heads).float()
    total = torch.cumsum(dt * A, dim=1)  # (M, Q, H): log of the decay from the chunk's start up to and including t
    t_total, t_dt = total.transpose(1, 2), dt.transpose(1, 2)  # (M, H, Q)

    by_head, product = x.unflatten(2, (heads, dims)).transpose(1, 2), torch.matmul(C, B.transpose(2, 3))
    own: Tensor = Within.apply(by_head, product, t_total, t_dt)  # type: ignore[no-untyped-call]
    own = own.transpose(1, 2)  # (M, Q, H, P)

    left = (torch.exp(total[:, -1:] - total) * dt)[..., None]  # decay from after t to the chunk's end, times dt
    fed = (x.unflatten(2, (heads, dims)) * left).to(x.dtype).flatten(2).unflatten(2, (groups, -1))
    added = torch.matmul(fed.permute(0, 2, 3, 1), B).flatten(1, 2)  # (M, E, N)
    # The state at a chunk's start is what the chunks before it left, decayed by the chunks in between. These decays are a
    # matrix (chunks, chunks) for each head.
    ends = torch.cumsum(total[:, -1].view(batch, chunks, heads), dim=1).transpose(1, 2)
    between = (ends - ends.diff(dim=2, prepend=torch.zeros_like(ends[..., :1])))[..., :, None] - ends[..., None, :]
    causal = torch.ones(chunks, chunks, dtype=torch.bool, device=x.device).tril(-1)
    decay = torch.exp(between.masked_fill(~causal, float("-inf"))).to(x.dtype)
    added = added.view(batch, chunks, heads, -1).transpose(1, 2)
    state = torch.matmul(decay, added).transpose(1, 2).reshape(batch * chunks, groups, -1, size)
    carried = torch.matmul(C, state.transpose(2, 3)).transpose(1, 2)  # (M, Q, G, E / G)
    before = carried.flatten(2).unflatten(2, (heads, dims)) * torch.exp(total)[..., None]
    y: Tensor = own + before + x.unflatten(2, (heads, dims)) * D[:, None]
    return y.to(x.dtype).reshape(batch, tokens, inner)


class Within(torch.autograd.Function):
    """What a chunk's tokens add to its outputs: x (M, H, Q, P), C Bᵀ (M, G, Q, Q), log decays, dt (M, H, Q) → (M, H, Q, P).

    The backward pass is written by hand: with W the weights, the row and column sums of (∂W ⊙ W) are sums over P of
    ∂y ⊙ y and of x ⊙ ∂x. So the only sum over a tensor of the weights' size is that over the heads of a group.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Tensor, total: Tensor, dt: Tensor) -> Tensor:
        weights = (decays(total, dt) * product).to(x.dtype)
        y = torch.matmul(weights, x)
        ctx.save_for_backward(x, product, total, dt, weights, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, product, total, dt, weights, y = ctx.saved_tensors
        grad_x = torch.matmul(weights.transpose(2, 3), grad)
        grad_product = (torch.matmul(grad, x.transpose(2, 3)) * decays(total, dt)).sum_to_size(product.shape)
        rows, columns = (grad.float() * y).sum(-1), (grad_x.float() * x).sum(-1)
        return grad_x, grad_product.to(product.dtype), rows - columns, columns / dt


def decays(total: Tensor, dt: Tensor) -> Tensor:
    """(M, H, t, s): dt of token s, times the decay of the tokens after s up to and including t; 0 above the diagonal."""
    between = total[..., :, None] - total[..., None, :]
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=total.device).tril()
    # The mask comes before exp: above the diagonal the exponent is positive and may overflow.
    return torch.exp(between.masked_fill(~causal, float("-inf"))) * dt[..., None, :]


@dataclass(frozen=True)
class Kernels:
    """The functions between matrix products."""

    norm: Any = rms_norm
    convolve: Any = convolve
    activation_gradient: Any = activation_gradient
    convolution_gradients: Any = convolution_gradients
    scan: Any = gated_scan

    def compiled(self) -> Kernels:
        """The same functions, each compiled for every shape that it meets."""
        torch._dynamo.config.recompile_limit = SHAPES
        return Kernels(*(torch.compile(getattr(self, field.name), dynamic=False) for field in fields(self)))
