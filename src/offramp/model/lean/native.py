"""Compile the C code, once for each machine, and call it through ctypes.

`llama.c` and `mamba2.c` run a range of blocks in one call. `head.c` multiplies with the LM head. `products.h` holds what
they share. Without a C compiler nothing here is used: the lean path then computes the same with torch's operators.
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
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.files import cache_folder
from offramp.machine import instruction_set, processor
from offramp.model.lean.weights import Weight

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / name for name in ("head.c", "llama.c", "mamba2.c")]
HEADER = FOLDER / "products.h"
FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]


class CWeight(ctypes.Structure):
    """`Weight` in products.h."""

    _fields_ = (
        *((name, c_int64) for name in ("kind", "rows", "columns")),
        *((name, c_void_p) for name in ("w", "scale", "low", "bias")),
    )

    @classmethod
    def of(cls, weight: Weight) -> CWeight:
        """The weight as the C code takes it. It holds addresses only, so `weight` must stay alive."""
        kind = ("float32", "bfloat16", "int8", "int4").index(weight.name)
        parts = (weight.w, weight.scale, weight.low, weight.bias)
        return cls(kind, weight.rows, weight.columns, *map(address, parts))


class CScratch(ctypes.Structure):
    """`Scratch` in products.h."""

    _fields_ = (("floats", c_void_p), ("own", c_int64), ("threads", c_int64))


class CBlock(ctypes.Structure):
    """`Block` in llama.c."""

    _fields_ = (
        *((name, CWeight) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, c_int64) for name in ("window", "rotary", "norm_first", "norm_heads")),
        *((name, c_float) for name in ("eps", "attention_eps", "scale")),
    )


class CShape(ctypes.Structure):
    """`Shape` in llama.c."""

    _fields_ = tuple((name, c_int64) for name in ("hidden", "queries", "heads", "dim", "width"))


class CTokens(ctypes.Structure):
    """`Tokens` in llama.c."""

    _fields_ = (
        ("h", c_void_p),
        ("count", c_int64),
        ("positions", c_void_p),
        ("sequences", c_void_p),
        ("turn", c_void_p),
    )


class CMambaBlock(ctypes.Structure):
    """`MambaBlock` in mamba2.c."""

    _fields_ = (
        *((name, CWeight) for name in ("in", "out")),
        *((name, c_void_p) for name in ("norm", "gated_norm", "conv", "conv_bias", "dt_bias", "decay", "skip")),
        *((name, c_float) for name in ("eps", "gated_eps", "dt_low", "dt_high")),
    )


class CMambaShape(ctypes.Structure):
    """`MambaShape` in mamba2.c."""

    _fields_ = tuple((name, c_int64) for name in ("hidden", "heads", "dim", "groups", "states", "width"))


class CMambaTokens(ctypes.Structure):
    """`MambaTokens` in mamba2.c."""

    _fields_ = (
        ("h", c_void_p),
        ("count", c_int64),
        ("sequences", c_void_p),
        ("journal", c_void_p),
        ("stride", c_int64),
    )


def address(tensor: Tensor | None) -> int | None:
    """Where the tensor's memory begins; None (NULL in C) for no tensor."""
    return None if tensor is None else tensor.data_ptr()


def _from_row(tensor: Tensor, row: int) -> int:
    """The address where a row begins, without making a tensor for it."""
    return tensor.data_ptr() + row * tensor.stride(0) * tensor.itemsize


@cache
def library() -> Any:
    """The compiled library, or None where no C compiler works. The environment variable `CC` names another compiler."""
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "clang"]
    command = [*compiler, *FLAGS]
    compiled = _compiled_file(command)
    try:
        if not compiled.exists():
            compiled.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=compiled.parent) as temporary:
                new = Path(temporary) / "new.so"
                subprocess.run([*command, "-o", str(new), *map(str, SOURCES), "-lm"], check=True, capture_output=True)
                os.replace(new, compiled)
        return _declared(ctypes.CDLL(str(compiled)))
    except (OSError, subprocess.CalledProcessError):
        return None


def _compiled_file(command: list[str]) -> Path:
    """Where the compiled library is kept: one file for each source, compiler command and kind of processor."""
    # -march=native means something else on each machine, and machines may share a cache folder.
    machine = "/".join([*command, platform.machine(), processor(), instruction_set()])
    code = b"".join(file.read_bytes() for file in (*SOURCES, HEADER))
    return cache_folder() / "native" / f"{hashlib.sha256(code + machine.encode()).hexdigest()[:16]}.so"


def _declared(loaded: Any) -> Any:
    """The library, with the signatures of its functions."""
    scratch = POINTER(CScratch)
    llama = [POINTER(CBlock), c_int64, POINTER(CShape), c_void_p, c_int64, POINTER(CTokens), scratch]
    mamba = [POINTER(CMambaBlock), c_int64, POINTER(CMambaShape), c_void_p, c_int64]
    mamba += [POINTER(CMambaTokens), scratch]
    signatures = {
        "offramp_product": [POINTER(CWeight), c_void_p, c_int64, c_void_p, scratch],
        "offramp_run": llama,
        "offramp_remember": llama,
        "offramp_mamba_run": mamba,
        "offramp_mamba_remember": mamba,
        "offramp_mamba_replay": [POINTER(CMambaBlock), POINTER(CMambaShape), c_void_p, c_void_p, c_int64],
    }
    for name, arguments in signatures.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    loaded.offramp_rounds_to_bfloat16.restype = c_int64
    return loaded


def rounds_to_bfloat16(format: str) -> bool:
    """Whether the compiled path rounds rows to bfloat16 before it multiplies them with weights in this format.

    `format` is a `Weight.name`. Where rows are rounded, so are int4's weights.
    """
    compiled = library()
    return format in ("bfloat16", "int4") and bool(compiled and compiled.offramp_rounds_to_bfloat16())


class _Room(threading.local):
    """Scratch memory: each Python thread has its own, since a call to C lets the others run."""

    def __init__(self) -> None:
        self.floats = torch.empty(0, dtype=torch.float32)


class _Native:
    """What both compiled paths share. All tensors are float32 and contiguous, on the CPU."""

    ROWS = 256  # the most rows of one call; more would need much scratch and gain nothing
    TILE, PANEL = 8, 1 << 15  # of products.h: at least TILE_ROWS, and PANEL

    def __init__(self, kind: Any, blocks: Sequence[Any], columns: int) -> None:
        """`columns` are those of the widest weight. The caller keeps the tensors alive that the blocks point to."""
        self._library = library()
        self._kind, self._blocks = kind, (kind * len(blocks))(*blocks)
        self._columns = columns
        self._room = _Room()

    def _from(self, start: int) -> Any:
        """The blocks from `start` on."""
        return ctypes.cast(ctypes.byref(self._blocks, start * ctypes.sizeof(self._kind)), POINTER(self._kind))

    def product(self, weight: CWeight, x: Tensor) -> Tensor:
        """Multiply x (R, K) with a weight: (R, N)."""
        y = torch.empty(len(x), weight.rows, dtype=torch.float32)
        for first, rows in self._pieces(len(x)):
            scratch = self._scratch(rows, 0)
            self._library.offramp_product(weight, _from_row(x, first), rows, _from_row(y, first), scratch)
        return y

    def _pieces(self, count: int) -> Iterator[tuple[int, int]]:
        """The first row and the number of rows of each call."""
        for first in range(0, count, self.ROWS):
            yield first, min(self.ROWS, count - first)

    def _scratch(self, rows: int, row: int, own: int = 0) -> CScratch:
        """Scratch for so many rows: `row` floats for each and its narrow form, and `own` floats for each thread."""
        threads, own = torch.get_num_threads(), own + self.PANEL
        shared = rows * (row + self._columns + 64)
        if len(self._room.floats) < shared + threads * own:
            self._room.floats = torch.empty(shared + threads * own, dtype=torch.float32)
        return CScratch(self._room.floats.data_ptr(), own, threads)


@dataclass(frozen=True)
class Rows:
    """The position and the sequence of each row, (R,) int64 each, and its rotary pairs, `turn` (R, P).

    The rows of a sequence follow each other, in the order of their positions.
    """

    positions: Tensor
    sequences: Tensor
    turn: Tensor


class Native(_Native):
    """Blocks of the llama kind."""

    def __init__(self, blocks: Sequence[CBlock], shape: CShape, columns: int) -> None:
        super().__init__(CBlock, blocks, columns)
        self._shape = shape
        row = max(shape.hidden, shape.queries * shape.dim) + (shape.queries + 2 * shape.heads) * shape.dim
        self._row = row + max(2 * shape.width, shape.hidden)

    def run(self, h: Tensor, start: int, memories: list[list[int]], rows: Rows) -> None:
        """Run h (R, D) in place through the blocks from `start` on, one block for each of the `memories`.

        memories[i][q] is the address of the keys and values that the i-th of these blocks has of sequence q.
        """
        self._call(self._library.offramp_run, h, start, memories, rows)

    def remember(self, h: Tensor, start: int, memories: list[list[int]], rows: Rows) -> None:
        """Only write the `memories`, as if h (R, D) were the input of each of the blocks."""
        self._call(self._library.offramp_remember, h, start, memories, rows)

    def _call(self, function: Any, h: Tensor, start: int, memories: list[list[int]], rows: Rows) -> None:
        count = len(h)
        if not (h.is_contiguous() and len(rows.positions) == len(rows.sequences) == len(rows.turn) == count):
            raise ValueError(
                f"{count} rows, {len(rows.positions)} positions, {len(rows.sequences)} sequences, "
                f"{len(rows.turn)} rotary rows"
            )
        kv = (c_void_p * (len(memories) * len(memories[0])))(*chain.from_iterable(memories))
        own = 2 * self.TILE * (self._shape.queries // self._shape.heads)
        for first, piece in self._pieces(count):
            starts = (_from_row(part, first) for part in (rows.positions, rows.sequences, rows.turn))
            tokens = CTokens(_from_row(h, first), piece, *starts)
            scratch = self._scratch(piece, self._row, own)
            function(self._from(start), len(memories), self._shape, kv, len(memories[0]), tokens, scratch)


class NativeMamba(_Native):
    """Blocks of the Mamba-2 kind."""

    def __init__(self, blocks: Sequence[CMambaBlock], shape: CMambaShape, columns: int) -> None:
        super().__init__(CMambaBlock, blocks, columns)
        self._shape = shape
        inner = shape.heads * shape.dim
        self._channels = inner + 2 * shape.groups * shape.states
        self._row = max(shape.hidden, inner) + inner + 2 * self._channels + shape.heads

    def journal(self, blocks: int, rows: int) -> Tensor:
        """An empty journal (blocks, R, 2C + H), in which blocks record what rows do to their memories."""
        return torch.empty(blocks, rows, 2 * self._channels + self._shape.heads)

    def run(
        self, h: Tensor, start: int, memories: list[list[int]], sequences: Tensor, journal: Tensor | None = None
    ) -> None:
        """Run h (R, D) in place through the blocks from `start` on, one block for each of the `memories`.

        memories[i] holds two addresses for each sequence: of the window and of the state that the i-th block has of it.
        Row r is the next token of sequences[r] (int64), or padding where that is -1. The `journal`, if given, receives each
        row's inputs and outputs of the convolution, and dt.
        """
        self._call(self._library.offramp_mamba_run, h, start, memories, sequences, journal)

    def remember(
        self, h: Tensor, start: int, memories: list[list[int]], sequences: Tensor, journal: Tensor | None = None
    ) -> None:
        """Only update the `memories`, as if h (R, D) were the input of each of the blocks."""
        self._call(self._library.offramp_mamba_remember, h, start, memories, sequences, journal)

    def _call(
        self, function: Any, h: Tensor, start: int, memories: list[list[int]], sequences: Tensor, journal: Tensor | None
    ) -> None:
        count = len(h)
        if not (h.is_contiguous() and len(sequences) == count):
            raise ValueError(f"{count} rows, {len(sequences)} sequences")
        memory = (c_void_p * (len(memories) * len(memories[0])))(*chain.from_iterable(memories))
        for first, piece in self._pieces(count):
            notes = None if journal is None else _from_row(journal[0], first)
            tokens = CMambaTokens(_from_row(h, first), piece, _from_row(sequences, first), notes, count)
            scratch = self._scratch(piece, self._row)
            function(self._from(start), len(memories), self._shape, memory, len(memories[0]) // 2, tokens, scratch)

    def replay(self, index: int, journal: Tensor, h: Tensor, tokens: int) -> Tensor:
        """Repeat the first `tokens` of block `index`'s journal (1, T, 2C + H) on its state h (1, H, P, N), in place."""
        self._library.offramp_mamba_replay(self._from(index), self._shape, h.data_ptr(), journal.data_ptr(), tokens)
        return h
