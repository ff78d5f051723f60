"""A frozen causal language model as embed → blocks → norm → head, with every part callable by itself.

The blocks are the library's own modules, called one range at a time, so that decoding can stop after any of them.
What differs between model families (names of the parts, scales on the way in and out, how keys and values come out
of the projections) is a row in `families`. Whether the row is right is not taken on trust: `loading.check` compares a full
and a cached pass with the library's own logits when a model is loaded, and refuses a model it would decode wrongly.

Shapes: B batch, T tokens of this call, D hidden size, V vocabulary, N blocks, H key/value heads, P head dim.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.errors import BadInput, UnsupportedModel
from offramp.model.families import UNBOUNDED, family_of
from offramp.model.hub import Source
from offramp.model.lean.base import Lean, LeanStep
from offramp.model.lean.llama import LeanLlama
from offramp.model.lean.mamba2 import LeanMamba
from offramp.model.lean.weights import FORMATS, Store
from offramp.model.mamba import is_mixer, remember, take_over
from offramp.model.state import State


@dataclass
class Step:
    """What all blocks of one call share: positions, rotary tables, and attention masks made once for each need."""

    positions: Tensor  # (1, T)
    rotary: Any = None
    masks: dict[tuple[int | None, int], Tensor | None] = field(default_factory=dict)


_BY_MODEL: WeakValueDictionary[int, Backbone] = WeakValueDictionary()


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
        self.context: int = getattr(config, "max_position_embeddings", UNBOUNDED)
        self.dtype: torch.dtype = self.head.weight.dtype
        self.weight_format = str(self.dtype).removeprefix("torch.")
        self.lean: Lean | None = None
        self.device: torch.device = self.head.weight.device
        self._attention = [self._part(block, family.attention, mamba=False) for block in self.blocks]
        self._mixers = [self._part(block, family.mixer, mamba=True) for block in self.blocks]
        for mixer in self._mixers:
            if mixer is not None:
                take_over(mixer)
        names = {(True, False): "attention", (False, True): "mamba", (True, True): "both", (False, False): "neither"}
        pairs = zip(self._attention, self._mixers, strict=True)
        self.kinds = [names[attention is not None, mixer is not None] for attention, mixer in pairs]
        self._layer_types = _layer_types(config, self.kinds)
        _BY_MODEL[id(model)] = self
        self._takes = [set(inspect.signature(type(block).forward).parameters) for block in self.blocks]

    @staticmethod
    def _part(block: nn.Module, name: str | None, mamba: bool) -> Any:
        """A block's attention, or its Mamba mixer; None for a block that has none, or an MLP of that name (nemotron_h)."""
        part = getattr(block, name, None) if name else None
        if part is None or is_mixer(part) != mamba:
            return None
        return part if mamba or name != "mixer" or hasattr(part, "num_key_value_groups") else None

    def mixer(self, index: int) -> Any:
        """The Mamba mixer of block `index`, the library's module; None where it has none."""
        return self._mixers[index]

    @classmethod
    def of(cls, model: Any) -> Backbone | None:
        """The backbone that was last made of the library's `model`, if it is still in use."""
        backbone = _BY_MODEL.get(id(model))
        return backbone if backbone is not None and backbone.model is model else None

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
        rest = (self.final_norm, self.head, FORMATS[format], store or Store(), native)
        try:
            if self.family.lean == "llama":
                windows = [self.window(index) for index in range(self.n_blocks)]
                self.lean = LeanLlama(self.blocks, windows, self._rotary, *rest)
            else:
                self.lean = LeanMamba(self.blocks, *rest)
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

    def embed(self, ids: Tensor, first: int | Tensor = 0, mask: Tensor | None = None) -> tuple[Tensor, Step | LeanStep]:
        """Token ids (B, T) at positions `first`, `first` + 1, … → hidden state (B, T, D) and what the blocks share.

        On the lean path each sequence may have its own `first`, (B,). Sequences with fewer than T tokens are padded at the
        end, with anything; `mask` (B, T) is False for pads. Attention needs no mask for that (what a pad leaves in memory
        is seen by no token before it is written over), Mamba does.
        """
        if self.lean:
            return self._embed(ids).float(), self.lean.step(first, ids.shape[0], ids.shape[1], mask)
        if not isinstance(first, int) or mask is not None:
            raise UnsupportedModel(f"Ragged batches need the lean path, which {self.name} has not.")
        positions = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
        h = self._embed(ids)
        scale = self.family.scale_in(self.config)
        if scale != 1.0:
            h = h * scale
        if self._positions is not None:
            h = h + self._positions(positions)
        return h, self.step(h, first)

    def step(self, h: Tensor, first: int) -> Step | LeanStep:
        """What the blocks share for tokens h (B, T, D) at positions `first`, `first` + 1, …"""
        if self.lean:
            return self.lean.step(first, *h.shape[:2])
        positions = torch.arange(first, first + h.shape[1], device=h.device)[None]
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
            attends = self._attention[index] is not None
            kwargs: dict[str, Any] = {
                "attention_mask": self._mask(index, state.length(index), step, h.dtype) if attends else None,
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

    def run_all(self, parts: Sequence[tuple[Tensor, State, Step | LeanStep]], start: int, stop: int) -> list[Tensor]:
        """`run` for several states at once; where the lean path is compiled, in one pass over the weights."""
        if self.lean:
            lean = [(h, state, step) for h, state, step in parts if isinstance(step, LeanStep)]
            return self.lean.run_all(lean, start, stop)
        return [self.run(h, start, stop, state, step) for h, state, step in parts]

    def project(self, h: Tensor, start: int, stop: int, state: State, step: Step | LeanStep) -> None:
        """Store what blocks `start` to `stop` - 1 would remember if each of them saw `h` (B, T, D) as its input.

        Attention: only the keys and values are computed, by each block's own input norm and projections, CALM's state
        propagation (arXiv 2207.07061, section 3.2). Mamba: only what feeds convolution and state (`mamba.remember`).
        """
        if self.lean and isinstance(step, LeanStep):
            self.lean.run(h, start, stop, state, step, fill=True)
            return
        assert isinstance(step, Step)
        for index in range(start, stop):
            self.project_keys(h, index, state, step)
            self.project_state(h, index, state)

    def project_keys(self, h: Tensor, index: int, state: State, step: Step | LeanStep) -> None:
        """The attention part of `project`, for one block; nothing where it has none."""
        attention = self._attention[index]
        if attention is not None:
            assert isinstance(step, Step), "attention on the lean path is filled by `project`"
            keys, values = self.family.keys_values(attention, self._normed(h, index))
            if step.rotary is not None and getattr(attention, "use_rope", True):
                rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
                keys, _ = rotate(keys, keys, *self._tables(index, step))
            state.update(keys, values, index)

    def project_state(self, h: Tensor, index: int, state: State) -> None:
        """The Mamba part of `project`, for one block; nothing where it has none."""
        memory = state.ssm[index]
        if memory is not None:
            remember(self._mixers[index], self._normed(h, index), memory)

    def _normed(self, h: Tensor, index: int) -> Tensor:
        name = self.family.input_norm
        normed: Tensor = getattr(self.blocks[index], name)(h.to(self.dtype)) if name else h
        return normed

    def logits(self, h: Tensor, rows: Tensor | None = None) -> Tensor:
        """Final norm and LM head: hidden state (…, D) → logits (…, V), in float32; of the tokens `rows` only, if given."""
        if self.lean:
            return self.family.finish(self.lean.logits(h, rows), self.config)
        normed = self.final_norm(h).to(self.dtype)  # some Mamba models keep the residual stream in float32
        out = self.head(normed) if rows is None else F.linear(normed, self.head.weight[rows])
        return self.family.finish(out, self.config).float()

    def head_of(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        """`logits` of the tokens `rows` only, as a function to be called many times."""
        if self.lean:
            short = self.lean.head_of(rows)
            return lambda h: self.family.finish(short(h), self.config)
        return lambda h: self.logits(h, rows)

    def sketched(self, reduce: Tensor, expand: Tensor, candidates: int) -> Callable[[Tensor], Tensor]:
        """`logits` of so many tokens only, those that a sketch of the head deems likeliest; −inf for all others.

        The sketch is the head behind `expand` · `reduce`, (D, k) and (k, D), of few dims k.
        """
        guess = self.lean.rough(expand) if self.lean else partial(F.linear, weight=self.head_weight() @ expand)

        def logits(h: Tensor) -> Tensor:
            flat = h.reshape(-1, h.shape[-1])
            names = _largest(guess(self.final(flat) @ reduce.T), candidates)
            out = torch.full((len(flat), self.vocab_size), float("-inf"), device=h.device)
            for row, some in enumerate(names):
                out[row, some] = self.head_of(some)(flat[row : row + 1])[0]
            return out.view(*h.shape[:-1], -1)

        return logits

    def final(self, h: Tensor) -> Tensor:
        """What the head is multiplied with: the final norm of h, in float32."""
        return self.lean.norm(h.float()) if self.lean else self.final_norm(h).float()

    def head_weight(self) -> Tensor:
        """The head's matrix, (V, D) in float32."""
        return self.lean.head.dense() if self.lean else self.head.weight.detach().float()

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


def _largest(rows: Tensor, count: int) -> Tensor:
    """Where the `count` largest of each row (n, V) are, in any order: (n, count)."""
    if rows.device.type != "cpu":
        return rows.topk(count, dim=-1, sorted=False).indices
    # Several times as fast as torch's topk there.
    return torch.from_numpy(np.argpartition(rows.numpy(), -count, axis=-1)[:, -count:])


def _layer_types(config: Any, kinds: list[str]) -> list[str]:
    """For each block: full_attention, sliding_attention, or what the config calls a block without attention."""
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"] * len(kinds)
    odd = {type for type, kind in zip(types, kinds, strict=True) if kind == "attention"}
    odd -= {"full_attention", "sliding_attention"}
    if odd:
        raise UnsupportedModel(f"Blocks of the kind {', '.join(sorted(odd))} are not supported yet.")
    return list(types)
