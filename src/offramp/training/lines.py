"""Lines of policies for a calibration to choose from. Each goes from nearly closed to open."""

from __future__ import annotations

from offramp.errors import BadInput
from offramp.exits.policy import PATIENCE, Policy

EXIT_CANDIDATES = 512  # from a sketch of the head
GRID = (0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.35)
KINDS = ("precision", "thresholds", "decay", PATIENCE, "fixed")


def candidates(
    count: int, kind: str, confidence: str = "gate", named: tuple[int, ...] = (), whole_head: bool = False
) -> list[list[Policy]]:
    """Lists of policies for `count` exits; each list, called a line, goes from nearly closed to open.

    There is one line for each exit that may be the first open one. The deepest comes first, so that deep exits open before
    shallow ones can do harm. The policies of a line, by `kind`:

    - `thresholds`: one threshold for all open exits, over `GRID`;
    - `decay`: the same, and it falls along the answer over 16 tokens (CALM);
    - `patience`: a token leaves where 2, 3, … open exits in a row read out the same token;
    - `fixed`: every token leaves at that exit.

    The kind `precision` has no such lines: its policies are made from the pilot's answers (`points.policies`).

    `named`: numbers of candidates from a sketch of the head (`Exits.named`). With a sketch, one more line comes first: it
    closes all exits and reads out fewer and fewer candidates; the other lines read out the least number. Still fewer would
    use up the risk before an exit opens. With `whole_head`, they do so at exits only, and the first line is left out.
    Raises `BadInput` for an unknown `kind`.
    """
    if kind not in KINDS:
        raise BadInput(f"There is no policy '{kind}'.", f"Choose from {', '.join(KINDS)}.")
    lines = [[Policy((1.0,) * count, confidence, candidates=number) for number in named]] if not whole_head else []
    head = heads(named, whole_head)
    for closed in reversed(range(count)):
        opened = count - closed

        def policy(threshold: float, confidence: str = confidence, closed: int = closed, decay: float = 0.0) -> Policy:
            return Policy((1.0,) * closed + (threshold,) * (count - closed), confidence, decay, *head)

        if kind == "thresholds":
            lines.append([policy(threshold) for threshold in GRID])
        elif kind == "decay":
            lines.append([policy(threshold, decay=16.0) for threshold in GRID])
        elif kind == PATIENCE:
            lines.append([policy((run - 0.5) / opened, PATIENCE) for run in range(opened, 1, -1)])
        elif kind == "fixed":
            alone = (1.0,) * closed + (0.0,) + (1.0,) * (opened - 1)
            lines.append([Policy(alone, "gate", 0.0, *head)])
    return [line for line in lines if line]


def heads(named: tuple[int, ...], whole_head: bool) -> tuple[int, int]:
    """A policy's `candidates` and `exit_candidates` for exits with a sketch; with `whole_head`, only the latter.

    A few candidates are enough at exits: if the likeliest next token is not among them, the exit is not sure enough anyway.
    """
    if not named:
        return 0, 0
    return (0 if whole_head else named[-1]), min(EXIT_CANDIDATES, named[-1])
