"""Load a model by its name, tensor by tensor, and check that its logits are the library's."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp import __version__
from offramp.errors import BadInput, BadNumbers, OfframpError, UnsupportedModel
from offramp.files import (
    cache_folder,
    in_the_cache,
    new_folder,
    read_json,
    sha256_of,
    sha256_of_text,
    write_atomically,
)
from offramp.model import core
from offramp.model.backbone import Backbone, no_compiled, require_compiled
from offramp.model.checkpoint import (
    RECORD,
    WHOLE,
    Checkpoint,
    Values,
    checkpoint_for,
    gguf_of,
    named_tensors,
    weights_in,
    write_safetensors,
)
from offramp.model.compiled.formats import FILE, FORMATS, Change, Int4
from offramp.model.compiled.library import library
from offramp.model.compiled.runtime import Compiled
from offramp.model.families import Family, family_of
from offramp.model.fingerprints import knows_fingerprint, with_fingerprint
from offramp.model.hub import Source, find_config, read_whole, resolve
from offramp.model.lending import OWN, Lender, lender_of
from offramp.model.library_blocks import Outline
from offramp.model.moments import Moments
from offramp.model.reading import EDITION as READING
from offramp.model.reading import Reading, change_of, read, short_text
from offramp.model.runtime import Runtime
from offramp.model.selfcheck import check, code_hash
from offramp.model.store import Get, Store, Tensors
from offramp.progress import Progress, silent

MUCH = 0.03  # a share by which perplexity may be worse in a format without a warning
MOST_WEIGHTS = 8  # weights in a byte of a file, at most: no format has less than a bit for each

__all__ = ["adopt", "check", "library_folder", "load", "outline", "wrap"]


def load(
    name: str,
    dtype: str | None = None,
    device: str | None = None,
    keep: bool = False,
    progress: Progress = silent,
    kv: str | None = None,
    held: int = 0,
) -> Backbone:
    """Load a causal language model and check it against the library's own logits.

    `name` is a hub name (`org/name`, or `org/name@revision`), a local folder, a GGUF file, or an alias (`smollm2`). `dtype`
    is a format of `formats.FORMATS`: `bfloat16`, `float32`, `int8`, `int4`, `int4-head4`, or `file` for each tensor as its
    file has it. The default is `file` for a GGUF file where compiled blocks run it, else bfloat16, or float32 where
    bfloat16 does not pass the self-check. The first time, weights are converted tensor by tensor and kept in the cache;
    after that they are mapped from there. The first time in a quantised format, the library's model also reads a short text
    in float32; `Backbone.change` then says what the format changes, with a warning where that is much. `progress` is told
    how many parts of the model are done. Compiled blocks run if the family has some. Then the library's model has shapes
    only; with `keep` it has its weights too, so that `Backbone.model` can be used by itself. Nothing is fetched when the
    files are already on this machine, or when `HF_HUB_OFFLINE` is set. `kv`: as `Backbone.keep_keys_in` takes it. `held` is
    for weights that do not all fit into memory: so many bytes of them are read and stay there. They are the LM head and the
    lowest blocks, which every token reads.

    Raises `ModelNotFound`, `UnsupportedModel`, `CorruptFile`, `BadNumbers`, each with a hint, and `OfframpError` where the
    cache is full or cannot be written.
    """
    _check_dtype(dtype)
    source = resolve(name)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loading = _Loading(source, where, keep, progress, held)
    backbone = loading.load(dtype) if dtype else loading.load_by_default()
    if kv is not None:
        backbone.keep_keys_in(kv)
    return backbone


class _Loading:
    """The arguments and steps that all ways to load one model share."""

    def __init__(self, source: Source, device: torch.device, keep: bool, progress: Progress, held: int = 0) -> None:
        from transformers import AutoConfig, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.source, self.device, self.keep, self.progress, self.held = source, device, keep, progress, held
        self.folder: Path = Path(source.path)
        try:
            self.config = AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
            # First, so that an unsupported family is refused before a minute of loading.
            self.family: Family = family_of(self.config, source)
            # The option is meant for new weights, but transformers 5 then divides every loaded out_proj of a Mamba model by
            # √blocks.
            if hasattr(self.config, "rescale_prenorm_residual"):
                self.config.rescale_prenorm_residual = False
            self.tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
        except OfframpError:
            raise
        except Exception as error:  # the library raises anything from KeyError to OSError here
            raise source.unreadable(error) from error

    def load(self, dtype: str) -> Backbone:
        """The model in one weight format: on compiled blocks if there are some and they pass the self-check."""
        try:
            require_compiled(self.source.name, self.family, dtype, self.device)  # before weights are read
            return self._on_compiled_blocks(dtype)
        except UnsupportedModel:
            if FORMATS[dtype].quantised:
                raise
        return self._on_library_blocks(dtype)

    def load_by_default(self) -> Backbone:
        """The model in its file's own types if that is a GGUF file, else in bfloat16, else in float32."""
        if gguf_of(self.folder) is not None:
            try:
                return self.load(FILE)
            except UnsupportedModel as error:
                warnings.warn(f"{self.source.name} runs in bfloat16, and not as its file has it. {error}", stacklevel=3)
        try:
            return self.load("bfloat16")
        except (UnsupportedModel, BadNumbers):
            backbone = self.load("float32")  # raises for a model that is wrong in any dtype
            warnings.warn(f"{self.source.name} fails the self-check in bfloat16; running it in float32.", stacklevel=3)
            return backbone

    def _on_compiled_blocks(self, dtype: str) -> Backbone:
        store, quantised = self._store(dtype), FORMATS[dtype].quantised
        model, values = self._shapes(dtype)
        reading = Reading.unpacked(self._reading_file()) if quantised else None
        # The fingerprint, the reading and the self-check need the weights as the library has them.
        ready = store.complete and knows_fingerprint(self.source) and store.passed(self._check_name()) is not None
        ready = ready and (reading is not None or not quantised)
        as_in_file = dtype == FILE
        if as_in_file and not (ready or values.checkpoint):
            why = "its tensors are not those of the library's model"
            raise no_compiled(self.source.name, dtype, why, "Choose --dtype bfloat16.")
        if self.keep or not (ready or values.checkpoint):
            model = self._whole(dtype, Store())
            values = Values(model, lambda: self._checkpoint(model)) if as_in_file else Values()
        backbone = self._backbone(model, values)
        if quantised and reading is None:
            reading = self._read(backbone, store, values)
        with self._readable():
            inputs = reading.inputs_of(backbone.model) if reading else {}
            unknown = reading and FORMATS[dtype].blocks is Int4 and not store.complete
            moments = Moments(backbone, lender_of(values, {})).of_block if unknown else None
            backbone.use_compiled_blocks(dtype, store, values, inputs, moments)
        self._check(backbone, store, values, reading)
        if not self.keep:
            backbone.drop_spare_weights()
        return backbone

    def _on_library_blocks(self, dtype: str) -> Backbone:
        store = self._store(f"{dtype}-library")
        backbone = self._backbone(self._whole(dtype, store), Values())
        self._check(backbone, store, Values())
        return backbone

    def _store(self, kind: str) -> Store:
        parts = self.config.num_hidden_layers + 1
        config = self.folder / "config.json"
        settings = {"device": self.device, "parts": parts, "progress": self.progress, "held": self.held}
        return Store.of(self.source.sha256, config, kind, **settings)

    def _shapes(self, dtype: str) -> tuple[Any, Values]:
        """The library's model with its parameters on the meta device, and the `Values` that read them."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM, GenerationConfig

        with self._readable():
            with init_empty_weights(include_buffers=False):
                settings = _settings(self.family, dtype)
                model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False, **settings)
            model.tie_weights()
            with suppress(OSError):  # there is no generation_config.json
                model.generation_config = GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        return model, Values(model, lambda: self._checkpoint(model))

    def _checkpoint(self, model: Any) -> Checkpoint | None:
        with self._readable():
            return checkpoint_for(self.folder, model)

    def _whole(self, dtype: str, store: Store) -> Any:
        """The library's model with its weights. They come from the store, if they can be read tensor by tensor."""
        model, values = self._shapes(dtype)
        with self._readable():
            if store.complete or values.checkpoint:
                _fill(model, self.family, store, values)
            else:
                self._check_size(model)
                model = read_whole(self.folder, model, **_settings(self.family, dtype))
        return model.to(self.device)

    def _check_size(self, model: Any) -> None:
        """Raises `ValueError` for more weights than the files can hold: the library would invent the missing ones."""
        needed = sum(part.numel() for part in named_tensors(model).values())
        held = sum(file.stat().st_size for file in weights_in(self.folder))
        if needed > MOST_WEIGHTS * held:
            raise ValueError(f"its config names {needed:,} weights, and its files have {held:,} bytes")

    def _backbone(self, model: Any, values: Values) -> Backbone:
        with self._readable():
            source = with_fingerprint(self.source, model, values)
            backbone = Backbone(model, self.tokenizer, source, self.device)
            backbone.stop_ids  # noqa: B018 - it raises for what is no token
        return backbone

    def _reading_file(self) -> Path:
        config = (self.folder / "config.json").read_text("utf-8")
        key = sha256_of_text(f"{READING} {self.source.sha256} {config} {short_text()} {version('transformers')}")
        return cache_folder() / "readings" / f"{key[:16]}.bin"

    def _read(self, backbone: Backbone, store: Store, values: Values) -> Reading:
        """Let the library's model read the short text; keep what was found."""
        with self._readable():
            reading = read(backbone, self._lender("reading", store, values))
        with suppress(OSError):  # it is made again next time
            write_atomically(self._reading_file(), reading.packed())
        return reading

    def _check(self, backbone: Backbone, store: Store, values: Values, reading: Reading | None = None) -> None:
        """The self-check, and what the format changes, unless these weights have passed it with this code before."""
        name = self._check_name()
        if store.passed(name) is not None:
            backbone.change = Change(**store.change) if store.change else None
            return
        lost = 0.0 if reading is None else max(found.lost16 for found in reading.inputs.values())
        with self._readable():
            differences = check(backbone, self._lender("checking", store, values, backbone.runtime), lost)
        backbone.change = change_of(backbone, reading, self.progress) if reading else None
        store.note(name, differences, asdict(backbone.change) if backbone.change else None)
        if backbone.change and backbone.change.worse > MUCH:
            warnings.warn(
                f"{backbone.name} loses much in {backbone.weight_format}: {backbone.change}. Try bfloat16.", stacklevel=5
            )

    def _check_name(self) -> str:
        """The name of a self-check: it changes with the code that computes, and with the kind of device."""
        compiled = core.variant() if self.device.type == "cpu" else ""
        versions = f"offramp {__version__}, torch {torch.__version__}, transformers {version('transformers')}"
        return f"{compiled or 'library'} {code_hash()} on {self.device.type}, {versions}"

    def _lender(self, stage: str, store: Store, values: Values, runtime: Runtime | None = None) -> Lender:
        """The lender of the model's own weights, or where the `runtime` has others in their place, of those."""

        def returned(count: int, total: int) -> None:
            store.release()
            self.progress(stage, count, total)

        changed = dict(runtime.changed) if isinstance(runtime, Compiled) else {}
        return OWN if values.model is None else lender_of(values, changed, returned)

    def write(self, file: Path) -> None:
        """Write the weights as safetensors in float32."""
        model, values = self._shapes("float32")
        with self._readable():
            if values.checkpoint is None:
                raise ValueError("its tensors are not those of the library's model")
            write_safetensors(file, named_tensors(model), values)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn the library's exception for a damaged file into a sentence and a hint."""
        try:
            with in_the_cache():
                yield
        except OfframpError:
            raise
        except Exception as error:  # the library raises anything from KeyError to SafetensorError
            raise self.source.unreadable(error) from error


def _fill(model: Any, family: Family, store: Store, values: Values) -> None:
    """Give the library's model on the meta device its weights, in its own dtype. The store keeps them."""
    new: dict[int, Tensor] = {}
    blocks = list(getattr(getattr(model, family.trunk), family.blocks))
    in_blocks = {id(tensor) for block in blocks for tensor in chain(block.parameters(), block.buffers())}
    tensors = {id(tensor): (name, tensor) for name, tensor in named_tensors(model).items()}

    def read(tensor: Tensor) -> Tensors:
        return {"": values.whole(tensor, tensor.dtype)}

    def fill(wanted: Iterable[int]) -> Callable[[Get], None]:
        def build(get: Get) -> None:
            for key in wanted:
                name, tensor = tensors[key]
                new[key] = get(name, partial(read, tensor))[""]

        return build

    for index, block in enumerate(blocks):
        own = {id(tensor) for tensor in chain(block.parameters(), block.buffers())}
        store.part(str(index), fill([key for key in tensors if key in own]))
    store.part("ends", fill([key for key in tensors if key not in in_blocks]))
    store.finish()
    parameters = {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in new.items()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = parameters[id(parameter)]
        for name, buffer in module._buffers.items():
            if id(buffer) in new:
                module._buffers[name] = new[id(buffer)]


def outline(name: str, dtype: str | None = None, random: bool = False) -> Backbone:
    """A model's shape, from its config alone. It has no weights, so it takes no memory and cannot run.

    With `random` it has random weights; it is checked, and can be timed. It has no tokenizer. Raises `ModelNotFound`,
    `UnsupportedModel`, `CorruptFile`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    _check_dtype(dtype)
    source = find_config(name)
    try:
        config = AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise source.unreadable(error) from error
    family = family_of(config, source)
    compiled = family.compiled and library() is not None and not random
    dtype = dtype or (FILE if compiled and gguf_of(Path(source.path)) else "bfloat16")
    if random:  # with Mamba's default of 0.1, a random model amplifies rounding a thousandfold
        config.initializer_range = 0.02
    torch.manual_seed(0)
    try:
        with torch.device("cpu" if random else "meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **_settings(family, dtype))
    except Exception as error:  # the library raises anything from KeyError to ValueError for a config's odd values
        raise source.unreadable(error) from error
    if random:  # a random token must not end a text
        config.eos_token_id = model.generation_config.eos_token_id = None
    if FORMATS[dtype].quantised:
        require_compiled(source.name, family, dtype, torch.device("cpu"))
    values, known = Values(model, lambda: checkpoint_for(Path(source.path), model)), None
    if not random and source.sha256:
        known = Store.of(source.sha256, Path(source.path) / "config.json", dtype).change
        with suppress(Exception):  # the shape of a model with damaged weights can be shown
            source = with_fingerprint(source, model, values)
    backbone = Backbone(model, None, source)
    backbone.change = Change(**known) if known else None
    if random:
        _make_ready(backbone, dtype)
    elif family.compiled:
        backbone.runtime = Outline(backbone.modules, family, config, dtype, values)
    return backbone


def _settings(family: Family, dtype: str) -> dict[str, Any]:
    """Settings for the library to make a model with."""
    return {"attn_implementation": family.implementation, "dtype": FORMATS[dtype].loaded}


def _make_ready(backbone: Backbone, dtype: str) -> None:
    """Use compiled blocks if there are some and they pass the self-check, else the library's, which are checked too."""
    try:
        backbone.use_compiled_blocks(dtype)
        check(backbone)
    except UnsupportedModel:
        if FORMATS[dtype].quantised:
            raise
        backbone.use_library_blocks()
        check(backbone)


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in FORMATS:
        raise BadInput(f"'{dtype}' is not a dtype offramp runs in.", f"Choose from {', '.join(FORMATS)}.")


def wrap(model: Any, tokenizer: Any, name: str = "unnamed") -> Backbone:
    """A `Backbone` around a `transformers` model that is already in memory; it is checked like a loaded one.

    The model is put in evaluation mode, with gradients off; nothing else about it changes. Raises `UnsupportedModel` and
    `BadNumbers`.
    """
    backbone = Backbone(model, tokenizer, Source.of_weights(name, model))
    check(backbone)
    return backbone


def adopt(model: Any) -> Backbone:
    """A `Backbone` around a transformers model that its owner goes on using: its parameters take gradients as before.

    It has no tokenizer. Compiled blocks run where there are some, with a second copy of the weights. Raises as `wrap` does.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    backbone = Backbone(model, None, Source.of_weights(model.name_or_path or "unnamed", model))
    for parameter in trained:
        parameter.requires_grad_(True)
    format = str(model.dtype).removeprefix("torch.")
    if format in FORMATS:
        _make_ready(backbone, format)
    else:
        check(backbone)
    return backbone


@in_the_cache()
def library_folder(name: str) -> Path:
    """A local folder with a model's weights that the library and other programs can read.

    For a GGUF file, it is written to the cache once, in float32, which holds every value of such a file exactly. Raises
    `ModelNotFound`, `UnsupportedModel`, `CorruptFile`.
    """
    loading = _Loading(resolve(name), torch.device("cpu"), True, silent)
    gguf, sha256 = gguf_of(loading.folder), loading.source.sha256
    if gguf is None:
        return loading.folder
    folder = cache_folder() / "models" / sha256[:16]
    weights = folder / WHOLE
    if weights.is_file() and sha256_of(weights) == read_json(folder / RECORD).get("converted_sha256"):
        return folder
    with new_folder(folder) as made:
        shutil.copytree(loading.folder, made, dirs_exist_ok=True)
        loading.write(made / WHOLE)
        converted = {"source": gguf.name, "sha256": sha256, "converted_sha256": sha256_of(made / WHOLE)}
        write_atomically(made / RECORD, json.dumps(converted, indent=1).encode())
    return folder
