"""A model's weights on disk, read a few rows at a time: safetensors (one file or several), and GGUF.

Bytes are read, not mapped, so that no page of these files stays in the memory of this process. Tensors have the names and
the order of rows that the library's model gives them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from offramp.errors import CorruptFile
from offramp.files import cache_folder, read_json
from offramp.model.headers import DTYPES, Place, read_gguf, read_safetensors, rows_of

PIECE = 1 << 20  # entries of a tensor that are converted at once
RECORD = "offramp-source.json"  # a file in the cache folder of a GGUF file's model; it says where the GGUF file is
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EDITION = 2  # version of the fingerprint; raise it when the same weights get another fingerprint
SAMPLE = 1024  # entries of a tensor that its fingerprint looks at
GOLDEN = 0x9E3779B97F4A7C15  # the golden ratio's fraction, times 2 ** 64
ROW_WISE = {"TensorProcessor", "Gemma2TensorProcessor", "MambaTensorProcessor"}  # of the library: they move no rows


class Checkpoint(Protocol):
    """Tensors by name: their shapes, and their rows."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that can be read."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` - 1 of a tensor, in the dtype of the file; GGUF gives float32."""
        ...

    def entries(self, name: str, places: Tensor) -> Tensor:
        """The entries at these places (n,) of a tensor, counted as if it were flat."""
        ...

    def kind(self, name: str) -> str:
        """The type of a tensor: F32, F16, BF16, or a type of GGUF files."""
        ...


class Safetensors:
    """A `Checkpoint` in safetensors files. Raises `ValueError` or `OSError` for files that are damaged or missing."""

    def __init__(self, files: list[Path]) -> None:
        self._places: dict[str, Place] = {}
        for file in files:
            places = read_safetensors(file)
            self._places |= {name: place for name, place in places.items() if place.kind in DTYPES}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self._places.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        place = self._places[name]
        return place.read(start, stop).view(DTYPES[place.kind]).view(-1, *place.shape[1:])

    def entries(self, name: str, places: Tensor) -> Tensor:
        dtype = DTYPES[self._places[name].kind]
        return self._places[name].read_each(places, dtype.itemsize).view(dtype).flatten()

    def kind(self, name: str) -> str:
        return str(self._places[name].kind)


class Gguf:
    """A `Checkpoint` in a GGUF file, for the library's `model`. Names and changes of tensors are those of the library.

    Raises `ValueError` or `OSError` for a file that is damaged or of another format.
    """

    def __init__(self, file: Path, model: Any) -> None:
        from transformers import modeling_gguf_pytorch_utils as library

        architecture, places = read_gguf(file)
        self._processor = library.TENSOR_PROCESSORS.get(architecture, library.TensorProcessor)(model.config.to_dict())
        # The library would look up the names module by module, which takes long.
        flat = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=list)
        names = library.get_gguf_hf_weights_map(flat, self._processor)
        self._own_names = {names[own]: own for own in places if own in names}
        self._places = {name: places[own] for name, own in self._own_names.items()}
        self._newest: tuple[str, Tensor] | None = None  # the newest tensor that was read whole

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        import numpy as np

        shapes = {}
        for name, place in self._places.items():
            # The library's change is a function of a numpy array; this array takes no memory.
            changed = self._changed(name, np.broadcast_to(np.float32(-1), place.shape))
            if changed is not None:
                shapes[name] = tuple(changed.shape)
        return shapes

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if self._row_wise(name):
            return self._dequantised(name, start, stop)
        if self._newest is None or self._newest[0] != name:
            self._newest = None
            self._newest = name, self._dequantised(name, 0, rows_of(self._places[name].shape))
        return self._newest[1][start:stop]

    def entries(self, name: str, places: Tensor) -> Tensor:
        if not self._row_wise(name):
            return self.rows(name, 0, rows_of(self.shapes[name])).flatten()[places]
        from gguf import GGML_QUANT_SIZES, dequantize

        # The library changes each entry of such a tensor by itself, so blocks of entries can be treated as rows.
        entries, size = GGML_QUANT_SIZES[self._places[name].kind]
        blocks = self._places[name].read_each(places // entries, size).numpy()
        changed = self._changed(name, dequantize(blocks, self._places[name].kind))
        return torch.from_numpy(changed.reshape(len(places), entries).copy())[torch.arange(len(places)), places % entries]

    def kind(self, name: str) -> str:
        """The type of a tensor in the file. One whose values the library changes is F32: they are kept as they become."""
        known: str = self._places[name].kind.name
        return "F32" if self._order(name) is None else known

    def blocks(self, name: str, start: int, stop: int) -> Tensor:
        """The bytes of rows `start` to `stop` - 1 of a tensor (n, bytes), as they stand in the file."""
        place, order = self._places[name], self._order(name)
        assert order is not None
        rows = order[start:stop]
        if bool((rows.diff() == 1).all()):
            return place.read(int(rows[0]), int(rows[-1]) + 1).view(len(rows), place.row_bytes)
        first = int(rows.min())
        return place.read(first, int(rows.max()) + 1).view(-1, place.row_bytes)[rows - first]

    def _order(self, name: str) -> Tensor | None:
        """For each row of a matrix as the library has it, the row of the file that it is; None where rows are not kept."""
        import numpy as np

        rows = rows_of(self._places[name].shape)
        if len(self._places[name].shape) != 2:
            return None
        if self._row_wise(name):
            return torch.arange(rows)
        changed = self._changed(name, np.arange(rows, dtype=np.float32)[:, None])
        order = None if changed is None else torch.from_numpy(np.ascontiguousarray(changed)).flatten().long()
        kept = order is not None and torch.equal(order.sort().values, torch.arange(rows))
        return order if kept else None

    def _row_wise(self, name: str) -> bool:
        """Whether the library changes each row of this tensor by itself."""
        kind = type(self._processor).__name__
        queries_or_keys = any(part in self._own_names[name] for part in (".attn_q.", ".attn_k."))
        return kind in ROW_WISE or (kind == "LlamaTensorProcessor" and not queries_or_keys)

    def _dequantised(self, name: str, start: int, stop: int) -> Tensor:
        from gguf import dequantize

        place = self._places[name]
        values = dequantize(place.read(start, stop).view(stop - start, place.row_bytes).numpy(), place.kind)
        changed = self._changed(name, values.reshape(-1, *place.shape[1:]))
        return torch.from_numpy(changed.copy())

    def _changed(self, name: str, values: Any) -> Any:
        """The tensor that the library makes of one in the file; None if it makes several of it."""
        try:
            result = self._processor.process(values, self._own_names[name], parsed_parameters={"tensors": {}})
        except Exception as error:  # the library does not expect a tensor of this shape here
            raise ValueError(f"'{self._own_names[name]}' cannot have the shape {values.shape}") from error
        return result.weights if result.name else None


@dataclass(frozen=True)
class Held:
    """What a model's files hold in one type: tensors, their entries, and bytes."""

    kind: str
    tensors: int
    entries: int
    bytes: int


def held_in(folder: Path) -> list[Held]:
    """What a folder's files hold, the largest first. Raises `ValueError` or `OSError` for damaged files."""
    places: list[Place] = []
    for file in weights_in(folder):
        places += (read_gguf(file)[1] if gguf_of(folder) else read_safetensors(file)).values()
    names = sorted({str(getattr(place.kind, "name", place.kind)) for place in places})
    held = []
    for kind in names:
        own = [place for place in places if str(getattr(place.kind, "name", place.kind)) == kind]
        size = sum(rows_of(place.shape) * place.row_bytes for place in own)
        held.append(Held(kind, len(own), sum(prod(place.shape) for place in own), size))
    return sorted(held, key=lambda each: -each.bytes)


def gguf_of(folder: Path) -> Path | None:
    """The GGUF file with a folder's weights. Only a folder that offramp made in its cache can name one."""
    if folder.resolve().parent != (cache_folder() / "gguf").resolve():
        return None
    named = read_json(folder / RECORD).get("gguf")
    return Path(named) if isinstance(named, str) else None


def weights_in(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder's model.

    If offramp made the folder of a GGUF file, it is that file. Otherwise, as in the library, they are `model.safetensors`,
    or the files that the index names, or all safetensors files. Raises `CorruptFile` for an index that names none, or names
    files outside the folder.
    """
    if gguf := gguf_of(folder):
        return [gguf]
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if not (folder / INDEX).is_file():
        return sorted(folder.glob("*.safetensors"))
    named = read_json(folder / INDEX).get("weight_map")
    names = list(named.values()) if isinstance(named, dict) else []
    plain = (isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors") for name in names)
    if not names or not all(plain):
        raise CorruptFile(
            f"{folder / INDEX} must name the files of weights, all in its own folder.",
            "Fetch the model again.",
        )
    return sorted({folder / name for name in names})


def checkpoint_for(folder: Path, model: Any) -> Checkpoint | None:
    """The weights in a folder, if their tensors are those of the library's `model`; None if it would convert them.

    Raises `ValueError` or `OSError` for damaged files.
    """
    if getattr(model.config, "quantization_config", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        return None
    files = weights_in(folder)
    if not files:
        return None
    checkpoint: Checkpoint = Gguf(files[0], model) if gguf_of(folder) else Safetensors(files)
    shapes, known = checkpoint.shapes, named_tensors(model)
    if any(shapes.get(name) != tuple(tensor.shape) for name, tensor in known.items()):
        return None
    # A file may hold a tied tensor twice. Where the two differ, the library does not tie them.
    names = {id(tensor): name for name, tensor in known.items()}
    for twin, parameter in model.named_parameters(remove_duplicate=False):
        name = names[id(parameter)]
        if twin != name and twin in shapes:
            places = _scattered(tuple(parameter.shape))
            if _rounded(checkpoint.entries(name, places)) != _rounded(checkpoint.entries(twin, places)):
                return None
    return checkpoint


def kind_of(tensor: Tensor) -> str:
    """The type of a tensor in memory: F32, F16 or BF16."""
    return next((kind for kind, dtype in DTYPES.items() if dtype == tensor.dtype), "F32")


def named_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and kept buffers of a model, each once."""
    parameters = dict(model.named_parameters())
    twins = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in twins}
    return parameters | buffers


class Values:
    """The values of a model's tensors: those in memory, or with a `model`, those of its checkpoint.

    `find` gives the checkpoint. It is called when it is first needed.
    """

    def __init__(self, model: Any = None, find: Callable[[], Checkpoint | None] = lambda: None) -> None:
        self._find, self.model = find, model
        self._names = {} if model is None else {id(tensor): name for name, tensor in named_tensors(model).items()}

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint; None if there is none that can be read tensor by tensor."""
        return self._find()

    def rows(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` - 1 of a tensor of the model."""
        if self.model is None:
            return tensor.detach()[start:stop]
        assert self.checkpoint is not None
        return self.checkpoint.rows(self._names[id(tensor)], start, stop)

    def entries(self, tensor: Tensor, places: Tensor) -> Tensor:
        """The entries at these places (n,) of a tensor of the model, counted as if it were flat."""
        if self.model is None:
            shape = tensor.shape or (1,)
            return tensor.detach().view(shape)[torch.unravel_index(places.to(tensor.device), shape)].cpu()
        assert self.checkpoint is not None
        return self.checkpoint.entries(self._names[id(tensor)], places)

    def kind(self, tensor: Tensor) -> str:
        """The type of a tensor of the model, as a `Checkpoint` names it."""
        if self.model is None:
            return kind_of(tensor)
        assert self.checkpoint is not None
        return self.checkpoint.kind(self._names[id(tensor)])

    def blocks(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """The bytes of rows `start` to `stop` - 1 of a tensor of the model, which is in a GGUF file."""
        assert isinstance(self.checkpoint, Gguf)
        return self.checkpoint.blocks(self._names[id(tensor)], start, stop)

    def slices(self, tensor: Tensor) -> Iterator[tuple[int, int]]:
        """The rows of a tensor, cut into slices of at most `PIECE` entries: (start, stop)."""
        rows = rows_of(tuple(tensor.shape))
        step = max(1, PIECE // max(1, tensor.numel() // rows))
        for start in range(0, rows, step):
            yield start, min(rows, start + step)

    def pieces(self, tensor: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """The values of a tensor, in its `slices`: (start, stop, rows)."""
        for start, stop in self.slices(tensor):
            yield start, stop, self.rows(tensor, start, stop)

    def whole(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """All of a tensor, in a dtype."""
        if self.model is None:
            return tensor.detach().to(dtype)
        out = torch.empty(tensor.shape, dtype=dtype)
        for start, stop, piece in self.pieces(tensor):
            out[start:stop] = piece
        return out


def fingerprint(model: Any, values: Values | None = None) -> str:
    """A hash that identifies a model's weights, whatever their dtype and wherever they were loaded from.

    SHA-256 over the name and shape of each parameter, and 1,024 scattered entries of it, rounded to bfloat16.
    """
    values, digest = values or Values(), hashlib.sha256()
    # accelerate's hooks turn one offloaded tensor that is tied into two tensors
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta and name in tied:
            continue
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(_rounded(values.entries(parameter, _scattered(tuple(parameter.shape)))))
    return digest.hexdigest()


def _rounded(entries: Tensor) -> bytes:
    return entries.to(torch.bfloat16).view(torch.int16).numpy().tobytes()


def _scattered(shape: tuple[int, ...]) -> Tensor:
    """`SAMPLE` places of a tensor, counted as if it were flat, or all places of a small one.

    They are in evenly spaced rows. Steps of the golden ratio spread them over the columns.
    """
    entries, rows = prod(shape), rows_of(shape)
    if entries <= SAMPLE:
        return torch.arange(entries)
    columns = entries // rows
    return torch.tensor([n * rows // SAMPLE * columns + (n * GOLDEN % (1 << 64) * columns >> 64) for n in range(SAMPLE)])


def write_safetensors(path: Path, tensors: dict[str, Tensor], values: Values) -> None:
    """Write the values of these tensors in float32, a piece at a time."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for _, _, piece in values.pieces(tensor):
                stream.write(piece.float().contiguous().flatten().view(torch.uint8).numpy().data)
