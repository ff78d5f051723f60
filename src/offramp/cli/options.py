"""The arguments that several verbs share: the model, how to decode with it, and the output format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli.progress import status
from offramp.errors import BadInput
from offramp.files import install_hint
from offramp.settings import RESEARCH, SEVERAL, setting

if TYPE_CHECKING:
    from offramp.decode.engine import Engine
    from offramp.decode.facade import Model as LoadedModel
    from offramp.decode.modes import Way
    from offramp.decode.sampling import Sampling
    from offramp.exits.exits import Exits
    from offramp.exits.policy import Policy
    from offramp.extras.cluster import Cluster

Model = Annotated[
    str,
    typer.Argument(
        help="A hub name (org/name), a folder, a GGUF file, or an alias (smollm2, smollm2-hybrid, mamba-tiny, …).",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for another program to read.")]
Ray = Annotated[
    str | None,
    typer.Option(
        help="Let a Ray cluster do the work: its address (HOST:PORT), auto for this machine's, or local for a new one.",
        show_default=False,
        rich_help_panel=SEVERAL,
    ),
]


@contextmanager
def cluster_at(address: str | None) -> Iterator[Cluster | None]:
    """The Ray cluster at an address, while the context is open; None without an address.

    Raises `BadInput` where there is none, or Ray is not installed.
    """
    if address is None:
        yield None
        return
    try:
        from offramp.extras.cluster import connected
    except ImportError as error:
        raise BadInput(f"--ray needs the package {error.name}.", install_hint("ray")) from error
    with connected(address) as found:
        yield found


@dataclass(frozen=True)
class DecodingOptions:
    """How to decode: the mode, the exits, the weights' format; and for research what a mode is made of."""

    mode: str | None = setting(
        None, "What you get: {modes}, or a point: early:3 (default: exact where drafts should pay, else full)."
    )
    exits: str | None = setting(None, "Folder with exits, or their name on the hub (default: those that ship).")
    dtype: str | None = setting(None, "Weights: {formats} (default: file for a GGUF file, else bfloat16).")
    fill: str | None = setting(
        None, "What skipped blocks remember of a token: {fills} (default: the mode's).", panel=RESEARCH
    )
    threshold: str | None = setting(
        None, "Confidence that a token must exceed to leave, one for all exits or one for each: 1,1,0.9.", panel=RESEARCH
    )
    candidates: int = setting(
        0, "Read out only so many tokens, those that a sketch of the head ranks highest (0: all).", panel=RESEARCH
    )

    def load(self, model: str, keep: bool = False) -> LoadedModel:
        """Load the model; its exits are those that the flags name. `keep`: keep the library's own weights, too."""
        with status(f"Loading {model} …") as progress:
            from offramp.decode.facade import load

            return load(model, self.dtype, keep=keep, progress=progress, exits=self.exits)

    def way(self, model: LoadedModel) -> Way:
        """The way to decode that the flags ask for. A policy of None is the exits' own.

        Without a mode, flags for research name it. Raises `BadInput` for flags that do not go together, and as
        `modes.settled` does.
        """
        from offramp.decode.modes import USUAL_FILL, Way, mode_of, settled, usual_mode

        asked = {
            "fill": self.fill,
            "threshold": self.threshold,
            "candidates": self.candidates,
        }
        flags = " and ".join(f"--{name}" for name, value in asked.items() if value)
        if self.mode == "full":
            if flags:
                raise BadInput(f"The mode full has no exits, so nothing for {flags}.", "Leave one of them out.")
            return Way(None, USUAL_FILL)
        mode = self.mode
        if mode is None:
            mode = mode_of(self.fill) if flags else usual_mode(model.backbone, model.exits)
        way = settled(mode, model.exits, model.backbone, self.fill)
        return way._replace(policy=self._policy(way.exits) or way.policy)

    def _policy(self, exits: Exits | None) -> Policy | None:
        from offramp.exits.policy import Policy

        if self.threshold is None:
            if self.candidates:
                raise BadInput("There is no default threshold with --candidates.", "Give one: --threshold 0.9")
            return None
        thresholds = _thresholds(self.threshold)
        if exits is None:
            raise BadInput("There are no exits that --threshold could open.", "Leave it out, or name exits: --exits DIR.")
        thresholds = thresholds * len(exits) if len(thresholds) == 1 else thresholds
        return Policy(thresholds, exits.policy.confidence, candidates=self.candidates)

    def engine(self, model: LoadedModel, sampling: Sampling | None = None) -> Engine:
        """The engine that the flags ask for. Raises as `way` does."""
        from offramp.decode.engine import Engine

        way = self.way(model)
        return Engine(model.backbone, way.exits, way.policy, way.fill, sampling)


def _thresholds(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise BadInput(f"'{text}' is not a threshold.", "For example --threshold 0.9, or --threshold 1,1,0.9,0.8") from None
