"""Prints unicode.h: which code points are letters and numbers, as the package tokenizers has them."""

from __future__ import annotations

from tokenizers import Regex, pre_tokenizers

POINTS = [point for point in range(0x110000) if not 0xD800 <= point <= 0xDFFF]
AT_ONCE = 4096
HEAD = """// Ranges of code points that are letters (\\p{L}) and numbers (\\p{N}). Made by unicode.py.

#pragma once
#include <stdint.h>

typedef struct {
    uint32_t first, last;
} Range;
"""


def ranges(pattern: str) -> list[tuple[int, int]]:
    """The ranges of code points that a regular expression matches."""
    split, found = pre_tokenizers.Split(Regex(pattern), "removed"), list[tuple[int, int]]()
    for start in range(0, len(POINTS), AT_ONCE):
        part = POINTS[start : start + AT_ONCE]
        others = split.pre_tokenize_str("".join(map(chr, part)))
        kept = {place for _, (first, last) in others for place in range(first, last)}
        for point in (point for place, point in enumerate(part) if place not in kept):
            if found and found[-1][1] == point - 1:
                found[-1] = found[-1][0], point
            else:
                found.append((point, point))
    return found


def table(name: str, pattern: str) -> str:
    """The ranges as an array of C."""
    return f"static const Range {name}[] = {{{', '.join(f'{{0x{a:x}, 0x{b:x}}}' for a, b in ranges(pattern))}}};"


if __name__ == "__main__":
    print(HEAD, table("LETTERS", r"\p{L}"), table("NUMBERS", r"\p{N}"), sep="\n")
