"""Exits: places after a block where decoding may stop. Each has a gate and a read-out.

The gate decides whether a token leaves: it reads the hidden state after its block and gives a logit, whose sigmoid is the
confidence. The three kinds are those of the paper (DYNAMAX, arXiv 2504.20922): `linear` (CALM-style), `ffn`, and `mamba`,
whose recurrent state remembers the tokens before. `ffn` and `mamba` work in a bottleneck, because a gate must be far
cheaper than a block. The read-out gives the logits of the next token: it corrects the hidden state with a small residual
adapter and hands it to the exit's tail if it has one, then to the backbone's own final norm and head.

This module holds one group of exits, which are trained together: its modules, and what it is saved with. `exits.format` has
the files, and `exits.exit_set` everything that belongs to one model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import BadInput, CorruptFile, reason_of
from offramp.exits.config import ExitsConfig
from offramp.exits.format import RECORD, WEIGHTS, Owner, Record, Tables, damaged, read_tensors
from offramp.exits.gates import GATES
from offramp.exits.ngrams import Ngrams
from offramp.exits.policy import Policy
from offramp.exits.readouts import READOUTS
from offramp.model.backbone import Backbone, HasBackbone, backbone_of


class Exit(nn.Module):
    """One exit: `block` blocks run before it, and after its adapter the model's last `tail` blocks."""

    def __init__(self, block: int, tail: int, hidden: int, config: ExitsConfig) -> None:
        super().__init__()
        self.block, self.tail = block, tail
        self.gate = GATES[config.gate](hidden, config.gate_width)
        kind, reads = READOUTS[config.readout], {"reads": 2} if config.middle else {}
        self.adapter = kind(hidden, config.readout_width, tail, **reads)


@dataclass
class Exits:
    """A group of exits that were trained together: what `offramp train` makes, `save` writes and `load` reads.

    `owner` is the model that they learned from, and `weight_format` the format that its weights ran in. `policy` is the
    default one. `training` records how the exits were made. `calibration` records the guarantee of `policy` (see
    `training.calibration`); it is empty without one.
    `elsewhere` holds the records for other formats of weights, by format: loading chooses that of the backbone.
    `shortlist` (n,): the tokens that are read out, rising; None for all. `sketch`: two maps, reduce (k, D) and expand
    (D, k). The head reads expand · reduce · h in place of the hidden state h, so the head times `expand` is a small matrix
    (`offramp.training.sketch`). `ngrams`: a table of the tokens that often follow a few others in the model's own answers.
    """

    config: ExitsConfig
    modules: nn.ModuleList
    owner: Owner
    weight_format: str
    policy: Policy
    training: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    elsewhere: dict[str, dict[str, Any]] = field(default_factory=dict)
    shortlist: Tensor | None = None
    sketch: tuple[Tensor, Tensor] | None = None
    ngrams: Ngrams | None = None

    @classmethod
    def new(cls, backbone: Backbone, config: ExitsConfig) -> Exits:
        """Untrained exits, all closed. Raises `OfframpError` for a config that does not fit the model."""
        config.check(backbone)
        modules = nn.ModuleList(Exit(layer, tail, backbone.hidden_size, config) for layer, tail in config.places)
        return cls(config, modules, Owner.of(backbone), backbone.weight_format, Policy.closed(len(config.layers)))

    def __iter__(self) -> Iterator[Exit]:
        return (exit for exit in self.modules if isinstance(exit, Exit))

    def named(self, vocabulary: int) -> tuple[int, ...]:
        """Numbers of candidates from the sketch that a policy may ask for, falling; none without a sketch."""
        numbers = (2 * self.config.candidates, self.config.candidates) if self.sketch else ()
        return tuple(number for number in numbers if number < vocabulary)

    @property
    def drafts(self) -> bool:
        """Whether these exits only draft: such read-outs also read what full depth made of the token before."""
        return any(exit.adapter.reads for exit in self)

    @property
    def validation(self) -> list[dict[str, Any]]:
        """For each exit, how often it was right on held-out text, from the training's record."""
        return [row for row in self.training.get("validation", []) if isinstance(row, dict)]

    def __len__(self) -> int:
        return len(self.modules)

    def __bool__(self) -> bool:
        """A group without exits may hold a sketch of the head."""
        return True

    def save(self, folder: str | Path) -> None:
        """Write `exits.safetensors` (bfloat16), and `offramp.json`, which names the hash of the weights beside it.

        Raises `BadInput` if the config does not fit the short list or the sketch of these exits: such a folder could not be
        loaded.
        """
        self._check_config()
        tensors = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in self.modules.state_dict().items()}
        tables = Tables(self.shortlist, self.sketch, self.ngrams)
        histories = self.training, self.calibration, self.elsewhere
        record = Record(self.config, self.owner, self.weight_format, "", self.policy, *histories)
        record.write(Path(folder), tensors | tables.tensors())

    def _check_config(self) -> None:
        sizes = {
            "shortlist": 0 if self.shortlist is None else len(self.shortlist),
            "sketch": 0 if self.sketch is None else len(self.sketch[0]),
            "ngrams": 0 if self.ngrams is None else len(self.ngrams.keys),
        }
        for name, size in sizes.items():
            named = getattr(self.config, name)
            if named != size:
                raise BadInput(
                    f"The exits' config names a {name} of {named}, but they hold {f'one of {size}' if size else 'none'}.",
                    f"Set exits.{name}, or replace {name} in exits.config.",
                )

    @classmethod
    def load(cls, folder: str | Path, model: Backbone | HasBackbone, *, any_weights: bool = False) -> Exits:
        """Read a folder that `save` wrote, for this model.

        With `any_weights`, the exits may be those of another model of the same shape and vocabulary. Raises `ExitsMismatch`
        for another model's exits, `CorruptFile` for files that are missing, cut short or damaged.
        """
        folder, backbone = Path(folder), backbone_of(model)
        record = Record.read(folder)
        if not (record.owner.fits(backbone) if any_weights else record.owner.owns_weights_of(backbone)):
            raise record.owner.mismatch(backbone, f"The exits in {folder}")
        try:
            with torch.device("meta"):  # no memory is allocated before the file is checked
                exits = cls.new(backbone, record.config)
        except (RuntimeError, TypeError, ValueError, OverflowError, KeyError) as error:  # the config makes no sense
            raise CorruptFile(f"{folder / RECORD} is damaged: {reason_of(error)}", "Train the exits again.") from error
        exits._take(folder / WEIGHTS, read_tensors(folder, record.weights_sha256), backbone)
        exits.owner, exits.policy, exits.weight_format = record.owner, record.policy, record.weight_format
        exits.training, exits.calibration, exits.elsewhere = record.training, record.calibration, record.elsewhere
        if record.calibration.get("weights") != backbone.weight_format:
            exits.use(record.elsewhere.get(backbone.weight_format, {}))
        exits.modules.eval().requires_grad_(False)
        return exits

    def use(self, calibration: dict[str, Any]) -> None:
        """Let this record of a calibration, unless it is empty, decide from now on. The one before is kept `elsewhere`."""
        if not calibration:
            return
        kept = {str(each["weights"]): each for each in (*self.elsewhere.values(), self.calibration) if "weights" in each}
        self.elsewhere = {format: each for format, each in kept.items() if format != calibration["weights"]}
        self.calibration = calibration
        self.policy = Policy.from_json(calibration["policy"])

    def promise(self, calibration: dict[str, Any], backbone: Backbone) -> None:
        """Use a calibration that was made with this model. What was promised for other weights is forgotten."""
        if not self.owner.owns_weights_of(backbone):
            self.owner, self.calibration, self.elsewhere = Owner.of(backbone), {}, {}
        self.use(calibration)

    def _take(self, file: Path, tensors: dict[str, Tensor], backbone: Backbone) -> None:
        """Take the weights and tables that a file held."""
        try:
            tables = Tables.taken_from(tensors, self.config, backbone.hidden_size, backbone.vocab_size)
            self.modules.load_state_dict({key: value.float() for key, value in tensors.items()}, assign=True)
        except (ValueError, RuntimeError, TypeError) as error:  # tensors are missing or have wrong shapes
            raise damaged(file, error) from error
        numbers = (*self.modules.state_dict().values(), *(tables.sketch or ()))
        if not all(torch.isfinite(value).all() for value in numbers):
            raise CorruptFile(f"{file} holds NaN or infinite weights.", "Train the exits again.")
        self.shortlist, self.sketch, self.ngrams = tables.shortlist, tables.sketch, tables.ngrams
