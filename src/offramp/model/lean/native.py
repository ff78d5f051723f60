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
import threading
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int64, c_void_p
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.files import cache_folder
from offramp.model.lean.weights import Weight

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
        return cls(kind, weight.rows, weight.columns, *map(address, parts))


class CBlock(ctypes.Structure):
    _fields_ = (
        *((name, CWeight) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, c_int64) for name in ("window", "rotary", "norm_first", "norm_heads")),
        *((name, c_float) for name in ("eps", "attention_eps", "scale")),
    )


class CShape(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in ("hidden", "queries", "heads", "dim", "width"))


class CMambaBlock(ctypes.Structure):
    _fields_ = (
        *((name, CWeight) for name in ("in", "out")),
        *((name, c_void_p) for name in ("norm", "gated_norm", "conv", "conv_bias", "dt_bias", "decay", "skip")),
        *((name, c_float) for name in ("eps", "gated_eps", "dt_low", "dt_high")),
    )


class CMambaShape(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in ("hidden", "heads", "dim", "groups", "states", "width"))


class CMambaMemory(ctypes.Structure):
    _fields_ = (("window", c_void_p), ("h", c_void_p))


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _from_row(tensor: Tensor, row: int) -> int:
    """Address of a row on, without making a tensor for it."""
    return tensor.data_ptr() + row * tensor.stride(0) * tensor.itemsize


def rows_of(tensor: Tensor) -> list[int]:
    """Address of each row."""
    return [_from_row(tensor, row) for row in range(len(tensor))]


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
    run.argtypes = [POINTER(CBlock), c_int64, POINTER(CShape), c_void_p, c_int64, c_void_p, c_int64]
    run.argtypes += [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64]
    product.argtypes = [POINTER(CWeight), c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64]
    mamba = loaded.offramp_mamba_run
    mamba.argtypes = [POINTER(CMambaBlock), c_int64, POINTER(CMambaShape), POINTER(CMambaMemory), c_int64]
    mamba.argtypes += [c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64]
    replay = loaded.offramp_mamba_replay
    replay.argtypes = [POINTER(CMambaBlock), POINTER(CMambaShape), c_void_p, c_void_p, c_int64]
    run.restype = product.restype = mamba.restype = replay.restype = None
    return loaded


def _processor() -> str:
    """What tells machines apart that share a cache folder: -march=native means another thing on each."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = ("flags", "Features", "model name", "CPU part")
    return "/".join(sorted({line for line in lines if line.startswith(named)}))


class _Room(threading.local):
    """Scratch memory: each Python thread has its own, since a call to C lets the others run."""

    def __init__(self) -> None:
        self.floats = torch.empty(0, dtype=torch.float32)


class _Native:
    """What both compiled paths share. All tensors are float32 and contiguous, on the CPU."""

    ROWS = 256  # at most so many in one call: more would need much scratch and gain nothing

    def __init__(self, kind: Any, blocks: Sequence[Any], columns: int) -> None:
        """`columns`: of the widest weight. Whoever calls keeps the tensors alive that the blocks point to."""
        self._library = library()
        self._kind, self._blocks = kind, (kind * len(blocks))(*blocks)
        self._columns = columns
        self._room = _Room()

    def _from(self, start: int) -> Any:
        """The blocks from `start` on."""
        return ctypes.cast(ctypes.byref(self._blocks, start * ctypes.sizeof(self._kind)), POINTER(self._kind))

    def product(self, weight: CWeight, x: Tensor) -> Tensor:
        """x (R, K) → (R, N)."""
        y = torch.empty(len(x), weight.rows, dtype=torch.float32)
        for some in range(0, len(x), self.ROWS):
            rows = min(self.ROWS, len(x) - some)
            scratch, own, threads = self._scratch(rows, 0, 0)
            self._library.offramp_product(weight, _from_row(x, some), rows, _from_row(y, some), scratch, own, threads)
        return y

    def _scratch(self, rows: int, shared: int, scores: int) -> tuple[int, int, int]:
        """Address of enough scratch, a thread's own part of it in floats, threads."""
        threads = torch.get_num_threads()
        own = max(scores, rows * self._columns)
        if len(self._room.floats) < shared + threads * own:
            self._room.floats = torch.empty(shared + threads * own, dtype=torch.float32)
        return self._room.floats.data_ptr(), own, threads


class Native(_Native):
    """Blocks of the llama kind."""

    def __init__(self, blocks: Sequence[CBlock], shape: CShape, columns: int) -> None:
        super().__init__(CBlock, blocks, columns)
        self._shape = shape
        row = max(shape.hidden, shape.queries * shape.dim) + (shape.queries + 2 * shape.heads) * shape.dim
        self._row = row + max(2 * shape.width, shape.hidden)

    def run(
        self,
        h: Tensor,
        start: int,
        memories: list[list[int]],
        positions: Tensor,
        sequences: Tensor,
        turn: Tensor,
        end: int,
        fill: bool = False,
    ) -> None:
        """h (R, D) through the blocks from `start` on, one for each of the `memories`, in place.

        A memory is for each sequence the address of its keys and values. Row r is at positions[r] < end of sequences[r]
        (both int64), and the rows of a sequence stand in the order of their positions; turn (R, P) are the rotary pairs.
        With `fill` only the memories are written.
        """
        count = len(h)
        if not (h.is_contiguous() and len(positions) == len(sequences) == len(turn) == count):
            raise ValueError(
                f"{count} rows, {len(positions)} positions, {len(sequences)} sequences, {len(turn)} rotary rows"
            )
        kv = (c_void_p * (len(memories) * len(memories[0])))(*chain.from_iterable(memories))
        for some in range(0, count, self.ROWS):
            rows = min(self.ROWS, count - some)
            scratch, own, threads = self._scratch(rows, rows * self._row, self._shape.queries // self._shape.heads * end)
            self._library.offramp_run(
                self._from(start), len(memories), self._shape, kv, len(memories[0]), _from_row(h, some), rows,
                _from_row(positions, some), _from_row(sequences, some), _from_row(turn, some), fill, scratch, own, threads,
            )  # fmt: skip


class NativeMamba(_Native):
    """Blocks of the Mamba-2 kind."""

    def __init__(self, blocks: Sequence[CMambaBlock], shape: CMambaShape, columns: int) -> None:
        super().__init__(CMambaBlock, blocks, columns)
        self._shape = shape
        inner = shape.heads * shape.dim
        self._channels = inner + 2 * shape.groups * shape.states
        self._row = max(shape.hidden, inner) + inner + 2 * self._channels + shape.heads

    def run(
        self,
        h: Tensor,
        start: int,
        memories: list[list[tuple[int, int]]],
        sequences: Tensor,
        fill: bool = False,
        watched: bool = False,
    ) -> Tensor | None:
        """h (R, D) through the blocks from `start` on, one for each of the `memories`, in place.

        A memory is for each sequence the addresses of its window and its state. Row r is the next token of sequences[r]
        (int64), of none where that is -1. With `fill` only the memories move. If `watched`, returns a journal
        (blocks, R, 2C + H): each row's inputs and outputs of the convolution, and dt.
        """
        count = len(h)
        if not (h.is_contiguous() and len(sequences) == count):
            raise ValueError(f"{count} rows, {len(sequences)} sequences")
        journal = torch.empty(len(memories), count, 2 * self._channels + self._shape.heads) if watched else None
        memory = (CMambaMemory * (len(memories) * len(memories[0])))(
            *(CMambaMemory(*addresses) for addresses in chain.from_iterable(memories))
        )
        for some in range(0, count, self.ROWS):
            rows = min(self.ROWS, count - some)
            scratch, own, threads = self._scratch(rows, rows * self._row, 0)
            self._library.offramp_mamba_run(
                self._from(start), len(memories), self._shape, memory, len(memories[0]), _from_row(h, some), rows,
                _from_row(sequences, some), None if journal is None else _from_row(journal[0], some), count,
                fill, scratch, own, threads,
            )  # fmt: skip
        return journal

    def replay(self, index: int, journal: Tensor, h: Tensor, tokens: int) -> Tensor:
        """The state h (1, H, P, N) of block `index`, moved on in place by its first tokens of a journal (1, T, 2C + H)."""
        self._library.offramp_mamba_replay(self._from(index), self._shape, h.data_ptr(), journal.data_ptr(), tokens)
        return h
