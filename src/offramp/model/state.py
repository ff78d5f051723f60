"""What each block remembers of the tokens it has seen.

Each block's memory has its own length: a block that an early exit skipped is behind the others until its fill catches up.
`State.update` has the signature by which the library's blocks store their keys and values, so a `State` is passed to
them in place of a `transformers.Cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# What a sliding window keeps beyond itself: tokens that can still be forgotten, and room for those to come until it slides.
SPARE, AT_ONCE = 64, 1024
UNIT = 8  # in which the compiled code reads positions: EIGHT of vectors.h


class KV:
    """Keys and values of one attention block, written in place into one buffer that doubles when full.

    A token's keys and values stand together, at the place of its position: (batch, capacity, keys then values, head
    dim). `keys` and `values` are views of the first `length` tokens in the library's layout (batch, KV heads, tokens,
    head dim). Lowering `length` forgets tokens. Where a token sees only a `window` of tokens, itself included, compiled
    code keeps few more: the buffer begins with position `base`, and so do the views.
    """

    def __init__(self, capacity: int = 256, window: int = 0) -> None:
        self.length = self.base = 0
        self._window = window
        self._capacity = capacity
        self._buffer: Tensor | None = None
        # The buffer's address, the end of the positions that it has room for, and what `addresses` gives for which shape.
        self._addresses: tuple[int, int, list[int], tuple[int, ...]] = 0, 0, [], ()

    def __deepcopy__(self, _: Any) -> KV:
        """A memory that goes on independently. It has no more room than its tokens need."""
        twin = KV(self._capacity, self._window)
        twin.length, twin.base = self.length, self.base
        if self._buffer is not None:
            twin._buffer = self._needed(self._buffer).clone()
        return twin

    @property
    def nbytes(self) -> int:
        """The bytes that the tokens take, and that a copy takes; the buffer may have more room."""
        return 0 if self._buffer is None else self._needed(self._buffer).nbytes

    def _needed(self, buffer: Tensor) -> Tensor:
        """A view of the part of the buffer that the tokens need."""
        return buffer[:, : -(-(self.length - self.base) // UNIT) * UNIT]

    def bytes_for(self, tokens: int) -> int:
        """The bytes of a buffer that has room for so many tokens like those in memory."""
        return 0 if self._buffer is None else self._buffer[:, :1].nbytes * self._expected(tokens)

    def _expected(self, tokens: int) -> int:
        return min(tokens, self._window + SPARE + AT_ONCE) if self._window else tokens

    @property
    def keys(self) -> Tensor:
        """A view (B, KV heads, tokens, head dim)."""
        return self._view(0)

    @property
    def values(self) -> Tensor:
        """A view (B, KV heads, tokens, head dim)."""
        return self._view(1)

    def _view(self, half: int) -> Tensor:
        assert self._buffer is not None, "nothing stored yet"
        return self._buffer[:, : self.length - self.base].chunk(2, dim=2)[half].transpose(1, 2)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the keys and values of T more tokens: (B, KV heads, T, head dim) each."""
        new = torch.cat([keys, values], dim=1).transpose(1, 2)
        place = self.length - self.base
        self._room(new, self.length + new.shape[1])[:, place : place + new.shape[1]] = new

    def _room(self, like: Tensor, end: int) -> Tensor:
        """Set the length to `end`, and return the buffer with room for that many tokens like those in `like`.

        Raises `ValueError` for tokens of another batch size, shape or dtype than those in memory.
        """
        old = self._buffer
        if old is not None and (old.dtype != like.dtype or len(old) != len(like) or old.shape[2:] != like.shape[2:]):
            raise ValueError(
                f"the memory holds {old.dtype} {tuple(old.shape)}, the tokens are {like.dtype} {tuple(like.shape)}"
            )
        needed = end - self.base
        if old is None or needed > old.shape[1]:
            expected = self._expected(self._capacity)
            capacity = expected if needed <= expected else needed if old is None else 2 * needed
            # Compiled code may read a few positions beyond the newest, whose scores it drops.
            self._buffer = like.new_zeros(len(like), capacity, *like.shape[2:])
            if old is not None:
                kept = self.length - self.base
                self._buffer[:, :kept] = old[:, :kept]
        self.length = end
        assert self._buffer is not None
        return self._buffer

    def reserve(self, capacity: int) -> None:
        """When the buffer grows next, let it have room for this many tokens."""
        self._capacity = max(self._capacity, capacity)

    def addresses(self, shape: tuple[int, int, int], dtype: torch.dtype, first: int, end: int) -> list[int]:
        """Set the length to `end`, for compiled code: for each sequence, the address where position 0 is, or would be.

        `shape`: sequences, heads of keys and of values, head dim. `first`: the position of the first new token, before
        which no more than a window is needed. Raises `ValueError` for a memory of another shape.
        """
        batch, heads, dim = shape
        start, limit, addresses, known = self._addresses
        kept = self._buffer
        fits = shape == known and end <= limit
        if fits and kept is not None and kept.data_ptr() == start and kept.dtype == dtype:
            self.length = end
            return addresses
        if self._window:
            self._slide(first, end)
        buffer = self._room(torch.empty(batch, 0, heads, dim, dtype=dtype), end)
        start, size = buffer.data_ptr(), buffer.stride(0) * buffer.itemsize
        before = self.base * buffer.stride(1) * buffer.itemsize
        addresses = [start + row * size - before for row in range(batch)]
        self._addresses = start, self.base + buffer.shape[1], addresses, shape
        return addresses

    def _slide(self, first: int, end: int) -> None:
        """If there is no room for tokens up to `end`, let go of those that none from position `first` on can see."""
        old, base = self._buffer, max(self.base, (first - self._window - SPARE) // UNIT * UNIT)
        if old is not None and end - self.base > old.shape[1] and base > self.base:
            kept = old[:, base - self.base : self.length - self.base].clone()
            old[:, : kept.shape[1]] = kept
            self.base, self._addresses = base, (0, 0, [], ())

    def can_crop(self, length: int) -> bool:
        """Whether tokens from position `length` on can be forgotten: what the next one sees must still be there."""
        return self.base == 0 or length >= self.base + self._window

    def crop(self, length: int) -> None:
        """Forget every token from position `length` on. Raises `ValueError` where a window has slid too far for that."""
        if not self.can_crop(length):
            raise ValueError(f"a window of {self._window} tokens has let go of what position {length} sees")
        self.length = min(self.length, length)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, in this order."""
        if self._buffer is not None:
            self._buffer, self._addresses = self._buffer.index_select(0, rows), (0, 0, [], ())


Replay = Callable[[Tensor, int], Tensor]


class SSM:
    """What a Mamba block remembers: the convolution's last inputs and the scan's state; None before the first token.

    `window` is (B, W - 1, E + 2 G N) for Mamba-2, (B, W - 1, E) for Mamba-1; `h` is (B, H, P, N) or (B, E, N). Neither
    grows with the text. Tokens can be forgotten only during a watch, in which a journal records what each token did. `crop`
    goes back to where the watch began and repeats the tokens that stay, without the block's weights.
    """

    def __init__(self) -> None:
        self.window: Tensor | None = None
        self.h: Tensor | None = None
        self.length = 0
        # The window's, the state's, those of each sequence, and the two shapes that they are for.
        self._addresses: tuple[int, int, list[int], tuple[tuple[int, ...], ...]] = 0, 0, [], ()
        self._start: tuple[int, Tensor | None, Tensor | None] | None = None
        self._journal: list[tuple[Tensor, Replay]] = []

    def __deepcopy__(self, _: Any) -> SSM:
        """A memory that goes on independently. What a journal holds is only read, so both share it."""
        twin = SSM()
        twin.window, twin.h = (None if part is None else part.clone() for part in (self.window, self.h))
        twin.length, twin._start, twin._journal = self.length, self._start, [*self._journal]
        return twin

    @property
    def nbytes(self) -> int:
        """The bytes of the window and the state."""
        return sum(part.nbytes for part in (self.window, self.h) if part is not None)

    @property
    def watched(self) -> bool:
        """Whether tokens taken in now can be forgotten."""
        return self._start is not None

    def watch(self) -> None:
        """Begin a watch: tokens taken in from now on can be forgotten. Does nothing during a watch."""
        if self._start is None:
            window, h = self.window, self.h
            self._start = self.length, None if window is None else window.clone(), None if h is None else h.clone()

    def settle(self) -> None:
        """End the watch: keep all tokens for good."""
        self._start = None
        self._journal.clear()

    def record(self, tokens: int, inputs: Tensor | None = None, replay: Replay | None = None) -> None:
        """Count T more `tokens` that the block has taken in, and during a watch keep how to repeat them.

        `inputs` (1, T, C) are the convolution's. replay(h, n) gives the state after the first n of the tokens, from state
        h, which it may write into. Raises `ValueError` for a batch during a watch, since its sequences may have to forget
        different tokens.
        """
        self.length += tokens
        if self._start is not None and inputs is not None and replay is not None:
            if len(inputs) > 1:
                raise ValueError("a batch of sequences cannot be watched")
            self._journal.append((inputs, replay))

    def crop(self, length: int) -> None:
        """Forget every token from position `length` on. Raises `ValueError` for tokens that came before the watch."""
        if length >= self.length:
            return
        if self._start is None or length < self._start[0]:
            raise ValueError("a Mamba state cannot forget tokens that it took in without a watch")
        assert self.window is not None
        assert self.h is not None
        first, window, h = self._start
        # Copies, since the next tokens may be written into them.
        window = torch.zeros_like(self.window) if window is None else window.clone()
        h = torch.zeros_like(self.h) if h is None else h.clone()
        kept, remaining = [], length - first
        for inputs, replay in self._journal:
            tokens = min(remaining, inputs.shape[1])
            if tokens:
                h = replay(h, tokens)
                window = torch.cat([window, inputs[:, :tokens].to(window.dtype)], dim=1)[:, tokens:]
                kept.append((inputs[:, :tokens], replay))
            remaining -= tokens
        self.window, self.h, self.length, self._journal = window.contiguous(), h, length, kept
        self._addresses = 0, 0, [], ()

    def addresses(self, like: Tensor, window: tuple[int, ...], h: tuple[int, ...]) -> list[int]:
        """For compiled code, of each sequence the address of its window and that of its state, which it writes in place.

        Both shapes include the batch. Raises `ValueError` for a memory of other shapes.
        """
        at_window, at_state, addresses, known = self._addresses
        kept = (0, 0) if self.window is None or self.h is None else (self.window.data_ptr(), self.h.data_ptr())
        if kept == (at_window, at_state) and known == (window, h):
            return addresses
        if self.window is None or self.h is None:
            self.window, self.h = like.new_zeros(window), like.new_zeros(h)
        parts = self.window, self.h
        if tuple(part.shape for part in parts) != (window, h) or not all(part.is_contiguous() for part in parts):
            raise ValueError(f"the memory holds {tuple(parts[0].shape)} and {tuple(parts[1].shape)}, not {window} and {h}")
        starts = [[part.data_ptr() + row * part.stride(0) * part.itemsize for row in range(h[0])] for part in parts]
        addresses = [address for pair in zip(*starts, strict=True) for address in pair]
        self._addresses = parts[0].data_ptr(), parts[1].data_ptr(), addresses, (window, h)
        return addresses

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, in this order."""
        self._addresses = 0, 0, [], ()
        if self.window is not None and self.h is not None:
            self.window, self.h = self.window.index_select(0, rows), self.h.index_select(0, rows)


KINDS = ("attention", "mamba", "both", "neither")  # what a block's memory holds; a hybrid model has blocks of several kinds


class State:
    """The memory of a backbone's blocks for one batch of sequences that share their positions.

    `kv[i]` holds the keys and values of block i, and `ssm[i]` its Mamba state; None where the block has no such part.
    `windows`: how many tokens a token sees in each block, where keys and values that none will see may go; None or 0: all.
    """

    def __init__(self, kinds: list[str], capacity: int = 256, windows: Sequence[int | None] | None = None) -> None:
        if unknown := set(kinds) - set(KINDS):
            raise NotImplementedError(f"no state for blocks of kind {sorted(unknown)}")
        sizes = [window or 0 for window in windows or [0] * len(kinds)]
        self.kv = [
            KV(capacity, window) if kind in ("attention", "both") else None
            for kind, window in zip(kinds, sizes, strict=True)
        ]
        self.ssm = [SSM() if kind in ("mamba", "both") else None for kind in kinds]

    def length(self, block: int) -> int:
        """Tokens whose keys and values `block` has in memory; 0 for a block without attention."""
        kv = self.kv[block]
        return 0 if kv is None else kv.length

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append to block `layer_idx` and return all its keys and values. The library calls this as `Cache.update`."""
        block = self.kv[layer_idx]
        assert block is not None
        block.append(keys, values)
        # The fill `copy` may have begun the memory with keys of a block that runs on another device.
        return block.keys.to(keys.device), block.values.to(keys.device)

    @property
    def bytes(self) -> int:
        """The bytes of all memories, without room to grow."""
        return sum(memory.nbytes for memory in (*self.kv, *self.ssm) if memory is not None)

    def bytes_for(self, tokens: int) -> int:
        """The bytes of memories like these with room for so many tokens. Mamba states count twice: a watch keeps a copy."""
        kv = sum(kv.bytes_for(tokens) for kv in self.kv if kv is not None)
        return kv + sum(2 * ssm.nbytes for ssm in self.ssm if ssm is not None)

    def reserve(self, capacity: int) -> None:
        """Expect this many tokens: memories that grow are then made large enough at once."""
        for kv in self.kv:
            if kv is not None:
                kv.reserve(capacity)

    def watch(self, start: int, stop: int) -> None:
        """From now on, blocks `start` to `stop` - 1 can forget the tokens they take in, until `settle`."""
        for ssm in self.ssm[start:stop]:
            if ssm is not None:
                ssm.watch()

    def settle(self) -> None:
        """Keep all tokens for good, and drop what was kept for forgetting them."""
        for ssm in self.ssm:
            if ssm is not None:
                ssm.settle()

    def crop(self, length: int, start: int = 0, stop: int | None = None) -> None:
        """Forget every token from position `length` on, in blocks `start` to `stop` - 1 (by default, in all).

        Raises `ValueError` where a Mamba state took in one of them without a watch.
        """
        for block in (*self.kv[start:stop], *self.ssm[start:stop]):
            if block is not None:
                block.crop(length)

    def can_forget(self, length: int) -> bool:
        """Whether `crop` can forget all tokens from position `length` on without a watch."""
        return not any(self.ssm) and all(kv is None or kv.can_crop(length) for kv in self.kv)

    def take_back(self, start: int) -> None:
        """Forget the newest token, in blocks `start` and after. Raises as `crop` does."""
        for block in (*self.kv[start:], *self.ssm[start:]):
            if block is not None:
                block.crop(block.length - 1)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, in this order; a row that is named twice is copied."""
        for block in (*self.kv, *self.ssm):
            if block is not None:
                block.select(rows)
