"""Modes keep their promises in every door; a model finds its exits once."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from helpers import exits_for, modest_exits
from models import compiled_only, tiny
from offramp import MODES, Engine, Exits, ExitSet, Model, Policy, Sampling
from offramp.decode.modes import promised_gain, usual_mode
from offramp.errors import BadInput, CorruptFile, ExitsMismatch

PROMPT = [72, 101, 108, 108, 111]


def deciding(family: str = "llama") -> Exits:
    exits = modest_exits(family)
    exits.policy = Policy((0.3,) * 3)
    return exits


def drafting(family: str = "llama", right: float = 0.9) -> Exits:
    """Exits whose record says how often their drafts are right."""
    exits = deciding(family)
    exits.training = {"validation": [{"block": next(iter(exits)).block, "agreement": right, "acceptance": [right] * 3}]}
    return exits


def test_exact_is_full_depths_answer_and_early_decides_by_the_exits() -> None:
    model = Model(tiny("llama"), ExitSet(deciding(), drafting()))
    assert model.modes == tuple(MODES) == ("full", "exact", "early")
    full, exact, early = (model.generate(PROMPT, mode, max_tokens=24) for mode in model.modes)
    assert [each.mode for each in (full, exact, early)] == list(MODES)
    assert exact.ids == full.ids
    assert early.mean_blocks < full.mean_blocks == full.blocks
    assert early.ids == Engine(model.backbone, model.exits.early).generate(PROMPT, max_tokens=24).ids
    assert [token.id for token in model.stream(PROMPT, "exact", max_tokens=24)] == full.ids
    assert model.generate_batch([PROMPT], "exact", max_tokens=24)[0].ids == full.ids


@compiled_only
@pytest.mark.parametrize(("right", "mode"), [(0.95, "exact"), (0.0, "full")])
def test_the_default_is_exact_where_drafts_should_pay_in_the_engine_and_the_model(right: float, mode: str) -> None:
    backbone, exits = tiny("llama/compiled"), ExitSet(None, drafting("llama/compiled", right))
    assert usual_mode(backbone, exits) == mode
    model = Model(backbone, exits)
    assert {model.generate(PROMPT, max_tokens=2).mode, Engine(model).mode, Engine(backbone, exits).mode} == {mode}
    assert usual_mode(tiny("llama"), exits) == "full"  # drafts' costs are those of compiled code
    assert Engine(backbone).mode == "full"  # a backbone alone has no exits


def test_what_drafts_promise_counts_those_of_the_table() -> None:
    exits = drafting(right=0.9)
    alone = promised_gain(tiny("llama"), exits)
    exits.training["validation"][0]["with_table"] = [0.99, 0.99, 0.99]
    assert promised_gain(tiny("llama"), exits) > alone


def test_a_record_of_nonsense_promises_nothing() -> None:
    exits = drafting()
    exits.training["validation"][0]["acceptance"] = ["often"]
    with pytest.raises(CorruptFile, match="record of their training is damaged"):
        promised_gain(tiny("llama"), exits)


@pytest.mark.parametrize("mode", MODES)
def test_a_group_of_exits_is_decoded_with_in_the_mode_that_is_named(mode: str) -> None:
    exits = deciding()
    assert Engine(tiny("llama"), exits, mode=mode).mode == mode
    assert Engine(tiny("llama"), exits).mode == "early"
    assert Engine(tiny("llama"), exits, fill="verify").mode == "exact"


def test_a_mode_may_name_a_point() -> None:
    """The points of `early` are what was calibrated, numbered from 1 on."""
    model = Model(tiny("llama"), ExitSet(deciding(), drafting()))
    early = model.exits.early
    assert early
    policies = [Policy((threshold,) * 3) for threshold in (0.9, 0.3)]
    early.calibration = {
        "tested": [
            {"policy": asdict(each), "loss": 0.0, "flops_saved": 0.0, "passed": passed}
            for each, passed in zip(policies, (True, False), strict=True)
        ]
    }
    assert model.engine("early:1").plan.policy == policies[0]
    with pytest.warns(UserWarning, match="point 2 did not pass its test"):
        assert model.engine("early:2").plan.policy == policies[1]
    assert model.engine("early").plan.policy == early.policy
    wrong = {"close": "close is gone", "close:2": "close is gone", "early:3": "no point 3"}
    for mode in (
        "exact:1",
        "full:1",
        "early:0",
        "early:",
        "early:-1",
        "early:x",
        "early:1:2",
        "early:²",
        "early:01",
        "early:٢",
        "early:1000",
    ):
        wrong[mode] = "There is no mode"
    for mode, why in wrong.items():
        with pytest.raises(BadInput, match=why):
            model.engine(mode)
    early.calibration = {}
    with pytest.raises(BadInput, match="no calibrated points"):
        model.engine("early:1")


def test_exits_of_other_weights_decide_nowhere_without_a_policy_of_ones_own() -> None:
    other, exits = tiny("llama", seed=1), deciding()
    model = Model(other, ExitSet(exits))
    assert model.modes == ("full", "exact")
    for make in (
        lambda: Engine(other, exits),
        lambda: Engine(other, exits, mode="early"),
        lambda: Engine(model, fill="copy"),
        lambda: Engine(model, policy=exits.policy),
        lambda: model.generate(PROMPT, "early"),
    ):
        with pytest.raises(ExitsMismatch, match="learned from other weights") as caught:
            make()
        assert "offramp calibrate" in caught.value.hint
    assert Engine(other, exits, Policy((0.3,) * 3)).mode == "early"  # for research
    exits.owner = replace(exits.owner, hidden_size=64)
    with pytest.raises(ExitsMismatch, match="with 6 blocks of 64 dims"):
        Engine(other, ExitSet(exits), mode="exact")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"mode": "magic"}, "no mode 'magic'"),
        ({"mode": ""}, "no mode ''"),
        ({"mode": "exact", "fill": "copy"}, "mode 'exact' has no fill 'copy'"),
        ({"mode": "early", "fill": "verify"}, "belongs to the mode exact"),
        ({"mode": "full", "fill": "copy"}, "full has no exits"),
        ({"mode": "full", "policy": Policy((0.5,) * 3)}, "full has no exits"),
        ({"fill": "magic"}, "no fill 'magic'"),
    ],
)
def test_what_no_mode_promises_is_refused(arguments, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence) as caught:
        Engine(Model(tiny("llama"), ExitSet(deciding())), **arguments)
    assert caught.value.hint


def test_full_depth_needs_no_exits(tmp_path) -> None:
    (tmp_path / "offramp.json").write_text("{")
    model = Model(tiny("llama"), tmp_path)
    assert model.generate(PROMPT, "full", max_tokens=2).mode == "full"
    with pytest.raises(CorruptFile):
        model.generate(PROMPT, "early")


def test_exits_are_read_once(tmp_path, monkeypatch) -> None:
    ExitSet(deciding(), drafting()).save(tmp_path)
    read, load = [], Exits.load.__func__

    def noted(cls, folder, *rest, **more):
        read.append(folder)
        return load(cls, folder, *rest, **more)

    monkeypatch.setattr(Exits, "load", classmethod(noted))
    model = Model(tiny("llama"), tmp_path)
    for mode in ("exact", "early", None, "exact"):
        model.generate(PROMPT, mode, max_tokens=2)
    assert sorted(read) == [tmp_path, tmp_path / "draft"]


def test_an_engine_is_kept_for_a_mode_whatever_the_sampling_and_until_the_exits_change() -> None:
    model = Model(tiny("llama"), ExitSet(deciding()))
    engine = model.engine("early")
    drawn = [model.engine("early", Sampling(temperature=0.9, seed=seed)) for seed in range(3)]
    assert all(each.plan is engine.plan for each in drawn)
    answers = [each.generate(PROMPT, max_tokens=16).ids for each in (engine, *drawn)]
    assert len({tuple(ids) for ids in answers}) > 2
    again = Engine(model.backbone, model.exits.early, sampling=Sampling(temperature=0.9, seed=2))
    assert answers[3] == again.generate(PROMPT, max_tokens=16).ids
    assert model.engine("early") is engine
    model.exits.early.policy = Policy((1.0,) * 3)
    assert model.engine("early").plan.policy == Policy((1.0,) * 3)


def test_the_public_names_of_the_backbone_are_the_models() -> None:
    backbone = tiny("llama")
    model = Model(backbone, ExitSet())
    for name in ("embed", "run_all", "state", "logits", "n_blocks", "tokenizer", "prompts", "kinds", "name", "forward"):
        assert name in dir(model)
        assert getattr(model, name) == getattr(backbone, name)
    with pytest.raises(AttributeError):
        model.nonsense  # noqa: B018
    assert Exits.new(model.backbone, exits_for("llama").config).owner.name == model.name
