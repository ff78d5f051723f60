"""The mode `close`: a draft stands if full depth finds it nearly as likely as its own token, and no answer loses more."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, replace

import pytest
import torch

from helpers import NEAR, TAILS, costing, modest_exits, some_prompts
from models import COMPILED, compiled_only, tiny
from offramp import Engine, Exits, ExitSet, Policy
from offramp.decode import row_costs
from offramp.decode.consent import POINTS, Consent
from offramp.decode.request import Generation, Talk, Token
from offramp.decode.sampling import Sampling
from offramp.errors import BadInput, CorruptFile
from offramp.exits.calibrated import CloseCalibration
from offramp.exits.learned import TRAINED, hashes_of
from offramp.training.config import CalibrationConfig
from offramp.training.consenting import calibrate_close, nlls
from offramp.training.losses import Question
from offramp.training.risk import bets, bound, proved_at

RULES = Consent(0.5, 0.03), Consent(0.05, 2.0), Consent(0.9, 100.0), Consent(0.01, 0.0)


def close(family: str, consent: Consent, sampling: Sampling | None = None, seed: int = 0, **options) -> Engine:
    exits = modest_exits(family, seed, "linear", "linear", TAILS)
    policy = Policy((0.0, 0.3, 1.0), "max-prob")
    return Engine(tiny(family), exits, policy, "verify", sampling, consent=consent, **options)


def seen(token: Token) -> tuple[object, ...]:
    return token.id, token.source, token.exit_block, token.deep_passes, token.rejected, token.regret


@torch.inference_mode()
def regrets(family: str, prompt: list[int], ids: list[int], penalty: float) -> list[tuple[float, int]]:
    """By the library's own logits, after the penalty: each token's regret, and the likeliest token in its place."""
    known = prompt + ids
    found = []
    for place, logits in enumerate(tiny(family).forward(torch.tensor([known]))[0], start=1):
        for each in set(known[:place]):
            logits[each] = logits[each] * penalty if logits[each] < 0 else logits[each] / penalty
        if len(prompt) <= place < len(known):
            found.append((float(logits.max() - logits[known[place]]), int(logits.argmax())))
    return found


def check(family: str, prompt: list[int], answer: Generation, consent: Consent, penalty: float = 1.0) -> None:
    """Both promises hold for the answer, its record is true, and its other tokens are full depth's own."""
    total = 0.0
    truth = regrets(family, prompt, answer.ids, penalty)
    ends = tiny(family).stop_ids
    for number, (token, (regret, own)) in enumerate(zip(answer.tokens, truth, strict=True), start=1):
        assert token.regret == pytest.approx(regret, abs=NEAR)
        assert token.regret <= -math.log(consent.share)
        assert token.source in ("exit", "table") or token.regret == 0  # what repeats the text is full depth's own token
        assert token.id in ends or own not in ends or regret <= NEAR  # full depth's own end of the text stands
        total += token.regret
        assert total <= consent.regret * number
    assert answer.regret == total


def test_each_answer_keeps_both_promises(family: str) -> None:
    consented = 0
    for number, consent in enumerate(RULES):
        penalty = (1.0, 1.2)[number % 2]
        engine = costing(close(family, consent, Sampling(repetition_penalty=penalty)), 0.01)
        assert engine.mode.startswith("close")
        for prompt in some_prompts(2):
            answer = engine.generate(prompt, max_tokens=12)
            check(family, prompt, answer, consent, penalty)
            consented += sum(token.regret > 0 for token in answer.tokens)
    assert consented


@compiled_only
@pytest.mark.parametrize("family", [f"{family}/compiled" for family in COMPILED])
def test_both_steppers_consent_to_the_same(family: str) -> None:
    dice, consented = random.Random(family), 0
    for number in range(5):
        consent = Consent(dice.choice([0.5, 0.1, 0.01]), dice.choice([0.03, 0.5]))
        sampling = Sampling(repetition_penalty=dice.choice([1.0, 1.3]))
        engine = close(family, consent, sampling, number, max_pending=dice.choice([1, 4, None]))
        engine = costing(engine, dice.choice([0.0, 0.05]))
        prompts = [prompt * dice.choice([1, 6]) for prompt in some_prompts(3, number)]
        ours = engine.generate_batch(prompts, max_tokens=24)
        engine.compiled = None
        theirs = engine.generate_batch(prompts, max_tokens=24)
        assert [[*map(seen, answer.tokens)] for answer in ours] == [[*map(seen, answer.tokens)] for answer in theirs]
        consented += sum(token.regret > 0 for answer in ours for token in answer.tokens)
    assert consented


@compiled_only
@pytest.mark.parametrize("family", ["llama/compiled", "mamba2/compiled", "bamba/compiled"])
def test_an_answer_does_not_depend_on_what_is_around_it(family: str, monkeypatch, tmp_path) -> None:
    """It is the same alone, among eight, after a beginning that another request read, and on a machine with other costs."""
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    consent = Consent(0.05, 0.5)
    usual = close(family, consent).drafts
    engine, prompts = costing(close(family, consent), 0.01), [prompt * 4 for prompt in some_prompts(8, 5)]
    alone = [engine.generate(prompt, max_tokens=24) for prompt in prompts]
    wanted = [[*map(seen, answer.tokens)] for answer in alone]
    assert any(token.regret for answer in alone for token in answer.tokens)

    together = engine.generate_batch(prompts, max_tokens=24)
    assert [[*map(seen, answer.tokens)] for answer in together] == wanted

    other = Talk()
    ids = [token.id for token in engine.stream(prompts[0][:5], other, max_tokens=16)]
    begun = prompts[0][:5] + ids[:-1]
    fresh = [*map(seen, engine.stream([*begun, 70, 71], max_tokens=24))]
    assert [*map(seen, engine.stream([*begun, 70, 71], other, max_tokens=24))] == fresh
    for talk, prompt, tokens in zip(engine.shared_talks(prompts), prompts, wanted, strict=True):
        assert [*map(seen, engine.stream(prompt, talk, max_tokens=24))] == tokens

    row_costs.keep(tiny(family), [0.0, *(9.0 for _ in row_costs.WIDTHS[1:])])
    assert Engine(tiny(family), mode="exact").drafts.rows[1] == 9.0
    monkeypatch.setattr(row_costs, "processor", lambda: "another")
    assert close(family, consent).drafts == usual


@compiled_only
@pytest.mark.parametrize("family", ["llama/compiled", "bamba/compiled"])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "reference"])
def test_an_answer_begins_as_a_longer_one_does(family: str, compiled: bool) -> None:
    """Also where the last token that is wanted is a draft to which full depth consents; and its talk goes on rightly."""
    engine = costing(close(family, Consent(0.01, 3.0)), 0.02)
    engine.compiled = engine.compiled if compiled else None
    last = 0
    for prompt in some_prompts(2, 7):
        long = engine.generate(prompt * 4, max_tokens=24)
        for most in range(1, 24):
            talk = Talk()
            short = [*engine.stream(prompt * 4, talk, max_tokens=most)]
            begun = [(token.id, token.source, token.regret) for token in long.tokens[:most]]
            assert [(token.id, token.source, token.regret) for token in short] == begun
            last += short[-1].regret > 0
            more = prompt * 4 + [token.id for token in short] + [70]
            fresh = engine.generate(more, max_tokens=3)
            assert [token.id for token in engine.stream(more, talk, max_tokens=3)] == fresh.ids
    assert last


def test_without_consent_nothing_is_regretted() -> None:
    exits = modest_exits("llama", gate="linear", tails=TAILS)
    answer = Engine(tiny("llama"), exits, Policy((0.0,) * 3), "verify").generate([72, 105], max_tokens=12)
    assert answer.regret == 0
    assert answer.mode == "exact"


def test_what_cannot_be_consented_to_is_refused() -> None:
    with pytest.raises(BadInput, match="no drafts to consent to"):
        Engine(tiny("llama"), fill="project", consent=RULES[0])
    with pytest.raises(BadInput, match="draws none"):
        close("llama", RULES[0], Sampling(temperature=0.5))
    engine = close("llama", RULES[0])
    for choose, why in ((Sampling(temperature=0.5).chooser(), "draws none"), (lambda logits, ids: 0, "nor logprobs")):
        with pytest.raises(BadInput, match=why):
            engine.batch().add([72], choose=choose)
    for rows in ((0.0,), (0.1,) * 31, (-0.1,) * 32, (math.nan,) * 32, (1e9,) * 32, (*(0.1,) * 31, 0.0)):
        with pytest.raises(BadInput, match="costs of rows"):
            Consent(0.5, 0.03, rows)
    for share, regret in ((0.0, 1.0), (1.0, 1.0), (0.5, -1.0), (0.5, math.inf), (math.nan, 1.0)):
        with pytest.raises(BadInput, match="cannot consent"):
            Consent(share, regret)


@torch.inference_mode()
def test_the_nll_of_an_answer_is_the_librarys() -> None:
    engine = close("llama", Consent(0.05, 1.0))
    prompts = some_prompts(3)
    made = engine.generate_batch(prompts, max_tokens=9)
    for nll, prompt, answer in zip(nlls(tiny("llama"), prompts, made), prompts, made, strict=True):
        logp = tiny("llama").forward(torch.tensor([prompt + answer.ids]))[0].log_softmax(-1)
        wanted = [-float(logp[len(prompt) - 1 + place, id]) for place, id in enumerate(answer.ids)]
        assert nll == pytest.approx(sum(wanted) / len(wanted), abs=NEAR)


def test_a_bet_against_a_true_claim_seldom_wins_and_one_against_a_false_claim_soon_does() -> None:
    def won(mean: float, count: int) -> list[int | None]:
        found = []
        for seed in range(300):
            dice = random.Random(seed)
            values = [min(1.0, max(0.0, dice.gauss(mean, 0.1))) for _ in range(count)]
            found.append(proved_at(bets(values, 0.5, 0.1), 0.1))
        return found

    assert sum(each is not None for each in won(0.5, 150)) <= 0.1 * 300
    assert sum(each is not None for each in won(0.55, 150)) <= 3
    below = won(0.45, 150)
    assert None not in below
    assert 5 < sorted(map(int, filter(None, below)))[150] < 100
    assert bets([0.0, 1.0], 0.5, 0.1)[0] > 0 > bets([1.0, 0.0], 0.5, 0.1)[0]
    assert min(bets([1.0] * 500, 0.01, 0.1)) > -math.inf  # no bet loses all


def calibrated(exits: Exits | None = None, **changed) -> tuple[Exits, CloseCalibration]:
    exits = exits or modest_exits("llama", 0, "linear", "linear", TAILS)
    exits.policy = Policy((0.0, 0.3, 1.0), "max-prob")
    config = CalibrationConfig(**{"risk": 0.5, "delta": 0.2, "max_tokens": 6, **changed})
    questions = [Question(f"Prompt {number}", ("x",)) for number in range(24)]
    return exits, calibrate_close(tiny("llama"), exits, questions, config)


def test_a_calibration_of_close_keeps_the_points_that_pass_and_their_costs_of_rows(tmp_path, monkeypatch) -> None:
    exits, record = calibrated()
    assert [test.passed for test in record.tested] == [True, True]
    assert [(test.share, test.regret) for test in record.tested] == [(point.share, point.regret) for point in POINTS]
    assert all(0 < (test.needed or 0) <= record.n == 24 for test in record.tested)
    assert {test.rows for test in record.tested} == {row_costs.usual_costs(tiny("llama"))}
    ExitSet(draft=exits).save(tmp_path)
    monkeypatch.setattr(row_costs, "processor", lambda: "another")
    found = ExitSet.load(tmp_path, tiny("llama"))
    for number, point in enumerate(POINTS, start=1):
        engine = Engine(tiny("llama"), found, mode=f"close:{number}")
        assert engine.consent == Consent(point.share, point.regret, record.tested[number - 1].rows)
        assert engine.mode == ("close" if number == 1 else "close:2")
    assert Engine(tiny("llama"), found, mode="exact").consent is None

    _, record = calibrated(risk=1e-6)
    assert [test.passed for test in record.tested] == [False, False]
    assert not record.passed
    assert calibrated(loss="task")[1].tested[0].loss >= 0


def test_a_bound_is_the_lowest_risk_that_passes() -> None:
    for mean in (0.2, 0.5, 0.8):
        dice = random.Random(mean)
        values = [min(1.0, max(0.0, dice.gauss(mean, 0.1))) for _ in range(200)]
        found = bound(values, 0.1)
        assert mean < found < mean + 0.05
        assert proved_at(bets(values, found + 1e-5, 0.1), 0.1)
        assert not proved_at(bets(values, found - 1e-5, 0.1), 0.1)
    assert bound([0.5] * 2, 0.01) == 1.0  # two prompts prove nothing
    for test in calibrated()[1].tested:
        assert test.loss < (test.bound or 0) < 0.5


def test_a_calibration_with_drafts_of_other_weights_is_of_the_weights_that_were_tested() -> None:
    exits = modest_exits("llama", 0, "linear", "linear", TAILS)
    exits.owner = replace(exits.owner, fingerprint="of other weights")
    calibrated(exits)
    assert exits.owner.owns_weights_of(tiny("llama"))
    assert not exits.elsewhere


def test_a_calibration_of_close_is_kept_for_each_format(tmp_path) -> None:
    exits, record = calibrated()
    costs = [{**asdict(test), "rows": (0.25,) * 32} for test in record.tested]
    for weights in ("bfloat16", "file"):
        exits.use({**asdict(record), "weights": weights, "tested": costs})
    ExitSet(draft=exits).save(tmp_path)
    found = ExitSet.load(tmp_path, tiny("llama"))
    assert found.draft
    assert sorted(found.draft.elsewhere) == ["bfloat16", "file"]
    assert Engine(tiny("llama"), found, mode="close").consent == replace(POINTS[0], rows=record.tested[0].rows)


@pytest.mark.parametrize("damage", [{"rows": [0.1]}, {"rows": [*range(31), 0]}, {"rows": "cheap"}, {"share": "half"}])
def test_a_damaged_record_of_close_is_refused(tmp_path, damage) -> None:
    exits, _ = calibrated()
    ExitSet(draft=exits).save(tmp_path)
    file = tmp_path / "draft" / "offramp.json"
    record = json.loads(file.read_text("utf-8"))
    record["calibration"]["tested"][0] |= damage
    file.write_text(json.dumps(record))
    with pytest.raises(CorruptFile, match="damaged"):
        Engine(tiny("llama"), ExitSet.load(tmp_path, tiny("llama")), mode="close")


def test_close_is_calibrated_for_likelihood_or_a_task() -> None:
    with pytest.raises(BadInput, match="says little"):
        calibrated(loss="f1")
    learned = modest_exits("llama", 0, "linear", "linear", TAILS)
    learned.training = {TRAINED: hashes_of(["Prompt 3"])}
    with pytest.raises(BadInput, match="1 of the 24 prompts were used to train"):
        calibrated(exits=learned)
    with pytest.raises(BadInput, match="delta of 2"):
        calibrated(delta=2)
    with pytest.raises(BadInput, match="too few"):
        calibrated(loss="task", risk=0.01)
    with pytest.raises(BadInput, match="too few"):
        calibrated(loss="task", risk=1e-9)
