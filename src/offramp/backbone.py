"""A frozen causal language model as embed → blocks → norm → head, with every part callable by itself.

The blocks are the library's own modules, called one range at a time, so that decoding can stop after any of them.
What differs between model families (names of the parts, scales on the way in and out, how keys and values come out
of the projections) is a row in `FAMILIES`. Whether the row is right is not taken on trust: `check` compares a full and
a cached pass with the library's own logits when a model is loaded, and refuses a model it would decode wrongly.

Shapes: B batch, T tokens of this call, D hidden size, V vocabulary, N blocks, H key/value heads, P head dim.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.errors import BadInput, BadNumbers, OfframpError, UnsupportedModel
from offramp.lean import Lean, LeanStep
from offramp.sources import Source, cache_folder, resolve
from offramp.state import State
from offramp.weights import FORMATS, Store

Config = Any  # a transformers PreTrainedConfig: its fields differ from family to family
KeysValues = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


def _split_kv(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Separate `k_proj` and `v_proj` (llama and most others), with a key norm over the whole row (olmo2) or each head."""
    k, v = attention.k_proj(x), attention.v_proj(x)
    heads = (*x.shape[:-1], -1, attention.head_dim)
    norm = getattr(attention, "k_norm", None)
    if norm is not None:
        over_row = norm.weight.shape[0] == k.shape[-1] and norm.weight.ndim == 1
        k = norm(k) if over_row else norm(k.view(heads))
    return k.view(heads).transpose(1, 2), v.view(heads).transpose(1, 2)


def _fused_kv(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """One `qkv_proj` whose rows are all queries, then all keys, then all values (phi3)."""
    width = attention.num_key_value_heads * attention.head_dim
    k, v = F.linear(x, attention.qkv_proj.weight[-2 * width :]).split(width, dim=-1)
    heads = (*x.shape[:-1], -1, attention.head_dim)
    return k.view(heads).transpose(1, 2), v.view(heads).transpose(1, 2)


def _conv1d_kv(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-2's `Conv1D`, a linear layer with its weight transposed: columns are queries, keys, values."""
    width = attention.split_size
    kv = x @ attention.c_attn.weight[:, width:] + attention.c_attn.bias[width:]
    k, v = kv.split(width, dim=-1)
    heads = (*x.shape[:-1], -1, attention.head_dim)
    return k.view(heads).transpose(1, 2), v.view(heads).transpose(1, 2)


def _interleaved_kv(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-NeoX's fused projection: query, key and value of one head stand together."""
    per_head = attention.query_key_value(x).view(*x.shape[:-1], -1, 3 * attention.head_size).transpose(1, 2)
    _, k, v = per_head.chunk(3, dim=-1)
    return k, v


@dataclass(frozen=True)
class Family:
    """How one model family departs from llama. A new family is a new row in `FAMILIES`; the conformance tests cover it."""

    trunk: str = "model"
    blocks: str = "layers"
    norm: str = "norm"
    attention: str = "self_attn"
    input_norm: str | None = "input_layernorm"
    positions: str | None = None  # an embedding of absolute positions, added to the tokens' own
    rotary: str | None = "rotary_emb"
    rotary_per_kind: bool = False  # one rotary table for each layer type (gemma3)
    cache_kwarg: str = "cache"
    implementation: str = "sdpa"  # which of the library's attention functions
    keys_values: KeysValues = _split_kv
    projected: int = 2  # of queries, keys and values, how many `keys_values` computes
    scale_in: Callable[[Config], float] = lambda config: 1.0
    finish: Callable[[Tensor, Config], Tensor] = lambda logits, config: logits  # after the head
    lean: bool = False  # blocks of the llama kind, which `lean` runs too


def _softcap(logits: Tensor, config: Config) -> Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


FAMILIES: dict[str, Family] = {
    "llama": Family(lean=True),
    "mistral": Family(lean=True),
    "qwen2": Family(lean=True),
    "qwen3": Family(lean=True),
    "smollm3": Family(lean=True),
    "phi3": Family(keys_values=_fused_kv, lean=True),
    "olmo2": Family(input_norm=None, lean=True),
    "gemma2": Family(finish=_softcap, implementation="eager"),  # SDPA has no soft cap
    "gemma3_text": Family(finish=_softcap, rotary_per_kind=True),
    "granite": Family(
        scale_in=lambda config: float(config.embedding_multiplier),
        finish=lambda logits, config: logits / config.logits_scaling,
    ),
    "cohere": Family(finish=lambda logits, config: logits * config.logit_scale),
    "gpt2": Family(
        trunk="transformer",
        blocks="h",
        norm="ln_f",
        attention="attn",
        input_norm="ln_1",
        positions="wpe",
        rotary=None,
        keys_values=_conv1d_kv,
    ),
    "gpt_neox": Family(
        trunk="gpt_neox",
        norm="final_layer_norm",
        attention="attention",
        cache_kwarg="layer_past",
        keys_values=_interleaved_kv,
        projected=3,
    ),
}


def family_of(config: Config, source: Source) -> Family:
    """The row for a model's config. Raises `UnsupportedModel` where there is none."""
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"'{source.name}' is of the family '{config.model_type}', which offramp has no row for.",
            f"Supported families: {', '.join(sorted(FAMILIES))}. A family is one row in backbone.FAMILIES.",
        )
    return FAMILIES[config.model_type]


@dataclass
class Step:
    """What all blocks of one call share: positions, rotary tables, and attention masks made once for each need."""

    positions: Tensor  # (1, T)
    rotary: Any = None
    masks: dict[tuple[int | None, int], Tensor | None] = field(default_factory=dict)


class Backbone:
    """A causal language model whose blocks can be run range by range. Make one with `offramp.load`.

    Attributes: `model` and `tokenizer` are the library's own; `config` the model's text config; `n_blocks` N,
    `hidden_size` D, `vocab_size` V, `context` the longest sequence the model was made for; `kinds` the kind of each
    block; `source` where the weights came from, with their hash; `weight_format` the format they run in; `dtype` that of
    hidden states; `lean` the lean path, None where the library's blocks do the work.
    """

    def __init__(self, model: Any, tokenizer: Any, source: Source) -> None:
        config = model.config
        self.family = family = family_of(config, source)
        self.model, self.tokenizer, self.source, self.config = (
            model.eval().requires_grad_(False),
            tokenizer,
            source,
            config,
        )
        trunk = getattr(model, family.trunk)
        self._embed = model.get_input_embeddings()
        self._positions = getattr(trunk, family.positions) if family.positions else None
        self._rotary = getattr(trunk, family.rotary) if family.rotary else None
        self.blocks: list[nn.Module] = list(getattr(trunk, family.blocks))
        self.final_norm: nn.Module = getattr(trunk, family.norm)
        self.head: Any = model.get_output_embeddings()
        self.n_blocks = len(self.blocks)
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = self.head.weight.shape[0]
        self.context: int = config.max_position_embeddings
        self.dtype: torch.dtype = self.head.weight.dtype
        self.weight_format = str(self.dtype).removeprefix("torch.")
        self.lean: Lean | None = None
        self.device: torch.device = self.head.weight.device
        self.kinds = ["attention"] * self.n_blocks
        self._layer_types = _layer_types(config, self.n_blocks)
        self._takes = [set(inspect.signature(type(block).forward).parameters) for block in self.blocks]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a text: what the generation config, the config and the tokenizer name."""
        generation = getattr(self.model, "generation_config", None)
        named = [
            getattr(generation, "eos_token_id", None),
            getattr(self.config, "eos_token_id", None),
            getattr(self.tokenizer, "eos_token_id", None),
        ]
        ids: set[int] = set()
        for one in named:
            ids.update(one if isinstance(one, list) else [] if one is None else [one])
        return frozenset(ids)

    def quicken(self, format: str, store: Store | None = None, native: bool = True) -> None:
        """Run the blocks and the head on the lean path from now on, with weights in this format (see `weights.FORMATS`).

        Raises `UnsupportedModel` for a family without one, and for shapes that do not fit. With a quantised format, the
        library's own model is given the quantised weights too. `native` false keeps to torch's operators.
        """
        if not self.family.lean:
            raise UnsupportedModel(f"The family '{self.config.model_type}' has no lean path.", "Use bfloat16 or float32.")
        windows = [self.window(index) for index in range(self.n_blocks)]
        parts = (self.blocks, windows, self._rotary, self.final_norm, self.head)
        try:
            self.lean = Lean(*parts, FORMATS[format], store or Store(), native)
        except ValueError as error:
            raise UnsupportedModel(f"{self.name} has no lean path: {error}.", "Use bfloat16 or float32.") from error
        self.weight_format, self.dtype = format, torch.float32

    def slow(self) -> None:
        """Back to the library's own blocks."""
        self.lean, self.dtype = None, self.head.weight.dtype
        self.weight_format = str(self.dtype).removeprefix("torch.")

    def drop_library_weights(self) -> None:
        """Free what the lean path has its own copies of; `model` is of no use by itself afterwards."""
        for block in self.blocks:
            block.to("meta")
        if self.head.weight is not self._embed.weight:
            self.head.to("meta")

    def state(self, capacity: int = 256) -> State:
        """An empty memory for all blocks."""
        return State(self.kinds, capacity)

    def window(self, index: int) -> int | None:
        """How many tokens, itself included, a token sees in block `index`; None for all of them."""
        return self.config.sliding_window if self._layer_types[index] == "sliding_attention" else None

    def kv_shape(self, index: int) -> tuple[int, int]:
        """Key/value heads and head dim of block `index`."""
        heads = self.config.num_attention_heads
        dim = getattr(self.config, "head_dim", None) or self.hidden_size // heads
        return getattr(self.config, "num_key_value_heads", None) or heads, dim

    def embed(self, ids: Tensor, first: int | Tensor = 0) -> tuple[Tensor, Step | LeanStep]:
        """Token ids (B, T) at positions `first`, `first` + 1, … → hidden state (B, T, D) and what the blocks share.

        On the lean path each sequence may have its own `first`, (B,). Sequences with fewer than T tokens are padded at the
        end, with anything: what a pad leaves in memory is seen by no token before it is written over.
        """
        if self.lean:
            return self._embed(ids).float(), self.lean.step(first, *ids.shape)
        if not isinstance(first, int):
            raise UnsupportedModel(f"Ragged batches need the lean path, which {self.name} has not.")
        positions = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
        h = self._embed(ids)
        scale = self.family.scale_in(self.config)
        if scale != 1.0:
            h = h * scale
        if self._positions is not None:
            h = h + self._positions(positions)
        return h, self.step(h, positions)

    def step(self, h: Tensor, positions: Tensor) -> Step | LeanStep:
        """What the blocks share for tokens at these consecutive positions (1, T)."""
        if self.lean:
            return self.lean.step(int(positions[0, 0]), *h.shape[:2])
        if self._rotary is None:
            return Step(positions)
        if self.family.rotary_per_kind:
            return Step(positions, {kind: self._rotary(h, positions, kind) for kind in set(self._layer_types)})
        return Step(positions, self._rotary(h, positions))

    def run(self, h: Tensor, start: int, stop: int, state: State, step: Step | LeanStep) -> Tensor:
        """Hidden state (B, T, D) through blocks `start` to `stop` - 1, each of which remembers the T tokens."""
        if self.lean and isinstance(step, LeanStep):
            return self.lean.run(h, start, stop, state, step)
        assert isinstance(step, Step)
        for index in range(start, stop):
            kwargs: dict[str, Any] = {
                "attention_mask": self._mask(index, state.length(index), step, h.dtype),
                "position_ids": step.positions,
                self.family.cache_kwarg: state,
            }
            if "use_cache" in self._takes[index]:
                kwargs["use_cache"] = True
            if step.rotary is not None:
                kwargs["position_embeddings"] = self._tables(index, step)
            out = self.blocks[index](h, **kwargs)
            h = out[0] if isinstance(out, tuple) else out
        return h

    def project(self, h: Tensor, start: int, stop: int, state: State, step: Step | LeanStep) -> None:
        """Store what blocks `start` to `stop` - 1 would remember if each of them saw `h` (B, T, D) as its input.

        Only the keys and values are computed, by each block's own input norm and projections: CALM's state
        propagation (arXiv 2207.07061, section 3.2).
        """
        if self.lean and isinstance(step, LeanStep):
            self.lean.run(h, start, stop, state, step, fill=True)
            return
        assert isinstance(step, Step)
        for index in range(start, stop):
            block: Any = self.blocks[index]
            attention = getattr(block, self.family.attention)
            x = getattr(block, self.family.input_norm)(h) if self.family.input_norm else h
            keys, values = self.family.keys_values(attention, x)
            if step.rotary is not None and getattr(attention, "use_rope", True):
                rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
                keys, _ = rotate(keys, keys, *self._tables(index, step))
            state.update(keys, values, index)

    def logits(self, h: Tensor, rows: Tensor | None = None) -> Tensor:
        """Final norm and LM head: hidden state (…, D) → logits (…, V), in float32; of the tokens `rows` only, if given."""
        if self.lean:
            return self.family.finish(self.lean.logits(h, rows), self.config)
        normed = self.final_norm(h)
        out = self.head(normed) if rows is None else F.linear(normed, self.head.weight[rows])
        return self.family.finish(out, self.config).float()

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) → logits (B, T, V), full depth, nothing remembered before or after."""
        h, step = self.embed(ids)
        return self.logits(self.run(h, 0, self.n_blocks, self.state(ids.shape[1]), step))

    def encode(self, prompt: str, raw: bool = False) -> list[int]:
        """A user's prompt → token ids, through the chat template where the tokenizer has one and `raw` is false.

        Raises `BadInput` for an empty prompt and for one that fills the model's context.
        """
        if not prompt.strip():
            raise BadInput("The prompt is empty.", "Give some text to go on from.")
        return self.encode_chat([{"role": "user", "content": prompt}], raw)

    def encode_chat(self, messages: list[dict[str, str]], raw: bool = False) -> list[int]:
        """A conversation → token ids up to where the answer begins."""
        if raw or not getattr(self.tokenizer, "chat_template", None):
            ids = self.tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
        else:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.check_prompt(ids)
        return list(ids)

    def check_prompt(self, ids: list[int]) -> None:
        """Raises `BadInput` for a prompt of no tokens, and for one that leaves no room for an answer."""
        if not ids:
            raise BadInput("The prompt is empty.", "Give some text to go on from.")
        if len(ids) >= self.context:
            raise BadInput(
                f"The prompt is {len(ids)} tokens long; {self.name} holds {self.context} with its answer.",
                "Shorten the prompt, or use a model with a longer context.",
            )

    def _tables(self, index: int, step: Step) -> Any:
        return step.rotary[self._layer_types[index]] if self.family.rotary_per_kind else step.rotary

    def _mask(self, index: int, past: int, step: Step, dtype: torch.dtype) -> Tensor | None:
        key = (self.window(index), past)
        if key not in step.masks:
            step.masks[key] = self._make_mask(*key, step.positions, dtype)
        return step.masks[key]

    def _make_mask(self, window: int | None, past: int, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Which of `past` remembered tokens and the T new ones each new token may see: (1, 1, T, past + T).

        None where the attention function does the right thing without: one token that sees everything, or T tokens
        with nothing before them. True means "sees" for SDPA; the eager function adds the mask to the scores instead.
        """
        tokens = positions.shape[1]
        everything = window is None or past + tokens <= window
        if everything and (tokens == 1 or (past == 0 and self.family.implementation == "sdpa")):
            return None
        queries = torch.arange(past, past + tokens, device=positions.device)[:, None]
        keys = torch.arange(past + tokens, device=positions.device)[None, :]
        sees = keys <= queries
        if window is not None:
            sees &= keys > queries - window
        if self.family.implementation == "sdpa":
            return sees[None, None]
        return torch.where(sees, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]


def _layer_types(config: Config, n_blocks: int) -> list[str]:
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"] * n_blocks
    odd = set(types) - {"full_attention", "sliding_attention"}
    if odd:
        raise UnsupportedModel(f"Blocks of the kind {', '.join(sorted(odd))} are not supported yet.")
    return list(types)


@dataclass(frozen=True)
class Reference:
    """The library's own logits (1, T, V) for some token ids, of one pass and of three pieces over its cache."""

    ids: Tensor
    pieces: list[Tensor]
    full: Tensor
    cached: Tensor

    @classmethod
    @torch.inference_mode()
    def of(cls, backbone: Backbone) -> Reference:
        """Raises `BadNumbers` when the library's logits are not finite."""
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
        for piece in pieces:
            out = backbone.model(piece, **({"cache": cache} if cache is not None else {}), use_cache=True)
            cache = out.cache
            cached.append(out.logits.float())
        return cls(ids, pieces, full, torch.cat(cached, 1))


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@torch.inference_mode()
def check(backbone: Backbone) -> tuple[float, float]:
    """Compare a full pass, and a pass in pieces over a state, with the library's own logits.

    Returns the largest differences (full, cached), as shares of the largest logit. Raises `UnsupportedModel` when one
    exceeds what is allowed: `TOLERANCE` for the library's blocks, `Lean.tolerance` on the lean path.
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
    allowed = backbone.lean.tolerance if backbone.lean else TOLERANCE.get(backbone.dtype, 3e-2)
    if not (full <= allowed and cached <= allowed):
        raise UnsupportedModel(
            f"offramp would decode {backbone.name} wrongly: its logits differ from the library's by {full:.1e} in a full "
            f"pass and {cached:.1e} in a cached one, as shares of the largest logit ({allowed:.0e} is allowed).",
            f"The row for the family '{backbone.config.model_type}' in backbone.FAMILIES does not fit this model.",
        )
    return full, cached


def load(name: str, dtype: str | None = None, device: str | None = None, keep: bool = False) -> Backbone:
    """Load a causal language model and check it against the library's own logits.

    `name` is a hub name (`org/name`, or `org/name@revision`), a local folder, a GGUF file, or an alias (`smollm2`).
    `dtype` is a format of `weights.FORMATS`: `bfloat16`, `float32`, `int8`, `int4` or `int4-head4`; by default bfloat16,
    or float32 where bfloat16 does not pass the self-check. Quantised weights are made once and kept in the cache folder.
    Families that have a lean path take it, and the library's copy of the weights is then dropped, unless `keep` is true:
    `Backbone.model` can be used by itself only with it. Nothing is fetched when the files are on this machine already, or
    when `HF_HUB_OFFLINE` is set.

    Raises `ModelNotFound`, `UnsupportedModel`, `CorruptFile`, `BadNumbers`, each with a hint.
    """
    if dtype is not None and dtype not in FORMATS:
        raise BadInput(f"'{dtype}' is not a dtype offramp runs in.", f"Choose from {', '.join(FORMATS)}.")
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
        family = family_of(config, source)  # a wrong family should not cost a minute of loading
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
    quantised = FORMATS[dtype].quantised
    if family.lean or quantised:
        try:
            backbone.quicken(dtype, Store(cache_folder() / "formats" / f"{source.sha256[:16]}-{dtype}.safetensors"))
            check(backbone)
        except UnsupportedModel:
            if quantised:
                raise
            backbone.slow()
    if backbone.lean is None:
        check(backbone)
    elif not keep:
        backbone.drop_library_weights()
    return backbone


def wrap(model: Any, tokenizer: Any, name: str = "unnamed") -> Backbone:
    """A `Backbone` around a `transformers` model that is in memory already; checked like one that was loaded."""
    backbone = Backbone(model, tokenizer, Source.of_weights(name, model.state_dict()))
    check(backbone)
    return backbone
