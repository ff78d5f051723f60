"""The arguments that several verbs share: the model, how to decode with it, and the output format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli.progress import status
from offramp.errors import BadInput
from offramp.files import install_hint
from offramp.settings import setting

if TYPE_CHECKING:
    from offramp.cluster import Cluster
    from offramp.decode.engine import Engine
    from offramp.decode.sampling import Sampling
    from offramp.exits.exits import Exits
    from offramp.exits.policy import Policy
    from offramp.model.backbone import Backbone

LEAST_GAIN = 1.1  # times as fast as full depth, for `verify` to be the default

Model = Annotated[
    str,
    typer.Argument(
        help="A hub name (org/name), a local folder, a GGUF file, or an alias (smollm2, smollm2-hybrid, mamba-tiny, "
        "mamba-tiny-ee).",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for another program to read.")]
Reference = Annotated[
    str | None,
    typer.Option(help="Compare with another model's full depth, such as the one that MODEL was tuned from."),
]
Ray = Annotated[
    str | None,
    typer.Option(
        help="Let the machines of a Ray cluster do the work. Its address (HOST:PORT); auto: the cluster that this machine "
        "belongs to; local: a new one of this machine alone. Needs the extra ray.",
        show_default=False,
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
        from offramp.cluster import connected
    except ImportError as error:
        raise BadInput(f"--ray needs the package {error.name}.", install_hint("ray")) from error
    with connected(address) as found:
        yield found


@dataclass(frozen=True)
class DecodingOptions:
    """How to decode: the weights' format, the exits, what skipped blocks remember, and when a token leaves."""

    exits: str | None = setting(
        None,
        "Folder with trained exits, or their name on the hub (org/name). Default: the exits that ship for this model, if "
        "any.",
    )
    fill: str | None = setting(
        None,
        "What skipped blocks remember of a token: project (keys, values and Mamba state computed from the exit's hidden "
        "state), copy (the last computed block's keys and values), freeze (the Mamba state stays as it was), defer (the "
        "exact states, computed together with the next token that goes deep), verify (as defer, and full depth decides). "
        "Default: project; but generate and chat take verify where drafts ship that should make it faster.",
    )
    threshold: str | None = setting(
        None,
        "Confidence that a token must exceed to leave, 0 to 1: one number for all exits, or one for each (1,1,0.9,0.8). "
        "1 closes an exit, 0 lets every token leave. It replaces the exits' whole policy. Default: the exits' own policy.",
    )
    confidence: str | None = setting(
        None,
        "What the threshold is compared with: gate (trained), or without training max-prob, margin, entropy or patience "
        "(the share of open exits in a row that agree). Needs --threshold. Default: as the exits have it.",
    )
    decay: float = setting(
        0.0, "Tokens over which thresholds fall at the beginning of an answer (CALM); 0: they stay. Needs --threshold."
    )
    candidates: int = setting(
        0,
        "Read out only the tokens that a sketch of the head ranks highest: this many, such as 2048; 0: all. Needs "
        "--threshold, and exits with a sketch.",
    )
    dtype: str | None = setting(
        None, "Weights: bfloat16, float32, int8, int4 or int4-head4. Default: bfloat16 where it passes the self-check."
    )

    kv: str | None = setting(
        None,
        "Keys and values: bfloat16 or float32, where compiled blocks have attention. Default: float32 with float32 "
        "weights, else bfloat16.",
    )

    def load(self, model: str, keep: bool = False) -> Backbone:
        """Load the model. `keep`: keep the library's own weights in memory too."""
        with status(f"Loading {model} …") as progress:
            from offramp.model.loading import load

            return load(model, self.dtype, keep=keep, progress=progress, kv=self.kv)

    @property
    def fill_name(self) -> str:
        """The fill's name."""
        return self.fill or "project"

    @property
    def verifies(self) -> bool:
        """Whether full depth decides each token, and exits only draft."""
        from offramp.decode.fills import fill_named

        return fill_named(self.fill_name).verifies

    def chosen_for(self, backbone: Backbone, sampling: Sampling, batch: int = 1) -> DecodingOptions:
        """These options, with `verify` where nothing else is asked for and drafts should make greedy decoding faster.

        No clock decides: the drafts' record and their costs do.
        """
        asked = (self.fill, self.threshold, self.confidence, self.decay or None, self.candidates or None)
        if any(option is not None for option in asked) or sampling.temperature or batch > 1:
            return self
        compiled = backbone.engine == "compiled blocks"  # the costs of drafts are those of compiled code
        rule = next((engine.drafts for engine in self.drafting(backbone)), None) if compiled else None
        return replace(self, fill="verify") if rule and rule.gain >= LEAST_GAIN else self

    def find_exits(self, backbone: Backbone) -> Exits | None:
        """The exits of the folder, or those that ship, or None; for verified decoding, those that draft."""
        from offramp.exits.exits import find_exits

        return find_exits(backbone, self.exits, self.verifies)

    def drafting(self, backbone: Backbone) -> list[Engine]:
        """An engine whose drafts full depth decides about, beside another fill; none without an exit that drafts."""
        from offramp.decode.engine import Engine
        from offramp.exits.exits import find_exits

        drafts = None if self.verifies else find_exits(backbone, self.exits, draft=True)
        return [Engine(backbone, drafts, fill="verify")] if drafts and drafts.config.readout == "deep" else []

    def require_exits(self, backbone: Backbone) -> Exits:
        """`find_exits`; raises `BadInput` where there are none."""
        from offramp.exits.exits import require_exits

        return require_exits(backbone, self.exits, self.verifies)

    def policy(self, backbone: Backbone, exits: Exits | None) -> Policy | None:
        """The policy that the flags name; None for the exits' own. Raises `BadInput` if a flag needs another one."""
        from offramp.exits.exits import no_exits
        from offramp.exits.policy import Policy

        if self.threshold is None:
            own_confidence = exits is None or self.confidence in (None, exits.policy.confidence)
            if self.decay or self.candidates or not own_confidence:
                flags = {"confidence": not own_confidence, "decay": self.decay, "candidates": self.candidates}
                flag_names = " and ".join(f"--{name}" for name, value in flags.items() if value)
                raise BadInput(f"There is no default threshold with {flag_names}.", "Give one: --threshold 0.9")
            return None
        thresholds = _thresholds(self.threshold)
        if exits is None:
            if min(thresholds) < 1:
                raise no_exits(backbone)
            return None
        thresholds = thresholds * len(exits) if len(thresholds) == 1 else thresholds
        return Policy(thresholds, self.confidence or exits.policy.confidence, self.decay, self.candidates)

    def engines(self, backbone: Backbone, exits: Exits | None, sampling: Sampling | None = None) -> tuple[Engine, Engine]:
        """Two engines under the same settings: one at full depth, one with the exits."""
        from offramp.decode.engine import Engine

        early = Engine(backbone, exits, self.policy(backbone, exits), self.fill_name, sampling)
        return Engine(backbone, sampling=sampling), early


def _thresholds(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise BadInput(f"'{text}' is not a threshold.", "For example --threshold 0.9, or --threshold 1,1,0.9,0.8") from None


def check_batch(batch: int) -> None:
    """Raise `BadInput` for a batch of less than one answer."""
    if batch < 1:
        raise BadInput(f"{batch} answers side by side are too few.", "Give --batch 1 or more.")
