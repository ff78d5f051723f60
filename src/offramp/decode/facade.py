"""A model as its users see it: the backbone, its exits, and answers in a mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

from offramp.decode.engine import Engine
from offramp.decode.request import Generation, Limits, Talk, Token
from offramp.decode.sampling import Choose, Sampling
from offramp.exits.exit_set import ExitSet
from offramp.model import loading
from offramp.model.backbone import Backbone
from offramp.progress import Progress, silent


class Model:
    """A causal language model with its exits. Make one with `offramp.load` or `offramp.wrap`.

    `backbone` runs the blocks; all its public names are the model's too: `embed`, `run_all`, `state`, `logits`, `n_blocks`,
    `tokenizer`, `prompts` and so on. `exits` are its exits.

    The ways to answer take `mode` (full, exact or early; by default exact if drafts should pay, else full),
    `sampling` (the most probable token by default), and the limits of an answer: `max_tokens` (128), `stop` and `end_ids`.
    A prompt is text, or token ids.
    """

    def __init__(self, backbone: Backbone, exits: ExitSet | str | Path | None = None) -> None:
        """`exits`: a set, a folder, or a name on the hub; by default those that ship for the model."""
        self.backbone = backbone
        self._named = exits
        self._engines: dict[str | None, tuple[list[Any], Engine]] = {}  # by mode, with what they were made of

    @cached_property
    def exits(self) -> ExitSet:
        """The model's exits, which are loaded when they are first needed; empty if there are none.

        Raises as `ExitSet.load` does.
        """
        if isinstance(self._named, ExitSet):
            return self._named
        return ExitSet.find(self._named, self.backbone)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that answers can be asked for in."""
        return self.exits.modes(self.backbone)

    def __getattr__(self, name: str) -> Any:
        """The backbone's attribute of this name."""
        if name.startswith("_") or name == "backbone":
            raise AttributeError(name)
        return getattr(self.backbone, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(name for name in dir(self.backbone) if not name.startswith("_"))})

    def engine(self, mode: str | None = None, sampling: Sampling | Choose | None = None) -> Engine:
        """The engine of a mode. It is kept until the exits change. Raises as `Engine` does."""
        groups = [] if mode == "full" else [each for each in (self.exits.early, self.exits.draft) if each]
        made_of = [(id(each), each.policy, id(each.calibration)) for each in groups]
        kept = self._engines.get(mode)
        if kept is None or kept[0] != made_of:
            kept = self._engines[mode] = made_of, Engine(self, mode=mode)
        return kept[1] if sampling is None else kept[1].sampling(sampling)

    def stream(
        self,
        prompt: str | list[int],
        mode: str | None = None,
        sampling: Sampling | Choose | None = None,
        *,
        talk: Talk | None = None,
        progress: Progress = silent,
        **limits: Unpack[Limits],
    ) -> Iterator[Token]:
        """Yield tokens as they are decided. A `talk` keeps what is computed for the text, for the next turn."""
        return self.engine(mode, sampling).stream(prompt, talk, progress=progress, **limits)

    def generate(
        self,
        prompt: str | list[int],
        mode: str | None = None,
        sampling: Sampling | Choose | None = None,
        *,
        progress: Progress = silent,
        **limits: Unpack[Limits],
    ) -> Generation:
        """The whole answer, with times and totals."""
        return self.engine(mode, sampling).generate(prompt, progress=progress, **limits)

    def generate_batch(
        self,
        prompts: Iterable[str | list[int]],
        mode: str | None = None,
        sampling: Sampling | Choose | None = None,
        *,
        progress: Progress = silent,
        **limits: Unpack[Limits],
    ) -> list[Generation]:
        """Answers to several prompts, which are made side by side."""
        return self.engine(mode, sampling).generate_batch(prompts, progress=progress, **limits)


def load(
    name: str,
    dtype: str | None = None,
    device: str | None = None,
    keep: bool = False,
    progress: Progress = silent,
    *,
    exits: str | Path | None = None,
    kv: str | None = None,
    held: int = 0,
) -> Model:
    """Load a causal language model, and check it against the library's own logits.

    `name` is a hub name (`org/name`, or `org/name@revision`), a local folder, a GGUF file, or an alias (`smollm2`).
    `exits`: a folder, or a name on the hub; by default those that ship for the model. The other arguments and the
    exceptions are those of `offramp.model.loading.load`.
    """
    return Model(loading.load(name, dtype, device, keep, progress, kv, held), exits)


def wrap(model: Any, tokenizer: Any, name: str = "unnamed", *, exits: str | Path | None = None) -> Model:
    """A `Model` around a transformers model that is already in memory. It is checked like a loaded one.

    The transformers model is put in evaluation mode, with gradients off. Raises `UnsupportedModel` and `BadNumbers`.
    """
    return Model(loading.wrap(model, tokenizer, name), exits)
