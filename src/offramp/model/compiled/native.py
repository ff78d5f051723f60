"""Compile the C code, once for each machine, and call it through ctypes.

`blocks.c` runs a range of blocks in one call, or decodes several tokens; `llama.c` and `mamba2.c` are what blocks are made
of. `head.c` multiplies with the LM head. The headers hold the rest: vectors, products, attention, gates, the head, its
sketch, and steps of decoding.
Without a C compiler nothing here is used: the library's own blocks run then. A compiler without OpenMP, such as Apple's,
makes code that uses a single core. The compiled library is kept in the cache folder. It is loaded
only where nobody else could have put another one.
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
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from ctypes import POINTER, c_char_p, c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.files import cache_folder, put
from offramp.machine import instruction_set, processor
from offramp.model.compiled.steps import Ask, Asked, Stepping, Steps
from offramp.model.compiled.structures import (
    MOST_DRAFTS,
    CBlock,
    CDrafter,
    CGate,
    CGates,
    CHead,
    CMambaBlock,
    CMambaShape,
    CMemory,
    CModel,
    CScratch,
    CShape,
    CSketch,
    CSteps,
    CTokens,
    CWeight,
)

FOLDER = Path(__file__).parent.parent / "lean"
SOURCE = FOLDER / "kernels.c"
SLOW_PAIRS = "-mno-avx512bf16"  # Intel's cores multiply pairs of bfloat16 at half the rate of float32
FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-Wno-psabi"]
ALONE = "The C compiler knows no OpenMP, so compiled blocks use a single core. Install gcc, or name a compiler in CC."
SLOW = "so the library's own blocks run: they are slower, and do not run in int8 and int4."
NOTHING = f"No C compiler works here, {SLOW} Install gcc or clang, or name a compiler in CC."
UNUSABLE = f"The compiled code cannot be used ({{}}), {SLOW}"
EXPOSED = (
    f"{{}} belongs to another user, or others may write there. No compiled code is loaded from such a place, {SLOW} "
    "Mend it: chmod -R go-w FOLDER, or name a folder of your own in OFFRAMP_CACHE."
)


class _NoCode(Exception):
    """There is no compiled library. The message is for the user."""


def _from_row(tensor: Tensor, row: int) -> int:
    """The address where a row begins, without making a tensor for it."""
    return tensor.data_ptr() + row * tensor.stride(0) * tensor.itemsize


def _check(x: Tensor, columns: int) -> None:
    """Raises `ValueError` for rows that are not of so many float32 numbers: the C code would read beyond them."""
    if x.dtype != torch.float32 or x.shape[-1] != columns:
        raise ValueError(f"rows of {x.shape[-1]} {x.dtype} where {columns} float32 numbers belong")


@cache
def library() -> Any:
    """The compiled library, or None where there is none. The environment variable `CC` names another compiler.

    Warns where there is none, and where the compiler has no OpenMP.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "clang"]
    command = [*compiler, *FLAGS, *([SLOW_PAIRS] if "Intel" in processor() else [])]
    with suppress(_NoCode):
        return _compiled([*command, "-fopenmp"])
    try:
        loaded = _compiled(command)
    except _NoCode as error:
        warnings.warn(str(error), stacklevel=2)
        return None
    warnings.warn(ALONE, stacklevel=2)
    return loaded


def _compiled(command: list[str]) -> Any:
    """The library as this command compiles it. Raises `_NoCode`."""
    key = _key(command)
    try:
        folder = cache_folder() / "native"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for place in (cache_folder(), folder):
            if _exposed(place):
                raise _NoCode(EXPOSED.format(place))
        for file in folder.glob(f"{key}-*.so"):
            if file.name == _name(key, file) and not _exposed(file):
                return _declared(ctypes.CDLL(str(file)))
            warnings.warn(
                f"The compiled library {file} was damaged, or others could write to it. It is made anew.", stacklevel=3
            )
            file.unlink(missing_ok=True)
        return _declared(ctypes.CDLL(str(_compile(command, folder, key))))
    except OSError as error:
        raise _NoCode(UNUSABLE.format(error)) from error


def _compile(command: list[str], folder: Path, key: str) -> Path:
    """Compile the code into a new file of the folder."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        new = Path(temporary) / "new.so"
        try:
            subprocess.run([*command, "-o", str(new), str(SOURCE), "-lm"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise _NoCode(NOTHING) from error
        new.chmod(0o755)
        file = folder / _name(key, new)
        put(new, file)
    return file


def _exposed(path: Path) -> bool:
    """Whether somebody other than this user and root could have written what is there. Windows has no such modes."""
    found = path.stat()
    return hasattr(os, "geteuid") and (found.st_uid not in (0, os.geteuid()) or bool(found.st_mode & 0o022))


def _name(key: str, file: Path) -> str:
    """The name of a compiled library: its key, and the hash of its content, which tells a damaged file."""
    return f"{key}-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}.so"


def _key(command: list[str]) -> str:
    """What names compiled libraries: the source, the compiler's command and the kind of processor."""
    # -march=native means something else on each machine, and machines may share a cache folder.
    machine = "/".join([*command, platform.machine(), processor(), instruction_set()])
    code = b"".join(file.read_bytes() for file in sorted(FOLDER.glob("*.[ch]")))
    return hashlib.sha256(code + machine.encode()).hexdigest()[:16]


def _declared(loaded: Any) -> Any:
    """The library, with the signatures of its functions."""
    scratch, model, memory = POINTER(CScratch), POINTER(CModel), POINTER(CMemory)
    blocks = [model, c_int64, c_int64, memory, POINTER(CTokens)]
    steps = [model, c_int64, memory, c_void_p, c_int64, POINTER(CSteps), POINTER(CGates)]
    signatures = {
        "offramp_product": (None, [POINTER(CWeight), c_void_p, c_int64, c_void_p, scratch]),
        "offramp_logits": (None, [POINTER(CHead), POINTER(CSketch), c_void_p, c_int64, c_void_p, scratch]),
        "offramp_ask": (c_float, [POINTER(CGate), c_void_p, scratch]),
        "offramp_run": (c_int64, [*blocks, POINTER(CGates), scratch]),
        "offramp_remember": (None, [*blocks, scratch]),
        "offramp_steps": (None, [*steps, scratch]),
        "offramp_mamba_replay": (None, [POINTER(CMambaBlock), POINTER(CMambaShape), c_void_p, c_void_p, c_int64]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, result
    loaded.offramp_kernels.restype = c_char_p
    return loaded


def kernels() -> str:
    """The processor's instructions that compiled code multiplies with, such as "AVX2"; "" where nothing is compiled."""
    compiled = library()
    return compiled.offramp_kernels().decode() if compiled else ""


class _Room(threading.local):
    """Scratch memory: each Python thread has its own, since a call to C lets the others run."""

    def __init__(self) -> None:
        self.floats = torch.empty(0, dtype=torch.float32)


@dataclass(frozen=True)
class Rows:
    """The sequence of each row, `sequences` (R,) int64; the rows of a sequence follow each other.

    With attention, the position of each row, `positions` (R,) int64, its rotary pairs, `turn` (R, P), and `end`, one more
    than the highest position.
    """

    sequences: Tensor
    positions: Tensor | None = None
    turn: Tensor | None = None
    end: int = 0


@dataclass(frozen=True)
class Addresses:
    """Where blocks keep what they remember.

    For each sequence, the i-th block has an entry in kv[i], the address of its keys and values, and two in mixed[i], those
    of a mixer's window and state. What a block does not have is 0.
    """

    kv: list[list[int]]
    mixed: list[list[int]]

    def compiled(self) -> CMemory:
        """The addresses as the C code takes them."""
        pointers = [(c_void_p * sum(map(len, rows)))(*chain.from_iterable(rows)) for rows in (self.kv, self.mixed)]
        return CMemory(*(ctypes.cast(each, c_void_p) for each in pointers), len(self.kv[0]))


class Native:
    """A model's blocks. All tensors are float32 and contiguous, on the CPU.

    `blocks` have attention and an MLP, or an MLP alone where `mixers` have a mixer. A model of mixers alone has no
    `blocks`, and one without mixers no `mixers`.
    """

    ROWS = 256  # the most rows of one call; more would need much scratch and gain nothing
    FEW, STRETCH = 8, 256  # EIGHT of vectors.h; of attention.h
    BINS, CHUNK = 1 << 11, 1 << 10  # of sketch.h

    def __init__(
        self, blocks: Sequence[CBlock], mixers: Sequence[CMambaBlock], shape: CShape, mamba: CMambaShape, columns: int
    ) -> None:
        """`columns` are those of the widest weight. The caller keeps the tensors alive that the blocks point to."""
        self._library, self._room, self._columns = library(), _Room(), columns
        self._count, self._mixers = max(len(blocks), len(mixers)), (CMambaBlock * len(mixers))(*mixers)
        self._model = CModel((CBlock * len(blocks))(*blocks) or None, self._mixers or None, shape, mamba)
        self._shape, self._mamba = self._model.shape, self._model.mamba_shape
        inner, self._width = mamba.heads * mamba.dim, max(shape.hidden, mamba.hidden)
        self._channels = inner + 2 * mamba.groups * mamba.states
        attended = max(shape.hidden, shape.queries * shape.dim) + (shape.queries + 2 * shape.heads) * shape.dim
        mlp, mixed = max(2 * shape.width, shape.hidden), inner + self._channels + mamba.heads
        self._row = max(attended + mlp, max(mamba.hidden, inner) + mixed + self._channels)
        self.room_for_gates = mlp if blocks else mixed  # floats that a gate may use beside the row

    def product(self, weight: CWeight, x: Tensor) -> Tensor:
        """Multiply x (R, K) with a weight: (R, N)."""
        _check(x, weight.columns)
        y = torch.empty(len(x), weight.rows, dtype=torch.float32)
        for first, rows in self._pieces(len(x)):
            scratch = self._scratch(rows, weight.columns)
            self._library.offramp_product(weight, _from_row(x, first), rows, _from_row(y, first), scratch)
        return y

    def logits(self, head: CHead, sketch: CSketch | None, h: Tensor) -> Tensor:
        """Logits (R, V) of hidden states h (R, D). With a sketch, −inf for tokens that it does not find likely."""
        _check(h, head.weight.columns)
        y = torch.empty(len(h), head.weight.rows, dtype=torch.float32)
        for first, rows in self._pieces(len(h)):
            scratch = self._scratch(0, 0, head=self._for_head(head, sketch, rows))
            self._library.offramp_logits(head, sketch, _from_row(h, first), rows, _from_row(y, first), scratch)
        return y

    def _for_head(self, head: CHead, sketch: CSketch | None, rows: int) -> int:
        """The floats that `read_logits` of head.h works in."""
        floats: int = rows * (2 * head.weight.columns + 64)
        if sketch:
            floats += rows * (2 * sketch.reduce.rows + 128) + self._chunks(head) * (self.CHUNK + 1) + self.BINS
        return floats

    def _for_steps(self, ask: Ask) -> tuple[int, int]:
        """The floats that the head and the choice work in, and those of a drafter's desk (drafts.h)."""
        vocabulary: int = ask.head.weight.rows
        head = max(self._for_head(ask.head, ask.sketch, ask.rows), ask.rows * (vocabulary // 32 + 1))
        head += ask.rows * (vocabulary + 2 * self._chunks(ask.head))
        return head, self._for_drafts(ask.drafter) if ask.drafter else 0

    def _for_drafts(self, drafter: CDrafter) -> int:
        down, inward, tokens = drafter.down, getattr(drafter, "in"), drafter.head.weight.rows
        floats: int = 2 * inward.columns + inward.rows + 3 * down.rows + down.columns + 128 + tokens
        return floats + 3 * self._chunks(drafter.head)

    def _chunks(self, head: CHead) -> int:
        tokens: int = head.weight.rows
        return -(-tokens // self.CHUNK)

    def ask(self, gate: CGate, h: Tensor) -> float:
        """The logit of a gate for a hidden state h of D numbers."""
        weight = getattr(gate, "in")
        _check(h, weight.columns)
        scratch = self._scratch(1, weight.columns + weight.rows)
        return float(self._library.offramp_ask(gate, h.data_ptr(), scratch))

    def _pieces(self, count: int) -> Iterator[tuple[int, int]]:
        """The first row and the number of rows of each call."""
        for first in range(0, count, self.ROWS):
            yield first, min(self.ROWS, count - first)

    def _scratch(self, rows: int, row: int, own: int = 0, head: int = 0, desk: int = 0, saved: int = 0) -> CScratch:
        """Scratch: for each row, `row` floats and its narrow form; for each thread, `own`; and so many for other parts."""
        threads = torch.get_num_threads()
        sizes = [rows * (row + self._columns + 64) + threads * own, head, desk, saved]
        if len(self._room.floats) < sum(sizes):
            self._room.floats = torch.empty(sum(sizes), dtype=torch.float32)
        start = self._room.floats.data_ptr()
        places = [start + size * self._room.floats.itemsize for size in accumulate(sizes)]
        return CScratch(start, own, threads, *places[:-1])

    def keep_halves(self, half: bool) -> None:
        """Keep keys and values in bfloat16, or else in float32."""
        self._shape.half = half

    def journal(self, blocks: int, rows: int) -> Tensor:
        """An empty journal (blocks, R, 2C + H), in which mixers record what rows do to their memories."""
        return torch.empty(blocks, rows, 2 * self._channels + self._mamba.heads)

    def run(
        self,
        h: Tensor,
        start: int,
        memory: Addresses,
        rows: Rows,
        journal: Tensor | None = None,
        asked: Asked | None = None,
    ) -> int:
        """Run h (R, D) in place through the blocks from `start` on, one block for each entry of the `memory`.

        The `journal`, if given, receives of each mixer and row the inputs and outputs of the convolution, and dt. Gates may
        be `asked` about a single row: it stops at the first one whose logit is above its threshold. Returns the number of
        blocks run.
        """
        gates = asked.compiled() if asked else None
        return self._call(self._library.offramp_run, h, start, memory, rows, journal, gates)

    def remember(self, h: Tensor, start: int, memory: Addresses, rows: Rows, journal: Tensor | None = None) -> int:
        """Only update the `memory`, as if h (R, D) were the input of each of the blocks. Returns their number."""
        self._call(self._library.offramp_remember, h, start, memory, rows, journal)
        return len(memory.kv)

    def _call(
        self,
        function: Any,
        h: Tensor,
        start: int,
        memory: Addresses,
        rows: Rows,
        journal: Tensor | None,
        *gates: CGates | None,
    ) -> int:
        count, run, stop = len(h), 0, start + len(memory.kv)
        _check(h, self._width)
        if not 0 <= start <= stop <= self._count:
            raise ValueError(f"there are {self._count} blocks, and none from {start} to {stop - 1}")
        parts = (rows.positions, rows.sequences, rows.sequences, rows.turn)
        if not h.is_contiguous() or any(part is not None and len(part) != count for part in parts):
            raise ValueError(
                f"{count} rows, and {[None if part is None else len(part) for part in parts]} of what they have"
            )
        addresses = memory.compiled()
        for first, piece in self._pieces(count):
            starts = (None if part is None else _from_row(part, first) for part in parts)
            notes = None if journal is None else _from_row(journal[0], first)
            tokens = CTokens(_from_row(h, first), piece, *starts, rows.end, notes, count)
            run = function(self._model, start, stop, addresses, tokens, *gates, self._for_blocks(piece, rows.end))
        return run

    def _for_blocks(self, rows: int, end: int, head: int = 0, desk: int = 0, saved: int = 0) -> CScratch:
        """Scratch for rows whose highest position is `end` - 1."""
        shape = self._shape
        group = shape.queries // max(1, shape.heads)
        own = 2 * self.FEW * group * (shape.dim + 2)
        parts = shape.queries * (shape.dim + 2) * (end // self.STRETCH + 1) if rows <= self.FEW else 0
        return self._scratch(rows, self._row + parts, own, head, desk, saved)

    def step(self, ask: Ask, memory: Addresses, turn: Tensor | None, position: int) -> Steps:
        """Decode what is asked for from `position` on.

        The `memory` has room for all tokens; row p of `turn` holds the rotary pairs of position p.
        """
        stepping = Stepping(ask)
        saved = self._for_saving() if ask.drafter and self._mixers else 0
        scratch = self._for_blocks(ask.rows, position + ask.most, *self._for_steps(ask), saved)
        turns = None if turn is None else turn.data_ptr()
        self._library.offramp_steps(
            self._model, self._count, memory.compiled(), turns, position, stepping.compiled, stepping.gates, scratch
        )
        return stepping.found()

    def _for_saving(self) -> int:
        """The floats of what mixers remember of a sequence, and of a journal of one round's rows."""
        shape = self._mamba
        memory = (shape.width - 1) * self._channels + shape.heads * shape.dim * shape.states
        return int(self._count * (memory + (MOST_DRAFTS + 1) * (2 * self._channels + shape.heads)))

    def replay(self, index: int, journal: Tensor, h: Tensor, tokens: int) -> Tensor:
        """Repeat the first `tokens` of block `index`'s journal (1, T, 2C + H) on its state h (1, H, P, N), in place."""
        self._library.offramp_mamba_replay(self._mixers[index], self._mamba, h.data_ptr(), journal.data_ptr(), tokens)
        return h
