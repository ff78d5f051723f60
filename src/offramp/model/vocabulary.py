"""A tokenizer as GGUF files have it: its tokens, their types, their merges, and how words are cut (core/tokenizer.c)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from offramp.errors import BadInput

if TYPE_CHECKING:
    from gguf import GGUFWriter

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
# mamba-tiny's: words with the space before them, single digits, and punctuation with the line breaks after it.
TINY = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+\n*|\s*\n+|\s+(?!\S)|\s+"
CUTS = {GPT2: "gpt-2", QWEN2: "qwen2", LLAMA3: "llama-bpe", TINY: "mamba-tiny"}  # the names that the library knows
ORDINARY, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens


def describe(tokenizer: Any, writer: GGUFWriter) -> None:
    """Write a tokenizer's entries. Raises `BadInput` for one that is no byte-level BPE whose words the library can cut."""
    said = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    model, cuts = said.get("model", {}), _cuts(said)
    if cuts is None or model.get("ignore_merges", False) != (cuts == CUTS[LLAMA3]):
        raise BadInput(
            "The program without Python cannot cut texts as this tokenizer does.",
            f"It reads byte-level BPE tokenizers that cut words as {', '.join(CUTS.values())} do.",
        )
    added = {token["id"]: token for token in said["added_tokens"]}
    names = {number: name for name, number in model["vocab"].items()} | {n: token["content"] for n, token in added.items()}
    ids = range(max(names) + 1)

    def type_of(number: int) -> int:
        if number in added:
            return CONTROL if added[number]["special"] else USER_DEFINED
        return ORDINARY if number in names else UNUSED

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cuts)
    writer.add_token_list([names.get(number, f"<unused {number}>") for number in ids])
    writer.add_token_types([type_of(number) for number in ids])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
        writer.add_add_bos_token(True)


def _cuts(said: dict[str, Any]) -> str | None:
    """How a tokenizer cuts words, by the name that the library has for it; None if the library does not cut so."""
    before = said.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    last = steps[-1]
    alone = said.get("model", {}).get("type") == "BPE" and last.get("type") == "ByteLevel" and not last["add_prefix_space"]
    if not alone or said.get("normalizer") or len(steps) > 2:
        return None
    if len(steps) == 1:
        return CUTS[GPT2] if last["use_regex"] else None
    split = steps[0]
    if last["use_regex"] or split.get("type") != "Split" or split["behavior"] != "Isolated" or split["invert"]:
        return None
    return CUTS.get(split["pattern"].get("Regex", ""))
