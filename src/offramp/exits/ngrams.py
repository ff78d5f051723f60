"""An n-gram table: the token that most often follows two to four tokens in a model's own answers.

Drafts from it cost nothing. It is an n-gram language model with back-off (Jurafsky and Martin, "Speech and Language
Processing", chapter 3): longer contexts are asked first. Compiled code reads the hash table as it is (drafts.h).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

LONGEST_CONTEXT, SHORTEST_CONTEXT = 4, 2  # tokens of a context
SLOTS = 1 << 17  # slots of the largest table: 1 MB; four times as many foresaw no more of answers to new prompts
FULLEST = 0.7  # largest share of slots that are taken
LEAST = 0.45  # a token is kept if its chance to follow is at least this
Text = tuple[np.ndarray, ...]  # ids, the tokens chosen after each, and whether these count


@dataclass(frozen=True)
class Ngrams:
    """Slots of a hash table, two int32 tensors (n,), where n is a power of 2.

    `keys`: the hash of a context, 0 for an empty slot; `values`: 256 · a token + its chance to follow, in 1/255.
    """

    keys: Tensor
    values: Tensor

    def check(self, vocabulary: int) -> None:
        """Raises `ValueError` for tensors that are no such table, or name tokens beyond a vocabulary of this size."""
        slots = len(self.keys)
        if any((part.dtype, *part.shape) != (torch.int32, slots) for part in (self.keys, self.values)):
            raise ValueError(f"keys and values of n-grams must be {slots} int32 numbers each")
        if not slots or slots & (slots - 1) or bool(self.keys.all()):
            raise ValueError(f"a table of n-grams needs empty slots, and a power of 2 of slots: it has {slots}")
        if int(((self.values.long() & 0xFFFFFFFF) >> 8).max()) >= vocabulary:
            raise ValueError(f"its table of n-grams names tokens beyond the vocabulary of {vocabulary}")

    def after(self, ids: list[int]) -> tuple[int, float] | None:
        """The token that the table expects after these ids, and its chance; None for a context that it does not know."""
        mask = len(self.keys) - 1
        for length in range(min(LONGEST_CONTEXT, len(ids)), SHORTEST_CONTEXT - 1, -1):
            key = int(_hashes(np.array([ids[-length:]], dtype=np.uint32))[0])
            slot = key & mask
            while (there := int(self.keys[slot]) & 0xFFFFFFFF) != 0:
                if there == key:
                    value = int(self.values[slot]) & 0xFFFFFFFF
                    return value >> 8, (value & 255) / 255
                slot = (slot + 1) & mask
        return None


def ngrams_of(texts: Iterable[tuple[Tensor, Tensor, Tensor]], before: Ngrams | None = None, most: int = SLOTS) -> Ngrams:
    """The table of texts: ids (T,), the token that the model chose after each (T,), and whether that counts (T,).

    The answers to one prompt are often alike, and say little about those to others. So what follows a context counts once
    for each prompt, and once for each text that answers none. A token that followed in b of n cases has a chance of
    b / (n + 2): a guess from few texts is often wrong on others. Contexts that are not in the texts come from a table
    `before`. If there are too many contexts for `most` slots, the most frequent ones are kept.
    """
    arrays: list[Text] = [tuple(part.numpy().astype(np.uint32) for part in text) for text in texts]
    prompts = (prompt_of(ids, counted) for ids, _, counted in arrays)
    groups = [[arrays[index] for index in group] for group in by_prompt(prompts)]
    found = [_likeliest(_pairs(groups, length)) for length in range(SHORTEST_CONTEXT, LONGEST_CONTEXT + 1)]
    keys, tokens, right, seen = (np.concatenate(parts) for parts in zip(*found, strict=True))
    chance = right / (seen + 2)
    kept = np.flatnonzero(chance >= LEAST)
    kept = kept[np.argsort(-right[kept], kind="stable")]
    keys, values = keys[kept], tokens[kept] << 8 | np.round(255 * chance[kept]).astype(np.uint32)
    if before is not None:
        old_keys, old_values = (part.numpy().view(np.uint32) for part in (before.keys, before.values))
        new = (old_keys != 0) & ~np.isin(old_keys, keys)
        keys, values = np.concatenate([keys, old_keys[new]]), np.concatenate([values, old_values[new]])
    keys, values = keys[: int(FULLEST * most)], values[: int(FULLEST * most)]
    slots = max(16, 1 << int(np.ceil(np.log2(len(keys) / FULLEST + 1))))
    return Ngrams(*_table(keys, values, min(slots, most)))


def _hashes(contexts: np.ndarray) -> np.ndarray:
    """The hash of each context (n, length): uint32 (n,), never 0. As `key_of` in drafts.h."""
    hashes = np.full(len(contexts), contexts.shape[1], dtype=np.uint32)
    for column in contexts.T:
        hashes = (hashes ^ column) * np.uint32(0x9E3779B1)
        hashes ^= hashes >> np.uint32(15)
    return np.maximum(hashes, 1)


def by_prompt(prompts: Iterable[bytes]) -> list[list[int]]:
    """The indices of the texts that answer the same prompt, together; that of each text that answers none (b""), alone."""
    groups: dict[bytes | int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt or index, []).append(index)
    return list(groups.values())


def prompt_of(ids: np.ndarray, counted: np.ndarray) -> bytes:
    """A hash of the prompt that a text (T,) answers; b"" for none. `counted`: whether what follows each id is learned."""
    last = int(counted.argmax()) if len(counted) else 0  # the prompt's last token: the first that counts follows it
    return blake2b(ids[: last + 1].tobytes(), digest_size=16).digest() if last else b""


def _pairs(groups: list[list[Text]], length: int) -> np.ndarray:
    """The contexts of a length and what follows each: 2³² · the context's hash + the token, uint64; once for each group."""
    found = [np.empty(0, np.uint64)]
    for texts in groups:
        pairs = [np.empty(0, np.uint64)]
        for ids, chosen, counted in texts:
            if len(ids) >= length:
                counts = counted[length - 1 :].astype(bool)
                keys = _hashes(np.lib.stride_tricks.sliding_window_view(ids, length)[counts])
                pairs.append(keys.astype(np.uint64) << np.uint64(32) | chosen[length - 1 :][counts])
        found.append(np.unique(np.concatenate(pairs)))
    return np.concatenate(found)


def _likeliest(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each context, the token that follows it most often, how often it does so, and how often any token follows."""
    pairs, counts = np.unique(pairs, return_counts=True)
    own = (pairs >> np.uint64(32)).astype(np.uint32)
    order = np.lexsort((-counts, own))
    distinct, first = np.unique(own[order], return_index=True)
    seen = np.add.reduceat(counts[order], first) if len(first) else counts
    best = order[first]
    return distinct, (pairs[best] & np.uint64(0xFFFFFFFF)).astype(np.uint32), counts[best], seen


def _table(keys: np.ndarray, values: np.ndarray, slots: int) -> tuple[Tensor, Tensor]:
    """The keys and values in a hash table with linear probing. Frequent keys go in first, so they are found soonest."""
    table, stored, mask = np.zeros(slots, np.uint32), np.zeros(slots, np.uint32), slots - 1
    for key, value in zip(keys.tolist(), values.tolist(), strict=True):
        slot = key & mask
        while table[slot] and table[slot] != key:
            slot = (slot + 1) & mask
        if not table[slot]:
            table[slot], stored[slot] = key, value
    return torch.from_numpy(table.view(np.int32)), torch.from_numpy(stored.view(np.int32))
