"""Weights as integers of 4, 5 or 8 bits, chosen so that products change little.

A weight w becomes q · scale + low. What matters is not the error of w but that of its products with the rows x that it
meets: the mean of (x · error)², which is errorᵀ M error with M (K, K) the mean of x xᵀ, the moments of the inputs.

- Nothing known of the rows: M is taken as 1, and each group of weights gets the grid of least squared error.
- M's diagonal is known, their mean squares (K,): errors are weighted with them, as an importance matrix of llama.cpp does.
- All of M is known: besides, the columns are rounded one after another, and each takes on what the earlier ones did to
  products. That is GPTQ (Frantar and others 2022, arXiv:2210.17323), in the form of LDLQ (Chee and others 2023,
  arXiv:2307.13304), which needs one Cholesky decomposition and no inverse. Groups of large inputs come first, and within a
  group columns of large inputs. A few thousand rows of text are enough.

Groups that already lie on a grid of 16 points, as those of a GGUF file in Q4_0 or Q4_1, keep their values in 4 bits; those
of Q5_0 and Q5_1 in 5.

Shapes: N rows of a weight (outputs), K its columns (inputs), G = K / 32 groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 32  # columns of a row that are rounded together: OFFRAMP_GROUP
DAMPING = 0.3  # of the diagonal, which is added to moments: a text is short, and other texts differ from it
FLOOR = 0.01  # of the median of mean squares: added to each, since a column that a short text leaves at 0 is not always 0
SPARE = (-2, -1, 0, 1, 2)  # how many scales more than a grid has the range of a group is taken to be, in the search
SHRINKING = (1.0, 0.97, 0.94, 0.9, 0.85)  # of a row's largest weight: what the largest 8-bit integer is tried to stand for
AT_ONCE = 1 << 20  # weights that are rounded at a time, which bounds the memory: a few float32 numbers for each


@dataclass(frozen=True)
class LayerInput:
    """What a linear layer gets.

    `power` (K,) is the mean square of each column. `lost8` and `lost16` are the shares of its output, without the bias,
    that are lost where its input is rounded to integers of 8 or 16 bits.
    """

    power: Tensor
    lost8: float
    lost16: float


@dataclass(frozen=True)
class Inputs:
    """What is known of the rows that a weight is multiplied with; weights that share their input share it.

    Args:
        squares: (K,), how much an error counts in a column, once the columns before it are rounded.
        order: (K,), the columns in the order in which they are rounded. Those of a group stay together.
        pull: (K, K), in this order, or None: `pull[j, k]`, j < k, is how much of column j's error column k takes on.
    """

    squares: Tensor
    order: Tensor
    pull: Tensor | None = None


class Grouped(NamedTuple):
    """Weight = codes · scale + low. `codes` (N, K) in uint8, from 0; `scale` and `low` (N, G) in float16."""

    codes: Tensor
    scale: Tensor
    low: Tensor


class Rowwise(NamedTuple):
    """Weight = codes · scale. `codes` (N, K) in int8, -127 to 127; `scale` (N,) in float32."""

    codes: Tensor
    scale: Tensor


def inputs_of(known: Tensor, damping: float = DAMPING) -> Inputs:
    """`Inputs` of rows (T, K), of which there may be fewer than K, or of their mean squares (K,).

    Moments M + damping are U D Uᵀ with U upper triangular and 1 on its diagonal. The products' error is then
    Σₖ Dₖ (eₖ + Σⱼ Uⱼₖ eⱼ over j < k)², so that column k aims at its weight + Σⱼ Uⱼₖ eⱼ, and Dₖ weights what is left.
    """
    if known.dim() == 1:
        mean = known.float()
    else:  # M's diagonal, summed as M is below
        mean = torch.cat([(part.T @ part).diagonal() for part in known.float().split(GROUP, 1)]) / len(known)
    floor = FLOOR * mean.median()
    squares = mean + torch.where(floor > 0, floor, FLOOR * mean.mean())
    if not squares.any():
        squares, known = torch.ones_like(squares), squares
    if known.dim() == 1:
        return Inputs(squares, torch.arange(len(squares), device=squares.device))
    order = _order(squares)
    last = order.flip(0)
    diagonal = mean + (squares * (1 + damping) - mean)  # M's, and what is added: in this order, for the same bits as ever
    size = diagonal.sqrt()
    # Of unit diagonal, so that float32 is exact enough whatever the columns' sizes. Last first, for an upper factor. There
    # is one matrix of this size, since it may be larger than the weight: a lower factor that Cholesky writes by columns is
    # an upper one by rows, and in reverse it is a lower one.
    rows = known[:, last].float()
    matrix = (rows.T @ rows).div_(len(rows)).div_(size[last, None]).div_(size[last])
    matrix.diagonal().copy_((diagonal / size / size)[last])
    torch.linalg.cholesky(matrix.mT, out=matrix.mT)
    _turn(matrix)
    upper = matrix.mT.mul_(size[order, None])
    squares[order] = upper.diagonal().square()
    return Inputs(squares, order, upper.div_(upper.diagonal().clone()))


def _turn(matrix: Tensor) -> None:
    """Reverse the rows and the columns of a matrix (K, K) in its place: the order of all its entries in memory."""
    flat, half = matrix.view(-1), matrix.numel() // 2
    for start in range(0, half, AT_ONCE):
        stop = min(start + AT_ONCE, half)
        front, back = flat[start:stop], flat[len(flat) - stop : len(flat) - start]
        turned = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(turned)


def _order(squares: Tensor) -> Tensor:
    """Columns (K,) in the order in which they are rounded: groups of large squares (K,) first, and so within a group."""
    groups = torch.arange(len(squares), device=squares.device) // GROUP
    sums = torch.zeros_like(squares).index_add(0, groups, squares)
    largest = squares.argsort(descending=True)
    return largest[sums[groups[largest]].argsort(descending=True, stable=True)]


def grouped(weight: Tensor, known: Tensor | Inputs | None = None, bits: int = 4) -> Grouped:
    """A weight (N, K) in integers of a few bits, with a scale and a minimum for every 32 weights of a row.

    `known` of the rows that it meets: mean squares (K,), the rows (T, K), or `Inputs`, made once where weights share them.
    A group with a weight that is no number, or beyond float16, has a scale or minimum that is none.
    """
    if weight.shape[1] % GROUP:
        raise ValueError(f"rows of {weight.shape[1]} weights cannot be cut into groups of {GROUP}")
    inputs, most = _inputs(weight, known), 2**bits - 1
    parts = [_grouped(rows, inputs, most) for rows in weight.split(max(1, AT_ONCE // weight.shape[1]))]
    return Grouped(*(torch.cat(part) for part in zip(*parts, strict=True)))


def int8(weight: Tensor, known: Tensor | Inputs | None = None) -> Rowwise:
    """A weight (N, K) in 8 bits, with one scale a row. `known` is as in `grouped`."""
    inputs = _inputs(weight, known)
    parts = [_int8(rows, inputs) for rows in weight.split(max(1, AT_ONCE // weight.shape[1]))]
    return Rowwise(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _inputs(weight: Tensor, known: Tensor | Inputs | None) -> Inputs:
    if known is None:
        return inputs_of(torch.ones(weight.shape[1], device=weight.device))
    return known if isinstance(known, Inputs) else inputs_of(known)


def _grouped(weight: Tensor, inputs: Inputs, most: int) -> Grouped:
    """As `grouped`, of a few rows. A column's weights lie side by side here: (K, N), and a group is 32 columns."""
    weight = weight.float()
    scales, lows, exact = (part.squeeze(-1).T.contiguous() for part in grids(weight.unflatten(1, (-1, GROUP)), most))
    columns, counts = weight.T[inputs.order].contiguous(), inputs.squares[inputs.order, None]
    errors, codes = torch.zeros_like(columns), torch.empty_like(columns, dtype=torch.uint8)
    for start in range(0, len(columns), GROUP):
        group, of_group = inputs.order[start] // GROUP, slice(start, start + GROUP)
        own = columns[of_group]
        aims = own if inputs.pull is None else own + inputs.pull[:start, of_group].T @ errors[:start]
        scale, low = _search(aims, counts[of_group], most)
        scale = scales[group] = torch.where(exact[group], scales[group], scale)
        low = lows[group] = torch.where(exact[group], lows[group], low)
        if inputs.pull is None:
            codes[of_group] = _codes(aims, scale.float(), low.float(), most)
        else:
            aims = torch.where(exact[group], own, aims)
            pull = inputs.pull[of_group, of_group]
            codes[of_group], errors[of_group] = _in_turn(aims, own, pull, Grid(scale.float(), low.float(), 0, most))
    return Grouped(_in_place(codes, inputs.order), scales.T.contiguous(), lows.T.contiguous())


def _int8(weight: Tensor, inputs: Inputs) -> Rowwise:
    """As `int8`, of a few rows."""
    weight = weight.float()
    most = weight.abs().amax(1, keepdim=True)
    scale, least_error = most, torch.full_like(most, float("inf"))
    for part in SHRINKING:
        tried = (most * part / 127).clamp(min=1e-12)
        error = (weight - (weight / tried).round_().clamp_(-127, 127) * tried).square() @ inputs.squares[:, None]
        scale, least_error = torch.where(error < least_error, tried, scale), torch.minimum(error, least_error)
    if inputs.pull is None:
        codes = (weight / scale).nan_to_num_(0, 0, 0).round_().clamp_(-127, 127)
        return Rowwise(codes.to(torch.int8), scale[:, 0])
    columns, grid = weight.T[inputs.order].contiguous(), Grid(scale[:, 0], torch.zeros_like(scale[:, 0]), -127, 127)
    errors, codes = torch.zeros_like(columns), torch.empty_like(columns, dtype=torch.int8)
    for start in range(0, len(columns), GROUP):
        few = slice(start, start + GROUP)
        aims = columns[few] + inputs.pull[:start, few].T @ errors[:start]
        codes[few], errors[few] = _in_turn(aims, columns[few], inputs.pull[few, few], grid)
    return Rowwise(_in_place(codes, inputs.order), scale[:, 0])


def _in_place(codes: Tensor, order: Tensor) -> Tensor:
    """Codes (K, N) of columns in this order, as (N, K) in the weight's own."""
    return torch.empty_like(codes).index_copy_(0, order, codes).T.contiguous()


class Grid(NamedTuple):
    """The points of rows' weights: whole numbers from `least` to `most`, times `scale` (N,), + `low` (N,)."""

    scale: Tensor
    low: Tensor
    least: int
    most: int


def _in_turn(aims: Tensor, own: Tensor, pull: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes and errors (32, N) of columns that are rounded one after another; each takes on the earlier ones' errors.

    `aims` and `own` weights are (32, N), and `aims` is changed in place. An error that is no number is passed on as 0.
    """
    codes, errors = torch.empty_like(aims), torch.empty_like(aims)
    per = (1 / grid.scale).nan_to_num_(0, 0, 0)
    for k in range(len(aims)):
        torch.sub(aims[k], grid.low, out=codes[k]).mul_(per).nan_to_num_(0, 0, 0).round_().clamp_(grid.least, grid.most)
        torch.addcmul(grid.low, codes[k], grid.scale, out=errors[k]).neg_().add_(own[k]).nan_to_num_(0, 0, 0)
        aims[k + 1 :].addcmul_(pull[k, k + 1 :, None], errors[k])
    return codes, errors


def _codes(columns: Tensor, scale: Tensor, low: Tensor, most: int) -> Tensor:
    """The points of a grid that are nearest to weights (32, N), 0 to `most`, in float32."""
    return (columns - low).mul_((1 / scale).nan_to_num_(0, 0, 0)).nan_to_num_(0, 0, 0).round_().clamp_(0, most)


def _search(columns: Tensor, counts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Scales and minima (N,) in float16 for groups (32, N), of little error if errors' squares are weighted with `counts`.

    The weights are rounded to grids of several sizes; least squares then give scale and minimum for these codes, 0 to
    `most`. It is the search of llama.cpp's Q4_1. No group has more error than with points spread evenly over its range.
    """
    least, largest = columns.aminmax(dim=0)
    span = largest - least
    total = counts.sum()
    mean = (columns * counts).sum(0) / total
    weighted = (columns - mean).mul_(counts)
    plain, best = (span / most, least), (span / most, least)
    gain = torch.zeros_like(span)
    for spare in (*SPARE, None):  # the last one goes on from the best
        if spare is None:
            codes = _codes(columns, *best, most)
        else:
            codes = (columns - least).mul_((most + spare) / span).round_().clamp_(max=most)
        scale, low, gained = _least_squares(codes, weighted, counts, mean, total)
        better = gained > gain
        best = torch.where(better, scale, best[0]), torch.where(better, low, best[1])
        gain = torch.where(better, gained, gain)
    (scale, low), (plain_scale, plain_low) = ((part[0].half(), part[1].half()) for part in (best, plain))
    better = _error(columns, counts, scale, low, most) < _error(columns, counts, plain_scale, plain_low, most)
    return torch.where(better, scale, plain_scale), torch.where(better, low, plain_low)


def _least_squares(
    codes: Tensor, weighted: Tensor, counts: Tensor, mean: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and minimum (N,) for codes (32, N), and by how much the weighted squared error is below that of the mean.

    `weighted` is (weights - `mean`) · `counts`, and its sums are 0.
    """
    counted = codes * counts
    codes_mean = counted.sum(0) / total
    spread = counted.mul_(codes).sum(0) - codes_mean.square() * total
    together = codes.mul_(weighted).sum(0)
    scale = together / spread
    return scale, mean - scale * codes_mean, together * scale


def _error(columns: Tensor, counts: Tensor, scale: Tensor, low: Tensor, most: int) -> Tensor:
    """The weighted squared error (N,) of groups (32, N) on these grids."""
    scale, low = scale.float(), low.float()
    return _codes(columns, scale, low, most).mul_(scale).add_(low).sub_(columns).square_().mul_(counts).sum(0)


def grids(groups: Tensor, most: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Of groups (N, G, 32): scales and minima (N, G, 1) in float16 of grids that they lie on, and whether they do.

    A group whose values lie on a grid of at most `most` + 1 points gets that grid, if its scale and its first point are
    float16 numbers, as those of a GGUF file are. The first point may be beyond the values, and a scale may be negative, as
    in Q4_0.
    """
    least, largest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    span = largest - least
    scale, low = (span / most).half(), least.half()
    # A group of one value: its q is 1, and its scale is what float16 loses of it.
    scale = torch.where(span == 0, (least - low.float()).half(), scale)
    missing = span.new_full(span.shape, float("inf")).masked_fill_(span == 0, 0)  # how far a group is from its grid
    for steps in range(most, 0, -1):
        inexact = missing > 1e-3 * span / most
        if not inexact.any():
            break
        # Most groups of most models lie on no grid, which a few of their weights show.
        chosen = (inexact & _on_grid(groups[..., :4], least, span / steps))[..., 0]
        chosen[chosen.clone()] = _on_grid(groups[chosen], least[chosen], span[chosen] / steps)[:, 0]
        own = (span[chosen] / steps).half()
        beyond = (
            torch.arange(most + 1 - steps, device=groups.device) * own.float()
        )  # from the last value to the first point
        exact = torch.cat([least[chosen] - beyond, largest[chosen] + beyond], dim=-1)  # first points of a grid up, or down
        firsts = exact.half()
        errors = (firsts.float() - exact).abs() + (own.float() * steps - span[chosen]).abs()
        error, best = errors.min(-1, keepdim=True)
        better = error < missing[chosen]
        scale[chosen] = torch.where(better, torch.where(best < beyond.shape[-1], own, -own), scale[chosen])
        low[chosen] = torch.where(better, firsts.gather(-1, best), low[chosen])
        missing[chosen] = error.minimum(missing[chosen])
    return scale, low, missing <= 1e-3 * span / most


def lies_on_grids(weight: Tensor, most: int = 15) -> bool:
    """Whether all groups of a weight (N, K) lie on grids of at most `most` + 1 points: see `grids`."""
    return weight.shape[1] % GROUP == 0 and bool(grids(weight.unflatten(1, (-1, GROUP)), most)[2].all())


def _on_grid(groups: Tensor, least: Tensor, scale: Tensor) -> Tensor:
    """Whether all weights of a group are the least one + a whole number of scales, up to float32's rounding: (…, 1)."""
    steps = (groups - least) / scale
    return ((steps - steps.round()).abs() < 1e-3).all(-1, keepdim=True)
