"""The structures of the C code, as ctypes sees them. Each mirrors the one that its docstring names, field by field."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_float, c_int64, c_void_p

from torch import Tensor

from offramp.model.compiled.weights import Weight


def address(tensor: Tensor | None) -> int | None:
    """Where the tensor's memory begins; None (NULL in C) for no tensor."""
    return None if tensor is None else tensor.data_ptr()


class CWeight(ctypes.Structure):
    """`Weight` in products.h."""

    _fields_ = (
        *((name, c_int64) for name in ("kind", "rows", "columns")),
        *((name, c_void_p) for name in ("w", "scale", "bias")),
    )

    @classmethod
    def of(cls, weight: Weight, fine: bool = False) -> CWeight:
        """The weight as the C code takes it. It holds addresses only, so `weight` must stay alive.

        `fine`: rows that are multiplied with integer weights are rounded to 16 bits instead of 8.
        """
        fine = fine and weight.name.startswith("int")
        kind = ("float32", "bfloat16", "int8", "int4", "fine int8", "fine int4").index("fine " * fine + weight.name)
        return cls(kind, weight.rows, weight.columns, *map(address, (weight.w, weight.scale, weight.bias)))


class CHead(ctypes.Structure):
    """`Head` in head.h."""

    _fields_ = (("weight", CWeight), ("norm", c_void_p), ("eps", c_float))


class CSketch(ctypes.Structure):
    """`Sketch` in sketch.h."""

    _fields_ = (("reduce", CWeight), ("expand", CWeight), ("candidates", c_int64))


MOST_DRAFTS = 7  # of a round; as in drafts.h


class CNgrams(ctypes.Structure):
    """`Ngrams` in drafts.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64) for name in ("mask", "shortest", "longest")),
    )


class CDrafter(ctypes.Structure):
    """`Drafter` in drafts.h."""

    _fields_ = (
        *((name, c_int64) for name in ("after", "tail", "middle")),
        *((name, CWeight) for name in ("in", "down")),
        *((name, c_void_p) for name in ("mean", "spread", "scale")),
        ("head", CHead),
        ("tokens", c_void_p),
        ("ngrams", POINTER(CNgrams)),
        *((name, c_int64) for name in ("most", "alike")),
        ("rows", c_float * (MOST_DRAFTS + 1)),
        *((name, c_float) for name in ("asking", "floor")),
    )


class CEstimates(ctypes.Structure):
    """`Estimates` in drafts.h."""

    _fields_ = (
        *((name, c_double * 4) for name in ("right", "seen")),
        *((name, c_double) for name in ("promised", "tokens", "cost")),
        *((name, c_int64) for name in ("rest", "pause")),
    )


class CRound(ctypes.Structure):
    """`Round` in drafts.h."""

    _fields_ = (
        *((name, c_int64 * (MOST_DRAFTS + 1)) for name in ("source", "guess", "kept")),
        *((name, c_double * (MOST_DRAFTS + 1)) for name in ("sure", "promise")),
        ("chance", c_double),
        *((name, c_int64) for name in ("drafts", "stood", "ends")),
    )


class CSteps(ctypes.Structure):
    """`Steps` in steps.h."""

    _fields_ = (
        ("embedding", c_void_p),
        ("whole", c_int64),
        ("head", POINTER(CHead)),
        ("sketch", POINTER(CSketch)),
        ("drafter", POINTER(CDrafter)),
        ("estimates", POINTER(CEstimates)),
        ("penalty", c_double),
        ("ends", c_void_p),
        *((name, c_int64) for name in ("ends_count", "enough", "most", "before")),
        *((name, c_void_p) for name in ("ids", "h", "middles", "deep")),
        *((name, c_int64) for name in ("decided", "run")),
        ("rounds", POINTER(CRound)),
        ("rounds_count", c_int64),
        ("seconds", c_double * 5),
    )


class CScratch(ctypes.Structure):
    """`Scratch` in products.h."""

    _fields_ = (
        ("floats", c_void_p),
        *((name, c_int64) for name in ("own", "threads")),
        *((name, c_void_p) for name in ("head", "desk", "saved")),
    )


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

    _fields_ = tuple((name, c_int64) for name in ("hidden", "queries", "heads", "dim", "width", "half"))


class CTokens(ctypes.Structure):
    """`Tokens` in tokens.h."""

    _fields_ = (
        ("h", c_void_p),
        ("count", c_int64),
        *((name, c_void_p) for name in ("positions", "sequences", "taken", "turn")),
        ("end", c_int64),
        ("journal", c_void_p),
        ("stride", c_int64),
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


class CModel(ctypes.Structure):
    """`Model` in blocks.c."""

    _fields_ = (
        ("blocks", POINTER(CBlock)),
        ("mixers", POINTER(CMambaBlock)),
        ("shape", CShape),
        ("mamba_shape", CMambaShape),
    )


class CMemory(ctypes.Structure):
    """`Memory` in blocks.c."""

    _fields_ = (("kv", c_void_p), ("mixed", c_void_p), ("sequences", c_int64))


class CGate(ctypes.Structure):
    """`Gate` in gates.h."""

    _fields_ = (
        ("after", c_int64),
        ("in", CWeight),
        *((name, c_void_p) for name in ("mean", "spread", "out")),
        *((name, c_float) for name in ("bias", "threshold")),
    )


class CGates(ctypes.Structure):
    """`Gates` in gates.h."""

    _fields_ = (("gates", POINTER(CGate)), ("count", c_int64), ("seen", c_void_p), ("logits", c_void_p))
