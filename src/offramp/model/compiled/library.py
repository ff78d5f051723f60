"""The C library as Python calls it (core/offramp.h says what its functions do): its structures, parts, models and sessions.

A call that fails raises `ValueError` with the library's sentence, or `MemoryError`.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char, c_char_p, c_double, c_int, c_int64, c_uint64, c_void_p
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from offramp.model import core
from offramp.model.compiled.rounding import GROUP
from offramp.model.compiled.weights import Stack, Weight

PANEL = 16  # rows of a weight in panels that are kept together
MOST_DRAFTS = 31  # of one pass
DEPTHS = 3  # drafts of an exit in a row, of which training says how many were right


class CError(ctypes.Structure):
    """`offramp_error`."""

    _fields_ = (("message", c_char * 248),)


class CWeight(ctypes.Structure):
    """`offramp_weight`."""

    _fields_ = (
        *((name, c_int64) for name in ("type", "fine", "rows", "columns")),
        *((name, c_void_p) for name in ("values", "scales", "bias")),
        ("pieces", c_int64),
    )


class CRows(ctypes.Structure):
    """`offramp_rows`."""

    _fields_ = (("session", c_void_p), ("first", c_int64), ("count", c_int64))


def _of(kind: Any, names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, kind) for name in names.split())


class Settings(Protocol):
    """How a token is chosen: the fields of `decode.sampling.Sampling`."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def repetition_penalty(self) -> float: ...


class CSampling(ctypes.Structure):
    """`offramp_sampling`."""

    _fields_ = (
        *_of(c_double, "temperature top_p min_p penalty"),
        ("top_k", c_int64),
        ("seed", c_uint64),
    )

    @classmethod
    def of(cls, settings: Settings) -> CSampling:
        """These settings as the C code takes them."""
        numbers = settings.temperature, settings.top_p, settings.min_p, settings.repetition_penalty
        return cls(*numbers, settings.top_k, settings.seed % 2**64)


class CExit(ctypes.Structure):
    """`offramp_exit`."""

    _fields_ = (
        *_of(c_int64, "after tail"),
        *_of(c_void_p, "gate readout"),
        *_of(c_double, "threshold perhaps key asking"),
        *_of(c_int64, "gate_flops readout_flops"),
    )


class CBlockCosts(ctypes.Structure):
    """`offramp_block_costs`."""

    _fields_ = _of(c_int64, "flops seen_flops key_flops state_flops")


class CRules(ctypes.Structure):
    """`offramp_rules`."""

    _fields_ = (
        ("exits", c_void_p),
        ("count", c_int64),
        *_of(c_int, "fill confidence key"),
        *_of(c_int64, "middle pending alike"),
        *_of(c_double, "decay"),
        *_of(c_void_p, "sketch exit_sketch shortlist guesses costs"),
        *_of(c_int64, "head_flops exit_head_flops"),
        ("row_costs", c_double * (MOST_DRAFTS + 1)),
        ("accepted", c_double * DEPTHS),
    )


class CDecision(ctypes.Structure):
    """`offramp_decision`."""

    _fields_ = (
        *_of(c_int64, "id block"),
        ("confidence", c_double),
        *_of(c_int64, "flops blocks passes rejected source"),
    )


class CRequest(ctypes.Structure):
    """`offramp_request`."""

    _fields_ = (
        *_of(c_void_p, "session ids"),
        *_of(c_int64, "known prompt reads most"),
        ("ends", c_void_p),
        ("ends_count", c_int64),
        ("how", CSampling),
        ("allowed", c_void_p),
        ("whole", c_int64),
        *_of(c_void_p, "deep decisions"),
        *_of(c_int64, "run decided asked failed"),
    )


STRUCTURES = {
    "offramp_error": CError,
    "offramp_weight": CWeight,
    "offramp_rows": CRows,
    "offramp_sampling": CSampling,
    "offramp_exit": CExit,
    "offramp_block_costs": CBlockCosts,
    "offramp_rules": CRules,
    "offramp_decision": CDecision,
    "offramp_request": CRequest,
}
TYPES = {
    torch.float32: "OFFRAMP_FLOAT32",
    torch.bfloat16: "OFFRAMP_BFLOAT16",
    torch.int64: "OFFRAMP_INT64",
    torch.int32: "OFFRAMP_UINT32",  # torch computes little with uint32
}
_ERROR = POINTER(CError)
_MODEL = _SESSION = _PART = _PLAN = c_void_p
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "offramp_part_new": (_PART, [c_char_p, _ERROR]),
    "offramp_part_free": (None, [_PART]),
    "offramp_part_weight": (c_int, [_PART, c_char_p, POINTER(CWeight), _ERROR]),
    "offramp_part_array": (c_int, [_PART, c_char_p, c_int, c_void_p, c_int64, _ERROR]),
    "offramp_part_number": (c_int, [_PART, c_char_p, c_double, _ERROR]),
    "offramp_model_new": (_MODEL, [_PART, c_void_p, c_void_p, c_void_p, c_int64, _ERROR]),
    "offramp_model_free": (None, [_MODEL]),
    "offramp_model_fits": (c_int, [_MODEL, _PART, _ERROR]),
    "offramp_model_threads": (c_int, [_MODEL, c_int64, _ERROR]),
    "offramp_model_rotary": (c_int, [_MODEL, c_int64, c_void_p, c_int64, c_double, _ERROR]),
    "offramp_pack": (c_int, [c_int64, c_void_p, c_int64, c_int64, c_void_p, _ERROR]),
    "offramp_pick": (c_int, [POINTER(CWeight), c_void_p, c_int64, c_void_p, _ERROR]),
    "offramp_values": (c_int, [POINTER(CWeight), c_void_p, c_int64, c_void_p, _ERROR]),
    "offramp_product": (c_int, [_MODEL, POINTER(CWeight), c_void_p, c_int64, c_void_p, _ERROR]),
    "offramp_logits": (c_int, [_MODEL, _PART, c_void_p, c_int64, c_void_p, _ERROR]),
    "offramp_ask": (c_int, [_MODEL, _PART, c_void_p, c_int64, c_void_p, _ERROR]),
    "offramp_read_out": (c_int, [_MODEL, _PART, c_void_p, c_void_p, c_int64, c_void_p, _ERROR]),
    "offramp_session_new": (_SESSION, [_MODEL, c_int, c_int64, _ERROR]),
    "offramp_session_free": (None, [_SESSION]),
    "offramp_session_fork": (_SESSION, [_SESSION, _ERROR]),
    "offramp_session_reserve": (None, [_SESSION, c_int64]),
    "offramp_session_length": (c_int64, [_SESSION, c_int64]),
    "offramp_session_waits": (c_int64, [_SESSION, c_int64]),
    "offramp_session_first": (c_int64, [_SESSION, c_int64]),
    "offramp_session_bytes": (c_int64, [_SESSION]),
    "offramp_session_bytes_for": (c_int64, [_SESSION, c_int64]),
    "offramp_session_watch": (c_int, [_SESSION, c_int64, c_int64, _ERROR]),
    "offramp_session_settle": (None, [_SESSION]),
    "offramp_session_crop": (c_int, [_SESSION, c_int64, c_int64, c_int64, _ERROR]),
    "offramp_session_can_forget": (c_int, [_SESSION, c_int64]),
    "offramp_session_copy": (c_int, [_SESSION, c_int64, c_int64, c_int64, _ERROR]),
    "offramp_session_keys": (c_int, [_SESSION, c_int64, c_int64, c_void_p, _ERROR]),
    "offramp_session_state": (c_int, [_SESSION, c_int64, c_void_p, c_void_p, _ERROR]),
    "offramp_run": (c_int, [_MODEL, c_int64, c_int64, POINTER(CRows), c_int64, c_void_p, _ERROR]),
    "offramp_remember": (c_int, [_MODEL, c_int64, c_int64, POINTER(CRows), c_int64, c_int64, c_void_p, _ERROR]),
    "offramp_plan_new": (_PLAN, [_MODEL, POINTER(CRules), _ERROR]),
    "offramp_plan_free": (None, [_PLAN]),
    "offramp_step": (c_int, [_PLAN, c_void_p, c_int64, c_int64, c_void_p, _ERROR]),
    "offramp_choose": (
        c_int,
        [_MODEL, POINTER(CSampling), c_void_p, c_int64, c_void_p, c_void_p, POINTER(c_int64), _ERROR],
    ),
}


@cache
def library() -> Any:
    """The compiled library with the signatures of its functions; None where there is none."""
    loaded: Any = core.library()
    if loaded is None:
        return None
    loaded.offramp_constant.argtypes, loaded.offramp_constant.restype = [c_char_p], c_int64
    loaded.offramp_kernels.restype = c_char_p
    expected = {
        "OFFRAMP_GROUP": GROUP,
        "OFFRAMP_PANEL": PANEL,
        "OFFRAMP_MOST_DRAFTS": MOST_DRAFTS,
        "OFFRAMP_DEPTHS": DEPTHS,
    }
    for name, structure in STRUCTURES.items():
        expected[name] = ctypes.sizeof(structure)
        expected |= {f"{name}.{field[0]}": getattr(structure, field[0]).offset for field in structure._fields_}
    differing = [name for name, value in expected.items() if loaded.offramp_constant(name.encode()) != value]
    if differing:
        warnings.warn(f"The compiled library is not one of this version of offramp: {', '.join(differing)}.", stacklevel=2)
        return None
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, result
    return loaded


def kernels() -> str:
    """The processor's instructions that compiled blocks multiply with, such as "AVX2"; "" where nothing is compiled."""
    loaded = library()
    return loaded.offramp_kernels().decode() if loaded else ""


@cache
def constant(name: str) -> int:
    """A constant of the C code by its name."""
    return int(library().offramp_constant(name.encode()))


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the library whose last argument is where it puts an error. Returns what it returns."""
    error = CError()
    function = getattr(library(), name)
    result = function(*arguments, byref(error))
    failed = result is None if function.restype is c_void_p else result != 0
    if failed:
        message = error.message.decode("utf-8", "replace")
        raise MemoryError(message) if result == constant("OFFRAMP_NO_MEMORY") else ValueError(message)
    return result


def handle_of(weight: Weight, fine: bool = False) -> CWeight:
    """The weight as the C code takes it. It holds addresses only, so `weight` must stay alive.

    `fine`: rows that are multiplied with integer weights are rounded to 16 bits instead of 8.
    """
    kind, pieces = constant(f"OFFRAMP_{weight.name.upper()}"), 0
    if isinstance(weight, Stack):
        pieces = len(weight.pieces)
        if weight.handles is None:  # made once: parts keep their address
            weight.handles = (CWeight * pieces)(*map(handle_of, weight.pieces))
        addresses: list[int | None] = [ctypes.addressof(weight.handles), None, None]
    else:
        addresses = [None if part is None else part.data_ptr() for part in (weight.w, weight.scale, weight.bias)]
    return CWeight(kind, fine, weight.rows, weight.columns, *addresses, pieces)


def check_rows(x: Tensor, columns: int) -> None:
    """Raise `ValueError` for rows that are not of so many float32 numbers, one after another."""
    if x.dtype != torch.float32 or x.shape[-1] != columns or not x.is_contiguous():
        raise ValueError(f"rows of {x.shape[-1]} {x.dtype} where {columns} float32 numbers belong")


class Fine:
    """A weight of integers whose rows are rounded to 16 bits; with `exact`, also one of bfloat16 with float32 rows."""

    def __init__(self, weight: Weight, exact: bool = False) -> None:
        self.weight = weight
        self.fine = exact or type(weight) is not Weight


Field = Weight | Fine | Tensor | float | None


class Owned:
    """What the library made for us, at `pointer`, and frees with this object."""

    def __init__(self, pointer: int, free: str) -> None:
        self.pointer = pointer
        self._free = getattr(library(), free)  # when Python ends, this module may be gone

    def __del__(self) -> None:
        if free := getattr(self, "_free", None):  # nothing was made of what the library refused
            free(self.pointer)


class CompiledPart(Owned):
    """A part of a model: `offramp_part`.

    `kind` and the names of the fields are those of the header; None leaves one out.
    """

    def __init__(self, kind: str, **fields: Field) -> None:
        self.kind, self.fields = kind, fields  # the library holds addresses only
        super().__init__(call("offramp_part_new", kind.encode()), "offramp_part_free")
        for name, value in fields.items():
            key = name.rstrip("_").encode()  # `in` is a word of Python's
            if isinstance(value, Weight | Fine):
                fine = isinstance(value, Fine) and value.fine
                handle = handle_of(value.weight if isinstance(value, Fine) else value, fine)
                call("offramp_part_weight", self.pointer, key, byref(handle))
            elif isinstance(value, Tensor):
                if not value.is_contiguous():
                    raise ValueError(f"the numbers of '{name}' do not stand one after another")
                call("offramp_part_array", self.pointer, key, constant(TYPES[value.dtype]), value.data_ptr(), value.numel())
            elif value is not None:
                call("offramp_part_number", self.pointer, key, value)

    def exact(self) -> CompiledPart:
        """The same part, whose rows are rounded as little as its weights allow."""

        def exact(value: Field) -> Field:
            weight = value.weight if isinstance(value, Fine) else value
            return Fine(weight, exact=True) if isinstance(weight, Weight) else value

        return CompiledPart(self.kind, **{name: exact(value) for name, value in self.fields.items()})

    @property
    def weights(self) -> list[Weight]:
        """Its weights."""
        fields = (field.weight if isinstance(field, Fine) else field for field in self.fields.values())
        return [field for field in fields if isinstance(field, Weight)]


def pointers(parts: Sequence[CompiledPart | None]) -> Any:
    """An array of the parts' pointers."""
    return (c_void_p * len(parts))(*(None if part is None else part.pointer for part in parts))


class Model(Owned):
    """A model: `offramp_model`. It uses as many threads as torch does."""

    def __init__(self, ends: CompiledPart, blocks: Sequence[Sequence[CompiledPart | None]]) -> None:
        """Each of `blocks`: attention, a mixer and an MLP, or None. Raises `ValueError` for shapes that do not fit."""
        self._alive = ends, blocks
        self._threads = 1
        parts = [pointers([block[place] for block in blocks]) for place in range(3)]
        made = call("offramp_model_new", ends.pointer, *parts, len(blocks))
        super().__init__(made, "offramp_model_free")

    def rotary(self, table: int, frequencies: Tensor, factor: float) -> None:
        """Give it a rotary table: the frequencies (n,) in float32 of pairs of dims, and the factor of cos and sin."""
        call("offramp_model_rotary", self.pointer, table, frequencies.data_ptr(), len(frequencies), factor)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the library with this model."""
        self.use_threads()
        call(name, self.pointer, *arguments)

    def use_threads(self) -> None:
        """Let the next call use as many threads as torch does."""
        threads = min(torch.get_num_threads(), constant("OFFRAMP_MOST_THREADS"))
        if threads != self._threads:
            call("offramp_model_threads", self.pointer, threads)
            self._threads = threads

    def product(self, weight: CWeight, x: Tensor) -> Tensor:
        """Multiply x (R, K) with a weight: (R, N)."""
        check_rows(x, weight.columns)
        y = torch.empty(len(x), weight.rows, dtype=torch.float32)
        self.call("offramp_product", byref(weight), x.data_ptr(), len(x), y.data_ptr())
        return y
