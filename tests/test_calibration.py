"""The guarantee of Learn then Test: known p-values, the share of failures over many repetitions, whole calibrations."""

from __future__ import annotations

import copy
import json
import math
import sys
import warnings
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import TAILS, exits_for, modest_exits, sketched
from models import LLAMA, tiny
from offramp import Engine, Exits, Policy, Sampling
from offramp.decode.request import Generation
from offramp.errors import BadInput, CorruptFile
from offramp.exits.learned import hashes_of, known_among
from offramp.model.costs import Costs
from offramp.training import calibration
from offramp.training.calibration import calibrate, calibrations
from offramp.training.config import CalibrationConfig
from offramp.training.lines import KINDS, candidates, heads
from offramp.training.losses import LOSSES, Question, losses_by_length, read_questions, task_loss
from offramp.training.points import SHARES, Rule, narrowed, policies, rule
from offramp.training.risk import fixed_sequence, p_value, path, prompts_needed
from offramp.training.validation import Evidence

REPETITIONS = 500


@pytest.mark.parametrize(
    ("mean", "n", "risk", "expected"),
    [
        (0.0, 59, 0.05, 0.95**59),  # no loss at all: (1 − α)ⁿ
        (0.0, 1, 0.5, 0.5),
        # The losses sum to 4, where Bentkus' bound is the smaller one. With a mean near the risk, Hoeffding's is.
        (0.02, 200, 0.05, math.e * sum(math.comb(200, k) * 0.05**k * 0.95 ** (200 - k) for k in range(5))),
        (0.41, 10, 0.5, math.exp(-10 * (0.41 * math.log(0.41 / 0.5) + 0.59 * math.log(0.59 / 0.5)))),
        (0.2, 100, 0.05, 1.0),
    ],
)
def test_known_p_values(mean: float, n: int, risk: float, expected: float) -> None:
    assert p_value(mean, n, risk) == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.floats(0.01, 0.6), st.data())
def test_a_p_value_is_one_for_coins(n: int, risk: float, data: st.DataObject) -> None:
    """P(p ≤ δ) ≤ δ if each loss is 1 with the risk's probability. It is computed exactly, from the binomial."""
    delta = data.draw(st.floats(0.001, 0.5))
    weights = [math.comb(n, k) * risk**k * (1 - risk) ** (n - k) for k in range(n + 1)]
    assert sum(weight for k, weight in enumerate(weights) if p_value(k / n, n, risk) <= delta) <= delta + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 0.3), st.integers(1, 500), st.floats(0.01, 0.5))
def test_less_loss_is_stronger_evidence(mean: float, n: int, risk: float) -> None:
    assert p_value(mean, n, risk) <= p_value(min(1.0, mean + 0.05), n, risk) + 1e-12


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 0.04), st.floats(0.05, 0.5), st.floats(0.01, 0.3))
def test_so_many_prompts_are_needed(mean: float, risk: float, delta: float) -> None:
    needed = prompts_needed(mean, risk, delta)
    assert needed is not None
    assert p_value(mean, needed, risk) <= delta
    assert needed == 1 or p_value(mean, needed - 1, risk) > delta
    assert prompts_needed(risk, risk, delta) is None
    assert prompts_needed(risk - 1e-9, risk, delta) is None  # more than anybody has


def test_59_prompts_without_a_difference_show_a_risk_of_5_percent() -> None:
    assert prompts_needed(0.0, 0.05, 0.05) == 59


def failures(draw, true: list[float], n: int, pilot: int, risk: float, delta: float) -> float:
    """The share of repetitions in which a policy is chosen whose expected loss is above the risk.

    `draw(generator, n)` gives losses (policies, n); the path is found on a pilot, as in `calibrate`.
    """
    failed = 0
    for seed in range(REPETITIONS):
        generator = np.random.default_rng(seed)
        seen, losses = draw(generator, pilot), draw(generator, n)
        order = path([(float(seen[index].mean()), 0.01 * (index + 1)) for index in range(len(true))], risk)
        results = list(fixed_sequence((losses[index].tolist() for index in order), risk, delta))
        passed = [index for index, (_, _, ok) in zip(order, results, strict=False) if ok]
        failed += bool(passed) and true[passed[-1]] > risk
    return failed / REPETITIONS


@pytest.mark.parametrize("delta", [0.05, 0.2])
@pytest.mark.parametrize("kind", ["coins", "parts", "the same prompts are hard for all"])
def test_the_guarantee_fails_at_most_as_often_as_promised(kind: str, delta: float) -> None:
    """Ten policies. The bolder half loses more than the risk of 0.1, the sixth only just, which is the hardest case."""
    risk, n = 0.1, 200
    true = [0.02, 0.04, 0.06, 0.08, 0.09, 0.101, 0.12, 0.14, 0.17, 0.2]
    means = np.array(true)[:, None]

    def draw(generator: np.random.Generator, n: int) -> np.ndarray:
        if kind == "coins":
            return (generator.random((len(true), n)) < means).astype(float)
        if kind == "parts":
            return generator.beta(means / 0.3, (1 - means) / 0.3, (len(true), n))
        return (generator.random(n)[None] < means).astype(float)

    slack = 3 * math.sqrt(delta * (1 - delta) / REPETITIONS)
    assert failures(draw, true, n, 50, risk, delta) <= delta + slack
    # This test can fail: choosing by the mean alone, without a margin, breaks the promise.
    careless = [fmean(draw(np.random.default_rng(seed), n)[5]) <= risk for seed in range(REPETITIONS)]
    assert fmean(careless) > delta + slack


def test_the_path_goes_from_safe_to_bold_and_skips_what_is_worse_in_both() -> None:
    pilot = [(0.00, -0.01), (0.01, 0.02), (0.02, 0.01), (0.03, 0.05), (0.03, 0.04), (0.2, 0.5)]
    assert path(pilot, risk=0.05) == [1, 4, 3]
    assert path(pilot, risk=0.15) == [1, 4, 3, 5]
    assert path([(0.0, 0.0)], 0.05) == []
    # Several policies lose nothing on the pilot's few prompts, which says little. The safest of them is tested first.
    assert path([(0.0, 0.03), (0.0, 0.01), (0.0, 0.02), (0.01, 0.02)], 0.05) == [1, 2, 0]
    assert len(path([(index / 1000, index + 1.0) for index in range(20)], 0.05, longest=8)) <= 8


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "precision"])
def test_every_line_of_candidates_grows_bolder_and_opens_deep_exits_first(kind: str) -> None:
    lines = candidates(4, kind)
    assert lines[-1][0].thresholds[0] < 1
    for line in lines:
        for before, after in pairwise(line):
            assert all(a <= b for a, b in zip(after.thresholds, before.thresholds, strict=True))
            assert after.thresholds != before.thresholds
    first_open = [next(i for i, t in enumerate(line[0].thresholds) if t < 1) for line in lines]
    assert first_open == sorted(first_open, reverse=True)


@pytest.mark.parametrize(("named", "tried"), [(None, "entropy"), ("gate", "gate")])
def test_the_exits_own_confidence_is_calibrated_unless_another_is_named(named, tried, monkeypatch) -> None:
    exits, seen = exits_for(LLAMA), set()
    exits.policy = Policy((1.0,) * 3, "entropy")

    class Spy(Engine):
        def __init__(self, backbone, exits=None, policy=None, *others, **options) -> None:
            seen.add(policy and policy.confidence)
            super().__init__(backbone, exits, policy, *others, **options)

    monkeypatch.setattr(calibration, "Engine", Spy)
    config = CalibrationConfig(risk=0.9, delta=0.1, kind="thresholds", confidence=named, max_tokens=2)
    calibrate(tiny(LLAMA), exits, questions(40), config)
    assert seen == {None, tried}


def questions(count: int) -> list[Question]:
    return [Question(f"Question {number}?", ("42",)) for number in range(count)]


# In this tiny model a head at every exit costs more than the blocks, so `patience` saves only deep passes.
COMBINED = [
    ("thresholds", "project"),
    ("decay", "project"),
    ("thresholds", "defer"),
    ("fixed", "defer"),
    ("patience", "defer"),
    ("precision", "defer"),
]


@pytest.mark.parametrize(("kind", "fill"), COMBINED)
def test_a_calibrated_policy_keeps_the_risk_it_was_tested_for(kind: str, fill: str, monkeypatch) -> None:
    """At a generous risk, a tiny random model passes. The chosen policy is the last of the path that passed."""
    backbone, exits = tiny(LLAMA), exits_for(LLAMA, readout="none")  # random adapters never agree
    if kind == "precision":
        exits = modest_exits(LLAMA, tails=TAILS)
        monkeypatch.setattr(calibration, "PRECISIONS", (0.5, 0.4, 0.3, 0.2, 0.1))
        monkeypatch.setattr("offramp.training.validation.LEAST", 3)
    config = CalibrationConfig(risk=0.9, delta=0.1, fill=fill, kind=kind, max_tokens=4)
    record = calibrate(backbone, exits, questions(40), config)
    assert record.passed
    assert (record.n, record.pilot) == (32, 8)
    passed = [step for step in record.tested if step.passed]
    assert record.policy == exits.policy == passed[-1].policy
    assert all(step.p_value <= 0.1 and step.loss < 0.9 for step in passed)
    assert exits.calibration["fill"] == fill
    assert exits.calibration["policy"]["thresholds"] == exits.policy.thresholds


def test_calibrations_that_share_answers_are_those_one_by_one(monkeypatch) -> None:
    """A calibration for another risk or loss reads the answers that there are already."""
    common = CalibrationConfig(delta=0.1, kind="fixed", fill="defer", max_tokens=3)
    configs = [replace(common, risk=0.9), replace(common, risk=0.5, loss="exact")]
    exits, made = exits_for(LLAMA, readout="none"), []
    alone = [calibrate(tiny(LLAMA), copy.copy(exits), questions(40), config) for config in configs]
    start = Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, *a, **k: made.append(a[2:3]) or start(self, *a, **k))
    assert calibrations(tiny(LLAMA), exits, questions(40), configs) == alone
    assert any(record.passed for record in alone)
    assert not exits.calibration
    assert max(Counter(made).values()) == 2  # each policy answers the pilot's questions once, and the test's
    with pytest.raises(BadInput, match="cannot share their answers"):
        calibrations(tiny(LLAMA), exits, questions(40), [configs[0], replace(configs[0], max_tokens=5)])


def test_the_prompts_order_does_not_matter() -> None:
    config = CalibrationConfig(risk=0.9, delta=0.1, fill="defer", kind="fixed", max_tokens=4)
    records = [calibrate(tiny(LLAMA), exits_for(LLAMA), sample, config) for sample in (questions(40), questions(40)[::-1])]
    assert records[0] == records[1]


@pytest.mark.parametrize("loss", LOSSES)
def test_exits_that_ruin_answers_stay_closed(loss: str) -> None:
    exits = exits_for(LLAMA)
    record = calibrate(tiny(LLAMA), exits, questions(90), CalibrationConfig(loss=loss, kind="fixed", max_tokens=4))
    if loss == "task":  # nothing scores, so nothing can be lost
        assert record.passed
        return
    assert not record.passed
    assert exits.policy == Policy((1.0,) * 3)
    assert Engine(tiny(LLAMA), exits).generate("Hi", max_tokens=8).mean_blocks == tiny(LLAMA).n_blocks


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"risk": 0.0}, "not between"),
        ({"delta": 1.0}, "not between"),
        ({"loss": "vibes"}, "no loss"),
        ({"fill": "verify"}, "nothing to calibrate"),
        ({"fill": "vibes"}, "no fill"),
        ({"kind": "vibes"}, "no policy"),
        ({"risk": 0.001}, "too few"),
        ({"questions": [Question("Why?")] * 90}, "twice"),
        ({"questions": [Question(f"Why {n}?") for n in range(90)], "loss": "task"}, "right answers"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(changed: dict, message: str) -> None:
    settings = {"questions": questions(90), **changed}
    with pytest.raises(BadInput, match=message) as caught:
        calibrate(tiny(LLAMA), exits_for(LLAMA), settings.pop("questions"), CalibrationConfig(**settings))
    assert caught.value.hint


def test_another_use_than_the_calibrated_one_warns(tmp_path) -> None:
    backbone, exits = tiny(LLAMA), exits_for(LLAMA)
    calibrate(backbone, exits, questions(40), CalibrationConfig(risk=0.9, delta=0.1, kind="fixed", max_tokens=4))
    exits.save(tmp_path)
    loaded = Exits.load(tmp_path, backbone)
    assert loaded.policy == exits.policy
    assert json.loads(json.dumps(exits.calibration)) == loaded.calibration
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine(backbone, loaded)
        Engine(backbone, loaded, Policy((0.5,) * 3), fill="copy")  # the user's own thresholds
    with pytest.warns(UserWarning, match="calibrated with fill project, not copy") as caught:
        Engine(backbone, loaded, fill="copy")
    assert caught[0].filename == __file__  # it points at the line that made the engine
    with pytest.warns(UserWarning, match=r"calibrated with repetition penalty 1.0, not 1.3"):
        Engine(backbone, loaded, sampling=Sampling(repetition_penalty=1.3))
    loaded.calibration["weights"] = "int4"
    with pytest.warns(UserWarning, match="calibrated with weights int4, not float32"):
        Engine(backbone, loaded)


def test_exits_keep_a_calibration_for_each_format_of_weights(tmp_path) -> None:
    backbone, exits = tiny(LLAMA), exits_for(LLAMA)
    config = CalibrationConfig(risk=0.9, delta=0.1, kind="fixed", max_tokens=4)
    calibrate(backbone, exits, questions(40), config)
    own = exits.calibration
    # The same exits were also calibrated for weights of 4 bits, with another policy.
    exits.use({**own, "weights": "int4", "policy": asdict(Policy((0.25,) * 3))})
    assert exits.policy == Policy((0.25,) * 3)
    exits.save(tmp_path)
    loaded = Exits.load(tmp_path, backbone)  # which runs in float32
    assert loaded.calibration == json.loads(json.dumps(own))
    assert loaded.policy == Policy.from_json(own["policy"])
    assert [*loaded.elsewhere] == ["int4"]
    calibrate(backbone, loaded, questions(41), config)
    assert (loaded.calibration["n"], [*loaded.elsewhere]) == (41 - round(41 / 5), ["int4"])
    record = json.loads((tmp_path / "offramp.json").read_text())
    record["elsewhere"]["float32"]["weights"] = "int8"
    (tmp_path / "offramp.json").write_text(json.dumps(record))
    with pytest.raises(CorruptFile, match="does not name the formats"):
        Exits.load(tmp_path, backbone)


def test_a_promise_is_for_weights_whatever_their_name() -> None:
    backbone, exits = tiny(LLAMA), exits_for(LLAMA)
    calibrate(backbone, exits, questions(40), CalibrationConfig(risk=0.9, delta=0.1, kind="fixed", max_tokens=4))
    own = exits.calibration
    exits.owner = replace(exits.owner, name="another/name", vocabulary="")
    exits.promise({**own, "weights": "int8"}, backbone)
    assert (exits.calibration["weights"], [*exits.elsewhere]) == ("int8", ["float32"])
    exits.owner = replace(exits.owner, fingerprint="of other weights")
    exits.promise(own, backbone)
    assert (exits.calibration, exits.elsewhere) == (own, {})
    assert exits.owner.owns_weights_of(backbone)


def test_longer_answers_than_the_calibrated_ones_warn() -> None:
    backbone, exits = tiny(LLAMA), exits_for(LLAMA)
    calibrate(backbone, exits, questions(40), CalibrationConfig(risk=0.9, delta=0.1, kind="fixed", max_tokens=4))
    engine = Engine(backbone, exits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shorter in (1, 4):
            engine.generate("Hi", max_tokens=shorter)
    with pytest.warns(UserWarning, match="answers of at most 4 tokens, not 5"):
        engine.generate("Hi", max_tokens=5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_at_each_length_is_that_of_answers_with_that_limit(loss: str) -> None:
    backbone, exits = tiny(LLAMA), exits_for(LLAMA, readout="none")
    policy, longest = Policy((0.7,) * 3), 9
    engines = Engine(backbone), Engine(backbone, exits, policy)
    full, early = (engine.generate("Hello there", max_tokens=longest) for engine in engines)
    question = Question("", (full.text,))
    assert full.ids[:2] == early.ids[:2]
    assert full.ids != early.ids  # so losses change along the answer
    found = losses_by_length(early, full, question, loss, longest + 2)
    for length in range(1, longest + 1):
        shorter = [engine.generate("Hello there", max_tokens=length) for engine in reversed(engines)]
        assert found[length - 1] == LOSSES[loss].of(*shorter, question)
    assert found[longest:] == found[longest - 1 : longest] * 2


def test_a_policy_is_tested_at_the_length_where_it_loses_most(monkeypatch) -> None:
    """Answers whose first tokens differ, and whose later ones agree, lose nothing in the end."""
    ways = iter([[1, 9], [9, 1]] * 1000)  # the same bag of tokens, in another order
    first = {True: [1, 9], False: [9, 1]}

    def answers(engine, prompts, *_):
        assert next(ways)
        made = Engine(tiny(LLAMA)).generate("Hi", max_tokens=2)
        ids = first[bool(engine.plan.open_exits)]
        tokens = [replace(token, id=id) for token, id in zip(made.tokens, ids, strict=True)]
        return [replace(made, tokens=tokens, flops_saved=0.1 * bool(engine.plan.open_exits))] * len(prompts)

    monkeypatch.setattr(calibration, "answers", answers)
    monkeypatch.setattr(calibration, "path", lambda results, risk: list(range(len(results))))
    config = CalibrationConfig(risk=0.3, delta=0.1, kind="fixed", max_tokens=2)
    record = calibrate(tiny(LLAMA), exits_for(LLAMA), questions(40), config)
    (tested,) = record.tested
    assert (tested.loss, tested.length, tested.p_value, tested.passed) == (1.0, 1, 1.0, False)
    assert len(record.untested) == 2


def test_a_path_that_was_written_down_is_tested_again_on_new_prompts() -> None:
    exits, config = exits_for(LLAMA, readout="none"), CalibrationConfig(risk=0.9, delta=0.1, kind="fixed", max_tokens=4)
    with pytest.raises(BadInput, match="no path from an earlier calibration"):
        calibrate(tiny(LLAMA), exits, questions(40), replace(config, retest=True))
    first = calibrate(tiny(LLAMA), exits, questions(40), config)
    fresh = [Question(f"Another {number}?") for number in range(30)]
    again = calibrate(tiny(LLAMA), exits, fresh, replace(config, retest=True))
    assert (again.n, again.pilot, again.pilot_hashes) == (30, 0, first.pilot_hashes)
    written = [*(test.policy for test in first.tested), *first.untested]
    assert [*(test.policy for test in again.tested), *again.untested] == written
    with pytest.raises(BadInput, match="find their thresholds"):  # the path was found on some of these
        calibrate(tiny(LLAMA), exits, questions(40), replace(config, retest=True))


def test_prompts_that_were_learned_from_are_refused() -> None:
    exits, config = exits_for(LLAMA), CalibrationConfig(risk=0.9, delta=0.1, kind="fixed", max_tokens=2)
    exits.training = {"prompt_hashes": hashes_of(["What?", "  QUESTION   7? "])}
    with pytest.raises(BadInput, match=r"1 of the 40 prompts were used .* 'Question 7\?'"):
        calibrate(tiny(LLAMA), exits, questions(40), config)
    exits.training = {"prompt_hashes": hashes_of(["What?"])}
    record = calibrate(tiny(LLAMA), exits, questions(40), config)
    calibrate(tiny(LLAMA), exits, questions(40), config)  # its pilot is that of the calibration before
    pilot = known_among([question.prompt for question in questions(40)], record.pilot_hashes)
    assert len(pilot) == record.pilot == 8
    fresh = [Question(f"Another {number}?") for number in range(40)]
    with pytest.raises(BadInput, match="used to train these exits or to find their thresholds"):
        calibrate(tiny(LLAMA), exits, [*fresh, *map(Question, pilot)], config)
    exits.training = {"prompt_hashes": "no base64!"}
    with pytest.raises(CorruptFile, match="record of their prompts"):
        calibrate(tiny(LLAMA), exits, fresh, config)
    exits.training = {"command": "of another program"}
    with pytest.warns(UserWarning, match="no record of the prompts they learned from"):
        calibrate(tiny(LLAMA), exits, fresh, config)


def test_a_repetition_penalty_is_calibrated_for(monkeypatch) -> None:
    """All answers of a calibration have the penalty, those of full depth too; other use warns."""
    backbone, exits, used = tiny(LLAMA), exits_for(LLAMA), set()
    start = Engine.__init__

    def watched(self, *args, **named) -> None:
        start(self, *args, **named)
        used.add(self._choose)

    config = CalibrationConfig(risk=0.9, delta=0.1, kind="fixed", max_tokens=4, repetition_penalty=1.3)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "__init__", watched)
        calibrate(backbone, exits, questions(40), config)
    assert used == {Sampling(repetition_penalty=1.3).chooser()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine(backbone, exits, sampling=Sampling(repetition_penalty=1.3))
    with pytest.warns(UserWarning, match=r"calibrated with repetition penalty 1.3, not 1.0"):
        Engine(backbone, exits)


def test_questions_are_read_with_their_answers(tmp_path) -> None:
    file = tmp_path / "questions.jsonl"
    lines = [
        {"question": "One?", "answer": {"value": "Uno", "aliases": ["Eins"]}},
        {"prompt": "Two?", "answers": ["Due", "Zwei"]},
        {"question": "Three?", "answer": "Tre"},
        {"question": "Four?"},
        {"question": "Five?", "answer": None},
        {"question": "Six?", "answer": 6},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert [question.references for question in read_questions(file)] == [
        ("Uno", "Eins"),
        ("Due", "Zwei"),
        ("Tre",),
        (),
        (),
        ("6",),
    ]
    (tmp_path / "lines.txt").write_text("One?\n\nTwo?\n")
    assert read_questions(tmp_path / "lines.txt") == [Question("One?"), Question("Two?")]


@pytest.mark.skipif(sys.platform != "linux", reason="programs can be shut in on Linux only")
def test_code_is_lost_if_full_depths_passes_and_the_other_fails(tmp_path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"prompt": "Double.", "program": "{answer}\nassert double(2) == 4"}))
    (question,) = read_questions(file)

    def answer(*words: str) -> Generation:
        tokens = tuple(SimpleNamespace(text=word, id=place) for place, word in enumerate(words))
        return replace(Engine(tiny(LLAMA)).generate("x", max_tokens=1), tokens=tokens, text="".join(words))

    right, wrong = answer("def double(x):", " return", " 2", " * x"), answer("def double(x):", " return", " x")
    assert [task_loss(early, full, question) for early in (right, wrong) for full in (right, wrong)] == [0, 0, 1, 0]
    assert losses_by_length(wrong, right, question, "task", 5) == [0, 0, 0, 1, 1]  # the beginning of `right` fails, too
    with pytest.raises(BadInput, match="programs that the model writes must run"):
        calibrate(tiny(LLAMA), exits_for(LLAMA), [question] * 80, CalibrationConfig(loss="task"))


def shown(gate: torch.Tensor, key: torch.Tensor, chance: torch.Tensor, harm: float = 0.0) -> Evidence:
    """Tokens that are right with the given chances, and change so many later ones where the gate is below a half."""
    drawn = torch.rand(len(chance), generator=torch.Generator().manual_seed(0))
    return Evidence(gate, key, drawn < chance, harm * (gate < 0.5))


def leaving(found: Rule, known: Evidence) -> torch.Tensor:
    """Which tokens leave by the rule."""
    return (known.gate > found.threshold) | ((known.gate > found.perhaps) & (known.key > found.key))


def test_a_rule_reaches_its_precision_and_asks_the_key_where_that_saves_more() -> None:
    generator = torch.Generator().manual_seed(1)
    gate, key = torch.rand(20_000, generator=generator), torch.rand(20_000, generator=generator)
    both = shown(gate, key, gate * key)
    for precision in (0.6, 0.8, 0.9):
        cheap, dear = rule(both, precision, gain=100, price=1), rule(both, precision, gain=100, price=20)
        for found in (cheap, dear):
            leaves = leaving(found, both)
            assert found == Rule() or both.agrees[leaves].float().mean() >= precision - 0.01
        assert cheap.key < 1 > cheap.perhaps
        assert cheap.saved > dear.saved
        assert dear.perhaps >= cheap.perhaps  # a dear key is asked less often
    gate_alone = rule(shown(gate, key, gate), 0.9, gain=100, price=1)
    assert gate_alone.threshold < 1
    assert gate_alone.key == 1
    assert rule(shown(gate, key, 0 * gate), 0.5, gain=100, price=1) == Rule()
    # Right tokens that change many later ones stay. Without harm, all would leave.
    assert rule(shown(gate, key, gate + 1), 0.99, gain=100, price=1).saved == pytest.approx(99, abs=1.5)
    harmful = rule(shown(gate, key, gate + 1, harm=3.0), 0.99, gain=100, price=1)
    assert 0.49 < harmful.threshold < 0.5


def test_policies_by_precision_open_more_and_more() -> None:
    backbone, exits = tiny(LLAMA), modest_exits(LLAMA, tails=TAILS)
    generator = torch.Generator().manual_seed(2)
    known = []
    for index in range(3):
        gate, key = torch.rand(5_000, generator=generator), torch.rand(5_000, generator=generator)
        known.append(shown(gate, key, (gate * key) ** 0.2, index))
    found = policies(exits, known, Costs(backbone), (0.99, 0.95, 0.9, 0.9, 0.8), 0, 0)
    assert 4 < len(found) <= 4 + 4 * len(SHARES)
    opened = [sum(map(policy.opens, range(3))) for policy in found]
    assert opened == sorted(opened)
    assert opened[0] > 0


@pytest.mark.parametrize("wide", [Rule(threshold=0.4, saved=8.0), Rule(perhaps=0.2, key=0.3, saved=8.0)])
def test_a_narrower_rule_lets_the_surest_of_the_same_tokens_leave(wide: Rule) -> None:
    generator = torch.Generator().manual_seed(3)
    known = shown(torch.rand(1_000, generator=generator), torch.rand(1_000, generator=generator), torch.ones(1_000))
    few = narrowed(wide, known, 0.25)
    assert few.saved == 2
    before, after = leaving(wide, known), leaving(few, known)
    assert not (after & ~before).any()
    assert after.sum() == pytest.approx(0.25 * before.sum(), abs=1)
    assert narrowed(Rule(), known, 0.25) == Rule()


def test_an_exit_of_which_nothing_is_known_stays_closed() -> None:
    nothing = torch.zeros(0)
    assert rule(Evidence(nothing, nothing, nothing.bool(), nothing), 0.9, gain=100, price=1) == Rule()


def test_a_sketch_keeps_enough_candidates_to_leave_risk_for_exits() -> None:
    """With fewer candidates, the sketch alone would use up the risk, and no exit could open."""
    exits = sketched(LLAMA)
    assert (exits.named(49_152), exits.named(8192), exits.named(300)) == ((8192, 4096), (4096,), ())
    named = exits.named(49_152)
    assert heads(named, whole_head=False) == (4096, 512)
    assert heads(named, whole_head=True) == (0, 512)
    assert heads((), whole_head=False) == (0, 0)
    least = min(policy.candidates for line in candidates(3, "thresholds", named=named) for policy in line)
    assert least == 4096
