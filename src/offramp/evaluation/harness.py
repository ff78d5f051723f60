"""offramp as a model of EleutherAI's lm-evaluation-harness: any of its tasks, with exits.

    python -m offramp.evaluation.harness run --model offramp --tasks truthfulqa_gen \\
        --model_args pretrained=smollm2,threshold=0.8

The same as `lm_eval`, which knows no models from elsewhere, with the model `offramp` made known first. `model_args`:
`pretrained` as for `offramp generate`, and `exits`, `fill`, `threshold` (one for all exits), `dtype` as there.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

import offramp
from offramp.errors import BadInput
from offramp.evaluation.evaluation import Condition, Forced, log_likelihood_of
from offramp.exits.exits import load_exits, shipped_for
from offramp.exits.policy import Policy


@register_model("offramp")
class Harnessed(LM):  # type: ignore[misc]  # the library has no annotations
    """Requests are answered one by one; exits leave in generation and in likelihoods alike."""

    def __init__(
        self,
        pretrained: str,
        exits: str | None = None,
        fill: str = "project",
        threshold: float | None = None,
        dtype: str | None = None,
        max_gen_toks: int = 256,
        batch_size: Any = None,  # these three the harness gives every model
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self._name, self._most = pretrained, max_gen_toks
        self.backbone = offramp.load(pretrained, dtype)
        draft = fill == "verify"
        found = load_exits(exits, self.backbone, draft) if exits else shipped_for(self.backbone, draft)
        policy = None
        if threshold is not None:
            if not found:
                raise BadInput(
                    f"There are no exits for {pretrained} to set a threshold of.", "Name their folder: exits=DIR"
                )
            policy = Policy((float(threshold),) * len(found), found.policy.confidence)
        self._forced = Forced()
        condition = Condition(fill, policy, found)
        self._engine, self._scorer = condition.engine(self.backbone), condition.scorer(self.backbone, self._forced)

    @property
    def tokenizer_name(self) -> str:
        return self._name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.backbone.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [self._likelihood(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        found = []
        for request in requests:
            ids = self._ids(request.args[0], begins=False)
            step = self.backbone.context - 1
            total, before = 0.0, [self._prefix]
            for at in range(0, len(ids), step):
                total += log_likelihood_of(self._scorer, self._forced, before, ids[at : at + step])
                before = ids[at : at + step][-1:]
            found.append(total)
        return found

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers = []
        for request in requests:
            prompt, settings = request.args
            until = settings.get("until") or []
            most = int(settings.get("max_gen_toks", self._most))
            ids = self._ids(prompt)[-max(1, self.backbone.context - most) :]
            stop = (until,) if isinstance(until, str) else tuple(until)
            answers.append(self._engine.generate(ids, max_tokens=most, stop=stop).text)
        return answers

    @property
    def _prefix(self) -> int:
        """What a text begins with that has no beginning: its end-of-text token."""
        return int(self.backbone.tokenizer.bos_token_id or min(self.backbone.stop_ids))

    def _ids(self, text: str, begins: bool = True) -> list[int]:
        begun = self.backbone.tokenizer.bos_token  # a chat template may have put it there already
        special = begins and not (begun and text.startswith(begun))
        return list(self.backbone.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        # As the harness cuts its own models' requests: a space at the seam goes to the continuation.
        seam = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - seam], context[len(context) - seam :] + continuation
        before = self._ids(context) if context else [self._prefix]
        tokens = self._ids(context + continuation)[len(before) :] if context else self._ids(continuation, begins=False)
        total = log_likelihood_of(self._scorer, self._forced, before, tokens)
        return total, self._forced.best


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
