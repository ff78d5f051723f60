"""Exits: places after a block where decoding may stop. Each has a gate and a read-out.

The gate decides whether a token leaves: it reads the hidden state after its block and gives a logit, whose sigmoid is the
confidence. The three kinds are those of the paper (DYNAMAX, arXiv 2504.20922): `linear` (CALM-style), `ffn`, and `mamba`,
whose recurrent state remembers the tokens before. `ffn` and `mamba` work in a bottleneck, because a gate must be far
cheaper than a block. The read-out gives the logits of the next token: it corrects the hidden state with a small residual
adapter and hands it to the backbone's own final norm and head.

This module holds the artefact that `offramp train` makes: its parts, its files, and the search for the exits of a model.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offramp.errors import BadInput, CorruptFile, ExitsMismatch, OfframpError, reason_of
from offramp.exits.calibrated import check_calibration, check_types
from offramp.exits.config import ExitsConfig
from offramp.exits.gates import GATES
from offramp.exits.ngrams import Ngrams
from offramp.exits.policy import Policy
from offramp.exits.readouts import READOUTS
from offramp.exits.sharing import fetched, on_the_hub, push
from offramp.files import INSTALL_MODELS, MODELS_PACKAGE, shipped, write_atomically
from offramp.model.hub import ALIASES

if TYPE_CHECKING:
    from offramp.model.backbone import Backbone

WEIGHTS, RECORD = "exits.safetensors", "offramp.json"
# Names of tensors beside the modules' own.
SHORTLIST, SKETCH, NGRAMS = "shortlist", ("sketch.reduce", "sketch.expand"), ("ngrams.keys", "ngrams.values")
DRAFT = "draft"  # the subfolder, in the folder of a model's exits, for the exits that draft for `verify`


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
    """A set of exits for one backbone: what `offramp train` makes, `save` writes and `load` reads.

    `backbone` names the model that they belong to (name, fingerprint, model_type, blocks, hidden_size). `weight_format` is
    the format that its weights ran in when the exits were trained. `policy` is the default one. `training` records how the
    exits were made. `calibration` records what `policy` guarantees (see `training.calibration`), and is empty for no
    guarantee. `shortlist` (n,): the tokens that are read out, rising; None for all. `sketch`: two maps, reduce (k, D) and
    expand (D, k). Before the head, expand · reduce · h stands in for the hidden state h, so that the head times `expand` is
    a small matrix (`offramp.training.sketch`). `ngrams`: what often follows a few tokens, in the model's own answers.
    """

    config: ExitsConfig
    modules: nn.ModuleList
    backbone: dict[str, Any]
    weight_format: str
    policy: Policy
    training: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    shortlist: Tensor | None = None
    sketch: tuple[Tensor, Tensor] | None = None
    ngrams: Ngrams | None = None

    @classmethod
    def new(cls, backbone: Backbone, config: ExitsConfig) -> Exits:
        """Untrained exits, all closed. Raises `OfframpError` for a config that does not fit the model."""
        config.check(backbone)
        modules = nn.ModuleList(Exit(layer, tail, backbone.hidden_size, config) for layer, tail in config.places)
        owner = {
            "name": backbone.name,
            "fingerprint": backbone.source.fingerprint,
            "model_type": backbone.config.model_type,
            "blocks": backbone.n_blocks,
            "hidden_size": backbone.hidden_size,
        }
        return cls(config, modules, owner, backbone.weight_format, Policy.closed(len(config.layers)))

    def __iter__(self) -> Iterator[Exit]:
        return (exit for exit in self.modules if isinstance(exit, Exit))

    def __len__(self) -> int:
        return len(self.modules)

    def save(self, folder: str | Path) -> None:
        """Write `exits.safetensors` (bfloat16), and `offramp.json`, which names the hash of the weights beside it.

        A crash leaves the old pair, the new one, or a record beside other weights, which `load` refuses.

        Raises `BadInput` where the config names a short list or a sketch other than the one that these exits hold: such a
        folder could not be loaded.
        """
        from safetensors.torch import save

        self._check_config()
        tensors = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in self.modules.state_dict().items()}
        if self.shortlist is not None:
            tensors[SHORTLIST] = self.shortlist.int()
        if self.sketch is not None:
            tensors |= {name: part.bfloat16() for name, part in zip(SKETCH, self.sketch, strict=True)}
        if self.ngrams is not None:
            tensors |= dict(zip(NGRAMS, (self.ngrams.keys, self.ngrams.values), strict=True))
        weights = save(tensors)
        record = {
            "offramp": 1,
            "config": asdict(self.config),
            "backbone": self.backbone,
            "weight_format": self.weight_format,
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "policy": asdict(self.policy),
            "training": self.training,
            "calibration": self.calibration,
        }
        # The record first: an old one without a hash would fit new weights.
        write_atomically(Path(folder) / RECORD, (json.dumps(record, indent=1) + "\n").encode())
        write_atomically(Path(folder) / WEIGHTS, weights)

    def push_to_hub(self, repository: str, drafts: Exits | None = None, private: bool = False, licence: str = "") -> str:
        """Upload the exits with a model card to the hub; `drafts` are those that draft, for the folder beside them.

        Returns the commit's address. Raises as `sharing.push` does.
        """
        return push(self, repository, drafts, private, licence)

    @classmethod
    def from_pretrained(cls, name: str | Path, backbone: Backbone, draft: bool = False) -> Exits:
        """Exits of a folder, or of a hub repository (`org/name`, `org/name@revision`); with `draft`, those that draft.

        Raises as `load` does, and `ModelNotFound` for a name that is neither.
        """
        return require_exits(backbone, name, draft)

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
    def load(cls, folder: str | Path, backbone: Backbone, *, any_weights: bool = False) -> Exits:
        """Read a folder that `save` wrote, for this backbone.

        With `any_weights`, they may be those of another model of the same shape, for a training to go on from. Warns where
        the model runs in another weight format than the exits were trained in. Raises `ExitsMismatch` for another model's
        exits, `CorruptFile` for files that are missing, cut short or damaged.
        """
        folder = Path(folder)
        record = _Record.read(folder)
        if any_weights:
            record.check_shape(folder, backbone)
        else:
            record.check_owner(folder, backbone)
        try:
            with torch.device("meta"):  # the weights come from the file, so nothing is allocated before they are checked
                exits = cls.new(backbone, record.config)
        except (RuntimeError, TypeError, ValueError, OverflowError, KeyError) as error:  # a config of nonsense
            raise CorruptFile(f"{folder / RECORD} is damaged: {reason_of(error)}", "Train the exits again.") from error
        exits._load_weights(folder / WEIGHTS, backbone.vocab_size, record.weights_sha256)
        if record.weight_format != backbone.weight_format:
            warnings.warn(
                f"These exits were trained with {record.weight_format} weights and the model runs in "
                f"{backbone.weight_format}: they may agree with it less often.",
                stacklevel=2,
            )
        exits.policy, exits.weight_format = record.policy, record.weight_format
        exits.training, exits.calibration = record.training, record.calibration
        exits.modules.eval().requires_grad_(False)
        return exits

    def _load_weights(self, file: Path, vocabulary: int, sha256: str) -> None:
        from safetensors.torch import load

        config, hidden = self.config, self.backbone["hidden_size"]
        content = file.read_bytes()
        _check_pair(file, content, sha256)
        try:
            tensors = load(content)
            shortlist = tensors.pop(SHORTLIST, None)
            if (0 if shortlist is None else len(shortlist)) != config.shortlist:
                raise ValueError(f"its short list is not one of {config.shortlist} tokens")
            if shortlist is not None and not _rises_within(shortlist, vocabulary):
                raise ValueError("its short list does not name tokens of the model in order")
            sketch = [tensors.pop(name).float() for name in SKETCH if name in tensors]
            shapes = [(config.sketch, hidden), (hidden, config.sketch)] if config.sketch else []
            if [tuple(part.shape) for part in sketch] != shapes:
                raise ValueError(f"its sketch of the head is not one of {config.sketch} dims")
            ngrams = self._ngrams([tensors.pop(name) for name in NGRAMS if name in tensors], vocabulary)
            for key in tensors:
                tensors[key] = tensors[key].float()
            self.modules.load_state_dict(tensors, assign=True)
        except Exception as error:  # SafetensorError, or RuntimeError for missing and misshapen tensors
            raise CorruptFile(
                f"{file} is damaged or cut short: {reason_of(error)}", "Copy it again, or train again."
            ) from error
        if not all(torch.isfinite(value).all() for value in (*self.modules.state_dict().values(), *sketch)):
            raise CorruptFile(f"{file} holds NaN or infinite weights.", "Train the exits again.")
        self.shortlist = None if shortlist is None else shortlist.long()
        self.sketch = (sketch[0], sketch[1]) if sketch else None
        self.ngrams = ngrams

    def _ngrams(self, parts: list[Tensor], vocabulary: int) -> Ngrams | None:
        """The table of these tensors. Raises `ValueError` for one that the config does not name, or that cannot be read."""
        size = self.config.ngrams
        if [(part.dtype, *part.shape) for part in parts] != [(torch.int32, size)] * 2 * bool(size):
            raise ValueError(f"its table of n-grams is not one of {size} slots")
        if not parts:
            return None
        table = Ngrams(*parts)
        table.check(vocabulary)
        return table


def _check_pair(file: Path, content: bytes, sha256: str) -> None:
    """Raises `CorruptFile` where a file of weights is not the one that the record beside it names."""
    if not sha256:
        warnings.warn(
            f"{file.with_name(RECORD)} does not say which weights it belongs to, as an earlier version wrote it.",
            stacklevel=4,
        )
    elif hashlib.sha256(content).hexdigest() != sha256:
        raise CorruptFile(
            f"{file} is damaged, or not the file that {RECORD} beside it belongs to: perhaps saving them was interrupted.",
            "Copy both files again, or run the command again that made them.",
        )


@dataclass(frozen=True)
class _Record:
    """The contents of `offramp.json`."""

    config: ExitsConfig
    backbone: dict[str, Any]
    weight_format: str
    weights_sha256: str  # "" in a record of an earlier version
    policy: Policy
    training: dict[str, Any]
    calibration: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> _Record:
        """Read the record of a folder. Raises `CorruptFile` where it or the weights are missing, or it is damaged."""
        hint = "Name a folder that `offramp train` wrote."
        if not folder.is_dir():
            raise CorruptFile(f"There is no folder {folder} with exits.", hint)
        for name in (RECORD, WEIGHTS):
            if not (folder / name).is_file():
                raise CorruptFile(f"{folder} holds no {name}, so no exits.", hint)
        try:
            record = json.loads((folder / RECORD).read_text("utf-8"))
            places = {name: tuple(record["config"].get(name, ())) for name in ("layers", "tails")}
            config, policy = ExitsConfig(**{**record["config"], **places}), Policy.from_json(record["policy"])
            check_types(config)
            check_types(policy)
            owner, histories = record["backbone"], [record[name] for name in ("training", "calibration")]
            hashes = {"fingerprint", "sha256"} & set(owner)
            if not hashes or not all(isinstance(owner[name], str) for name in hashes):
                raise KeyError("fingerprint")
            if not all(isinstance(each, dict) for each in histories):
                raise TypeError("training or calibration is no record")
            check_calibration(record["calibration"])
            formats = str(record["weight_format"]), str(record.get("weights_sha256", ""))
            return cls(config, owner, *formats, policy, *histories)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, OfframpError) as error:
            raise CorruptFile(f"{folder / RECORD} is damaged: {error!r}.", "Train the exits again.") from error

    def check_owner(self, folder: Path, backbone: Backbone) -> None:
        """Raises `ExitsMismatch` where the exits were trained for other weights than this backbone's."""
        if belong(self.backbone, backbone):
            return
        name = self.backbone.get("name")
        weights = self.backbone.get("fingerprint") or self.backbone.get("sha256") or "unknown"
        difference = "another revision or conversion of it" if name == backbone.name else "not for this model"
        raise ExitsMismatch(
            f"The exits in {folder} were trained for {name} (weights {weights[:12]}), {difference}: "
            f"{backbone.name} has the weights {backbone.source.fingerprint[:12] or 'unknown'}.",
            f"Train exits for this model: offramp train {backbone.name} -o DIR",
        )

    def check_shape(self, folder: Path, backbone: Backbone) -> None:
        """Raises `ExitsMismatch` where the exits were trained for a model of another shape than this backbone's."""
        of_exits = {name: self.backbone.get(name) for name in ("blocks", "hidden_size")}
        if of_exits == {"blocks": backbone.n_blocks, "hidden_size": backbone.hidden_size}:
            return
        raise ExitsMismatch(
            f"The exits in {folder} are for {of_exits['blocks']} blocks of {of_exits['hidden_size']} dims, and "
            f"{backbone.name} has {backbone.n_blocks} of {backbone.hidden_size}.",
            "Go on from exits of a model of the same shape, such as the one that yours was tuned from.",
        )


def _rises_within(ids: Tensor, size: int) -> bool:
    """Whether ids (n,) rise, from 0 to `size` - 1 at most."""
    whole = ids.ndim == 1 and ids.dtype in (torch.int32, torch.int64)
    return whole and bool((ids.diff() > 0).all()) and 0 <= int(ids.min()) <= int(ids.max()) < size


def find_exits(backbone: Backbone, folder: str | Path | None = None, draft: bool = False) -> Exits | None:
    """The exits in `folder`. Without a folder, those that ship for this backbone's weights, or None.

    `folder` may also be the name of a hub repository. With `draft`, the exits that draft for `verify`, if the folder has
    them. Warns where exits should have shipped, but are not installed. Raises as `Exits.load` does, and `ModelNotFound` for
    a name that is neither.
    """
    exits = _found(backbone, folder, draft)
    if exits is None and backbone.name in ALIASES and not shipped("exits"):
        missing = f"There are no exits for {backbone.name} here, since the package {MODELS_PACKAGE} is not installed."
        warnings.warn(f"{missing} {INSTALL_MODELS}", stacklevel=1)  # one place, so it is said once
    return exits


def exits_and_drafts(backbone: Backbone, folder: str | Path | None = None) -> tuple[Exits, Exits | None]:
    """What `require_exits` gives, and the exits that draft beside them, or None. Raises as `require_exits` does."""
    found = _folder_of(backbone, folder)
    if found is None:
        raise no_exits(backbone)
    drafts = found / DRAFT
    return Exits.load(found, backbone), Exits.load(drafts, backbone) if drafts.is_dir() else None


def _found(backbone: Backbone, folder: str | Path | None, draft: bool) -> Exits | None:
    found = _folder_of(backbone, folder)
    if found is None:
        return None
    drafts = found / DRAFT
    return Exits.load(drafts if draft and drafts.is_dir() else found, backbone)


def _folder_of(backbone: Backbone, folder: str | Path | None) -> Path | None:
    """The folder on this machine with the exits that `folder` names, or with those that ship for this backbone."""
    if folder is not None:
        return fetched(str(folder)) if on_the_hub(folder) else Path(folder)
    folders = (path for path in shipped("exits") if (path / RECORD).is_file())
    return next((path for path in folders if belong(_owner(path), backbone)), None)


def require_exits(backbone: Backbone, folder: str | Path | None = None, draft: bool = False) -> Exits:
    """As `find_exits`, for work that needs exits. Raises `BadInput` if there are none."""
    exits = _found(backbone, folder, draft)
    if exits is None:
        raise no_exits(backbone)
    return exits


def no_exits(backbone: Backbone) -> BadInput:
    """The error for a model without exits."""
    train = f"offramp train {backbone.name} -o DIR. Then name them: --exits DIR."
    if not shipped("exits"):
        return BadInput(
            f"No folder of exits is named, and the package {MODELS_PACKAGE}, with the exits that ship, is not installed.",
            f"{INSTALL_MODELS}. Or train some: {train}",
        )
    return BadInput(f"No exits ship for {backbone.name}, and no folder of exits is named.", f"Train some: {train}")


def shipped_for(backbone: Backbone, draft: bool = False) -> Exits | None:
    """The exits that come with offramp for this backbone's weights, if any; with `draft`, those that draft for `verify`."""
    return find_exits(backbone, draft=draft)


def _owner(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / RECORD).read_text("utf-8"))["backbone"])


def belong(owner: dict[str, Any], backbone: Backbone) -> bool:
    """Whether exits with this record of their backbone were trained for the weights of this one.

    Records of earlier versions have no fingerprint, but a hash of the files that the weights came from.
    """
    if "fingerprint" in owner:
        return bool(owner["fingerprint"] and owner["fingerprint"] == backbone.source.fingerprint)
    return bool(owner["sha256"] and owner["sha256"] == backbone.source.sha256)
