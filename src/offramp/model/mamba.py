"""The mixers of the library's Mamba blocks, continued from any state, in chunks of any length.

The library's own are right for a whole text and for one token after another, but its Mamba-1 forgets its state when a
chunk follows, and loops over the tokens of a prompt. So a block of a Mamba family keeps the library's norms, residuals,
experts and attention, and only its mixer's call is ours (`take_over`); the weights stay where they are.

Mamba-1 (arXiv 2312.00752, section 3.4): mamba, falcon_mamba and jamba, the latter two with norms on dt, B and C.
Mamba-2 (2405.21060, section 7): mamba2, bamba, granitemoehybrid, nemotron_h, and falcon_h1 with multipliers and without
the norm if so configured.

Shapes: B batch, T tokens, D hidden size, E inner width, G groups, N state size, W the convolution's width.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.model.scan import causal_conv, scan, selective_scan
from offramp.model.state import SSM, State

Mixer = Any  # a mixer module of the library: its class differs from family to family


def is_mixer(module: object) -> bool:
    """Whether a block's part is a Mamba mixer."""
    return hasattr(module, "A_log")


def mix(mixer: Mixer, u: Tensor, memory: SSM | None = None) -> Tensor:
    """What the mixer makes of u (B, T, D): (B, T, D). Continues from `memory` and leaves the new state there."""
    if is_first(mixer):
        x, z = _linear(mixer.in_proj, u).chunk(2, dim=-1)
        y = _advance_first(mixer, x, memory) * F.silu(z.float())
    else:
        z, xBC, dt = _project_second(mixer, u).split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)
        y = _advance_second(mixer, xBC, dt, memory)
        y = mixer.norm(y, z) if getattr(mixer, "mamba_rms_norm", True) else y * F.silu(z.float())
    return _linear(mixer.out_proj, y.to(u.dtype))


def remember(mixer: Mixer, u: Tensor, memory: SSM) -> None:
    """Only what `memory` would keep if u (B, T, D) were the mixer's input: DYNAMAX's partial forward.

    No gate path and no output projection: of the input projection only the rows that feed convolution and state.
    """
    if is_first(mixer):
        _advance_first(mixer, _linear(mixer.in_proj, u, slice(0, mixer.intermediate_size)), memory)
    else:
        widths = [mixer.conv_dim, mixer.num_heads]
        xBC, dt = _project_second(mixer, u, slice(mixer.intermediate_size, None)).split(widths, dim=-1)
        _advance_second(mixer, xBC, dt, memory)


def take_over(mixer: Mixer) -> None:
    """From now on the library's mixer, when it is called with a `State` as its cache, does what `mix` does."""
    mixer.forward = MethodType(_forward, mixer)


def _forward(self: Mixer, hidden_states: Tensor, cache: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
    if isinstance(cache, State):
        return mix(self, hidden_states, cache.ssm[self.layer_idx])
    return type(self).forward(self, hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)


def is_first(mixer: Mixer) -> bool:
    """Whether a mixer is Mamba-1's."""
    return bool(mixer.A_log.ndim == 2)


def _advance_first(mixer: Mixer, x: Tensor, memory: SSM | None) -> Tensor:
    """Convolution and scan of Mamba-1: x (B, T, E) → (B, T, E) in float32."""
    inputs, x = x, _convolve(mixer, x, memory)
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    dt, B, C = _linear(mixer.x_proj, x).split(sizes, dim=-1)
    if hasattr(mixer, "dt_layernorm"):
        dt, B, C = mixer.dt_layernorm(dt), mixer.b_layernorm(B), mixer.c_layernorm(C)
    dt = F.softplus(_linear(mixer.dt_proj, dt).float())
    A, D = -torch.exp(mixer.A_log.float()), mixer.D

    def forward(h: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
        return selective_scan(x[:, :n], dt[:, :n], A, B[:, :n], C[:, :n], D, h)

    return _remembered(forward, inputs, memory)


Forward = Callable[[Tensor | None, int], tuple[Tensor, Tensor]]  # the first n tokens from state h on: y and the new h


def _remembered(forward: Forward, inputs: Tensor, memory: SSM | None) -> Tensor:
    """What `forward` gives of all tokens from the remembered state on, which moves on."""
    tokens = inputs.shape[1]
    y, h = forward(None if memory is None else memory.h, tokens)
    if memory is not None:
        memory.h = h
        memory.record(tokens, inputs, lambda h, n: forward(h, n)[1])
    return y


def _project_second(mixer: Mixer, u: Tensor, rows: slice = slice(None)) -> Tensor:
    """The rows z, x, B, C, dt (in this order) of Mamba-2's input projection."""
    if hasattr(mixer, "mup_vector"):  # falcon_h1
        projected: Tensor = _linear(mixer.in_proj, u * mixer.ssm_in_multiplier, rows) * mixer.mup_vector[..., rows]
        return projected
    return _linear(mixer.in_proj, u, rows)


def _advance_second(mixer: Mixer, xBC: Tensor, dt: Tensor, memory: SSM | None) -> Tensor:
    """Convolution and scan of Mamba-2: x, B, C (B, T, E + 2 G N) and dt (B, T, H) → (B, T, E) in float32."""
    size = mixer.n_groups * mixer.ssm_state_size
    x, B, C = _convolve(mixer, xBC, memory).split([mixer.intermediate_size, size, size], dim=-1)
    heads, groups = (-1, mixer.head_dim), (mixer.n_groups, -1)
    x, B, C = x.unflatten(2, heads), B.unflatten(2, groups), C.unflatten(2, groups)
    # The library leaves the limits out for single tokens, which only shows where they bite.
    dt = F.softplus(dt.float() + mixer.dt_bias.float()).clamp(*mixer.time_step_limit)
    A, D = -torch.exp(mixer.A_log.float()), mixer.D

    def forward(h: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
        return scan(x[:, :n], dt[:, :n], A, B[:, :n], C[:, :n], D, h)

    return _remembered(forward, xBC, memory).flatten(2)


def _convolve(mixer: Mixer, x: Tensor, memory: SSM | None) -> Tensor:
    weight = mixer.conv1d.weight.squeeze(1)
    window = None if memory is None else memory.window
    if window is None:
        window = x.new_zeros(len(x), weight.shape[1] - 1, x.shape[2])
    x, window = causal_conv(x, weight, mixer.conv1d.bias, window)
    if memory is not None:
        memory.window = window
    return x


def _linear(layer: nn.Linear, x: Tensor, rows: slice = slice(None)) -> Tensor:
    """The rows `rows` of a linear layer, of which it may have a hundred inputs at once."""
    weight, bias = layer.weight[rows], None if layer.bias is None else layer.bias[rows]
    if x.device.type == "cpu" and weight.dtype == torch.bfloat16 and x.shape[:-1].numel() >= 16:
        # Without bfloat16 instructions, many rows are several times faster in float32.
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)
