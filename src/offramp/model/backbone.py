"""A frozen causal language model as embed → blocks → norm → head, with every part callable by itself.

A `Runtime` runs the blocks. `LibraryBlocks` calls the library's own modules. `Compiled` runs code of this project's own,
for some families. When a model is loaded, `selfcheck.check` compares the logits of a full pass and of a cached pass with
the library's, and refuses a model that would be decoded wrongly.

Shapes: B batch, T tokens of this call, D hidden size, V vocabulary, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from offramp.errors import BadInput, BadNumbers, UnsupportedModel
from offramp.model.checkpoint import Values
from offramp.model.compiled.formats import Change, precision_of
from offramp.model.compiled.library import library
from offramp.model.compiled.parts import Moments
from offramp.model.compiled.rounding import LayerInput
from offramp.model.compiled.runtime import Compiled
from offramp.model.families import UNBOUNDED, Family, family_of
from offramp.model.hooks import device_of, is_offloaded
from offramp.model.hub import Source
from offramp.model.library_blocks import LibraryBlocks
from offramp.model.modules import Modules
from offramp.model.prompts import Prompts
from offramp.model.runtime import AnyState, BlockInput, Runtime, Step
from offramp.model.store import Store

__all__ = ["Backbone", "BlockInput", "HasBackbone", "Runtime", "Step", "backbone_of"]

KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

PLAIN = "Use bfloat16 or float32."
NO_CODE = "Install gcc or clang, and then offramp again; or use bfloat16 or float32."
BY_NAME = "Load the model by its name: offramp.load maps its weights from files."
NO_CPU = 'Use bfloat16 or float32, or the CPU: device="cpu" in Python, CUDA_VISIBLE_DEVICES= before a command.'

_BACKBONES: WeakKeyDictionary[Any, ReferenceType[Backbone]] = WeakKeyDictionary()  # library model → its newest backbone


def no_compiled(name: str, format: str, why: str, hint: str = PLAIN) -> UnsupportedModel:
    """The error for a model that compiled blocks cannot run."""
    return UnsupportedModel(f"{name} has no compiled blocks in {format}: {why}.", hint)


def require_compiled(name: str, family: Family, format: str, device: torch.device) -> None:
    """Raise `UnsupportedModel`, with the reason, unless compiled blocks of this family can run here."""
    if not family.compiled:
        raise no_compiled(name, format, "there is no code for its family")
    if device.type != "cpu":
        raise no_compiled(name, format, f"they run on a CPU, and it is on '{device.type}'", NO_CPU)
    if library() is None:
        raise no_compiled(name, format, "the C code is not compiled here", NO_CODE)


class Backbone:
    """A causal language model whose blocks can be run range by range. Make one with `offramp.load`.

    Attributes: `model` and `tokenizer` are the library's own, and `config` is the model's text config. `n_blocks` is N,
    `hidden_size` D, `vocab_size` V, and `context` the length of the longest sequence the model was made for, in tokens.
    `kinds` holds the kind of each block. `source` says where the weights came from, with their hash. `prompts` turns text
    into token ids. `modules` holds the library's modules, and `runtime` runs the blocks. `change` says what
    the weight format changes in a short text, where that was measured. `device` is where hidden states and gates are, and
    the blocks unless accelerate has spread them; a model on the meta device names it.
    """

    def __init__(self, model: Any, tokenizer: Any, source: Source, device: torch.device | None = None) -> None:
        config = model.config
        self.family = family_of(config, source)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.source, self.config = tokenizer, source, config
        self.modules = Modules.of(model, self.family)
        self.runtime: Runtime = LibraryBlocks(self.modules, self.family, config)
        head = self.modules.head.weight
        self.n_blocks = len(self.modules.blocks)
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = head.shape[0]
        self.context: int = getattr(config, "max_position_embeddings", UNBOUNDED)
        self.device: torch.device = device or device_of(self.modules.embedding)
        self.kinds = self.modules.kinds
        self.change: Change | None = None
        self.prompts = Prompts(tokenizer, self.context, source.name, self.vocab_size)
        _BACKBONES[model] = ref(self)

    @classmethod
    def of(cls, model: Any) -> Backbone | None:
        """The newest backbone that was made of the library's `model`, if it is still in use."""
        backbone = _BACKBONES.get(model)
        return None if backbone is None else backbone()

    @property
    def name(self) -> str:
        """The model's name as the user gave it."""
        return self.source.name

    @property
    def weight_format(self) -> str:
        """The format that the weights run in."""
        return self.runtime.weight_format

    def bad_numbers(self) -> BadNumbers:
        """The error for logits that are not finite."""
        return BadNumbers(
            f"{self.name} gave NaN or infinite logits in {self.weight_format}.",
            "Try --dtype float32; if that fails too, the weights are damaged: fetch them again.",
        )

    @property
    def precision(self) -> str:
        """The format whose weights have about as many bits: float32, bfloat16, int8 or int4."""
        return precision_of(self.runtime.bits)

    @property
    def step_bytes(self) -> int:
        """The bytes of weights that a step of full depth reads: the blocks' and the head's."""
        return sum(map(self.runtime.block_bytes, range(self.n_blocks))) + self.runtime.head_bytes()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states."""
        return self.runtime.dtype

    @property
    def engine(self) -> str:
        """What runs the blocks: `library blocks` or `compiled blocks`."""
        return self.runtime.engine

    @property
    def blocks(self) -> list[nn.Module]:
        """The library's blocks."""
        return self.modules.blocks

    @property
    def head(self) -> Any:
        """The library's LM head."""
        return self.modules.head

    def mixer(self, index: int) -> Any:
        """The library's Mamba mixer of block `index`; None if the block has none."""
        return self.modules.mixers[index]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a text: those that the generation config, the config and the tokenizer name.

        Raises `ValueError` for what is no token's number.
        """
        owners = (getattr(self.model, "generation_config", None), self.config, self.tokenizer)
        ids = list[Any]()
        for owner in owners:
            named = getattr(owner, "eos_token_id", None)
            ids += named if isinstance(named, list) else [] if named is None else [named]
        if wrong := [id for id in ids if type(id) is not int or not -1 <= id < 1 << 31]:
            raise ValueError(f"eos_token_id: {wrong[0]!r} is no token")
        return frozenset(ids) - {-1}  # which configs write for none

    def use_compiled_blocks(
        self,
        format: str,
        store: Store | None = None,
        values: Values | None = None,
        inputs: Mapping[nn.Module, LayerInput] | None = None,
        moments: Callable[[int], Moments] | None = None,
    ) -> None:
        """Run compiled blocks and a compiled head from now on, with weights in this format (see `formats.FORMATS`).

        `store` keeps the converted weights. `values` reads those of a model on the meta device. `inputs` says
        which weights get inputs that 8 bits cannot hold, and `moments` what each linear layer of a block gets. If the model
        is in memory, a quantised format also replaces the library's own weights. Raises `UnsupportedModel`, with the
        reason, where there are no compiled blocks for this model in this format.
        """
        require_compiled(self.name, self.family, format, self.device)
        if is_offloaded(self.model):
            raise no_compiled(self.name, format, "accelerate brings its weights in one by one", BY_NAME)
        try:
            store, values = store or Store(), values or Values()
            runtime = Compiled(self.modules, self.family, self.config, format, store, values, inputs or {}, moments)
        except ValueError as error:
            why = str(error).removesuffix(".")
            raise no_compiled(self.name, format, why[0].lower() + why[1:]) from error
        self.runtime = runtime
        for module, weight in runtime.changed:
            if not module.weight.is_meta:
                module.weight = nn.Parameter(weight().to(module.weight), requires_grad=False)

    def keep_keys_in(self, dtype: str) -> None:
        """Keep the keys and values of new texts in `float32` or `bfloat16` from now on.

        Without this, compiled blocks keep them in float32 with float32 weights, and in bfloat16 with others. Raises
        `BadInput` for another dtype, and `UnsupportedModel` where no compiled block has attention.
        """
        if dtype not in KV_DTYPES:
            raise BadInput(f"Keys and values cannot be kept in '{dtype}'.", f"Choose from {', '.join(KV_DTYPES)}.")
        if not isinstance(self.runtime, Compiled) or not self.runtime.keeps_keys:
            raise UnsupportedModel(
                f"{self.name} runs without compiled attention, so its keys and values cannot be kept in {dtype}.",
                "Leave the choice out (kv).",
            )
        self.runtime.keep_keys_in(KV_DTYPES[dtype])

    def use_library_blocks(self) -> None:
        """Run the library's own blocks from now on, as its model holds them at this moment."""
        self.modules = Modules.of(self.model, self.family)
        self.runtime = LibraryBlocks(self.modules, self.family, self.config)

    def trainable_from(self, start: int) -> Runtime:
        """A runtime for blocks `start` to N - 1 only, through which gradients pass. Their weights stay as they are.

        They are the library's blocks, with the weights that this backbone runs with. If compiled blocks run, they are
        copies: in bfloat16 if the processor multiplies it and the backbone does not run in float32.
        """
        if not isinstance(self.runtime, Compiled):
            return self.runtime
        filled = [self.runtime.filled(block) for block in self.modules.blocks[start:]]
        modules = self.modules.with_blocks([*self.modules.blocks[:start], *filled], self.family)
        return LibraryBlocks(modules, self.family, self.config)

    def drop_spare_weights(self) -> None:
        """Free the library's weights that compiled blocks have copies of; `model` cannot be used by itself afterwards.

        Does nothing where the library's blocks run.
        """
        self.runtime.drop_spare_weights()

    def state(self, capacity: int = 256) -> AnyState:
        """An empty memory for all blocks, with room for so many tokens; it grows where more come."""
        return self.runtime.state(capacity)

    def window(self, index: int) -> int | None:
        """The number of tokens that a token sees in block `index`, itself included; None if it sees all of them."""
        return self.modules.windows[index]

    def kv_shape(self, index: int) -> tuple[int, int]:
        """The number of key/value heads of block `index`, and their head dim."""
        heads = self.config.num_attention_heads
        dim = getattr(self.config, "head_dim", None) or self.hidden_size // heads
        return getattr(self.config, "num_key_value_heads", None) or heads, dim

    def embed(self, ids: Tensor, first: int = 0) -> tuple[Tensor, Step]:
        """Token ids (B, T) at positions `first`, `first` + 1, … → hidden state (B, T, D) and what the blocks share."""
        return self.runtime.embed(ids, first)

    def step(self, h: Tensor, first: int) -> Step:
        """What the blocks share for tokens h (B, T, D) at positions `first`, `first` + 1, …"""
        return self.runtime.step(h, first)

    def run(self, h: Tensor, start: int, stop: int, state: AnyState, step: Step) -> Tensor:
        """Hidden state (B, T, D) through blocks `start` to `stop` - 1, each of which remembers the T tokens."""
        return self.runtime.run_all([(h, state, step)], start, stop)[0]

    def run_all(self, parts: Sequence[BlockInput], start: int, stop: int) -> list[Tensor]:
        """Do `run` for several states at once. Compiled blocks read their weights once for all of them."""
        return self.runtime.run_all(parts, start, stop)

    def project(self, h: Tensor, start: int, stop: int, state: AnyState, step: Step) -> None:
        """Store what blocks `start` to `stop` - 1 would remember if each of them saw `h` (B, T, D) as its input.

        Attention blocks compute only keys and values, by their own input norm and projections. This is CALM's state
        propagation (arXiv 2207.07061, section 3.2). Mamba blocks compute only what feeds their convolution and state
        (`mamba.remember`).
        """
        self.runtime.remember_all([(h, state, step)], start, stop)

    def project_keys(self, h: Tensor, index: int, state: AnyState, step: Step) -> None:
        """Do the attention part of `project` in block `index`. Does nothing if the block has no attention."""
        self.runtime.remember_keys(h, index, state, step)

    def project_state(self, h: Tensor, index: int, state: AnyState) -> None:
        """Do the Mamba part of `project` in block `index`. Does nothing if the block has no Mamba mixer."""
        self.runtime.remember_state(h, index, state)

    def logits(self, h: Tensor, rows: Tensor | None = None) -> Tensor:
        """Final norm and LM head: hidden state (…, D) → logits (…, V) in float32; (…, n) for the n tokens `rows`."""
        return self.runtime.logits(h, rows)

    def head_of(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that gives the `logits` of the n tokens `rows` only, (…, D) → (…, n). It is meant for many calls."""
        return self.runtime.head_of(rows)

    def sketched(self, reduce: Tensor, expand: Tensor, candidates: int) -> Callable[[Tensor], Tensor]:
        """A function like `logits` that reads out only the `candidates` likeliest tokens; all others get −inf.

        A sketch of the head estimates which tokens are the likeliest. It is the head times `expand` (D, k), and takes the
        hidden state times `reduce` (k, D), for a small k.
        """
        return self.runtime.sketched(reduce, expand, candidates)

    def final(self, h: Tensor) -> Tensor:
        """The final norm of h (…, D) in float32: the head's input."""
        return self.runtime.final(h)

    def head_weight(self) -> Tensor:
        """The head's matrix, (V, D) in float32."""
        return self.runtime.head_weight()

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) → logits (B, T, V) at full depth. The memory is empty at the start and is not kept."""
        h, step = self.embed(ids)
        return self.logits(self.run(h, 0, self.n_blocks, self.state(ids.shape[1]), step))


class HasBackbone(Protocol):
    """An object that holds a backbone, such as the `Model` that `offramp.load` gives."""

    @property
    def backbone(self) -> Backbone:
        """The backbone."""
        ...


def backbone_of(model: Backbone | HasBackbone) -> Backbone:
    """The backbone of a model, or the backbone itself."""
    return model if isinstance(model, Backbone) else model.backbone
