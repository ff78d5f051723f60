"""Weights that are rounded to integers change products as little as the method promises."""

import pytest
import torch
from gguf import GGMLQuantizationType, quants

from offramp.model.compiled.rounding import GROUP, Rowwise, grouped, inputs_of, int8


def dense(parts):
    """The values (N, K) that integers and scales stand for."""
    if isinstance(parts, Rowwise):
        return parts.codes.float() * parts.scale[:, None]
    groups = parts.codes.float().unflatten(1, (-1, GROUP))
    return (groups * parts.scale.float()[:, :, None] + parts.low.float()[:, :, None]).flatten(1)


def plain(weight, kind):
    """Each group's range cut into 16 points in float16, or each row's largest weight into 127."""
    if kind is int8:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round() * scale
    groups = weight.unflatten(1, (-1, GROUP))
    low = groups.amin(-1, keepdim=True)
    scale, low = ((groups.amax(-1, keepdim=True) - low) / 15).half().float(), low.half().float()
    return (((groups - low) / scale).round().clamp(0, 15) * scale + low).flatten(1)


def random(rows=24, columns=96, seed=0):
    torch.manual_seed(seed)
    return torch.randn(rows, columns) * torch.logspace(-2, 1, rows)[:, None]


def correlated(tokens, columns, seed=1):
    """Rows (tokens, columns) whose columns go together, and some of which are large."""
    torch.manual_seed(seed)
    mixed = torch.randn(tokens, columns // 4) @ torch.randn(columns // 4, columns) + 0.3 * torch.randn(tokens, columns)
    return mixed * torch.logspace(-1, 1, columns)[torch.randperm(columns)]


@pytest.mark.parametrize("kind", [grouped, int8])
@pytest.mark.parametrize("squares", [None, torch.ones(96), torch.logspace(-3, 3, 96)])
def test_no_group_has_more_weighted_error_than_plain_rounding(kind, squares):
    weight = random()
    counts = torch.ones(96) if squares is None else inputs_of(squares).squares

    def error(values):
        each = (values - weight).square() * counts
        return each.unflatten(1, (-1, GROUP)).sum(-1) if kind is grouped else each.sum(-1)

    searched, rounded = error(dense(kind(weight, squares))), error(plain(weight, kind))
    assert (searched <= rounded * (1 + 1e-5)).all()
    if kind is grouped:
        assert searched.sum() < 0.9 * rounded.sum()


@pytest.mark.parametrize("kind", [grouped, int8])
def test_what_is_known_of_the_rows_makes_products_more_exact(kind):
    weight, (rows, others) = random(64, 128), correlated(8192, 128).split(4096)

    def error(known):
        return (others @ (dense(kind(weight, known)) - weight).T).square().sum()

    nothing, squares, whole = error(None), error(rows.square().mean(0)), error(rows)
    assert whole < 0.5 * min(nothing, squares)
    if kind is grouped:
        assert squares < nothing


def test_a_bit_more_halves_the_errors():
    weight = random()
    four, five = ((dense(grouped(weight, bits=bits)) - weight).square().sum() for bits in (4, 5))
    assert five < 0.35 * four


@pytest.mark.parametrize("tokens", [1, 20])
def test_fewer_rows_than_columns_are_enough_to_go_by(tokens):
    weight, rows = random(16, 64), correlated(tokens, 64)
    rows[:, :3] = 0  # columns that the text never used
    values = dense(grouped(weight, rows))
    assert values.isfinite().all()
    span = weight.unflatten(1, (-1, GROUP)).aminmax(dim=-1)
    assert ((values - weight).abs().unflatten(1, (-1, GROUP)).amax(-1) <= span.max - span.min).all()


@pytest.mark.parametrize("quantisation", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("known", [None, "squares", "rows"])
def test_groups_that_lie_on_a_grid_keep_their_values(quantisation, known):
    kind = GGMLQuantizationType[quantisation]
    weight = torch.from_numpy(quants.dequantize(quants.quantize(random(40, 128).numpy(), kind), kind).copy())
    rows = correlated(512, 128)
    weight[:, 32:64] = random(40, 32)  # on no grid, so that later groups could take on its errors
    values = dense(grouped(weight, {"squares": rows.square().mean(0), "rows": rows}.get(known), int(quantisation[1])))
    kept = [column for column in range(128) if not 32 <= column < 64]
    torch.testing.assert_close(values[:, kept], weight[:, kept], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("known", [None, torch.zeros(64), torch.zeros(64, 64), correlated(99, 64)])
def test_equal_weights_and_zeros_stay_as_they_are(known):
    weight = torch.full((8, 64), 0.3)
    weight[:, 32:] = 0
    weight[4:] = 0
    torch.testing.assert_close(dense(grouped(weight, known)), weight, rtol=1e-6, atol=0)
    eight = dense(int8(weight, known))
    assert (eight[4:] == 0).all()
    assert (eight - weight).abs().max() <= 0.3 / 127


def test_rows_of_zeros_count_all_columns_alike():
    weight = random()
    for zeros in (torch.zeros(96), torch.zeros(96, 96)):
        assert torch.equal(dense(grouped(weight, zeros)), dense(grouped(weight)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_weights_that_are_no_numbers_of_float16_do_not_pass_for_others(bad):
    weight, rows = random(8, 96), correlated(256, 96)
    weight[2, 40] = bad
    values = dense(grouped(weight, rows)).unflatten(1, (-1, GROUP))
    assert not values[2, 1].isfinite().all()
    values[2, 1] = 0
    assert values.isfinite().all()


@pytest.mark.parametrize("columns", [33, 40, 64, 96])
@pytest.mark.parametrize("at_once", [7, 1 << 20])
def test_inputs_are_the_factors_of_their_moments(columns, at_once, monkeypatch):
    monkeypatch.setattr("offramp.model.compiled.rounding.AT_ONCE", at_once)
    rows = torch.randn(500, columns, dtype=torch.float64) * torch.logspace(-1, 1, columns, dtype=torch.float64)
    found = inputs_of(rows, damping=0.3)
    assert torch.equal(found.pull, found.pull.triu())
    made = found.pull.double() @ torch.diag(found.squares[found.order].double()) @ found.pull.double().T
    wanted = (rows.T @ rows / len(rows))[found.order][:, found.order]
    own, added = wanted.diagonal(), made.diagonal() - 1.3 * wanted.diagonal()  # the damping, and a floor
    torch.testing.assert_close(made - torch.diag(made.diagonal()), wanted - torch.diag(own), rtol=0, atol=1e-3)
    assert (added > 0).all()
    assert (added < 0.02 * own.median()).all()


def test_inputs_that_weights_share_are_made_once():
    weight, rows = random(), correlated(512, 96)
    for kind in (grouped, int8):
        for a, b in zip(kind(weight, rows), kind(weight, inputs_of(rows)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [grouped, int8])
def test_a_few_rows_at_a_time_are_rounded_as_all_of_them(kind, monkeypatch):
    weight, squares, rows = random(), torch.logspace(-3, 3, 96), correlated(512, 96)
    whole, fed = kind(weight, squares), dense(kind(weight, rows))
    monkeypatch.setattr("offramp.model.compiled.rounding.AT_ONCE", 5 * 96)
    for few, all_of_them in zip(kind(weight, squares), whole, strict=True):
        assert torch.equal(few, all_of_them)
    # A sum in another order may turn a tie, and what takes on its error.
    assert (dense(kind(weight, rows)) == fed).float().mean() > 0.9


def test_parts_have_the_shapes_and_dtypes_that_are_kept():
    weight = random().bfloat16()
    codes, scale, low = grouped(weight)
    assert (codes.dtype, scale.dtype, low.dtype) == (torch.uint8, torch.float16, torch.float16)
    assert (codes.shape, scale.shape, low.shape) == ((24, 96), (24, 3), (24, 3))
    assert codes.max() <= 15
    codes, scale = int8(weight)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (torch.int8, (24, 96), torch.float32, (24,))


def test_rows_that_cannot_be_grouped_are_refused():
    with pytest.raises(ValueError, match="groups of 32"):
        grouped(torch.randn(4, 40))
