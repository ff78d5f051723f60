"""The scans of Mamba-1 and Mamba-2 from an initial state, and the causal convolution before them, in plain torch.

Gu and Dao, "Mamba" (arXiv 2312.00752) and Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060). Both are the recurrence

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t        y_t = C_t h_t + D x_t

Mamba-1 (`selective_scan`) has a decay for every entry of the state. Mamba-2 (`scan`) has one for each head, so a chunk of
tokens becomes a few matrix products.

| here | paper | Mamba-2 | Mamba-1 | meaning |
|------|-------|---------|---------|---------|
| x    | X, x  | (B, T, H, P) | (B, T, E) | input: H heads of P dims, or E channels |
| dt   | Δ     | (B, T, H)    | (B, T, E) | step size, after softplus |
| A    | A     | (H,)         | (E, N)    | decay rate, negative |
| B, C | B, C  | (B, T, G, N) | (B, T, N) | input and output maps; G groups of H / G heads share theirs |
| D    | D     | (H,)         | (E,)      | skip |
| h    | h     | (B, H, P, N) | (B, E, N) | state |

Everything is computed in float32 (float64 for float64 inputs), whatever dtype comes in.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # tokens of a chunk, computed as one matrix of all pairs (2405.21060, section 6); longer chunks only cost more
FEW = 16  # tokens of Mamba-1 whose decays and inputs are computed at once
SPAN = 16 * CHUNK  # tokens whose chunks are computed side by side; this bounds the memory of a long prompt


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2: run T tokens from state `h` (zeros if None). Returns y (B, T, H, P) and the new h."""
    x, dt, A, B, C, D = (_wide(part) for part in (x, dt, A, B, C, D))
    if h is None:
        h = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
    if x.shape[1] == 1:
        return _single_token(x, dt, A, B, C, D, h)
    if x.is_cuda and x.dtype == torch.float32 and (kernel := _kernel()):
        y, h = kernel(x, dt, A, B, C, D, h)
        return y, h
    return _scan(x, dt, A, B, C, D, h)


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for start in range(0, x.shape[1], SPAN):
        piece = slice(start, start + SPAN)
        y, h = _chunks(x[:, piece], dt[:, piece], A, B[:, piece], C[:, piece], h)
        outputs.append(y)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return y + x * D[:, None], h


def _single_token(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    x, dt, groups = x[:, 0], dt[:, 0], B.shape[2]
    fed = (dt[..., None] * x).unflatten(1, (groups, -1))[..., None] * B[:, 0, :, None, None]  # (B, G, H / G, P, N)
    h = h * torch.exp(dt * A)[..., None, None] + fed.flatten(1, 2)
    y = (h.unflatten(1, (groups, -1)) @ C[:, 0, :, None, :, None]).squeeze(-1).flatten(1, 2)
    return (y + x * D[:, None])[:, None], h


def _chunks(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The dual form (2405.21060, section 6): all tokens of a chunk at once, like attention; the state links the chunks.

    Shapes: c chunks of L tokens, G groups of R heads.
    """
    tokens, groups = x.shape[1], B.shape[2]
    length = min(CHUNK, tokens)
    missing = -tokens % length
    if missing:  # tokens with dt = 0 change nothing
        x, dt = F.pad(x, (0, 0, 0, 0, 0, missing)), F.pad(dt, (0, 0, 0, missing))
        B, C = (F.pad(part, (0, 0, 0, 0, 0, missing)) for part in (B, C))

    def cut(part: Tensor) -> Tensor:  # (B, T, heads or groups, …) → (B, c, heads or groups, L, …)
        chunks: Tensor = part.unflatten(1, (-1, length)).transpose(2, 3)
        return chunks

    B, C, fed = cut(B), cut(C), cut(x * dt[..., None])
    # Log of the decay from the chunk's start up to and including t, (B, c, H, L). It is in float64, since strong decay
    # makes it large and the differences below are small.
    total = torch.cumsum((cut(dt[..., None]).squeeze(-1) * A[:, None]).double(), dim=-1)
    between = (total[..., :, None] - total[..., None, :]).to(x.dtype)  # after s, up to and including t: (B, c, H, t, s)
    future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    # Masked before exp: above the diagonal the exponent is positive and may overflow.
    decay = torch.exp(between.masked_fill(future, float("-inf")))
    scores = C @ B.transpose(-1, -2)  # (B, c, G, t, s)
    y = (decay.unflatten(2, (groups, -1)) * scores[:, :, :, None]).flatten(2, 3) @ fed
    left = torch.exp(total[..., -1:] - total).to(x.dtype)  # decay from after t to the chunk's end
    added = (fed * left[..., None]).unflatten(2, (groups, -1)).transpose(-1, -2) @ B[:, :, :, None]  # (B, c, G, R, P, N)
    added, kept = added.flatten(2, 3), torch.exp(total[..., -1]).to(x.dtype)[..., None, None]
    before = []
    for chunk in range(added.shape[1]):
        before.append(h)
        h = h * kept[:, chunk] + added[:, chunk]
    carried = C[:, :, :, None] @ torch.stack(before, dim=1).unflatten(2, (groups, -1)).transpose(-1, -2)
    y = y + carried.flatten(2, 3) * torch.exp(total).to(x.dtype)[..., None]
    return y.transpose(2, 3).flatten(1, 2)[:, :tokens], h


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1: run T tokens from state `h` (zeros if None). Returns y (B, T, E) and the new h.

    The recurrence runs token by token. The terms that do not depend on the token before are computed for `FEW` tokens at
    once, so that they stay in the processor's cache. States are written in place, unless gradients must pass through.
    """
    x, dt, A, B, C, D = (_wide(part) for part in (x, dt, A, B, C, D))
    if h is None:
        h = x.new_zeros(x.shape[0], x.shape[2], B.shape[-1])
    if x.shape[1] == 1:
        h = torch.exp(dt[:, 0, :, None] * A) * h + (dt * x)[:, 0, :, None] * B[:, 0, None]
        return (h @ C[:, 0, :, None]).transpose(1, 2) + x * D, h
    # Channels last, where they make the longest vectors.
    h, rates, fed, outputs = h.transpose(1, 2).contiguous(), A.T.contiguous(), dt * x, []  # (B, N, E), (N, E), (B, T, E)
    for start in range(0, x.shape[1], FEW):
        piece = slice(start, start + FEW)
        decays = torch.exp(dt[:, piece].transpose(0, 1)[:, :, None] * rates)  # (L, B, N, E)
        states = fed[:, piece].transpose(0, 1)[:, :, None] * B[:, piece].transpose(0, 1)[..., None]  # the inputs, so far
        run = []
        for decay, state in zip(decays.unbind(), states.unbind(), strict=True):
            h = torch.addcmul(state, decay, h) if states.requires_grad else state.addcmul_(decay, h)
            run.append(h)
        states = torch.stack(run) if states.requires_grad else states
        outputs.append((C[:, piece, None] @ states.transpose(0, 1)).squeeze(2))
    return torch.cat(outputs, dim=1) + x * D, h.transpose(1, 2).contiguous()


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, activates: bool = True
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution of x (B, T, E) with weight (E, W): (B, T, E), and the new window.

    `window` (B, W - 1, E) holds the inputs before x. `activates`: SiLU follows.
    """
    width, tokens = weight.shape[1], x.shape[1]
    joined = torch.cat([window.to(x.dtype), x], dim=1)
    if tokens == 1:  # one product and one sum are cheaper than one for each tap
        y = (joined.transpose(1, 2) * weight).sum(-1)[:, None]
    else:  # without transposes, this is several times as fast on a CPU as a convolution call
        y = joined[:, :tokens] * weight[:, 0]
        for tap in range(1, width):
            y = torch.addcmul(y, joined[:, tap : tap + tokens], weight[:, tap])
    y = y if bias is None else y + bias
    return F.silu(y) if activates else y, joined[:, tokens:]


def _wide(part: Tensor) -> Tensor:
    return part if part.dtype in (torch.float32, torch.float64) else part.float()


Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@cache
def _kernel() -> Scan | None:
    """The GPU kernel of the package `mamba-ssm`, if it is installed and agrees with `_scan` on a random input."""
    try:
        combined = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    except ImportError:
        return None
    except Exception as error:  # a broken install may raise anything
        warnings.warn(f"mamba-ssm cannot be imported ({error}): using offramp's scan.", stacklevel=3)
        return None

    def kernel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = combined(x, dt, A, B, C, CHUNK, D=D, initial_states=h, return_final_states=True)
        return y, h

    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((2, 150, 8, 64), (2, 150, 8), (8,), (2, 150, 2, 64), (2, 150, 2, 64), (8,), (2, 8, 64, 64))
    parts = [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]
    parts[1], parts[2] = F.softplus(parts[1]), -parts[2].exp()
    for ours, theirs in zip(_scan(*parts), kernel(*parts), strict=True):
        if not (ours - theirs).abs().max() <= 2e-2 * ours.abs().max():  # its products may round to TF32
            warnings.warn("mamba-ssm's scan differs from offramp's on this GPU: using offramp's.", stacklevel=3)
            return None
    return kernel
