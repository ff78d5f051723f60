"""The files of a group of exits: the record `offramp.json`, and the weights `exits.safetensors`, whose hash it holds.

This module checks what a stranger's files hold. `exits.exits` makes modules of it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offramp.errors import CorruptFile, ExitsMismatch, OfframpError, reason_of
from offramp.exits.calibrated import check_calibration, check_types
from offramp.exits.config import ExitsConfig
from offramp.exits.ngrams import Ngrams
from offramp.exits.policy import Policy
from offramp.files import write_atomically

if TYPE_CHECKING:
    from offramp.model.backbone import Backbone

WEIGHTS, RECORD = "exits.safetensors", "offramp.json"
# Names of the tensors that are not parameters of modules.
SHORTLIST, SKETCH, NGRAMS = "shortlist", ("sketch.reduce", "sketch.expand"), ("ngrams.keys", "ngrams.values")


@dataclass(frozen=True)
class Owner:
    """The model that exits learned from: its name, a hash of its weights and of its vocabulary, and its shape.

    `vocabulary` is empty for a model without a tokenizer, and in records that do not have it.
    """

    name: str
    fingerprint: str
    model_type: str
    blocks: int
    hidden_size: int
    vocabulary: str = ""

    @classmethod
    def of(cls, backbone: Backbone) -> Owner:
        """The owner of exits that are made for this backbone."""
        return cls(
            backbone.name,
            backbone.source.fingerprint,
            backbone.config.model_type,
            backbone.n_blocks,
            backbone.hidden_size,
            backbone.prompts.vocabulary,
        )

    def owns_weights_of(self, backbone: Backbone) -> bool:
        """Whether the backbone has the weights that the exits learned from."""
        return bool(self.fingerprint and self.fingerprint == backbone.source.fingerprint)

    def fits(self, backbone: Backbone) -> bool:
        """Whether the backbone has the same shape, and the same vocabulary, as far as it has one, or the same weights."""
        same_shape = (self.blocks, self.hidden_size) == (backbone.n_blocks, backbone.hidden_size)
        here = backbone.prompts.vocabulary
        if not (self.vocabulary and here):
            return same_shape and (bool(self.vocabulary) or self.owns_weights_of(backbone))
        return same_shape and self.vocabulary == here

    def mismatch(self, backbone: Backbone, what: str) -> ExitsMismatch:
        """The error for `what` ("The exits in DIR"), which this backbone cannot use."""
        train = f"Train exits for this model: offramp train {backbone.name} -o DIR"
        if (self.blocks, self.hidden_size) != (backbone.n_blocks, backbone.hidden_size):
            return ExitsMismatch(
                f"{what} were trained for {self.name}, with {self.blocks} blocks of {self.hidden_size} dims. "
                f"{backbone.name} has {backbone.n_blocks} of {backbone.hidden_size}.",
                train,
            )
        if not self.fits(backbone):
            return ExitsMismatch(f"{what} were trained for {self.name}, and {backbone.name} has other tokens.", train)
        difference = "another revision or conversion of it" if self.name == backbone.name else "not for this model"
        return ExitsMismatch(
            f"{what} were trained for {self.name} (weights {self.fingerprint[:12] or 'unknown'}), {difference}: "
            f"{backbone.name} has the weights {backbone.source.fingerprint[:12] or 'unknown'}.",
            train,
        )


@dataclass(frozen=True)
class Record:
    """The contents of `offramp.json`; `weights_sha256` is the hash of the file of weights beside it."""

    config: ExitsConfig
    owner: Owner
    weight_format: str
    weights_sha256: str
    policy: Policy
    training: dict[str, Any]
    calibration: dict[str, Any]
    elsewhere: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Read the record of a folder. Raises `CorruptFile` if it is damaged, or if it or the weights are missing."""
        hint = "Name a folder that `offramp train` wrote."
        if not folder.is_dir():
            raise CorruptFile(f"There is no folder {folder} with exits.", hint)
        for name in (RECORD, WEIGHTS):
            if not (folder / name).is_file():
                raise CorruptFile(f"{folder} holds no {name}, so it has no exits.", hint)
        try:
            return cls._of(json.loads((folder / RECORD).read_text("utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, OfframpError) as error:
            raise CorruptFile(f"{folder / RECORD} is damaged: {error!r}.", "Train the exits again.") from error

    @classmethod
    def _of(cls, record: dict[str, Any]) -> Record:
        places = {name: tuple(record["config"].get(name, ())) for name in ("layers", "tails")}
        config, policy = ExitsConfig(**{**record["config"], **places}), Policy.from_json(record["policy"])
        owner = Owner(**record["backbone"])
        for made in (config, policy, owner):
            check_types(made)
        training, calibration = record["training"], record["calibration"]
        if not (isinstance(training, dict) and isinstance(calibration, dict)):
            raise TypeError("'training' or 'calibration' is not a JSON object")
        elsewhere = {str(format): dict(each) for format, each in dict(record.get("elsewhere", {})).items()}
        for each in (calibration, *elsewhere.values()):
            check_calibration(each)
        for format, each in elsewhere.items():
            if each["weights"] != format or not each["policy"]:
                raise TypeError("'elsewhere' does not name the formats of its calibrations")
        written = str(record["weight_format"]), str(record["weights_sha256"])
        return cls(config, owner, *written, policy, training, calibration, elsewhere)

    def write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write the record, with the hash of these tensors, and the tensors.

        A crash leaves the old pair, the new one, or a record beside other weights, which `read_tensors` refuses.
        """
        from safetensors.torch import save

        weights = save(tensors)
        whole = replace(self, weights_sha256=hashlib.sha256(weights).hexdigest())
        record = {"offramp": 1, **asdict(whole)}
        record["backbone"] = record.pop("owner")
        # The record comes first: an old record beside new weights could pass for theirs.
        write_atomically(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())
        write_atomically(folder / WEIGHTS, weights)


@dataclass(frozen=True)
class Tables:
    """The tables in a file of weights, beside the modules' tensors (see `exits.exits.Exits`); None for a missing one."""

    shortlist: Tensor | None = None
    sketch: tuple[Tensor, Tensor] | None = None
    ngrams: Ngrams | None = None

    def tensors(self) -> dict[str, Tensor]:
        """These tables as tensors of a file."""
        found: dict[str, Tensor] = {}
        if self.shortlist is not None:
            found[SHORTLIST] = self.shortlist.int()
        if self.sketch is not None:
            found |= {name: part.bfloat16() for name, part in zip(SKETCH, self.sketch, strict=True)}
        if self.ngrams is not None:
            found |= dict(zip(NGRAMS, (self.ngrams.keys, self.ngrams.values), strict=True))
        return found

    @classmethod
    def taken_from(cls, tensors: dict[str, Tensor], config: ExitsConfig, hidden: int, vocabulary: int) -> Tables:
        """Take the tables out of a file's tensors. Raises `ValueError` for tables that do not fit the config."""
        shortlist = tensors.pop(SHORTLIST, None)
        if (0 if shortlist is None else len(shortlist)) != config.shortlist:
            raise ValueError(f"its short list is not one of {config.shortlist} tokens")
        if shortlist is not None and not _rises_within(shortlist, vocabulary):
            raise ValueError("its short list does not name tokens of the model in order")
        sketch = [tensors.pop(name).float() for name in SKETCH if name in tensors]
        shapes = [(config.sketch, hidden), (hidden, config.sketch)] if config.sketch else []
        if [tuple(part.shape) for part in sketch] != shapes:
            raise ValueError(f"its sketch of the head is not one of {config.sketch} dims")
        parts = [tensors.pop(name) for name in NGRAMS if name in tensors]
        if [(part.dtype, *part.shape) for part in parts] != [(torch.int32, config.ngrams)] * 2 * bool(config.ngrams):
            raise ValueError(f"its table of n-grams is not one of {config.ngrams} slots")
        ngrams = Ngrams(*parts) if parts else None
        if ngrams is not None:
            ngrams.check(vocabulary)
        return cls(None if shortlist is None else shortlist.long(), (sketch[0], sketch[1]) if sketch else None, ngrams)


def read_tensors(folder: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a folder's file of weights. Raises `CorruptFile` for a wrong hash, or a file that cannot be read."""
    from safetensors.torch import load

    file = folder / WEIGHTS
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CorruptFile(
            f"{file} is damaged, or does not belong to {RECORD} beside it: perhaps saving was interrupted.",
            "Copy both files again, or repeat the command that made them.",
        )
    try:
        return load(content)
    except Exception as error:  # SafetensorError
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> CorruptFile:
    """The error for a file of weights that cannot be read."""
    return CorruptFile(f"{file} is damaged or cut short: {reason_of(error)}", "Copy it again, or train again.")


def _rises_within(ids: Tensor, size: int) -> bool:
    """Whether ids (n,) rise, and lie between 0 and `size` - 1."""
    whole = ids.ndim == 1 and ids.dtype in (torch.int32, torch.int64)
    return whole and bool((ids.diff() > 0).all()) and 0 <= int(ids.min()) <= int(ids.max()) < size
