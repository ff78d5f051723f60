"""`native.c` from Python: compiled where a C compiler is at hand, once for each machine, and called through ctypes.

Without a compiler nothing here is used, and `lean` does the same with torch's operators.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.sources import cache_folder
from offramp.weights import Weight

SOURCE = Path(__file__).parent / "native.c"
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]


class CWeight(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("kind", "rows", "columns")),
        *((name, c_void_p) for name in ("w", "scale", "low", "bias")),
    )

    @classmethod
    def of(cls, weight: Weight) -> CWeight:
        kind = ("float32", "bfloat16", "int8", "int4").index(weight.name)
        parts = (weight.w, weight.scale, weight.low, weight.bias)
        return cls(kind, weight.rows, weight.columns, *map(_address, parts))


class CBlock(ctypes.Structure):
    _fields_ = (
        *((name, CWeight) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, c_int64) for name in ("window", "rotary", "norm_first", "norm_heads")),
        *((name, c_float) for name in ("eps", "attention_eps", "scale")),
    )


class CShape(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in ("hidden", "queries", "heads", "dim", "width"))


class CMemory(ctypes.Structure):
    _fields_ = (("kv", c_void_p), ("capacity", c_int64))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def library() -> Any:
    """The compiled library, or None where there is no working C compiler. `CC` names another compiler."""
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "clang"]
    command = [*compiler, *FLAGS]
    machine = "/".join([*command, platform.machine(), _processor()])
    key = hashlib.sha256(SOURCE.read_bytes() + machine.encode()).hexdigest()[:16]
    made = cache_folder() / "native" / f"{key}.so"
    try:
        if not made.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=made.parent) as temporary:
                new = Path(temporary) / "new.so"
                subprocess.run([*command, "-o", str(new), str(SOURCE), "-lm"], check=True, capture_output=True)
                os.replace(new, made)
        loaded = ctypes.CDLL(str(made))
    except (OSError, subprocess.CalledProcessError):
        return None
    run, product = loaded.offramp_run, loaded.offramp_product
    run.argtypes = [POINTER(CBlock), c_int64, POINTER(CShape), POINTER(CMemory), c_void_p, c_int64]
    run.argtypes += [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64]
    product.argtypes = [POINTER(CWeight), c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64]
    run.restype = product.restype = None
    return loaded


def _processor() -> str:
    """What tells machines apart that share a cache folder: -march=native means another thing on each."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


class Native:
    """The compiled path for one model's blocks and head. All tensors are float32 and contiguous, on the CPU."""

    def __init__(self, blocks: Sequence[CBlock], shape: CShape, columns: int) -> None:
        """`columns`: of the widest weight. Whoever calls keeps the tensors alive that the blocks point to."""
        self._library = library()
        self._blocks = (CBlock * len(blocks))(*blocks)
        self._shape, self._columns = shape, columns
        row = max(shape.hidden, shape.queries * shape.dim) + (shape.queries + 2 * shape.heads) * shape.dim
        self._row = row + 2 * shape.width
        self._scratch = torch.empty(0)

    def run(
        self,
        h: Tensor,
        start: int,
        buffers: list[Tensor],
        positions: Tensor,
        sequences: Tensor,
        turn: Tensor,
        end: int,
        fill: bool = False,
    ) -> None:
        """h (R, D) through the blocks from `start` on, one for each of the `buffers`, in place.

        Row r is at positions[r] < end of sequences[r] (both int64); turn (R, P) are the rotary pairs. With `fill` only the
        buffers are written.
        """
        memory = (CMemory * len(buffers))(*[CMemory(buffer.data_ptr(), buffer.shape[1]) for buffer in buffers])
        blocks = ctypes.cast(ctypes.byref(self._blocks, start * ctypes.sizeof(CBlock)), POINTER(CBlock))
        rows = len(h)
        scratch, own, threads = self._room(rows, rows * self._row, self._shape.queries // self._shape.heads * end)
        self._library.offramp_run(
            blocks, len(buffers), self._shape, memory, h.data_ptr(), rows, positions.data_ptr(), sequences.data_ptr(),
            turn.data_ptr(), fill, scratch, own, threads,
        )  # fmt: skip

    def product(self, weight: CWeight, x: Tensor) -> Tensor:
        """x (R, K) → (R, N)."""
        y = torch.empty(len(x), weight.rows)
        scratch, own, threads = self._room(len(x), 0, 0)
        self._library.offramp_product(weight, x.data_ptr(), len(x), y.data_ptr(), scratch, own, threads)
        return y

    def _room(self, rows: int, shared: int, scores: int) -> tuple[int, int, int]:
        """Address of enough scratch, a thread's own part of it in floats, threads."""
        threads = torch.get_num_threads()
        own = max(scores, rows * self._columns)
        if len(self._scratch) < shared + threads * own:
            self._scratch = torch.empty(shared + threads * own)
        return self._scratch.data_ptr(), own, threads
