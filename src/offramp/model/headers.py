"""Find the tensors of a file by its header: safetensors and GGUF.

Files come from strangers. So nothing is allocated or looped over because of a header's claim before the file is known to
hold it.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MOST_HEADER_BYTES = 100_000_000  # bytes of a safetensors header, as the library has it
BITS = {  # bits of an entry, for all dtypes that safetensors files may hold
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
MOST_DIMS = 4  # of a tensor in a GGUF file, as ggml has it
GGUF_FORMS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # its types of numbers, as `struct` names them


def rows_of(shape: tuple[int, ...]) -> int:
    """The rows of a tensor of this shape."""
    return shape[0] if shape else 1


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are: `file`, from `offset` on. `kind` is a key of `DTYPES`, or GGUF's own type."""

    file: Path
    offset: int
    row_bytes: int
    kind: Any
    shape: tuple[int, ...]

    def read(self, start: int, stop: int) -> Tensor:
        """The bytes of rows `start` to `stop` - 1. Raises `OSError` where the file ends before them."""
        out = torch.empty((stop - start) * self.row_bytes, dtype=torch.uint8)
        rest = out.numpy().data
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset + start * self.row_bytes)
            while rest:
                count = stream.readinto(rest)
                if not count:
                    raise OSError(f"{self.file.name} is cut short")
                rest = rest[count:]
        return out

    def read_each(self, units: Tensor, size: int) -> Tensor:
        """The bytes (n, `size`) of each of these units (n,) of `size` bytes, counted from the start of the tensor."""
        with self.file.open("rb", buffering=0) as stream:
            if hasattr(os, "posix_fadvise"):  # with reading ahead, the system would read most of the file
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            found = b"".join(os.pread(stream.fileno(), size, self.offset + unit * size) for unit in units.tolist())
        if len(found) < len(units) * size:
            raise OSError(f"{self.file.name} is cut short")
        return torch.frombuffer(bytearray(found), dtype=torch.uint8).view(len(units), size)


def read_safetensors(file: Path) -> dict[str, Place]:
    """Where each tensor of a safetensors file is. It is checked that each byte after the header belongs to one tensor.

    Raises `ValueError` or `OSError` for a file that is damaged.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(size - 8, MOST_HEADER_BYTES):
            raise OSError(f"{file.name} is cut short")
        try:
            header = dict(json.loads(stream.read(length)))
            header.pop("__metadata__", None)
            table = []
            for name, tensor in header.items():
                start, stop = _numbers(tensor["data_offsets"])
                table.append((start, stop, name, tensor["dtype"], _numbers(tensor["shape"]), BITS[tensor["dtype"]]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"the header of {file.name} is damaged") from error
    places, end = {}, 0
    for start, stop, name, dtype, shape, bits in sorted(table, key=lambda row: row[:2]):
        if start != end or 8 * (stop - start) != prod(shape) * bits:
            raise ValueError(f"the header of {file.name} is damaged: it gives '{name}' a wrong place or size")
        places[name] = Place(file, 8 + length + start, (stop - start) // max(1, rows_of(shape)), dtype, shape)
        end = stop
    if 8 + length + end > size:
        raise OSError(f"{file.name} is cut short")
    if 8 + length + end < size:
        raise ValueError(f"{file.name} holds more than its tensors")
    return places


def _numbers(found: Any) -> tuple[int, ...]:
    """The numbers of a list, if they are few, whole and not negative. Raises `TypeError` for anything else."""
    if not isinstance(found, list) or len(found) > 64 or any(type(each) is not int or each < 0 for each in found):
        raise TypeError("not a list of whole numbers")
    return tuple(found)


def read_gguf(file: Path) -> tuple[str, dict[str, Place]]:
    """The architecture that a GGUF file names, and where each of its tensors is.

    The package `gguf` can do this too. But it takes seconds and a gigabyte for a large vocabulary, and it trusts damaged
    files. Raises `ValueError` or `OSError` for a file that is damaged or of another format.
    """
    try:
        with file.open("rb") as stream:
            header = _GgufHeader(stream, file.stat().st_size)
            magic, version, tensors, fields = header.bytes(4), header.number("I"), header.number(), header.number()
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(f"{file.name} is not a GGUF file of version 2 or 3")
            known: dict[str, Any] = {"general.architecture": "", "general.alignment": 32}
            keys = set()
            for _ in range(fields):
                key, found = header.text(), header.value(header.number("I"))
                keys.add(key)
                if key in known:
                    if type(found) is not type(known[key]):
                        raise KeyError(key)
                    known[key] = found
            table = [header.tensor() for _ in range(tensors)]
            start = header.at + -header.at % known["general.alignment"]
            places = {name: _gguf_place(file, start, header.size, *tensor) for name, *tensor in table}
            if len(keys) < fields or len(places) < tensors:
                raise ValueError(f"{file.name} is damaged: its header has a key or a tensor twice")
    except (struct.error, KeyError, UnicodeDecodeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{file.name} is damaged or cut short") from error
    return known["general.architecture"], places


class _GgufHeader:
    """Reads the header of a GGUF file of `size` bytes, from place `at` on. A file that ends early: `struct.error`."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self.size, self.at = stream, size, 0

    def bytes(self, count: int) -> bytes:
        self._go(count)
        return self._stream.read(count)

    def number(self, form: str = "Q") -> Any:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        return self.bytes(self.number()).decode()

    def value(self, kind: int) -> Any:
        """The value of a field; None for an array, which is skipped. As in llama.cpp, an array holds no arrays."""
        from gguf import GGUFValueType

        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.number(GGUF_FORMS[kind])
        inner, count = self.number("I"), self.number()
        if inner == GGUFValueType.STRING:
            for _ in range(count):
                self.text()
        else:
            self._go(count * struct.calcsize(f"<{GGUF_FORMS[inner]}"))
            self._stream.seek(self.at)
        return None

    def tensor(self) -> tuple[Any, ...]:
        """A tensor's name, shape, type and offset."""
        name, dims = self.text(), self.number("I")
        if dims > MOST_DIMS:
            raise struct.error(f"a tensor of {dims} dims")
        shape = tuple(reversed([self.number() for _ in range(dims)]))
        return name, shape, self.number("I"), self.number()

    def _go(self, count: int) -> None:
        self.at += count
        if self.at > self.size:
            raise struct.error(f"{count} bytes are missing")


def _gguf_place(file: Path, start: int, size: int, shape: tuple[int, ...], number: int, offset: int) -> Place:
    """The place of a tensor whose data begin `offset` bytes after `start`, in a file of `size` bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType(number)
    entries, block = GGML_QUANT_SIZES[kind]
    row_bytes = prod(shape) // rows_of(shape) * block // entries
    if prod(shape[-1:]) % entries or start + offset + rows_of(shape) * row_bytes > size:
        raise ValueError(f"a tensor of the shape {shape} and the type {kind.name} is not in {file.name}")
    return Place(file, start + offset, row_bytes, kind, shape)
