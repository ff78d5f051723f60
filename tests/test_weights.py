"""Weight formats keep what they promise, and products multiply with exactly those values."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from models import compiled_only
from offramp.model.compiled.formats import FORMATS, Int4
from offramp.model.compiled.library import CompiledPart, Model, handle_of, kernels
from offramp.model.compiled.panels import PANELS
from offramp.model.compiled.weights import LARGE, Int8, Stack, Weight

KINDS = {"float32": Weight, "bfloat16": Weight, "int8": Int8, "int4": Int4}
# Where the float16 numbers of a block stand in a file: random bytes there would be infinite or NaN.
FLOATS = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)},
}


def random_weight(kind, rows=48, columns=96, bias=False):
    torch.manual_seed(0)
    weight = torch.randn(rows, columns) * torch.logspace(-2, 1, rows)[:, None]
    if kind == "bfloat16":
        weight = weight.bfloat16()
    return KINDS[kind].of(weight, torch.randn(rows) if bias else None)


def gguf_values(quantisation, rows=40, columns=256):
    """Random weights as a GGUF file of this type holds them."""
    weight = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    kind = GGMLQuantizationType[quantisation]
    return torch.from_numpy(quants.dequantize(quants.quantize(weight, kind), kind).copy())


def gguf_rows(kind, rows=37, columns=768):
    """Random rows of this type as their bytes in a file (rows, bytes), and as values."""
    entries, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (rows, columns // entries, size), dtype=np.uint8)
    for place in FLOATS[kind]:
        scales = generator.normal(0, 1e-2, (rows, columns // entries, 1)).astype(np.float16)
        blocks[..., place : place + 2] = scales.view(np.uint8)
    raw = blocks.reshape(rows, -1)
    return torch.from_numpy(raw), torch.from_numpy(quants.dequantize(raw, GGMLQuantizationType[kind]).copy())


@compiled_only
@pytest.mark.parametrize("kind", PANELS)
def test_a_panel_keeps_the_values_of_its_file(kind):
    raw, values = gguf_rows(kind)
    made = PANELS[kind]
    weight = made(made.packed({"blocks": raw}))
    torch.testing.assert_close(weight.dense(), values, rtol=1e-6, atol=0)
    assert weight.shape == (37, 768)
    assert weight.nbytes == made.bytes_of(37, 768, 4)
    for rows in (slice(5, 30), torch.tensor([36, 0, 17])):
        assert torch.equal(weight.pick(rows).dense(), weight.dense()[rows])


@pytest.mark.parametrize("kind", PANELS)
def test_rows_that_are_no_whole_blocks_are_refused(kind):
    _, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    with pytest.raises(ValueError, match="not whole blocks"):
        PANELS[kind].packed({"blocks": torch.zeros(4, size * 3 // 2, dtype=torch.uint8)})


@compiled_only
@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("kind", PANELS)
def test_a_compiled_product_is_with_the_values_of_the_file(kind, fine):
    torch.manual_seed(0)  # a number half way between two integers may be rounded to either
    raw, values = gguf_rows(kind)
    made, rows = PANELS[kind], torch.randn(9, 768)
    wanted = rounded(rows, "int4", fine).double() @ values.double().T
    found = product(made(made.packed({"blocks": raw})), rows, fine)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@compiled_only
def test_a_stack_multiplies_as_its_pieces():
    bias = torch.randn(37)
    made = [PANELS[kind](PANELS[kind].packed({"blocks": gguf_rows(kind)[0]}), bias) for kind in ("Q5_0", "Q6_K")]
    pieces = [*made, Weight.of(torch.randn(11, 768).half())]
    stack, rows = Stack(pieces), torch.randn(6, 768)
    assert torch.equal(product(stack, rows), torch.cat([product(piece, rows) for piece in pieces], dim=1))
    assert torch.equal(stack.pick(slice(30, 80)).dense(), stack.dense()[30:80])
    assert stack.nbytes == sum(piece.nbytes for piece in pieces)


@pytest.mark.parametrize("quantisation", ["Q4_0", "Q4_1"])
def test_int4_keeps_the_values_of_a_4_bit_gguf(quantisation):
    values = gguf_values(quantisation)
    torch.testing.assert_close(Int4.of(values).dense(), values, rtol=0, atol=2e-6)


def test_int4_does_not_keep_what_has_more_than_16_values():
    values = gguf_values("Q8_0")
    assert (Int4.of(values).dense() - values).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "steps"), [("int8", 254), ("int4", 15)])
def test_rounding_is_at_most_half_a_step_or_better_on_the_whole(kind, steps):
    """A grid that is searched for may leave a group's largest weight further away, where all others gain."""
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    groups = weight if kind == "int8" else weight.unflatten(1, (-1, 32))
    span = 2 * groups.abs().amax(-1) if kind == "int8" else groups.amax(-1) - groups.amin(-1)
    error = (KINDS[kind].of(weight).dense() - weight).view_as(groups).abs()
    assert (error.amax(-1) <= span / steps * (0.5 * 1.001 if kind == "int8" else 3)).all()
    assert (error.square().mean(-1) <= (span / steps).square() / 12 * 1.5).all()


def test_a_group_of_equal_weights_stays_as_it_is():
    weight = torch.full((16, 32), 0.3)
    torch.testing.assert_close(Int4.of(weight).dense(), weight, rtol=1e-6, atol=0)


def test_rows_that_cannot_be_grouped_are_refused():
    with pytest.raises(ValueError, match="groups of 32"):
        Int4.tensors(torch.randn(4, 40))


def rounded(rows, kind, fine=False):
    """The numbers that rows are multiplied as."""
    most = 127 * 256 if fine else 127
    if kind == "bfloat16" and "BF16" in kernels():
        return rows.bfloat16().float()
    if kind.startswith("int"):
        parts = rows.split(64 if kind == "int8" else 32, dim=1)
        scales = [part.abs().amax(-1, keepdim=True) for part in parts]
        numbers = [(part * (most / scale) + part.sign() / 2).trunc() for part, scale in zip(parts, scales, strict=True)]
        return torch.cat([part.double() * (scale / most) for part, scale in zip(numbers, scales, strict=True)], dim=1)
    return rows


def product(weight, rows, fine=False):
    """Rows (R, K) times a weight, by compiled code."""
    ends = CompiledPart("ends", head=weight, norm=torch.ones(weight.columns), embedding=weight, eps=0)
    return Model(ends, []).product(handle_of(weight, fine), rows)


@compiled_only
@pytest.mark.parametrize(("kind", "fine"), [*((kind, False) for kind in KINDS), ("int8", True), ("int4", True)])
def test_a_compiled_product_is_with_the_dense_weight(kind, fine):
    """core/tests/products.c looks closer; here it is seen that weights are laid out as the library reads them."""
    for columns in (96, 320, 2112):
        weight, rows = random_weight(kind, rows=37, columns=columns, bias=True), torch.randn(70, columns)
        wanted = rounded(rows, kind, fine).double() @ weight.dense().double().T + weight.bias
        assert (product(weight, rows, fine) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@compiled_only
@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_lost_in_a_compiled_product(kind):
    x = torch.ones(1, 96)
    x[0, 40] = float("nan")
    assert product(random_weight(kind), x).isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_picked_rows_give_the_same_results(kind):
    weight = random_weight(kind, bias=True)
    torch.testing.assert_close(weight.pick(slice(32, None)).dense(), weight.dense()[32:])
    rows = torch.tensor([3, 40, 1])
    torch.testing.assert_close(weight.pick(rows).dense(), weight.dense()[rows])


def test_a_format_with_fewer_bits_reads_fewer_bytes():
    sizes = [random_weight(kind, columns=256).nbytes for kind in ("float32", "bfloat16", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    assert set(FORMATS) == {"float32", "bfloat16", "int8", "int4", "int4-head4", "file"}


@pytest.mark.parametrize("kind", [Int8, Int4])
def test_the_integers_of_a_large_weight_are_found_once(kind, own_cache, monkeypatch):
    torch.manual_seed(0)
    weight, tensors, found = torch.randn(512, LARGE // 512), kind.tensors, []

    def counted(weight, known=None):
        found.append(len(weight))
        return tensors(weight, known)

    monkeypatch.setattr(kind, "tensors", counted)
    first, again = kind.of(weight), kind.of(weight.clone(), torch.ones(512))
    assert found == [512]
    assert torch.equal(again.dense(), first.dense())
    assert torch.equal(again.bias, torch.ones(512))
    assert torch.allclose(kind.of(2 * weight).dense(), 2 * first.dense(), rtol=1e-2, atol=1e-2)  # another weight
    kind.of(weight[:256])
    kind.of(weight[:256])
    assert found == [512, 512, 256, 256]  # a small one is found each time
    assert len(list(own_cache.glob("formats/*/record.json"))) == 2


@pytest.mark.parametrize("kind", [Int8, Int4])
def test_a_large_weight_needs_no_cache_that_can_be_written(kind, own_cache):
    torch.manual_seed(0)
    weight = torch.randn(512, LARGE // 512)
    wanted = kind(kind.packed(kind.tensors(weight))).dense()
    own_cache.mkdir()
    (own_cache / "formats").write_text("in the way")
    assert torch.equal(kind.of(weight).dense(), wanted)
