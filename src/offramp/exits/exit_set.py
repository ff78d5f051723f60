"""All exits of one model, and the search for them.

A folder holds the exits that decide. Its subfolder `draft` holds the exit that drafts. A folder may have only one of them.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from offramp.errors import BadInput, CorruptFile, ExitsMismatch, reason_of
from offramp.exits.exits import Exits
from offramp.exits.format import RECORD, WEIGHTS, Owner, Record
from offramp.exits.sharing import fetched, on_the_hub, push
from offramp.files import MODELS_PACKAGE, install_package, is_installed, shipped
from offramp.model.backbone import Backbone, HasBackbone, backbone_of
from offramp.model.headers import read_gguf, rows_of
from offramp.model.hub import ALIASES, PACKAGES

DRAFT = "draft"  # the subfolder for the exit that drafts
ARCHITECTURE = "offramp"  # of a GGUF file with exits
FILES = "files/"  # what the names of these files begin with in a GGUF file
# Packages that hold the exits of one model, by its blocks, dims, and tokens of the vocabulary.
PACKAGES_OF_MODELS = {(24, 896, 151_936): ("offramp-qwen2.5-coder-0.5b", "Qwen2.5-Coder-0.5B-Instruct")}


@dataclass
class ExitSet:
    """Everything that belongs to one model: the exits that decide (`early`), and the exit that drafts (`draft`).

    Either may be None. `early.calibration` holds the calibrated points, `draft.ngrams` its table, and `training` of both
    what they learned from. They may have learned from other weights than the model's, such as those of the same model in
    another quantisation: then they may draft, since full depth decides (see `modes`).
    """

    early: Exits | None = None
    draft: Exits | None = None

    @classmethod
    def load(cls, name: str | Path, model: Backbone | HasBackbone) -> ExitSet:
        """The exits in a folder, in a GGUF file that `offramp export` wrote, or in a repository of the hub (`org/name`,
        `org/name@revision`).

        Exits load if shapes and tokenizer agree; a note says if they learned from other weights. Raises `ExitsMismatch` for
        exits of another model, `CorruptFile` for files that are missing or damaged, and `ModelNotFound` for a name that is
        neither folder nor repository.
        """
        folder, backbone = fetched(str(name), (".", DRAFT)) if on_the_hub(name) else Path(name), backbone_of(model)
        found = cls._unpacked(folder, backbone) if folder.suffix == ".gguf" else cls._read(folder, backbone)
        foreign = [each for each in (found.early, found.draft) if each and not each.owner.owns_weights_of(backbone)]
        if foreign:
            early = (
                " The mode early needs a calibration on these weights: offramp calibrate." if found.early in foreign else ""
            )
            warnings.warn(
                f"The exits in {folder} learned from other weights, those of {foreign[0].owner.name}. They may draft (mode "
                f"exact), since full depth decides.{early}",
                stacklevel=2,
            )
        return found

    @classmethod
    def find(cls, name: str | Path | None, model: Backbone | HasBackbone) -> ExitSet:
        """`load` where a name is given, else `shipped`."""
        return cls.shipped(model) if name is None else cls.load(name, model)

    @classmethod
    def shipped(cls, model: Backbone | HasBackbone) -> ExitSet:
        """The exits that come with offramp for this model; empty if there are none.

        Exits that learned from the same model in another quantisation are the second choice. Warns if the package with the
        exits is not installed.
        """
        backbone = backbone_of(model)
        package = PACKAGES.get(backbone.name, MODELS_PACKAGE)
        if backbone.name in ALIASES and not is_installed(package):
            missing = f"There are no exits for {backbone.name} here, since the package {package} is not installed."
            warnings.warn(f"{missing} {install_package(package)}", stacklevel=1)  # one place, so it is said once
        others = []
        for path in shipped("exits"):
            owner = _owner(path)
            if owner and owner.owns_weights_of(backbone):
                return cls._read(path, backbone)
            others += [(path, owner)] if owner else []
        for path, owner in others:
            if backbone.prompts.vocabulary and owner.fits(backbone):
                return cls.load(path, backbone)
        return cls()

    @classmethod
    def _unpacked(cls, file: Path, backbone: Backbone) -> ExitSet:
        """The exits in a file that `offramp export --gguf` wrote."""
        try:
            architecture, places = read_gguf(file)
            if architecture != ARCHITECTURE:
                raise ValueError("it holds no exits")
            with tempfile.TemporaryDirectory() as temporary:
                for inside in (Path(folder) / name for folder in (".", DRAFT) for name in (RECORD, WEIGHTS)):
                    if place := places.get(FILES + inside.as_posix()):
                        to = Path(temporary) / inside
                        to.parent.mkdir(exist_ok=True)
                        to.write_bytes(place.read(0, rows_of(place.shape)).numpy().tobytes())
                return cls._read(Path(temporary), backbone)
        except (OSError, ValueError) as error:
            raise CorruptFile(
                f"The exits in {file} cannot be read: {reason_of(error)}", "Make it again: offramp export --gguf"
            ) from error

    @classmethod
    def _read(cls, folder: Path, backbone: Backbone) -> ExitSet:
        drafts = folder / DRAFT
        draft = Exits.load(drafts, backbone, any_weights=True) if drafts.is_dir() else None
        # A folder with neither is refused by `load`, which says what is missing.
        early = Exits.load(folder, backbone, any_weights=True) if (folder / RECORD).is_file() or not draft else None
        return cls(early, draft)

    def __bool__(self) -> bool:
        return bool(self.early or self.draft)

    def modes(self, model: Backbone | HasBackbone) -> tuple[str, ...]:
        """The modes that these exits serve for a model. `exact` drafts from the text if there are no exits."""
        decides = self.early is not None and self.early.owner.owns_weights_of(backbone_of(model))
        return ("full", "exact", *(["early"] if decides else []))

    @property
    def drafting(self) -> Exits | None:
        """The exits that draft: the one that was trained for it, or else those that decide."""
        return self.draft or self.early

    def require_early(self, backbone: Backbone) -> Exits:
        """The exits that may decide for this backbone. Warns if they were trained and calibrated only in other formats.

        Raises `BadInput` where there are none, and `ExitsMismatch` where they learned from other weights.
        """
        if self.early is None and self.draft:
            raise BadInput("These exits only draft.", "Use the mode exact, or train exits that decide: offramp train.")
        if self.early is None:
            raise no_exits(backbone)
        if not self.early.owner.owns_weights_of(backbone):
            raise ExitsMismatch(
                f"These exits learned from other weights, those of {self.early.owner.name}: nothing is known of what they "
                f"would lose in {backbone.name}.",
                "Calibrate them on these weights (offramp calibrate), or use the mode exact, in which full depth decides.",
            )
        formats = {self.early.weight_format, self.early.calibration.get("weights")}
        if backbone.weight_format not in formats:
            warnings.warn(
                f"These exits were trained with {self.early.weight_format} weights and the model runs in "
                f"{backbone.weight_format}: they may agree with it less often.",
                stacklevel=4,
            )
        return self.early

    def save(self, folder: str | Path) -> None:
        """Write the exits to a folder. Raises `BadInput` as `Exits.save` does."""
        if self.early:
            self.early.save(folder)
        if self.draft:
            self.draft.save(Path(folder) / DRAFT)

    def push_to_hub(self, repository: str, private: bool = False, licence: str = "") -> str:
        """Upload the exits with a model card to the hub. Returns the commit's address.

        `licence` is an identifier of the hub, such as apache-2.0. The token is the one that `hf auth login` keeps. Raises
        `CorruptFile` where the hub refuses, and `BadInput` for a set without exits.
        """
        if not self:
            raise BadInput("There are no exits to upload.", "Train some: offramp train MODEL -o DIR")
        return push(self, repository, private, licence)


def _owner(folder: Path) -> Owner | None:
    """The owner of a folder's exits; None for a folder without any."""
    places = [place for place in (folder, folder / DRAFT) if (place / RECORD).is_file()]
    return Record.read(places[0]).owner if places else None


def no_exits(backbone: Backbone) -> BadInput:
    """The error for a model without exits."""
    train = f"offramp train {backbone.name} -o DIR. Then name them: --exits DIR."
    package, model = PACKAGES_OF_MODELS.get((backbone.n_blocks, backbone.hidden_size, backbone.vocab_size), ("", ""))
    if package:
        return BadInput(
            f"No exits for {backbone.name} are installed, and no folder of exits is named.",
            f"If it is {model}, install its exits in a clone of offramp: pip install ./{package}. Or train some: {train}",
        )
    if not is_installed(MODELS_PACKAGE):
        return BadInput(
            f"No folder of exits is named, and the package {MODELS_PACKAGE}, with the exits that ship, is not installed.",
            f"{install_package(MODELS_PACKAGE)}. Or train some: {train}",
        )
    return BadInput(f"No exits ship for {backbone.name}, and no folder of exits is named.", f"Train some: {train}")
