"""Files for the program without Python (core/offramp.h, "Files"): a model as `model.gguf`, its exits as `exits.gguf`.

Where the library reads the GGUF file that the model was loaded from, the model's file is that one, with what Python knows
and it does not say: how the chat template puts a talk together, which tokens end a text, how positions turn, which products
may be coarse, and what blocks cost. Otherwise it holds the model's parts as the library takes them (core/saved.c), in the
format that they run in, and its tokenizer. The exits' file has the parts and rules of each mode, and the exits themselves,
so that `ExitSet.load` reads them back.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from offramp.decode.compiled import CompiledStepper
from offramp.decode.engine import Engine, HasExits
from offramp.errors import BadInput
from offramp.exits.calibrated import points_of
from offramp.exits.exit_set import ARCHITECTURE, FILES
from offramp.files import put
from offramp.model import vocabulary
from offramp.model.backbone import Backbone
from offramp.model.chat import chat_pieces
from offramp.model.checkpoint import gguf_of
from offramp.model.compiled.library import CompiledPart, Fine, handle_of
from offramp.model.compiled.runtime import Compiled
from offramp.model.compiled.steps import ExitRules, Rules, number_of
from offramp.model.compiled.weights import Stack, Weight
from offramp.model.costs import Costs

if TYPE_CHECKING:
    from gguf import GGUFWriter

MODEL, EXITS = "model.gguf", "exits.gguf"
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # that the library reads from a file
OF_PARTS = "offramp-model"  # the architecture of a file that holds a model's parts
KINDS = ("attention", "mixer", "mlp")  # of a block's parts
ALIGNMENT = 64  # of tensors, so that compiled code can use them where they lie
PARTS = ("gate", "readout", "sketch", "exit_sketch", "shortlist", "guesses")  # of rules
BLOCK_COSTS = ("flops", "seen_flops", "key_flops", "state_flops")  # as `Costs.of_block` gives them


def write(model: HasExits, folder: Path) -> tuple[str, ...]:
    """Write both files. Returns the modes that the exits' file has; without exits, those that draft from the text.

    Raises `BadInput` for a model that is not compiled, or whose tokenizer the library does not read.
    """
    backbone = model.backbone
    file = gguf_of(Path(backbone.source.path)) if backbone.source.path else None
    runtime: object = backbone.runtime
    if not isinstance(runtime, Compiled):
        raise BadInput(
            f"{backbone.name} runs on the library's blocks, which need Python.", "offramp inspect MODEL says why."
        )
    as_it_is = backbone.config.model_type in ARCHITECTURES and backbone.weight_format == "file"
    folder.mkdir(parents=True, exist_ok=True)
    with _written(folder / MODEL, backbone.config.model_type if file and as_it_is else OF_PARTS) as writer:
        if file and as_it_is:
            _copy(file, writer)
            _say_coarse(runtime, writer)
        else:
            _write_model(backbone, runtime, file, writer)
        _describe(backbone, runtime, writer)
    with _written(folder / EXITS, ARCHITECTURE) as writer:
        return _write_exits(model, writer)


@contextmanager
def _written(path: Path, architecture: str) -> Iterator[GGUFWriter]:
    """A writer whose file takes its name when it is complete."""
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        made = Path(temporary) / path.name
        writer = GGUFWriter(made, architecture)
        writer.add_custom_alignment(ALIGNMENT)
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        put(made, path)


def _copy(file: Path, writer: GGUFWriter, only: str = "") -> None:
    """Copy what a file says, and its tensors as they are; `only`: what it says under names that begin so."""
    from gguf import GGUFReader, GGUFValueType

    reader = GGUFReader(file)
    for name, entry in reader.fields.items():
        own = name.startswith(("GGUF.", "offramp.")) or name in ("general.architecture", "general.alignment")
        if own or not name.startswith(only):
            continue
        kind, *inner = entry.types
        writer.add_key_value(name, entry.contents(), kind, inner[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in [] if only else reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)


def _say_coarse(runtime: Compiled, writer: GGUFWriter) -> None:
    """Name the weights whose rows may be rounded to 8 bits."""
    coarse = [
        f"{index}.{name}"
        for index, block in enumerate(runtime.blocks)
        for part in block.parts
        for name, field in (part.fields.items() if part else ())
        if isinstance(field, Weight)
    ]
    if coarse:
        writer.add_array("offramp.coarse", coarse)


def _write_model(backbone: Backbone, runtime: Compiled, file: Path | None, writer: GGUFWriter) -> None:
    """Write a model's parts, its tokenizer, and what the library needs to know of it."""
    if file:
        _copy(file, writer, "tokenizer.")
    else:
        vocabulary.describe(backbone.tokenizer, writer)
    parts = _Parts(writer)
    parts.number(runtime.ends)
    blocks = [[parts.number(part) for part in block.parts] for block in runtime.blocks]
    for kind, numbers in zip(KINDS, zip(*blocks, strict=True), strict=True):
        _add(writer, f"offramp.blocks.{kind}", numbers)
    writer.add_uint32("offramp.parts", len(parts))
    writer.add_uint32("offramp.context", backbone.context)
    writer.add_bool("offramp.keys_in_float32", runtime.kept_dtype == torch.float32)


def _describe(backbone: Backbone, runtime: Compiled, writer: GGUFWriter) -> None:
    """Say what no GGUF file says: see this module."""
    from gguf import GGUFValueType

    costs = Costs(backbone)
    writer.add_string("offramp.fingerprint", backbone.source.fingerprint)
    writer.add_array("offramp.ends", sorted(backbone.stop_ids))
    for table in runtime.tables.values():
        key, frequencies = f"offramp.rotary.{table.number}", table.frequencies.tolist()
        writer.add_key_value(f"{key}.frequencies", frequencies, GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
        writer.add_float32(f"{key}.factor", table.factor)
    for name, values in zip(BLOCK_COSTS, zip(*map(costs.of_block, range(costs.n_blocks)), strict=True), strict=True):
        _add(writer, f"offramp.costs.{name}", values)
    writer.add_uint64("offramp.head_flops", costs.head)
    for name, value in (chat_pieces(backbone.tokenizer) or {}).items():
        if isinstance(value, str):
            writer.add_key_value(f"offramp.chat.{name}", value, GGUFValueType.STRING)  # add_string leaves out empty ones
        else:
            _add(writer, f"offramp.chat.{name}", value)


class _Parts:
    """The parts of all modes, each written once."""

    def __init__(self, writer: GGUFWriter) -> None:
        self._writer, self._numbers = writer, dict[str, int]()

    def number(self, part: CompiledPart | None) -> int:
        """The number of a part, which is written if it is new; -1 for None."""
        if part is None:
            return -1
        tensors, numbers = _contents(part)
        digest = hashlib.sha256(repr((part.kind, sorted(numbers.items()))).encode())
        for name, values in tensors.items():
            digest.update(name.encode())
            digest.update(values.tobytes())
        key = digest.hexdigest()
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self._write(self._numbers[key], part.kind, tensors, numbers)
        return self._numbers[key]

    def _write(self, number: int, kind: str, tensors: dict[str, np.ndarray], numbers: dict[str, Any]) -> None:
        self._writer.add_string(f"offramp.part.{number}.kind", kind)
        for name, value in numbers.items():
            key = f"offramp.part.{number}.{name}"
            if isinstance(value, list):
                _add(self._writer, key, value)
            else:
                self._writer.add_float64(key, value)
        for name, values in tensors.items():
            self._writer.add_tensor(f"{number}.{name}", values)

    def __len__(self) -> int:
        return len(self._numbers)


def _contents(part: CompiledPart) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A part's tensors and numbers by their names; of a weight, its bytes, and its shape: see `_put_weight`."""
    tensors: dict[str, np.ndarray] = {}
    numbers: dict[str, Any] = {}
    tied = part.kind == "ends" and len({id(weight) for weight in part.weights}) == 1
    for name, field in part.fields.items():
        name = name.rstrip("_")
        if isinstance(field, Weight | Fine):
            if not (tied and name == "embedding"):  # the library takes the head for it
                weight, fine = (field.weight, field.fine) if isinstance(field, Fine) else (field, False)
                _put_weight(name, weight, fine, tensors, numbers)
        elif isinstance(field, Tensor):
            tensors[name] = field.contiguous().flatten().numpy()
        elif field is not None:
            numbers[name] = float(field)
    return tensors, numbers


def _put_weight(name: str, weight: Weight, fine: bool, tensors: dict[str, np.ndarray], numbers: dict[str, Any]) -> None:
    """Put a weight's bytes among the tensors, and among the numbers its type, rows, columns, fineness and pieces."""
    handle = handle_of(weight, fine)
    pieces = weight.pieces if isinstance(weight, Stack) else []
    numbers[name] = [int(handle.type), weight.rows, weight.columns, int(fine), len(pieces)]
    for number, piece in enumerate(pieces):
        _put_weight(f"{name}.{number}", piece, False, tensors, numbers)
    if not pieces:
        tensors[name] = weight.w.contiguous().view(torch.uint8).flatten().numpy().view(np.int8)
        beside = {"bias": weight.bias, "scales": weight.scale}
        tensors.update({f"{name}.{what}": each.flatten().numpy() for what, each in beside.items() if each is not None})


def _write_exits(model: HasExits, writer: GGUFWriter) -> tuple[str, ...]:
    """Write each mode's rules and their parts, and the exits themselves."""
    modes, parts = _modes(model), _Parts(writer)
    writer.add_string("offramp.fingerprint", model.backbone.source.fingerprint)
    for number, mode in enumerate(modes):
        engine, key = Engine(model, mode=mode), f"offramp.mode.{number}"
        stepper = engine.steppers.compiled
        assert isinstance(stepper, CompiledStepper)
        words = {"name": mode, "fill_name": engine.plan.fill.name, "policy": engine.plan.policy.describe(engine.plan.gate)}
        for name, word in words.items():
            writer.add_string(f"{key}.{name}", word)
        if engine.plan.thresholds:
            _add(writer, f"{key}.blocks", [*engine.plan.thresholds])
            _add(writer, f"{key}.thresholds", [*engine.plan.thresholds.values()])
        _write_rules(stepper.rules, key, parts, writer)
    writer.add_uint32("offramp.parts", len(parts))
    with tempfile.TemporaryDirectory() as temporary:
        model.exits.save(temporary)
        for file in sorted(path for path in Path(temporary).rglob("*") if path.is_file()):
            content = np.fromfile(file, np.int8)
            writer.add_tensor(FILES + file.relative_to(temporary).as_posix(), content)
    return modes


def _modes(model: HasExits) -> tuple[str, ...]:
    """All modes and points of a model but full, and points that failed their test."""
    tested = points_of(model.exits.early.calibration) if model.exits.early else []
    modes = [mode for mode in model.exits.modes(model.backbone) if mode != "full"]
    points = [f"early:{number}" for number, each in enumerate(tested, 1) if each.passed] if "early" in modes else []
    return (*modes, *points)


def _write_rules(rules: Rules, key: str, parts: _Parts, writer: GGUFWriter) -> None:
    def value_of(name: str, value: Any) -> float | int:
        if name in PARTS:
            return parts.number(value)
        return number_of(value) if isinstance(value, str) else value

    for field in fields(Rules):
        value = getattr(rules, field.name)
        if field.name in ("row_costs", "accepted"):
            _add(writer, f"{key}.{field.name}", value)
        elif field.name not in ("exits", "costs"):
            _add(writer, f"{key}.{field.name}", [value_of(field.name, value)])
    for field in fields(ExitRules) if rules.exits else ():
        _add(writer, f"{key}.exits.{field.name}", [value_of(field.name, getattr(e, field.name)) for e in rules.exits])


def _add(writer: GGUFWriter, key: str, values: Sequence[float]) -> None:
    """Add whole numbers or floats as an array."""
    from gguf import GGUFValueType

    kind = GGUFValueType.INT64 if all(isinstance(value, int) for value in values) else GGUFValueType.FLOAT64
    writer.add_key_value(key, [*values], GGUFValueType.ARRAY, kind)
