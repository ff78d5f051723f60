"""The mixers of the library's Mamba blocks, continued from any state, in chunks of any length.

The library's own mixers are right for a whole text and for single tokens after it. But its Mamba-1 mixer forgets its state
when a chunk of several tokens follows, and it loops over the tokens of a prompt. So our runs put another mixer into its
blocks: `with_own_mixer` makes a copy of a block that shares all weights with it. The library's model stays as it is.

Mamba-1 (arXiv 2312.00752, section 3.4): mamba, falcon_mamba and jamba; the last two have norms on dt, B and C. Mamba-2
(2405.21060, section 7): mamba2, bamba, granitemoehybrid, nemotron_h, and falcon_h1, which adds multipliers and, where the
config says so, leaves the norm out. A convolution between two gates, without a state behind it: lfm2 (2511.23404).

Shapes: B batch, T tokens, D hidden size, E inner width, G groups, N state size, W the convolution's width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.model.hooks import brought_in, share_hook
from offramp.model.scan import causal_conv, scan, selective_scan
from offramp.model.state import SSM, State

LibraryMixer = Any  # a mixer module of the library: its class differs from family to family


def is_mixer(module: object) -> bool:
    """Whether a block's part is a mixer: Mamba's, or a convolution."""
    return hasattr(module, "A_log") or is_convolution(module)


def is_convolution(module: object) -> bool:
    """Whether a block's part is a convolution without a state behind it (LFM2)."""
    return hasattr(module, "conv_kernel_size") and hasattr(module, "conv")


def convolution_of(mixer: LibraryMixer) -> nn.Conv1d:
    """The convolution of a mixer."""
    found: nn.Conv1d = mixer.conv if is_convolution(mixer) else mixer.conv1d
    return found


def width_of(mixer: LibraryMixer) -> int:
    """The inner width E of a mixer: that of its gate and its outputs."""
    return int(mixer.out_proj.in_features)


def state_shape(mixer: LibraryMixer) -> tuple[int, ...]:
    """The shape of a mixer's state: (H, P, N), of Mamba-1 (E, N), and (0,) of a convolution."""
    if is_convolution(mixer):
        return (0,)
    if is_mamba1(mixer):
        return tuple(mixer.A_log.shape)
    return mixer.num_heads, mixer.head_dim, mixer.ssm_state_size


def is_mamba1(mixer: LibraryMixer) -> bool:
    """Whether a mixer is Mamba-1's."""
    return bool(mixer.A_log.ndim == 2)


class StatefulMixer(nn.Module):
    """Takes the place of a library's mixer in a block: the library's weights, continued from a `State`."""

    def __init__(self, mixer: LibraryMixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden_states: Tensor, cache: State, attention_mask: Any = None, **_: Any) -> Tensor:
        """hidden_states (B, T, D) → (B, T, D). Updates the block's memory in `cache`. The signature is the library's."""
        return mix(self.mixer, hidden_states, cache.ssm[self.mixer.layer_idx])


def with_own_mixer(block: nn.Module, name: str) -> nn.Module:
    """A copy of the library's block. It shares all modules but the mixer `name`, which is a `StatefulMixer`."""
    copied = copy.copy(block)
    copied._modules = {**block._modules, name: StatefulMixer(getattr(block, name))}
    share_hook(copied, block)
    return copied


def mix(mixer: LibraryMixer, u: Tensor, memory: SSM | None = None) -> Tensor:
    """The mixer's output (B, T, D) for u (B, T, D). It continues from `memory` and leaves the new state there."""
    with brought_in(mixer):
        if is_convolution(mixer):
            B, z, x = _linear(mixer.in_proj, u).chunk(3, dim=-1)
            y = z * _advance_convolution(mixer, B * x, memory)
        elif is_mamba1(mixer):
            x, z = _linear(mixer.in_proj, u).chunk(2, dim=-1)
            y = _advance_mamba1(mixer, x, memory) * F.silu(z.float())
        else:
            widths = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
            z, xBC, dt = _project_mamba2(mixer, u).split(widths, dim=-1)
            y = _advance_mamba2(mixer, xBC, dt, memory)
            y = mixer.norm(y, z) if getattr(mixer, "mamba_rms_norm", True) else y * F.silu(z.float())
        return _linear(mixer.out_proj, y.to(u.dtype))


def remember(mixer: LibraryMixer, u: Tensor, memory: SSM) -> None:
    """Store in `memory` only what it would keep if u (B, T, D) were the mixer's input: DYNAMAX's partial forward.

    This leaves out the gate path and the output projection. Of the input projection it computes only the rows that feed the
    convolution and the state.
    """
    with brought_in(mixer):
        if is_convolution(mixer):
            width = width_of(mixer)
            B, x = (_linear(mixer.in_proj, u, slice(first, first + width)) for first in (0, 2 * width))
            _advance_convolution(mixer, B * x, memory)
        elif is_mamba1(mixer):
            _advance_mamba1(mixer, _linear(mixer.in_proj, u, slice(0, mixer.intermediate_size)), memory)
        else:
            widths = [mixer.conv_dim, mixer.num_heads]
            xBC, dt = _project_mamba2(mixer, u, slice(mixer.intermediate_size, None)).split(widths, dim=-1)
            _advance_mamba2(mixer, xBC, dt, memory)


def _advance_convolution(mixer: LibraryMixer, x: Tensor, memory: SSM | None) -> Tensor:
    """The convolution of x (B, T, D)."""
    inputs, x = x, _convolve(mixer, x, memory)
    if memory is not None:
        memory.h = x.new_zeros(len(x), 0)
        memory.record(x.shape[1], inputs, lambda h, n: h)
    return x


def _advance_mamba1(mixer: LibraryMixer, x: Tensor, memory: SSM | None) -> Tensor:
    """Convolution and scan of Mamba-1: x (B, T, E) → (B, T, E) in float32."""
    inputs, x = x, _convolve(mixer, x, memory)
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    dt, B, C = _linear(mixer.x_proj, x).split(sizes, dim=-1)
    if hasattr(mixer, "dt_layernorm"):
        dt, B, C = mixer.dt_layernorm(dt), mixer.b_layernorm(B), mixer.c_layernorm(C)
    dt = F.softplus(_linear(mixer.dt_proj, dt).float())
    A, D = -torch.exp(mixer.A_log.float()), mixer.D

    def advance(h: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
        return selective_scan(x[:, :n], dt[:, :n], A, B[:, :n], C[:, :n], D, h)

    return _recorded(advance, inputs, memory)


Advance = Callable[[Tensor | None, int], tuple[Tensor, Tensor]]  # (state h, n) → y of the first n tokens, new h


def _recorded(advance: Advance, inputs: Tensor, memory: SSM | None) -> Tensor:
    """The y of all tokens, from the remembered state on. `memory` gets the new state, and a way to repeat the tokens."""
    tokens = inputs.shape[1]
    y, h = advance(None if memory is None else memory.h, tokens)
    if memory is not None:
        memory.h = h
        memory.record(tokens, inputs, lambda h, n: advance(h, n)[1])
    return y


def _project_mamba2(mixer: LibraryMixer, u: Tensor, rows: slice = slice(None)) -> Tensor:
    """The rows z, x, B, C, dt (in this order) of Mamba-2's input projection."""
    if hasattr(mixer, "mup_vector"):  # falcon_h1
        projected: Tensor = _linear(mixer.in_proj, u * mixer.ssm_in_multiplier, rows) * mixer.mup_vector[..., rows]
        return projected
    return _linear(mixer.in_proj, u, rows)


def _advance_mamba2(mixer: LibraryMixer, xBC: Tensor, dt: Tensor, memory: SSM | None) -> Tensor:
    """Convolution and scan of Mamba-2: x, B, C (B, T, E + 2 G N) and dt (B, T, H) → (B, T, E) in float32."""
    size = mixer.n_groups * mixer.ssm_state_size
    x, B, C = _convolve(mixer, xBC, memory).split([mixer.intermediate_size, size, size], dim=-1)
    heads, groups = (-1, mixer.head_dim), (mixer.n_groups, -1)
    x, B, C = x.unflatten(2, heads), B.unflatten(2, groups), C.unflatten(2, groups)
    # The library has no limits for single tokens. The results differ only where a step size reaches a limit.
    dt = F.softplus(dt.float() + mixer.dt_bias.float()).clamp(*mixer.time_step_limit)
    A, D = -torch.exp(mixer.A_log.float()), mixer.D

    def advance(h: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
        return scan(x[:, :n], dt[:, :n], A, B[:, :n], C[:, :n], D, h)

    return _recorded(advance, xBC, memory).flatten(2)


def _convolve(mixer: LibraryMixer, x: Tensor, memory: SSM | None) -> Tensor:
    layer = convolution_of(mixer)
    with brought_in(layer):
        weight, bias = layer.weight.squeeze(1), layer.bias
    window = None if memory is None else memory.window
    if window is None:
        window = x.new_zeros(len(x), weight.shape[1] - 1, x.shape[2])
    x, window = causal_conv(x, weight, bias, window, activates=not is_convolution(mixer))
    if memory is not None:
        memory.window = window
    return x


def _linear(layer: nn.Linear, x: Tensor, rows: slice = slice(None)) -> Tensor:
    """The rows `rows` of a linear layer's output, for one to some hundred inputs x."""
    with brought_in(layer):
        weight, bias = layer.weight[rows], None if layer.bias is None else layer.bias[rows]
    if x.device.type == "cpu" and weight.dtype == torch.bfloat16 and x.shape[:-1].numel() >= 16:
        # Without bfloat16 instructions, many rows are several times faster in float32.
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)
