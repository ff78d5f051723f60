"""offramp as a model of EleutherAI's lm-evaluation-harness: any of its tasks, with exits.

    python -m offramp.extras.harness run --model offramp --tasks truthfulqa_gen \\
        --model_args pretrained=smollm2,threshold=0.8

This runs the harness' command `lm_eval` with the model `offramp` registered; `lm_eval` itself finds only its own models.
`model_args` are the fields of `ModelArguments`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

import offramp
from offramp.decode.facade import Model
from offramp.decode.fills import fill_named
from offramp.decode.modes import mode_of, parted, settled
from offramp.errors import BadInput, OfframpError
from offramp.evaluation.evaluation import Condition
from offramp.evaluation.likelihood import Forced, log_likelihood_of
from offramp.exits.exit_set import no_exits
from offramp.exits.policy import Policy


@dataclass(frozen=True)
class ModelArguments:
    """What `model_args` may name: as for `offramp generate`, but one threshold for all exits."""

    pretrained: str
    exits: str | None = None
    mode: str | None = None
    fill: str | None = None
    threshold: float | None = None
    dtype: str | None = None
    max_gen_toks: int = 256

    @classmethod
    def read(cls, arguments: dict[str, Any]) -> ModelArguments:
        """The arguments from a dict. Raises `BadInput` for names that are not fields, and if `pretrained` is missing."""
        known = [field.name for field in fields(cls)]
        for name in arguments:
            if name not in known:
                raise BadInput(f"There is no model argument '{name}'.", f"Choose from {', '.join(known)}.")
        if "pretrained" not in arguments:
            raise BadInput("The model arguments name no model.", "For example: --model_args pretrained=smollm2")
        return cls(**arguments)

    def check(self) -> None:
        """Raises `BadInput` for a misspelt mode or fill, before the model is loaded."""
        if self.mode is not None:
            parted(self.mode)
        if self.fill is not None:
            fill_named(self.fill)

    def condition(self, model: Model) -> Condition:
        """How to decode: with the exits that decide, unless a mode says otherwise; a model without exits at full depth.

        Raises `BadInput` as `modes.settled` does, and for a threshold without exits to set it for.
        """
        if self.mode is None and self.threshold is None and not model.exits:
            return Condition()
        way = settled(self.mode or mode_of(self.fill), model.exits, model.backbone, self.fill)
        policy = way.policy
        if self.threshold is not None:
            if way.exits is None:
                raise no_exits(model.backbone)
            policy = Policy((float(self.threshold),) * len(way.exits), way.exits.policy.confidence)
        return Condition(way.fill, policy, way.exits)


@register_model("offramp")
class Harnessed(LM):  # type: ignore[misc]  # the library has no annotations
    """Answers the harness' requests one by one. Tokens leave at exits both in generation and in likelihoods."""

    def __init__(self, batch_size: Any = None, max_batch_size: Any = None, device: Any = None, **arguments: Any) -> None:
        """`arguments` are those of `ModelArguments`; the harness gives the other three to every model."""
        super().__init__()
        self.arguments = ModelArguments.read(arguments)
        self.arguments.check()
        model = offramp.load(self.arguments.pretrained, self.arguments.dtype, exits=self.arguments.exits)
        self.backbone, condition = model.backbone, self.arguments.condition(model)
        self._forced = Forced()
        self._engine = condition.engine(self.backbone)
        self._scorer = condition.scorer(self.backbone, self._forced)

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches rendered chats."""
        return self.arguments.pretrained

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as one text, in the model's chat template."""
        return str(
            self.backbone.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): log P in nats, and whether every token is the most probable one."""
        return [self._likelihood(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """The log-likelihood of each whole text, in nats."""
        return [self._rolling_likelihood(request.args[0]) for request in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answer to each (prompt, settings), up to a stop string or the limit."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, prompt: str, settings: dict[str, Any]) -> str:
        stops = settings.get("until") or []
        max_tokens = int(settings.get("max_gen_toks", self.arguments.max_gen_toks))
        ids = self._ids(prompt)[-max(1, self.backbone.context - max_tokens) :]
        stop = (stops,) if isinstance(stops, str) else tuple(stops)
        return self._engine.generate(ids, max_tokens=max_tokens, stop=stop).text

    def _likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        # As the harness does for its own models: spaces at the seam go to the continuation.
        seam = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - seam], context[len(context) - seam :] + continuation
        before = self._ids(context) if context else [self._prefix]
        tokens = self._ids(context + continuation)[len(before) :] if context else self._ids(continuation, begins=False)
        total = log_likelihood_of(self._scorer, self._forced, before, tokens)
        return total, self._forced.best

    def _rolling_likelihood(self, text: str) -> float:
        """log P of a whole text in nats, in windows as long as the context that overlap by one token."""
        ids = self._ids(text, begins=False)
        step = self.backbone.context - 1
        total, before = 0.0, [self._prefix]
        for start in range(0, len(ids), step):
            window = ids[start : start + step]
            total += log_likelihood_of(self._scorer, self._forced, before, window)
            before = window[-1:]
        return total

    @property
    def _prefix(self) -> int:
        """The token that stands before a text without a prompt: the one that begins texts, or else one that ends them."""
        return int(self.backbone.tokenizer.bos_token_id or min(self.backbone.stop_ids))

    def _ids(self, text: str, begins: bool = True) -> list[int]:
        bos = self.backbone.tokenizer.bos_token  # a chat template may have put it there already
        special = begins and not (bos and text.startswith(bos))
        return list(self.backbone.tokenizer(text, add_special_tokens=special)["input_ids"])


def main() -> None:
    """Run the harness' command line. An error of ours ends in one sentence and a hint."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except OfframpError as error:
        sys.exit(f"error: {error}\nhint: {error.hint}")


if __name__ == "__main__":
    main()
