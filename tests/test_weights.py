"""Weight formats keep what they promise, and products multiply with exactly those values."""

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from offramp.model.compiled import native
from offramp.model.compiled.native import Native, kernels, library
from offramp.model.compiled.structures import CMambaShape, CShape, CWeight
from offramp.model.compiled.weights import FORMATS, Int4, Int8, Weight

KINDS = {"float32": Weight, "bfloat16": Weight, "int8": Int8, "int4": Int4}


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


@pytest.mark.parametrize("quantisation", ["Q4_0", "Q4_1"])
def test_int4_keeps_the_values_of_a_4_bit_gguf(quantisation):
    values = gguf_values(quantisation)
    torch.testing.assert_close(Int4.of(values).dense(), values, rtol=0, atol=2e-6)


def test_int4_does_not_keep_what_has_more_than_16_values():
    values = gguf_values("Q8_0")
    assert (Int4.of(values).dense() - values).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "steps"), [("int8", 254), ("int4", 15)])
def test_rounding_is_at_most_half_a_step(kind, steps):
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    groups = weight if kind == "int8" else weight.unflatten(1, (-1, 32))
    span = 2 * groups.abs().amax(-1) if kind == "int8" else groups.amax(-1) - groups.amin(-1)
    error = (KINDS[kind].of(weight).dense() - weight).view_as(groups).abs().amax(-1)
    assert (error <= span / steps / 2 * 1.001).all()


def test_a_group_of_equal_weights_stays_as_it_is():
    weight = torch.full((16, 32), 0.3)
    torch.testing.assert_close(Int4.of(weight).dense(), weight, rtol=1e-6, atol=0)


def test_rows_that_cannot_be_grouped_are_refused():
    with pytest.raises(ValueError, match="groups of 32"):
        Int4.tensors(torch.randn(4, 40))


# Instructions that the compiler must not use, so that one machine tests the kernels of several.
WITHOUT = {
    "none": "",
    "bfloat16": "-mno-avx512bf16 -mno-avx512vnni",
    "avx512": "-mno-avx512f",
    "avx2": "-mno-avx512f -mno-avx2 -mno-fma",
}


# What is compiled for a test only is not optimised as far: that takes long.
QUICK = ["-O1" if flag == "-O3" else flag for flag in native.FLAGS]


@pytest.fixture(params=[name for name in WITHOUT if name == "none" or platform.machine() == "x86_64"])
def compiled(request, monkeypatch, tmp_path_factory):
    """The C code, compiled without these instructions."""
    if not library() or not shutil.which("gcc"):
        pytest.skip("no C compiler")
    if request.param != "none":
        monkeypatch.setenv("CC", f"gcc {WITHOUT[request.param]}")
        monkeypatch.setattr(native, "FLAGS", QUICK)
        # Beside the folders of the test run's processes, which share what is compiled.
        monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path_factory.getbasetemp().parent / "compiled"))
        found = library.__wrapped__()
        assert found, "this does not compile"
        monkeypatch.setattr(native, "library", lambda: found)


def rounded(rows, kind, fine=False, multiplies=kernels):
    """The numbers that rows are multiplied as, by kernels of this name."""
    most = 127 * 256 if fine else 127
    if kind == "bfloat16" and "BF16" in multiplies():
        return rows.bfloat16().float()
    if kind.startswith("int"):
        parts = rows.split(64 if kind == "int8" else 32, dim=1)
        scales = [part.abs().amax(-1, keepdim=True) for part in parts]
        numbers = [(part * (most / scale) + part.sign() / 2).trunc() for part, scale in zip(parts, scales, strict=True)]
        return torch.cat([part.double() * (scale / most) for part, scale in zip(numbers, scales, strict=True)], dim=1)
    return rows


@pytest.mark.parametrize(("kind", "fine"), [*((kind, False) for kind in KINDS), ("int8", True), ("int4", True)])
def test_a_native_product_is_with_the_dense_weight_and_each_row_for_itself(kind, fine, compiled):
    """With any number of rows, also where columns do not fill a vector, and where they are more than `DEPTH`."""
    for columns in (96, 320, 2112):
        weight = random_weight(kind, rows=37, columns=columns, bias=True)
        rows, dense = torch.randn(70, columns), weight.dense()
        multiplier = Native([], [], CShape(columns, 1, 1, 8, columns), CMambaShape(), columns)
        handle = CWeight.of(weight, fine)
        product = multiplier.product(handle, rows)
        for count in (1, 2, 3, 4, 7, 8, 13):
            alone = torch.cat([multiplier.product(handle, part.contiguous()) for part in rows.split(count)])
            assert torch.equal(product, alone), f"{count} rows of {columns}"
        wanted = rounded(rows, kind, fine).double() @ dense.double().T + weight.bias
        assert (product - wanted).abs().max() <= 1e-5 * wanted.abs().max()


ARM = ("aarch64-linux-gnu-gcc", "qemu-aarch64")  # of Debian's packages gcc-aarch64-linux-gnu and qemu-user


# Sets of instructions, by the compiler that knows them. Zen 5 has AVX-VNNI beside AVX-512; it may be compiled without the
# latter's VNNI.
SETS = {
    "gcc": [
        "x86-64-v3", "x86-64-v4", "x86-64-v4 -mavxvnni", "znver4", "znver5", "alderlake", "sapphirerapids",
    ],
    ARM[0]: ["armv8-a", "armv8.2-a+dotprod"],
}  # fmt: skip


@pytest.mark.parametrize(("compiler", "instructions"), [(name, each) for name, sets in SETS.items() for each in sets])
def test_the_code_compiles_for_every_set_of_instructions(compiler, instructions):
    if not shutil.which(compiler) or (compiler == "gcc" and platform.machine() != "x86_64"):
        pytest.skip(f"no {compiler} for this")
    command = [compiler, *f"-march={instructions} -O0 -ffp-contract=off -fopenmp -Wno-psabi -S -o /dev/null".split()]
    known = subprocess.run([*command, "-x", "c", "/dev/null"], capture_output=True, text=True)
    if known.returncode:
        pytest.skip(f"{compiler} does not know -march={instructions}")
    done = subprocess.run([*command, str(native.SOURCE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=["armv8-a", "armv8.2-a+dotprod"])
def arm_product(request, tmp_path_factory):
    """product.c, compiled for ARM processors with NEON, and for those that also have dot products."""
    if not all(map(shutil.which, ARM)):
        pytest.skip(f"no {' or no '.join(ARM)}")
    program = tmp_path_factory.mktemp("arm") / "product"
    flags = [f"-march={request.param}", *(flag for flag in QUICK if flag not in ("-march=native", "-shared", "-fPIC"))]
    source = Path(__file__).with_name("product.c")
    command = [ARM[0], *flags, "-static", "-I", str(native.FOLDER), "-o", str(program), str(source), "-lm"]
    subprocess.run(command, check=True, capture_output=True)
    return [ARM[1], "-cpu", "max", str(program)]


@pytest.mark.parametrize(("kind", "fine"), [*((kind, False) for kind in KINDS), ("int8", True), ("int4", True)])
def test_a_product_on_arm_is_with_the_dense_weight_and_each_row_for_itself(kind, fine, arm_product, tmp_path):
    """Emulated by qemu, so its speed says nothing."""
    weight, rows = random_weight(kind, rows=37, columns=352), torch.randn(13, 352)
    sizes = [CWeight.of(weight, fine).kind, weight.rows, weight.columns, weight.w.nbytes, len(rows)]
    parts = [np.array(sizes, np.int64), weight.w.view(torch.uint8), *([weight.scale] if kind == "int8" else []), rows]
    file = tmp_path / "product"
    file.write_bytes(b"".join(np.asarray(part).tobytes() for part in parts))
    done = subprocess.run([*arm_product, str(file)], capture_output=True, check=False)
    assert done.returncode == 0, "few rows at a time gave other bits" if done.returncode == 1 else done.stderr
    assert done.stderr.startswith(b"NEON")
    product = torch.from_numpy(np.frombuffer(done.stdout, np.float32).reshape(13, 37).copy())
    wanted = rounded(rows, kind, fine, done.stderr.decode).double() @ weight.dense().double().T
    assert (product - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.skipif(not library(), reason="no C compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_lost_in_a_native_product(kind):
    x = torch.ones(1, 96)
    x[0, 40] = float("nan")
    native = Native([], [], CShape(96, 1, 1, 8, 96), CMambaShape(), 96)
    assert native.product(CWeight.of(random_weight(kind)), x).isnan().all()


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
    assert set(FORMATS) == {"float32", "bfloat16", "int8", "int4", "int4-head4"}
