"""Load a model by its name, and check that its logits are the library's."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.errors import BadInput, BadNumbers, OfframpError, UnsupportedModel
from offramp.files import cache_folder
from offramp.model.backbone import Backbone
from offramp.model.families import family_of
from offramp.model.hub import Source, find_config, resolve
from offramp.model.lean.weights import FORMATS, Store
from offramp.model.library_blocks import Outline
from offramp.model.mamba import is_mamba1


@dataclass(frozen=True)
class Reference:
    """The library's own logits (1, T, V) for fixed token ids: `full` in one pass, `cached` in three pieces over its cache.

    `pieces` are the three pieces that offramp reads. The library's Mamba-1 computes pieces of several tokens wrongly, so
    for such a model the library reads the tokens one by one.
    """

    ids: Tensor
    pieces: list[Tensor]
    full: Tensor
    cached: Tensor

    @classmethod
    @torch.inference_mode()
    def of(cls, backbone: Backbone) -> Reference:
        """Run the library's model. Raises `BadNumbers` when its logits are not finite."""
        generator = torch.Generator().manual_seed(0)
        length = min(16, backbone.context)
        ids = torch.randint(0, backbone.vocab_size, (1, length), generator=generator).to(backbone.device)
        pieces = [ids[:, : length - 4], ids[:, length - 4 : length - 1], ids[:, length - 1 :]]
        full = backbone.model(ids).logits.float()
        if not torch.isfinite(full).all():
            raise BadNumbers(
                f"{backbone.name} gives NaN or infinite logits in {backbone.weight_format}.",
                "Try --dtype float32; if that fails too, the weights are damaged: fetch them again.",
            )
        cache, cached = None, []
        has_mamba1 = any(mixer is not None and is_mamba1(mixer) for mixer in backbone.modules.mixers)
        positions = torch.arange(length, device=ids.device)[None]
        sizes = [1] * length if has_mamba1 else [piece.shape[1] for piece in pieces]
        for piece, place in zip(ids.split(sizes, dim=1), positions.split(sizes, dim=1), strict=True):
            before: dict[str, Any] = {"cache": cache} if cache is not None else {}
            out = backbone.model(piece, **before, position_ids=place, use_cache=True)
            cache = out.cache
            cached.append(out.logits.float())
        return cls(ids, pieces, full, torch.cat(cached, 1))


@torch.inference_mode()
def check(backbone: Backbone) -> tuple[float, float]:
    """Compare a full pass, and a pass in pieces over a state, with the library's own logits.

    Returns the largest differences (full, cached), as shares of the largest logit. Raises `UnsupportedModel` when one
    exceeds what rounding explains, `Runtime.tolerance`.
    """
    reference = Reference.of(backbone)
    ours, state, seen, middle = [], backbone.state(), 0, backbone.n_blocks // 2
    for piece in reference.pieces:
        h, step = backbone.embed(piece, seen)
        h = backbone.run(h, 0, middle, state, step)
        ours.append(backbone.logits(backbone.run(h, middle, backbone.n_blocks, state, step)))
        seen += piece.shape[1]
    scale = reference.full.abs().max().clamp(min=1e-6)
    full = float((backbone.forward(reference.ids) - reference.full).abs().max() / scale)
    cached = float((torch.cat(ours, 1) - reference.cached).abs().max() / scale)
    allowed = backbone.runtime.tolerance
    if not (full <= allowed and cached <= allowed):
        raise UnsupportedModel(
            f"offramp would decode {backbone.name} wrongly: its logits differ from the library's by {full:.1e} in a full "
            f"pass and {cached:.1e} in a cached one, as shares of the largest logit ({allowed:.0e} is allowed).",
            f"The row for the family '{backbone.config.model_type}' in families.FAMILIES does not fit this model.",
        )
    return full, cached


def load(name: str, dtype: str | None = None, device: str | None = None, keep: bool = False) -> Backbone:
    """Load a causal language model and check it against the library's own logits.

    `name` is a hub name (`org/name`, or `org/name@revision`), a local folder, a GGUF file, or an alias (`smollm2`).
    `dtype` is a format of `weights.FORMATS`: `bfloat16`, `float32`, `int8`, `int4` or `int4-head4`. The default is
    bfloat16, or float32 where bfloat16 does not pass the self-check. Quantised weights are made once and kept in the cache.
    Families that have a lean path take it, and then the library's copy of the weights is dropped. With `keep` it stays, so
    that `Backbone.model` can be used by itself. Nothing is fetched when the files are already on this machine, or when
    `HF_HUB_OFFLINE` is set.

    Raises `ModelNotFound`, `UnsupportedModel`, `CorruptFile`, `BadNumbers`, each with a hint.
    """
    _check_dtype(dtype)
    source = resolve(name)
    if dtype is not None:
        return _load(source, dtype, device, keep)
    try:
        return _load(source, "bfloat16", device, keep)
    except (UnsupportedModel, BadNumbers):
        backbone = _load(source, "float32", device, keep)  # raises for a model that is wrong in any dtype
        warnings.warn(f"{name} fails the self-check in bfloat16; running it in float32.", stacklevel=2)
        return backbone


def _load(source: Source, dtype: str, device: str | None, keep: bool) -> Backbone:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source.path, local_files_only=True)
        family = family_of(config, source)  # first, so that an unsupported family is refused before a minute of loading
        # It is meant for new weights, but transformers 5 divides every loaded out_proj of a Mamba model by √blocks, too.
        if hasattr(config, "rescale_prenorm_residual"):
            config.rescale_prenorm_residual = False
        model = AutoModelForCausalLM.from_pretrained(
            source.path,
            config=config,
            dtype=FORMATS[dtype].loaded,
            attn_implementation=family.implementation,
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    except OfframpError:
        raise
    except Exception as error:  # the library raises anything from KeyError to SafetensorError here
        raise source.unreadable(error) from error
    backbone = Backbone(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer, source)
    _make_ready(backbone, dtype, Store(cache_folder() / "formats" / f"{source.sha256[:16]}-{dtype}.safetensors"))
    if not keep:
        backbone.drop_spare_weights()
    return backbone


def _make_ready(backbone: Backbone, dtype: str, store: Store) -> None:
    """Use the lean path if there is one and it passes the self-check, else the library's blocks, which are checked too."""
    quantised = FORMATS[dtype].quantised
    if backbone.family.lean or quantised:
        try:
            backbone.use_lean_path(dtype, store)
            check(backbone)
            return
        except UnsupportedModel:
            if quantised:
                raise
            backbone.use_library_blocks()
    check(backbone)


def outline(name: str, dtype: str | None = None, random: bool = False) -> Backbone:
    """A model's shape, from its config alone. It has no weights, so it takes no memory and cannot run.

    With `random` it has random weights; it is checked, and can be timed. It has no tokenizer. Raises `ModelNotFound`,
    `UnsupportedModel`, `CorruptFile`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = dtype or "bfloat16"
    _check_dtype(dtype)
    source = find_config(name)
    try:
        config = AutoConfig.from_pretrained(source.path, local_files_only=True)
    except Exception as error:
        raise source.unreadable(error) from error
    family = family_of(config, source)
    if random:  # Mamba's default of 0.1 makes a random model that amplifies rounding a thousandfold
        config.initializer_range = 0.02
    torch.manual_seed(0)
    try:
        with torch.device("cpu" if random else "meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=family.implementation, dtype=FORMATS[dtype].loaded
            )
    except Exception as error:  # the library raises anything from KeyError to ValueError for a config's odd values
        raise source.unreadable(error) from error
    if random:  # a random token must not end a text
        config.eos_token_id = model.generation_config.eos_token_id = None
    backbone = Backbone(model, None, source)
    if FORMATS[dtype].quantised and not family.lean:
        raise UnsupportedModel(f"The family '{config.model_type}' has no lean path.", "Use bfloat16 or float32.")
    if random:
        _make_ready(backbone, dtype, Store())
    elif family.lean:
        backbone.runtime = Outline(backbone.modules, family, config, dtype)
    return backbone


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in FORMATS:
        raise BadInput(f"'{dtype}' is not a dtype offramp runs in.", f"Choose from {', '.join(FORMATS)}.")


def wrap(model: Any, tokenizer: Any, name: str = "unnamed") -> Backbone:
    """A `Backbone` around a `transformers` model that is already in memory; it is checked like a loaded one.

    The model is put in evaluation mode, with gradients off; nothing else about it changes. Raises `UnsupportedModel` and
    `BadNumbers`.
    """
    backbone = Backbone(model, tokenizer, Source.of_weights(name, model.state_dict()))
    check(backbone)
    return backbone
