"""The artefact: what is saved is what is loaded, and nothing else is accepted."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from copy import copy
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import exits_for, sketched
from models import tiny
from offramp import MODES, Engine, Exits, ExitsConfig, Policy
from offramp.decode.modes import usual_mode
from offramp.errors import BadInput, CorruptFile, ExitsMismatch, OfframpError
from offramp.exits.config import suggested_places
from offramp.exits.exit_set import PACKAGES_OF_MODELS, ExitSet
from offramp.exits.format import Owner
from offramp.exits.gates import GATES
from offramp.exits.readouts import READOUTS
from offramp.model.compiled.library import library
from offramp.model.hub import ALIASES
from offramp.serve.menu import Menu
from offramp.training import sketch
from offramp.training.loop import Fit
from offramp.training.sketch import chosen_sketch, closest, ranks, sketch_of
from offramp.training.teacher import TeacherText


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("gate", GATES)
def test_saved_exits_load_back_equal_to_bfloat16(tmp_path, gate: str, readout: str) -> None:
    exits = exits_for("llama", gate, readout)
    exits.policy, exits.training = Policy((0.5, 0.75, 1.0), "margin", 9.0), {"seed": 3}
    exits.save(tmp_path)
    loaded = Exits.load(tmp_path, tiny("llama"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exits.safetensors", "offramp.json"]
    assert (loaded.config, loaded.policy, loaded.training) == (exits.config, exits.policy, exits.training)
    for key, value in exits.modules.state_dict().items():
        assert torch.equal(loaded.modules.state_dict()[key], value.bfloat16().float())


def test_a_short_list_is_kept_and_checked(tmp_path) -> None:
    exits = exits_for("llama", "linear", "deep")
    exits.config, exits.shortlist = replace(exits.config, shortlist=3), torch.tensor([4, 7, 250])
    exits.save(tmp_path)
    assert Exits.load(tmp_path, tiny("llama")).shortlist.tolist() == [4, 7, 250]
    tamper(tmp_path, shortlist=2)
    with pytest.raises(CorruptFile, match="short list"):
        Exits.load(tmp_path, tiny("llama"))


def places_in(value, path=()):
    """The paths of all values in a record."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places_in(inner, (*path, key))


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    """The files of exits that draft, and of exits with second keys and a calibration."""
    folder = tmp_path_factory.mktemp("artefact")
    drafting = exits_for("llama", "linear", "deep")
    drafting.config, drafting.shortlist = replace(drafting.config, shortlist=3), torch.tensor([4, 7, 250])
    drafting.training = {"validation": [{"block": 2, "agreement": 0.4, "acceptance": [0.4, 0.3, 0.3]}]}
    usual = exits_for("llama")
    usual.policy = Policy((0.5,) * 3, perhaps=(0.2,) * 3, keys=(0.3,) * 3)
    tested = [{"policy": asdict(usual.policy), "loss": 0.1, "flops_saved": 0.2, "passed": True}]
    usual.calibration = {"policy": asdict(usual.policy), "fill": "project", "weights": "float32", "tested": tested}
    usual.calibration |= {"max_tokens": 128, "stop": ["\n"], "raw": False, "risk": 0.05, "n": 720, "needed": None}
    drafting.policy = Policy((0.3,) * 3, "max-prob")
    for exits, name in ((drafting, "drafting"), (usual, "usual")):
        exits.save(folder / name)
    return folder


def use(folder, fill: str) -> None:
    """Do with exits of strangers what the command line does. Only errors that teach may come of it."""
    with suppress(OfframpError):
        exits = Exits.load(folder, tiny("llama"))
        engine = Engine(tiny("llama/compiled" if library() else "llama"), exits, fill=fill)
        engine.generate([1, 2], max_tokens=2)
        assert usual_mode(engine.backbone, ExitSet(draft=exits)) in MODES
        assert len(Menu(tiny("llama"), ExitSet(exits), engine).points) == len(exits.calibration.get("tested", []))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "fill"), [("drafting", "verify"), ("usual", "project")])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_record_of_nonsense_gets_an_error_that_teaches(artefact, tmp_path, name: str, fill: str, data) -> None:
    record = json.loads((artefact / name / "offramp.json").read_text())
    path = data.draw(st.sampled_from([path for path in places_in(record) if path]))
    place = record
    for key in path[:-1]:
        place = place[key]
    nonsense = (
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=3)
    )
    place[path[-1]] = data.draw(nonsense | st.just({}))
    shutil.copytree(artefact / name, tmp_path / name, dirs_exist_ok=True)
    (tmp_path / name / "offramp.json").write_text(json.dumps(record))
    use(tmp_path / name, fill)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "fill"), [("drafting", "verify"), ("usual", "project")])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), what=st.binary(min_size=1, max_size=8), cut=st.booleans())
def test_weights_of_nonsense_get_an_error_that_teaches(artefact, tmp_path, name, fill, at, what, cut) -> None:
    shutil.copytree(artefact / name, tmp_path / name, dirs_exist_ok=True)
    file = tmp_path / name / "exits.safetensors"
    bytes_before = file.read_bytes()
    # Most of the time in the header, where sizes and names stand.
    place = int(at * at * at * len(bytes_before))
    file.write_bytes(bytes_before[:place] + what + (b"" if cut else bytes_before[place + len(what) :]))
    record = json.loads((tmp_path / name / "offramp.json").read_text())
    record["weights_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()  # or they would be refused unread
    (tmp_path / name / "offramp.json").write_text(json.dumps(record))
    use(tmp_path / name, fill)


def tamper(folder, **changed) -> None:
    """Change the config in a saved record, so that it no longer fits the saved weights."""
    record = json.loads((folder / "offramp.json").read_text())
    record["config"] |= changed
    (folder / "offramp.json").write_text(json.dumps(record))


@pytest.mark.parametrize(("name", "size"), [("sketch", 32), ("shortlist", 3)])
def test_a_config_that_names_what_the_exits_do_not_hold_is_not_saved(tmp_path, name: str, size: int) -> None:
    exits = exits_for("llama")
    exits.config = replace(exits.config, **{name: size})
    with pytest.raises(BadInput, match=f"names a {name} of {size}, but they hold none") as caught:
        exits.save(tmp_path)
    assert caught.value.hint
    assert not list(tmp_path.iterdir())
    held = sketched("llama")
    held.config = replace(held.config, sketch=0)
    with pytest.raises(BadInput, match="sketch of 0, but they hold one of 32"):
        held.save(tmp_path)


def test_without_the_package_of_exits_that_ship_it_is_named(monkeypatch) -> None:
    backbone = tiny("llama")
    monkeypatch.setattr("offramp.exits.exit_set.shipped", lambda kind: [])
    monkeypatch.setattr("offramp.exits.exit_set.is_installed", lambda package: False)
    assert not ExitSet.shipped(backbone)  # nothing ships for this model, so nothing is said
    monkeypatch.setitem(ALIASES, backbone.name, "offramp-models")
    with pytest.warns(UserWarning, match="no exits for tiny-llama here, since the package offramp-models is not installed"):
        exits = ExitSet.shipped(backbone)
    with pytest.raises(BadInput, match="offramp-models, with the exits that ship, is not installed") as caught:
        exits.require_early(backbone)
    assert "pip install ./offramp-models" in caught.value.hint
    assert "offramp train tiny-llama" in caught.value.hint


def test_a_package_of_exits_for_this_shape_is_named(monkeypatch) -> None:
    backbone = tiny("qwen2")
    shape = backbone.n_blocks, backbone.hidden_size, backbone.vocab_size
    monkeypatch.setitem(PACKAGES_OF_MODELS, shape, ("offramp-tiny", "Tiny-Instruct"))
    with pytest.raises(BadInput, match="No exits for tiny-qwen2 are installed") as caught:
        ExitSet.find(None, backbone).require_early(backbone)
    assert "If it is Tiny-Instruct, install its exits" in caught.value.hint
    assert "pip install ./offramp-tiny. Or" in caught.value.hint
    assert "offramp train tiny-qwen2" in caught.value.hint


def test_exits_are_found_in_a_folder_or_among_those_that_ship(tmp_path) -> None:
    backbone, exits = tiny("llama"), exits_for("llama")
    assert not ExitSet.shipped(backbone)
    with pytest.raises(BadInput, match="No exits ship for tiny-llama") as caught:
        ExitSet.find(None, backbone).require_early(backbone)
    assert "offramp train tiny-llama" in caught.value.hint
    exits.save(tmp_path / "both")
    found = ExitSet.find(tmp_path / "both", backbone)
    assert found.early is found.drafting
    assert found.early.policy == Policy((1.0,) * 3)
    exits.policy = Policy((0.25,) * 3)
    for place in ("both", "one"):
        exits.save(tmp_path / place / "draft")
    found = ExitSet.load(tmp_path / "both", backbone)
    assert [each.policy.thresholds[0] for each in (found.early, found.drafting)] == [1.0, 0.25]
    drafts = ExitSet.load(tmp_path / "one", backbone)
    assert (drafts.early, drafts.drafting.policy) == (None, Policy((0.25,) * 3))
    drafts.save(tmp_path / "again")
    assert ExitSet.load(tmp_path / "again", backbone).draft.policy == Policy((0.25,) * 3)


def test_exits_of_the_same_model_in_another_quantisation_may_draft_and_not_decide(tmp_path) -> None:
    ExitSet(exits_for("llama"), exits_for("llama", "linear", "deep")).save(tmp_path)
    other = tiny("llama", seed=1)
    with pytest.warns(UserWarning, match="learned from other weights, those of tiny-llama"):
        exits = ExitSet.load(tmp_path, other)
    assert exits.modes(other) == ("full", "exact")
    answers = [Engine(other, exits, mode=mode).generate([1, 2, 3], max_tokens=12).ids for mode in ("full", "exact")]
    assert answers[0] == answers[1]
    with pytest.raises(ExitsMismatch, match="learned from other weights") as caught:
        Engine(other, exits, mode="early")
    assert "offramp calibrate" in caught.value.hint


def test_exits_of_another_vocabulary_are_refused(tmp_path) -> None:
    ExitSet(exits_for("llama")).save(tmp_path)
    record = tmp_path / "offramp.json"
    record.write_text(record.read_text().replace('"vocabulary": "', '"vocabulary": "0'))
    with pytest.raises(ExitsMismatch, match="has other tokens"):
        ExitSet.load(tmp_path, tiny("llama"))


def test_exits_of_another_model_are_refused_with_both_names(tmp_path) -> None:
    exits_for("llama").save(tmp_path)
    with pytest.raises(ExitsMismatch, match=r"tiny-llama .* not for this model: tiny-qwen3") as raised:
        Exits.load(tmp_path, tiny("qwen3"))
    assert "offramp train" in raised.value.hint


def test_exits_of_another_revision_are_refused(tmp_path) -> None:
    exits_for("llama").save(tmp_path)
    other_model = tiny("llama", seed=1)
    with pytest.raises(ExitsMismatch, match="another revision"):
        Exits.load(tmp_path, other_model)


def test_a_training_may_go_on_from_the_exits_of_another_model_of_the_same_shape(tmp_path) -> None:
    exits = exits_for("llama")
    exits.save(tmp_path)
    other_model = tiny("llama", seed=1)
    begun = Exits.load(tmp_path, other_model, any_weights=True)
    assert begun.owner == exits.owner != Owner.of(other_model)
    for key, value in exits.modules.state_dict().items():
        assert torch.allclose(begun.modules.state_dict()[key], value, atol=1e-2), key
    record = tmp_path / "offramp.json"
    record.write_text(record.read_text().replace('"hidden_size": ', '"hidden_size": 9'))
    with pytest.raises(ExitsMismatch, match="blocks of 9") as raised:
        Exits.load(tmp_path, other_model, any_weights=True)
    assert "offramp train" in raised.value.hint


def test_weights_that_are_not_known_are_not_taken_for_the_exits_own(tmp_path) -> None:
    backbone = copy(tiny("llama"))
    backbone.source = replace(backbone.source, fingerprint="", digest=lambda: "")
    exits = Exits.new(backbone, ExitsConfig((2,), gate_width=32, readout_width=32))
    exits.save(tmp_path)
    with pytest.raises(ExitsMismatch, match="weights unknown"):
        Exits.load(tmp_path, backbone)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_cut_off_exits_are_named(tmp_path, share: float) -> None:
    exits_for("llama").save(tmp_path)
    path = tmp_path / "exits.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CorruptFile, match=r"exits\.safetensors is damaged"):
        Exits.load(tmp_path, tiny("llama"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"backbone": 3, "config": {}}'])
def test_a_damaged_record_is_named(tmp_path, content: str) -> None:
    exits_for("llama").save(tmp_path)
    (tmp_path / "offramp.json").write_text(content)
    with pytest.raises(CorruptFile, match=r"offramp\.json is damaged"):
        Exits.load(tmp_path, tiny("llama"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": ["x"]},
        {"max_tokens": "x"},
        {"raw": 1},
        {"fill": ["project"]},
        {"risk": "0.05"},
        {"delta": float("nan")},
        {"n": 10**400},
        {"needed": 0.5},
        {"tested": {}},
        {"tested": [5]},
        {"tested": [{"passed": "no"}]},
        {"tested": [{"policy": {"thresholds": [0.5], "key": 3}}]},
    ],
    ids=str,
)
def test_a_calibration_of_wrong_types_is_named(tmp_path, wrong: dict) -> None:
    exits = exits_for("llama")
    exits.calibration = {"max_tokens": 48, "raw": False}
    exits.save(tmp_path)
    Exits.load(tmp_path, tiny("llama"))
    exits.calibration |= wrong
    exits.save(tmp_path)
    with pytest.raises(CorruptFile, match=r"offramp\.json is damaged") as caught:
        Exits.load(tmp_path, tiny("llama"))
    assert caught.value.hint


def test_weights_that_do_not_fit_the_record_are_named(tmp_path) -> None:
    exits_for("llama").save(tmp_path)
    tamper(tmp_path, gate_width=64)
    with pytest.raises(CorruptFile, match="damaged"):
        Exits.load(tmp_path, tiny("llama"))


def test_nan_weights_are_refused(tmp_path) -> None:
    exits = exits_for("llama")
    next(exits.modules.parameters()).data.fill_(float("nan"))
    exits.save(tmp_path)
    with pytest.raises(CorruptFile, match="NaN"):
        Exits.load(tmp_path, tiny("llama"))


def test_missing_folders_and_files_are_named(tmp_path) -> None:
    with pytest.raises(CorruptFile, match="no folder"):
        Exits.load(tmp_path / "nowhere", tiny("llama"))
    with pytest.raises(CorruptFile, match=r"no offramp\.json"):
        Exits.load(tmp_path, tiny("llama"))


@pytest.mark.parametrize("layers", [(), (0, 2), (3, 2), (2, 2), (2, 6)])
def test_layers_the_model_does_not_have_are_refused(layers) -> None:
    with pytest.raises(OfframpError, match="do not fit a model of 6"):
        Exits.new(tiny("llama"), ExitsConfig(layers))


@pytest.mark.parametrize("kinds", [{"gate": "oracle"}, {"readout": "oracle"}])
def test_unknown_kinds_are_refused(kinds) -> None:
    with pytest.raises(OfframpError, match="'oracle'"):
        Exits.new(tiny("llama"), ExitsConfig((2,), **kinds))


@pytest.mark.parametrize("kind", [name for name in READOUTS if name != "none"])
def test_an_adapter_starts_as_the_untrained_read_out(kind: str) -> None:
    backbone, h = tiny("llama"), torch.randn(1, 5, 32)
    read = torch.cat([h, torch.randn_like(h)], dim=-1) if kind == "deep" else h
    torch.testing.assert_close(backbone.logits(READOUTS[kind](32, 32)(read)[0]), backbone.logits(h), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", GATES)
def test_a_gates_score_depends_on_earlier_tokens_only_if_it_is_recurrent(kind: str) -> None:
    torch.manual_seed(0)
    gate, h = GATES[kind](32, 32).eval(), torch.randn(1, 5, 32)
    with torch.no_grad():  # a Mamba gate starts with its output projection at zero
        for parameter in gate.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    changed = h.clone()
    changed[:, 0] += 1
    last_differs = not torch.equal(gate(h)[0][:, -1], gate(changed)[0][:, -1])
    assert last_differs == GATES[kind].recurrent


def test_suggested_places_fit_every_depth() -> None:
    assert suggested_places(30) == ((10, 15, 20), (4, 3, 3))
    for blocks in range(2, 100):
        layers, tails = suggested_places(blocks)
        assert layers
        assert all(
            0 < layer < layer + tail < blocks or tail == 0 < layer for layer, tail in zip(layers, tails, strict=True)
        )


@pytest.mark.parametrize("family", ["llama", "llama/compiled", "mamba2", "gemma2", "cohere"])
def test_a_sketch_of_all_dims_names_the_right_candidates(family: str) -> None:
    backbone, exits = tiny(family), sketched(family)
    whole = Engine(backbone).generate("Some words", max_tokens=16)
    for candidates in (1, 7, backbone.vocab_size):
        policy = Policy((1.0,) * 3, candidates=candidates)
        answer = Engine(backbone, exits, policy).generate("Some words", max_tokens=16)
        assert answer.ids == whole.ids
        assert answer.mean_blocks == backbone.n_blocks
    # Verified answers are full depth's, with the whole head.
    assert (
        Engine(backbone, exits, Policy((0.3,) * 3, candidates=1), "verify").generate("Some words", max_tokens=16).ids
        == whole.ids
    )


@torch.inference_mode()
def test_candidates_have_the_heads_own_logits_and_others_none() -> None:
    backbone, exits = tiny("llama/compiled"), sketched("llama/compiled", dims=32)
    h = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
    rough = backbone.sketched(*exits.sketch, 10)(h)
    assert rough.isfinite().sum(-1).tolist() == [[10, 10, 10]]
    kept = rough.isfinite()
    torch.testing.assert_close(rough[kept], backbone.logits(h)[kept])


@torch.inference_mode()
def test_the_sketch_errs_least_on_hidden_states_like_those_it_was_made_of() -> None:
    """The sketch is better than the plain singular vectors of the head, on correlated hidden states."""
    torch.manual_seed(0)
    mix = torch.randn(32, 32) @ torch.diag(torch.logspace(0, -2, 32))
    backbone = tiny("llama")
    h = torch.randn(400, 1, 32) @ mix.T
    texts = [TeacherText(torch.zeros(400), h, torch.zeros(400, 1), torch.zeros(400, 1), torch.ones(400, dtype=torch.bool))]
    reduce, expand = closest(backbone, texts, 8)
    new = backbone.final(torch.randn(400, 32) @ mix.T)
    weight = backbone.head_weight()
    _, _, vectors = torch.linalg.svd(weight, full_matrices=False)
    ours = (new - new @ reduce.T @ expand.T) @ weight.T
    plain = (new - new @ vectors[:8].T @ vectors[:8]) @ weight.T
    assert ours.square().mean() < 0.7 * plain.square().mean()


def test_a_trained_sketch_names_the_models_tokens_more_often_than_the_closest(tmp_path) -> None:
    """On states that it was not trained on, where the model chooses among 40 of its 260 tokens."""
    backbone, dice = tiny("llama"), torch.Generator().manual_seed(0)
    everything = torch.ones(30, dtype=torch.bool)
    liked = backbone.head_weight()[::6][:40]
    liked = liked / liked.norm(dim=-1, keepdim=True)

    def text() -> TeacherText:
        h = liked[torch.randint(40, (30, 1), generator=dice)] + 0.1 * torch.randn(30, 1, 32, generator=dice)
        top = backbone.logits(h[:, 0]).log_softmax(-1).topk(16)
        return TeacherText(torch.zeros(30), h, top.indices, top.values, everything)

    with torch.no_grad():
        texts = [text() for _ in range(440)]
    new = torch.cat([each.hidden[:, 0] for each in texts[400:]])

    def misses(reduce: torch.Tensor, expand: torch.Tensor) -> float:
        named = backbone.sketched(reduce, expand, 4)(new).isfinite()
        return float((~named.gather(-1, backbone.logits(new).argmax(-1, keepdim=True))).float().mean())

    with torch.inference_mode():
        closest_misses = misses(*closest(backbone, texts[:400], 8))
    trained = sketch_of(backbone, texts[:400], 8, Fit(tmp_path, backbone.device))
    with torch.inference_mode():
        assert misses(*trained) < 0.9 * closest_misses


def test_the_cheapest_sketch_that_misses_few_tokens_is_chosen(tmp_path, monkeypatch) -> None:
    backbone, dice = tiny("llama"), torch.Generator().manual_seed(0)

    def text() -> TeacherText:  # states that lie in four of the 32 dims
        h = torch.randn(30, 1, 4, generator=dice) @ torch.eye(4, 32) * 3
        top = backbone.logits(h[:, 0]).log_softmax(-1).topk(16)
        return TeacherText(torch.zeros(30), h, top.indices, top.values, torch.ones(30, dtype=torch.bool))

    with torch.no_grad():
        texts = [text() for _ in range(60)]
    monkeypatch.setattr(sketch, "CANDIDATES", (4, 40))
    fit = Fit(tmp_path / "some", backbone.device)
    maps, named = chosen_sketch(backbone, texts[:40], texts[40:], (1, 4, 8), fit)
    assert maps is not None
    assert (len(maps[0]), named) == (4, 4)
    assert float((ranks(backbone, texts[40:], maps) >= named).float().mean()) <= sketch.MISSED
    tried = {(point["dims"], point["candidates"]): point["missed"] for point in fit.curve if "missed" in point}
    assert set(tried) == {(1, 4), (1, 40), (4, 4), (4, 40)}  # 8 dims would cost more than what 4 dims have shown
    assert min(tried[1, 4], tried[1, 40]) > sketch.MISSED
    assert chosen_sketch(backbone, texts[:40], texts[40:], (1,), Fit(tmp_path / "none", backbone.device)) == (None, 0)


def test_fewer_candidates_cost_less_and_are_counted() -> None:
    backbone, exits = tiny("llama"), sketched("llama")
    answers = [
        Engine(backbone, exits, Policy((1.0,) * 3, candidates=n)).generate("Some words", max_tokens=4)
        for n in (200, 100, 10)
    ]
    assert [answer.flops_saved for answer in answers] == sorted(answer.flops_saved for answer in answers)
    tokens = len(answers[0].tokens)
    assert answers[0].tokens[-1].cumulative_flops - answers[1].tokens[-1].cumulative_flops == tokens * 2 * 100 * 32


def test_a_sketch_is_kept_and_checked(tmp_path) -> None:
    exits = sketched("llama")
    exits.policy = Policy((1.0,) * 3, candidates=50)
    exits.save(tmp_path)
    loaded = Exits.load(tmp_path, tiny("llama"))
    assert loaded.policy.candidates == 50
    for loaded_map, saved_map in zip(loaded.sketch, exits.sketch, strict=True):
        torch.testing.assert_close(loaded_map, saved_map.bfloat16().float())
    tamper(tmp_path, sketch=0)
    with pytest.raises(CorruptFile, match="sketch"):
        Exits.load(tmp_path, tiny("llama"))
    with pytest.raises(BadInput, match="no sketch"):
        Engine(tiny("llama"), exits_for("llama"), Policy((1.0,) * 3, candidates=50))
    with pytest.raises(BadInput, match="there are 260 tokens"):
        Engine(tiny("llama"), sketched("llama"), Policy((1.0,) * 3, candidates=300))
    with pytest.raises(OfframpError, match="cannot name -1 candidates"):
        Exits.new(tiny("llama"), ExitsConfig((1,), sketch=32, candidates=-1))
    with pytest.raises(OfframpError, match="sketch of 33 dims"):
        Exits.new(tiny("llama"), ExitsConfig((1,), sketch=33))
