"""What a chat template does, in pieces that a program without Jinja can put together."""

from __future__ import annotations

from typing import Any

ROLES = ("system", "user", "assistant")  # in the order of the C library


def chat_pieces(tokenizer: Any) -> dict[str, str | list[int]] | None:
    """How a tokenizer's chat template puts a talk together, found by rendering it with markers as messages.

    `first`: what stands before the first message if it is the user's, `system`: if it is the system's; `after_system`:
    after the system's message; `answer`: after one of the user's; `assistant`: then, before one of the assistant's that is
    known; `next`: after it; `trims`: for each of `ROLES` whether white space around a message is left out. None without a
    template, and for one that does more.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None

    def rendered(*messages: tuple[str, str]) -> str:
        talk = [{"role": role, "content": content} for role, content in messages]
        return str(tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))

    marks = [" \n<<0>>\n ", " \n<<1>>\n ", " \n<<2>>\n ", " \n<<3>>\n "]
    roles = ["system", "user", "assistant", "user"]
    try:
        whole = rendered(*zip(roles, marks, strict=True))
        plain = rendered(*zip(roles[1:2], marks[1:2], strict=True))
        found = [mark if mark in whole else mark.strip() for mark in marks]
        system, after_system, between, following, answer = _cut(whole, found)
        first, last = _cut(plain, found[1:2])
        trims = [int(mark not in whole) for mark in marks[:3]]
        pieces: dict[str, str | list[int]] = {"first": first, "system": system, "trims": trims}
        pieces |= {"after_system": after_system, "answer": answer, "next": following}
        pieces["assistant"] = between.removeprefix(answer)
        longer = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", " d "), ("user", "e")]
        same = all(
            rendered(*talk) == put_together(pieces, talk)
            for talk in (longer, longer[:1], [("system", "s "), *longer], [("system", ""), *longer[:3]])
        )
    except Exception:  # templates raise what they like
        return None
    return pieces if same and last == answer else None


def put_together(pieces: dict[str, Any], talk: list[tuple[str, str]]) -> str:
    """A talk's text up to the answer, as the C library's `offramp_chat` puts it together."""
    text = pieces["system" if talk[0][0] == "system" else "first"]
    for role, content in talk:
        text += pieces["assistant"] if role == "assistant" else ""
        text += content.strip() if pieces["trims"][ROLES.index(role)] else content
        text += pieces[{"system": "after_system", "user": "answer", "assistant": "next"}[role]]
    return str(text)


def _cut(text: str, marks: list[str]) -> list[str]:
    """What stands before, between and behind the marks. Raises `ValueError` if one does not occur once, in order."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError(mark)
        pieces.append(before)
    return [*pieces, text]
