"""The real model, SmolLM2-135M-Instruct: what holds for the tiny ones holds here."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
import torch

import offramp
from helpers import MADE_AT_ONCE, costing, run_cli
from offramp import Engine, Exits, ExitSet, Policy, files
from offramp.decode.sampling import Sampling
from offramp.evaluation.bench import REST, parts_of_a_token
from offramp.exits.learned import known_among
from offramp.metrics import token_f1
from offramp.model.backbone import Backbone
from offramp.model.hybrid import MIXERS
from offramp.model.loading import check
from offramp.training.data import PROMPTS as OWN

pytestmark = pytest.mark.real
MIXED = {"smollm2-hybrid": 15, "smollm2-mamba": 30}  # how many of the 30 blocks have a mixer
PROMPTS = [
    "Why is the sky blue?",
    "Write a haiku about rain on a tin roof.",
    "Question: Which planet is the largest? Answer:",
    "List three uses of vinegar in the house.",
    "Explain recursion to a ten year old.",
    "What did the Romans use concrete for?",
]


@pytest.fixture(scope="module")
def shipped(smollm2: Backbone) -> Exits:
    exits = ExitSet.shipped(smollm2).draft
    assert exits, "no exit that drafts ships for smollm2"
    return exits


@torch.inference_mode()
def library_tokens(backbone: Backbone, prompt: str, n: int, **kwargs) -> list[int]:
    ids = torch.tensor([backbone.prompts.encode(prompt)])
    out = backbone.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, **kwargs)
    return out[0, ids.shape[1] :].tolist()


def test_the_self_check_finds_no_difference(smollm2: Backbone) -> None:
    assert max(check(smollm2)) <= 1e-5


@pytest.mark.parametrize("prompt", PROMPTS)
def test_closed_and_verified_exits_give_the_librarys_tokens(smollm2: Backbone, shipped: Exits, prompt: str) -> None:
    wanted = library_tokens(smollm2, prompt, 32)
    closed = Engine(smollm2, shipped, Policy((1.0,))).generate(prompt, max_tokens=32)
    assert closed.ids == wanted
    assert closed.flops_saved == 0
    verified = Engine(smollm2, shipped, fill="verify").generate(prompt, max_tokens=32)
    assert verified.ids == wanted


def test_with_a_repetition_penalty_too(smollm2: Backbone) -> None:
    answer = Engine(smollm2, sampling=Sampling(repetition_penalty=1.2)).generate(PROMPTS[3], max_tokens=32)
    assert answer.ids == library_tokens(smollm2, PROMPTS[3], 32, repetition_penalty=1.2)


def test_the_shipped_exits_were_trained_by_a_recorded_command(smollm2: Backbone, shipped: Exits) -> None:
    stages = [shipped.training]
    while "start" in stages[-1]:
        stages.append(stages[-1]["start"])
    for training in stages:
        assert training["command"].startswith("offramp train smollm2 -o build/")
        assert [len(source["sha256"]) for source in training["text"]] == [64]
    assert sum(sum(training["tokens"].values()) for training in stages) > 2_000_000
    for package in {folder.parent for folder in files.shipped("exits")}:
        assert sum(file.stat().st_size for file in package.rglob("*") if file.is_file()) <= 45_000_000


def test_the_shipped_policy_is_calibrated_and_needs_no_exit(smollm2: Backbone) -> None:
    exits = ExitSet.shipped(smollm2).early
    assert exits
    calibration = exits.calibration
    assert (calibration["risk"], calibration["delta"], calibration["loss"]) == (0.05, 0.05, "f1")
    assert calibration["max_tokens"] == 128
    passed = [test for test in calibration["tested"] if test["passed"]]
    assert Policy.from_json(passed[-1]["policy"]) == exits.policy
    own = files.read_lines(OWN, ("prompt",))
    assert known_among(own, exits.training["prompt_hashes"]) == own  # a calibration on these would be refused
    full, early = Engine(smollm2), Engine(smollm2, exits, exits.policy)
    pairs = [(full.generate(prompt, max_tokens=32), early.generate(prompt, max_tokens=32)) for prompt in PROMPTS]
    assert early.mode == "early"
    assert all(0.1 < answer.flops_saved < 0.2 for _, answer in pairs)
    assert sum(token_f1(answer.ids, reference.ids) for reference, answer in pairs) / len(pairs) >= 0.8


@torch.inference_mode()
def test_int4_keeps_the_weights_of_the_file_and_decodes_like_the_library_with_them(smollm2: Backbone) -> None:
    """The file's blocks are in Q4_1. The head, and with it the library's head, is rounded to 8 bits.

    Rows are rounded, too, to 8 bits: where the library's two best tokens are close, the other one may come first.
    """
    backbone = offramp.load("smollm2", "int4", keep=True).backbone
    assert max(check(backbone)) <= 3e-2
    original = dict(smollm2.model.named_parameters())
    for name, weight in backbone.model.named_parameters():
        if "proj" in name:
            torch.testing.assert_close(weight, original[name], rtol=0, atol=1e-6)
    agrees = []
    for prompt in PROMPTS:
        start = backbone.prompts.encode(prompt)
        chosen = torch.tensor(Engine(backbone).generate(start, max_tokens=24).ids)
        ids = torch.cat([torch.tensor(start), chosen])[None, :-1]
        read, exact = (x[0, -len(chosen) :] for x in (backbone.forward(ids), backbone.model(ids).logits))
        for ours in (chosen, read.argmax(-1)):
            gap = exact.amax(-1) - exact.gather(1, ours[:, None])[:, 0]
            assert (gap <= 3e-2 * exact.abs().amax()).all()
            agrees.append((ours == exact.argmax(-1)).float().mean())
    assert fmean(map(float, agrees)) > 0.9


@pytest.mark.parametrize("fill", ["full", "verify"])
def test_the_named_parts_of_a_tokens_time_add_up(fill: str, smollm2: Backbone) -> None:
    exits = ExitSet.shipped(smollm2).draft if fill == "verify" else None
    engine = Engine(smollm2, exits, fill="verify") if exits else Engine(smollm2)
    parts = parts_of_a_token(engine, [smollm2.prompts.encode("Explain how rainbows form, in detail.")], 32)
    named = {part: milliseconds for part, milliseconds in parts.items() if part != REST}
    assert set(named) == {"blocks", "heads", "steps", "text", *(["exits"] if exits else [])}
    assert all(milliseconds > 0 for milliseconds in named.values())
    assert sum(named.values()) >= 0.85 * sum(parts.values())


def shown(*arguments: str) -> str:
    """What a command prints."""
    ran = run_cli(*arguments)
    assert ran.code == 0, ran.stderr
    return ran.stdout


def test_bench_measures_both_sides() -> None:
    result = json.loads(shown("bench", "--tokens", "6", "--pairs", "2", "--dtype", "bfloat16", "--json"))
    assert len(result["ours"]["runs"]) == len(result["theirs"]["runs"]) == 2
    assert result["spread"][0] <= result["ratio"] <= result["spread"][1]
    assert set(result["parts_ms"]) == {"blocks", "heads", "steps", "text", "everything else"}
    assert result["machine"]["threads"] >= 1


def test_the_readmes_generate_command_prints_one_object() -> None:
    record = json.loads(shown("generate", "smollm2", "Why is the sky blue?", "--max-tokens", "12", "--json"))
    assert record["blocks"] == 30
    assert record["thresholds"]
    assert len(record["tokens"]) == 12
    assert record["text"]


@pytest.fixture(scope="module", params=MIXED)
def mixed(request: pytest.FixtureRequest) -> Backbone:
    return offramp.load(request.param, "float32", keep=True).backbone


def test_models_with_mixers_and_their_exits_decode_like_the_librarys_bamba(mixed: Backbone) -> None:
    assert max(check(mixed)) <= 1e-5
    assert mixed.kinds.count("mamba") == MIXED[mixed.name]
    exits = ExitSet.shipped(mixed).draft
    assert exits, f"no exit that drafts ships for {mixed.name}"
    use_cache = "attention" in mixed.kinds  # the library's cache of a bamba model needs a block with attention
    for prompt in PROMPTS[:3]:
        wanted = library_tokens(mixed, prompt, 16, use_cache=use_cache)
        assert Engine(mixed, exits, Policy((1.0,))).generate(prompt, max_tokens=16).ids == wanted
        assert Engine(mixed, exits, fill="verify").generate(prompt, max_tokens=16).ids == wanted


@pytest.mark.parametrize("name", MIXED)
def test_the_mixers_are_small(name: str) -> None:
    (folder,) = (path for path in files.shipped("models") if path.name == name)
    assert (folder / MIXERS).stat().st_size <= 25_000_000


@pytest.fixture(scope="module")
def mamba_tiny() -> Backbone:
    return offramp.load("mamba-tiny", "float32", keep=True).backbone


def test_the_mamba_model_and_its_exits_decode_like_the_library(mamba_tiny: Backbone) -> None:
    assert max(check(mamba_tiny)) <= 1e-5
    exits = ExitSet.shipped(mamba_tiny).early
    assert exits, f"no exits ship for {mamba_tiny.name}"
    for prompt in PROMPTS[:3]:
        answer = Engine(mamba_tiny, exits, Policy((1.0,) * len(exits))).generate(prompt, max_tokens=24)
        assert answer.ids == library_tokens(mamba_tiny, prompt, 24)[: len(answer.ids)]


def test_the_mamba_models_exits_open_and_every_fill_decodes(mamba_tiny: Backbone) -> None:
    exits = ExitSet.shipped(mamba_tiny).early
    assert exits
    for fill in MADE_AT_ONCE:
        answers = [
            Engine(mamba_tiny, exits, Policy((0.5,) * len(exits)), fill).generate(prompt, max_tokens=16)
            for prompt in PROMPTS
        ]
        assert any(token.exit_block < mamba_tiny.n_blocks for answer in answers for token in answer.tokens)
        assert sum(answer.flops_saved for answer in answers) > 0


def test_the_mamba_model_says_what_it_was_trained_on_and_is_small(mamba_tiny: Backbone) -> None:
    folder = Path(mamba_tiny.source.path)
    record = json.loads((folder / "training.json").read_text())
    assert record["parameters"] == sum(parameter.numel() for parameter in mamba_tiny.model.parameters())
    assert all(source["sha256"] for source in record["corpus"]["sources"])
    assert {source["name"] for source in record["corpus"]["excluded"]} >= {
        "TruthfulQA.csv",
        "coqa.json",
        "rc.nocontext.jsonl",
    }
    assert all(model["curve"] for model in record.get("models", [record]))
    assert (folder / "model.safetensors").stat().st_size <= 16_000_000
    (exits,) = (path for path in files.shipped("exits") if path.name == mamba_tiny.name)
    assert sum(file.stat().st_size for file in exits.iterdir()) <= 3_000_000


@pytest.mark.parametrize("model", ["smollm2", "mamba-tiny", "smollm2-mamba"])
def test_the_demo_shows_that_drafts_give_the_same_tokens(model: str) -> None:
    answers = shown("demo", "--model", model, "--max-tokens", "6")
    assert answers.count("as full depth, same tokens") == 3
    assert all(f"│ {mode}" in answers for mode in ("full", "exact", "early"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("smollm2", "bfloat16"),
        ("smollm2", "int4"),
        ("mamba-tiny", "bfloat16"),
        ("smollm2-hybrid", "bfloat16"),
        ("smollm2-mamba", "int4"),
    ],
)
@pytest.mark.filterwarnings("ignore:These exits were trained")
def test_verified_exits_give_the_real_models_own_tokens_in_any_weights(name: str, dtype: str) -> None:
    """Compiled blocks add up each row in one order, so a chunk gives the tokens that single steps give, even at ties."""
    backbone = offramp.load(name, dtype).backbone
    if backbone.engine != "compiled blocks":
        pytest.skip("no compiled library")
    drafting = ExitSet.shipped(backbone).draft
    assert drafting
    full = Engine(backbone)
    engines = [  # whose drafts cost little, so that they are made on every machine
        costing(Engine(backbone, drafting, Policy((0.1,) * len(drafting), drafting.policy.confidence), "verify"), row=0.02),
    ]
    stood = rejected = 0
    for prompt in PROMPTS[:4]:
        whole = full.generate(prompt, max_tokens=32)
        for engine in engines:
            answer = engine.generate(prompt, max_tokens=32)
            assert answer.ids == whole.ids
            stood += sum(token.exit_block < backbone.n_blocks for token in answer.tokens)
            rejected += answer.tokens[-1].rejected
    assert stood > 0 < rejected


@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
def test_an_answer_of_the_real_model_is_the_same_among_seventy(dtype: str) -> None:
    backbone = offramp.load("smollm2", dtype).backbone
    if backbone.engine != "compiled blocks":
        pytest.skip("no compiled library")
    drafting = ExitSet.shipped(backbone).draft
    assert drafting
    many = [f"{PROMPTS[place % 6]} Give {place} reasons." for place in range(70)]
    for engine in (Engine(backbone), Engine(backbone, drafting, fill="verify")):
        alone = [engine.generate(prompt, max_tokens=8).ids for prompt in many[:4]]
        assert [answer.ids for answer in engine.generate_batch(many, max_tokens=8)[:4]] == alone


def test_verified_exits_side_by_side_equal_full_depth_which_is_the_librarys(smollm2: Backbone, shipped: Exits) -> None:
    prompts = [smollm2.prompts.encode(prompt) for prompt in PROMPTS]
    answers = Engine(smollm2, shipped, fill="verify").generate_batch(prompts, max_tokens=24)
    full = Engine(smollm2)
    assert [answer.ids for answer in answers] == [full.generate(prompt, max_tokens=24).ids for prompt in prompts]


def test_verified_exits_side_by_side_equal_the_librarys_generate(mamba_tiny: Backbone) -> None:
    exits = ExitSet.shipped(mamba_tiny).early
    assert exits
    engine = Engine(mamba_tiny, exits, Policy((0.6,) * len(exits)), "verify")
    answers = engine.generate_batch([mamba_tiny.prompts.encode(prompt) for prompt in PROMPTS], max_tokens=24)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.ids == library_tokens(mamba_tiny, prompt, 24)[: len(answer.ids)]


def test_the_shipped_drafts_make_several_tokens_of_a_pass(smollm2: Backbone) -> None:
    exits = ExitSet.shipped(smollm2).draft
    assert exits
    answers = [Engine(smollm2, exits, fill="verify").generate(prompt, max_tokens=32) for prompt in PROMPTS]
    tokens = sum(len(answer.tokens) for answer in answers)
    assert tokens / sum(answer.tokens[-1].deep_passes for answer in answers) > 1.25
