"""What the mode `close` costs in quality, with a guarantee: a calibration of its points.

By construction, no token of an answer is much less likely than full depth's own (`decode.consent`). What follows from that
for whole answers is tested here, on prompts like those of later use. The loss `nll` is the mean NLL of an
answer's tokens under full depth, minus that of full depth's own answer; the test cuts it off at ±`LARGEST` nats. The loss
`task` is that of `training.losses`.

The points are tested in their order, which no prompt decides; after one that fails, none passes (fixed-sequence testing,
Learn then Test, arXiv 2110.01052). For `nll`, a point passes by a bet against it (arXiv 2010.09686). The lowest risk that
this bet proves is the point's bound: it holds for a point that failed, too. The costs of rows by which drafts were made are
kept with a point: they decide what is said, and a later version may have others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from statistics import fmean

import torch

from offramp.decode.consent import POINTS, Consent
from offramp.decode.engine import Engine
from offramp.decode.request import Generation
from offramp.decode.row_costs import usual_costs
from offramp.decode.sampling import Sampling
from offramp.errors import BadInput
from offramp.exits.calibrated import CloseCalibration, CloseTested
from offramp.exits.exits import Exits
from offramp.files import sha256_of_text
from offramp.model.backbone import Backbone, HasBackbone, backbone_of
from offramp.progress import Progress, silent
from offramp.training.calibration import answers, check_questions, check_unknown
from offramp.training.config import CalibrationConfig
from offramp.training.losses import LOSSES, Question
from offramp.training.risk import bets, bound, p_value, proved_at

LARGEST = 1.0  # nats a token; an answer that changes more counts so much
ROWS = 128  # tokens whose likelihoods are computed at a time


def calibrate_close(
    model: Backbone | HasBackbone,
    exits: Exits,
    questions: list[Question],
    config: CalibrationConfig,
    progress: Progress = silent,
) -> CloseCalibration:
    """Test the points of `close` with the drafts of these exits, and keep the record in `exits.calibration`.

    If the exits learned from other weights, they become this model's, as with `calibration.calibrate`.

    Raises `BadInput` as `calibration.calibrate` does, though any number of prompts will do for `nll`, and for another loss
    than `nll`, the default, and `task`.
    """
    backbone, config = backbone_of(model), replace(config, loss=config.loss or "nll")
    check_questions(questions, config)
    if config.loss not in ("nll", "task"):
        raise BadInput(f"The loss '{config.loss}' says little of the mode close.", "Choose nll or task.")
    check_unknown(exits, [question.prompt for question in questions], 0)
    questions = sorted(questions, key=lambda question: sha256_of_text(question.prompt))
    ids = [backbone.prompts.encode(question.prompt, config.raw) for question in questions]
    rows, tested = usual_costs(backbone), list[CloseTested]()

    def answered(consent: Consent | None, stage: str) -> list[Generation]:
        sampling = Sampling(repetition_penalty=config.repetition_penalty)
        engine = Engine(backbone, exits, None, "verify", sampling, consent=consent)
        return answers(engine, ids, config.max_tokens, config.stop, lambda count: progress(stage, count, len(ids)))

    own = answered(None, "exact")
    likely = nlls(backbone, ids, own) if config.loss == "nll" else []
    for number, point in enumerate(POINTS, start=1):
        made = answered(replace(point, rows=rows), f"close:{number}")
        if config.loss == "nll":
            losses = [after - before for after, before in zip(nlls(backbone, ids, made), likely, strict=True)]
        else:
            losses = [LOSSES[config.loss].of(*each) for each in zip(made, own, questions, strict=True)]
        test = _tested(replace(point, rows=rows), losses, made, config)
        tested.append(replace(test, passed=test.passed and all(before.passed for before in tested)))
    record = CloseCalibration(
        loss=config.loss,
        weights=backbone.weight_format,
        risk=config.risk,
        delta=config.delta,
        n=len(questions),
        max_tokens=config.max_tokens,
        stop=config.stop,
        raw=config.raw,
        repetition_penalty=config.repetition_penalty,
        prompts_sha256=sha256_of_text("\n".join(question.prompt for question in questions)),
        tested=tuple(tested),
    )
    exits.promise(asdict(record), backbone)
    return record


def _tested(consent: Consent, losses: list[float], made: list[Generation], config: CalibrationConfig) -> CloseTested:
    """The record of a point's test on these losses."""
    if config.loss == "nll":
        shares = [(min(max(nats, -LARGEST), LARGEST) + LARGEST) / (2 * LARGEST) for nats in (*losses, config.risk)]
        capital = bets(shares[:-1], shares[-1], config.delta)
        p, needed = math.exp(-max(0.0, *capital)), proved_at(capital, config.delta)
        highest = 2 * LARGEST * bound(shares[:-1], config.delta) - LARGEST
    else:
        p, needed, highest = p_value(fmean(losses), len(losses), config.risk), None, None
    return CloseTested(
        share=consent.share,
        regret=consent.regret,
        rows=consent.rows,
        loss=fmean(losses),
        bound=highest,
        p_value=p,
        passed=p <= config.delta,
        needed=needed,
        tokens_per_deep_pass=fmean(answer.tokens_per_deep_pass for answer in made),
    )


@torch.inference_mode()
def nlls(backbone: Backbone, prompts: list[list[int]], made: list[Generation]) -> list[float]:
    """For each answer to a prompt (token ids), the mean of its tokens' −log p under full depth, in nats."""

    def nll(prompt: list[int], ids: list[int]) -> Iterator[float]:
        h, step = backbone.embed(torch.tensor([prompt + ids[:-1]]))
        top = backbone.run(h, 0, backbone.n_blocks, backbone.state(h.shape[1]), step)[0, len(prompt) - 1 :]
        for rows, wanted in zip(top.split(ROWS), torch.tensor(ids).split(ROWS), strict=True):
            logp = backbone.logits(rows).float().log_softmax(-1)
            yield from (-logp.gather(1, wanted[:, None].to(logp.device))[:, 0]).tolist()

    return [fmean(nll(prompt, answer.ids)) for prompt, answer in zip(prompts, made, strict=True)]
