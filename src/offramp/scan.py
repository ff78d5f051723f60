"""The selective scan of Mamba-2 with an initial state, in plain torch.

Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060). Per head, with a scalar decay:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        (state: P × N)
    y_t = h_t C_t + D x_t

| here | paper | shape | meaning |
|------|-------|-------|---------|
| x    | X     | (B, T, H, P) | input: H heads of P dims |
| dt   | Δ     | (B, T, H)    | step size, after softplus |
| A    | A     | (H,)         | decay rate, negative |
| B, C | B, C  | (B, T, N)    | input and output maps, shared by all heads (one group) |
| D    | D     | (H,)         | skip |
| h    | h     | (B, H, P, N) | state |
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # tokens whose mutual influence is computed as one matrix (section 6); longer only costs more


def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run T tokens from state `h` (zeros if None). Shapes as in the table above; returns y (B, T, H, P) and the new h."""
    batch, tokens, heads, dims = x.shape
    if h is None:
        h = x.new_zeros(batch, heads, dims, B.shape[-1])
    if tokens == 1:
        return _one(x, dt, A, B, C, D, h)
    outputs = []
    for start in range(0, tokens, CHUNK):
        piece = slice(start, start + CHUNK)
        y, h = _chunk(x[:, piece], dt[:, piece], A, B[:, piece], C[:, piece], h)
        outputs.append(y)
    return torch.cat(outputs, dim=1) + x * D[:, None], h


def _one(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    decay = torch.exp(dt[:, 0] * A)[..., None, None]  # (B, H, 1, 1)
    h = h * decay + (dt[:, 0, :, None] * x[:, 0])[..., None] * B[:, 0, None, None, :]
    y = (h * C[:, 0, None, None, :]).sum(-1)
    return (y + x[:, 0] * D[:, None])[:, None], h


def _chunk(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The dual form within a chunk (section 6, "intra-chunk" and "inter-chunk"): attention-like, all tokens at once."""
    # Log of the decay from the chunk's start up to and with t, (B, T, H). In float64: strong decay makes it large, and
    # the differences below are small.
    total = torch.cumsum((dt * A).double(), dim=1)
    between = total[:, :, None] - total[:, None]  # (B, T, S, H): from after s up to and with t
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()[None, :, :, None]
    # Masked before exp: above the diagonal the exponent is positive and may overflow.
    decay = torch.exp(between.to(x.dtype).masked_fill(~causal, float("-inf")))
    weights = decay * torch.einsum("btn,bsn->bts", C, B)[..., None]
    fed = x * dt[..., None]  # (B, T, H, P)
    y = torch.einsum("btsh,bshp->bthp", weights, fed)
    y = y + torch.einsum("btn,bhpn,bth->bthp", C, h, torch.exp(total).to(x.dtype))
    left = torch.exp(total[:, -1:] - total).to(x.dtype)  # decay from after t to the chunk's end
    h = h * torch.exp(total[:, -1]).to(x.dtype)[..., None, None] + torch.einsum("bthp,btn,bth->bhpn", fed, B, left)
    return y, h


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution, SiLU after it. x (B, T, E), weight (E, W), window (B, W - 1, E): the inputs before.

    Returns (B, T, E) and the new window.
    """
    joined = torch.cat([window, x], dim=1)
    width = weight.shape[1]
    if x.shape[1] == 1:  # one product is several times cheaper than a convolution call
        y = (joined.transpose(1, 2) * weight).sum(-1)[:, None] + bias
    else:
        y = F.conv1d(joined.transpose(1, 2), weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)
    return F.silu(y), joined[:, -(width - 1) :]
