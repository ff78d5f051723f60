"""What compiled blocks remember of texts: as a `State`, but the C library keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.model.compiled.library import TYPES, CRows, Model, Owned, call, constant, library


class Kept:
    """Copies of what one block remembers, for those who look at it: keys and values, or a window and a state.

    `shape`: of keys and values, heads and their dim; of a mixer, the shapes of its window and its state.
    """

    def __init__(self, texts: Sequence[Owned], block: int, shape: tuple[Any, Any]) -> None:
        self._texts, self._block, self._shape = texts, block, shape

    @property
    def length(self) -> int:
        """The tokens that the block has taken in."""
        return int(library().offramp_session_length(self._texts[0].pointer, self._block))

    @property
    def first(self) -> int:
        """The first position that is still kept, beyond 0 where a window has slid."""
        return int(library().offramp_session_first(self._texts[0].pointer, self._block))

    @property
    def keys(self) -> Tensor:
        """(B, KV heads, tokens from the `first` on, head dim)."""
        return self._halves()[0]

    @property
    def values(self) -> Tensor:
        """(B, KV heads, tokens from the `first` on, head dim)."""
        return self._halves()[1]

    def _halves(self) -> Sequence[Tensor]:
        heads, dim = self._shape
        out = torch.empty(len(self._texts), self.length - self.first, 2, heads, dim)
        for row, text in zip(out, self._texts, strict=True):
            call("offramp_session_keys", text.pointer, self._block, self.first, row.data_ptr())
        return out.permute(2, 0, 3, 1, 4).unbind()

    @property
    def window(self) -> Tensor:
        """The convolution's last inputs, (B, W - 1, C)."""
        return self._mixed()[0]

    @property
    def h(self) -> Tensor:
        """The scan's state, (B, H, P, N)."""
        return self._mixed()[1]

    def _mixed(self) -> tuple[Tensor, Tensor]:
        window, h = (torch.empty(len(self._texts), *shape) for shape in self._shape)
        for parts in zip(self._texts, window, h, strict=True):
            text, *places = parts
            call("offramp_session_state", text.pointer, self._block, *(place.data_ptr() for place in places))
        return window, h


class Session:
    """What compiled blocks remember of a batch of texts that share their positions. Its methods are those of a `State`.

    `shapes`: for each block what `Kept` needs of its keys and values, and of its mixer; None for what it does not have.
    Keys and values are kept in the dtype `keys`. `capacity` tokens are expected.

    `plan` stepped the texts last. It is held, since a fork needs the shapes of its Mamba gates.
    """

    plan: Owned | None = None

    def __init__(self, model: Model, shapes: Sequence[tuple[Any, Any]], keys: torch.dtype, capacity: int) -> None:
        self._model, self._shapes, self._keys, self._capacity = model, shapes, keys, capacity
        self._texts = [self._new()]

    def _new(self) -> Owned:
        pointer = call("offramp_session_new", self._model.pointer, constant(TYPES[self._keys]), self._capacity)
        return _text(pointer)

    def __deepcopy__(self, _: Any) -> Session:
        """A memory that goes on independently. It has no more room than its tokens need."""
        twin = Session.__new__(Session)
        twin.__dict__.update(self.__dict__)
        twin._texts = [_text(call("offramp_session_fork", text.pointer)) for text in self._texts]
        return twin

    def rows(self, batch: int, first: int, count: int) -> list[CRows]:
        """The next tokens of a batch: `count` of each text, from position `first` on.

        Raises `ValueError` for a batch of another size than the one before.
        """
        if batch > len(self._texts) == 1 and not any(map(self.length, range(len(self._shapes)))):
            self._texts += [self._new() for _ in range(batch - 1)]
        if batch != len(self._texts):
            raise ValueError(f"the memory holds {len(self._texts)} texts, not {batch}")
        return [CRows(text.pointer, first, count) for text in self._texts]

    @property
    def pointer(self) -> int:
        """The only text's session."""
        (text,) = self._texts
        return text.pointer

    @property
    def kv(self) -> list[Kept | None]:
        """For each block with attention, a look at its keys and values."""
        return [shapes[0] and Kept(self._texts, block, shapes[0]) for block, shapes in enumerate(self._shapes)]

    @property
    def ssm(self) -> list[Kept | None]:
        """For each block with a mixer, a look at its window and state."""
        return [shapes[1] and Kept(self._texts, block, shapes[1]) for block, shapes in enumerate(self._shapes)]

    def length(self, block: int) -> int:
        """Tokens that `block` has in memory."""
        return int(library().offramp_session_length(self._texts[0].pointer, block))

    def waits(self, exit: int) -> int:
        """Tokens that wait at an open exit for their deeper blocks."""
        return sum(library().offramp_session_waits(text.pointer, exit) for text in self._texts)

    @property
    def bytes(self) -> int:
        """The bytes of all memories, without room to grow."""
        return sum(library().offramp_session_bytes(text.pointer) for text in self._texts)

    def bytes_for(self, tokens: int) -> int:
        """The bytes of memories like these with room for so many tokens. Mamba states count twice: a watch keeps a copy."""
        return sum(library().offramp_session_bytes_for(text.pointer, tokens) for text in self._texts)

    def reserve(self, capacity: int) -> None:
        """Expect this many tokens: memories that grow are then made large enough at once."""
        self._capacity = max(self._capacity, capacity)
        for text in self._texts:
            library().offramp_session_reserve(text.pointer, capacity)

    def watch(self, start: int, stop: int) -> None:
        """From now on, blocks `start` to `stop` - 1 can forget the tokens they take in, until `settle`."""
        for text in self._texts:
            call("offramp_session_watch", text.pointer, start, stop)

    def settle(self) -> None:
        """Keep all tokens for good, and drop what was kept for forgetting them."""
        for text in self._texts:
            library().offramp_session_settle(text.pointer)

    def crop(self, length: int, start: int = 0, stop: int | None = None) -> None:
        """Forget every token from position `length` on, in blocks `start` to `stop` - 1 (by default, in all).

        Raises `ValueError` where a Mamba state took in one of them without a watch.
        """
        stop = len(self._shapes) if stop is None else stop
        for text in self._texts:
            call("offramp_session_crop", text.pointer, length, start, stop)

    def can_forget(self, length: int) -> bool:
        """Whether `crop` can forget all tokens from position `length` on without a watch."""
        return all(library().offramp_session_can_forget(text.pointer, length) for text in self._texts)

    def take_back(self, start: int) -> None:
        """Forget the newest token, in blocks `start` and after. Raises as `crop` does."""
        for block in (block for block in range(start, len(self._shapes)) if any(self._shapes[block])):
            self.crop(self.length(block) - 1, block, block + 1)

    def copy_keys(self, source: int, goal: int, tokens: int) -> None:
        """Append to block `goal` the keys and values of the newest `tokens` of block `source`."""
        for text in self._texts:
            call("offramp_session_copy", text.pointer, source, goal, tokens)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, in this order; a row that is named twice is copied."""
        chosen = rows.tolist()
        first = {row: place for place, row in reversed([*enumerate(chosen)])}
        self._texts = [
            self._texts[row] if first[row] == place else _text(call("offramp_session_fork", self._texts[row].pointer))
            for place, row in enumerate(chosen)
        ]


def _text(pointer: int) -> Owned:
    return Owned(pointer, "offramp_session_free")
