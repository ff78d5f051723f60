"""The verbs print what they promise, and no mistake of a user ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Annotated, Any

import pytest
import typer
from rich.console import Console

import offramp
from helpers import Ran, exits_for, modest_exits, run_cli
from models import BLOCKS, compiled_only, saved, tiny
from offramp import Engine, Policy, Sampling
from offramp.cli.app import app
from offramp.cli.flags import Chosen, Only, with_flags
from offramp.cli.options import DecodingOptions
from offramp.cli.progress import progress_bars
from offramp.decode import plan
from offramp.decode.row_costs import WIDTHS
from offramp.errors import BadInput
from offramp.settings import setting
from offramp.training.config import CalibrationConfig, TrainConfig

VERBS = ("demo", "generate", "chat", "train", "calibrate", "export", "eval", "report", "inspect", "bench", "serve")
TOKEN = {
    "id",
    "text",
    "exit_block",
    "blocks",
    "confidence",
    "flops",
    "cumulative_flops",
    "deep_passes",
    "rejected",
    "source",
    "drafted",
}
ANSWER = {
    "text",
    "tokens",
    "blocks",
    "mean_blocks",
    "mode",
    "flops_saved",
    "tokens_per_deep_pass",
    "acceptance_rate",
    "prefill_seconds",
    "decode_tokens_per_second",
    "fill",
    "thresholds",
    "policy",
    "finish_reason",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model in a folder, exits for it, and a cache of their own."""
    folder = tmp_path_factory.mktemp("world")
    saved(tiny("llama"), folder / "model")
    os.environ["OFFRAMP_CACHE"] = str(folder / "cache")
    backbone = offramp.load(str(folder / "model"), "float32").backbone
    exits = exits_for("llama")
    exits.owner, exits.policy = replace(exits.owner, fingerprint=backbone.source.fingerprint), Policy((0.9, 0.5, 0.5))
    exits.save(folder / "exits")
    (folder / "few.txt").write_text("One\nTwo\n")
    story = {"id": "a", "story": "It is red.", "questions": [{"input_text": "Which?"}], "answers": [{"input_text": "Red"}]}
    (folder / "coqa.json").write_text(json.dumps({"data": [story]}))
    for name, changed in (("shape", {}), ("odd", {"activation_function": "none such"})):  # configs without weights
        (folder / name).mkdir()
        config = {**tiny("gpt2").config.to_dict(), **changed}
        (folder / name / "config.json").write_text(json.dumps(config))
    yield folder
    del os.environ["OFFRAMP_CACHE"]


def run(world, *arguments: str, stdin: str = "", code: int = 0, **environment: str) -> Ran:
    ran = run_cli(*arguments, folder=world, stdin=stdin, OFFRAMP_CACHE=str(world / "cache"), **environment)
    assert ran.code == code, ran.stderr
    return ran


def run_process(world, *arguments: str, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    """Like `run`, but in a process of its own, for what only a process can show. It takes seconds."""
    settings = {**os.environ, "OFFRAMP_CACHE": str(world / "cache"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", "from offramp.cli import main; main()", *arguments]
    ran = subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=world, env=settings)
    assert ran.returncode == code, ran.stderr
    assert "Traceback" not in ran.stderr
    return ran


def options_of(verb: str) -> dict[str, Any]:
    """A verb's options by their flags, from the command line's parser."""
    command = typer.main.get_command(app).commands[verb]
    return {flag: option for option in command.params for flag in option.opts}


def test_help_names_every_verb_and_says_the_defaults(world) -> None:
    overview = run(world, "--help").stdout
    for verb in VERBS:
        assert verb in overview
    shown = " ".join(run(world, "train", "--help", COLUMNS="400").stdout.split())
    assert "Inner dims of a gate, a multiple of 16 (default: 64)." in shown
    assert "Inner dims of a read-out, a multiple of 32 (default: 512; with --draft: 1024)." in shown


def test_names_in_a_verbs_help_are_those_of_the_classes(world, monkeypatch) -> None:
    from offramp.exits.gates import GATES, LinearGate

    monkeypatch.setitem(GATES, "new", LinearGate)
    for verb, words in (
        ("train", ["linear, ffn, mamba or new (default: mamba", "deep (default: ffn"]),
        ("calibrate", ["f1, exact or task", "precision, thresholds, decay, patience or fixed"]),
        ("eval", ["truthfulqa, truthfulqa-mc, triviaqa, coqa, humaneval or mbpp"]),
    ):
        shown = " ".join(run(world, verb, "--help", COLUMNS="400").stdout.split())
        for each in words:
            assert each in shown


def test_an_overview_waits_for_no_library_that_takes_seconds() -> None:
    program = "import sys; from offramp.cli.app import app; app(['--help'], standalone_mode=False)"
    program += "; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def panels(verb: str) -> tuple[int, int]:
    """How many flags a verb has in the first panel of its help, and how many elsewhere."""
    flags = [option for flag, option in options_of(verb).items() if flag.startswith("--") and flag != "--help"]
    first = sum(option.rich_help_panel is None for option in flags)
    return first, len(flags) - first


@pytest.mark.parametrize("verb", ["train", "calibrate"])
def test_the_first_panel_of_a_verbs_help_is_short(verb: str) -> None:
    assert panels(verb)[0] <= 12


@pytest.mark.parametrize("verb", ["generate", "serve"])
def test_the_first_panel_of_what_answers_is_short(verb: str) -> None:
    assert panels(verb)[0] <= 12


def test_there_are_few_flags() -> None:
    made = {verb: sum(panels(verb)) for verb in ("train", "calibrate", "export", "eval", "report", "inspect", "bench")}
    assert sum(made.values()) <= 60, made


def test_there_are_at_most_a_hundred_flags_in_all() -> None:
    assert sum(sum(panels(verb)) for verb in VERBS) <= 100


def test_it_says_its_version(world) -> None:
    assert run(world, "--version").stdout == f"offramp {offramp.__version__}\n"


def test_a_shell_completes_verbs() -> None:
    program = "import sys; sys.argv[0] = 'offramp'; from offramp.cli import main; main()"
    words = {"_OFFRAMP_COMPLETE": "complete_bash", "COMP_WORDS": "offramp ge", "COMP_CWORD": "1"}
    found = subprocess.run([sys.executable, "-c", program], env={**os.environ, **words}, capture_output=True, text=True)
    assert found.stdout.split() == ["generate"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_says_what_it_does(verb: str) -> None:
    for flag, option in options_of(verb).items():
        assert option.help, flag


@pytest.mark.parametrize(
    ("verb", "config", "flags"),
    [
        ("train", TrainConfig, ("--layers", "--own-prompts", "--hours", "--gate-width", "--draft")),
        ("calibrate", CalibrationConfig, ("--risk", "--delta", "--policy", "--retest", "--exits", "--dtype")),
        ("generate", Sampling, ("--temperature", "--top-p", "--repetition-penalty", "--exits", "--fill")),
        ("generate", DecodingOptions, ("--threshold", "--mode", "--fill", "--dtype")),
    ],
)
def test_a_verbs_flags_defaults_and_help_are_its_configs(verb: str, config: type, flags: tuple[str, ...]) -> None:
    options = options_of(verb)
    assert set(flags) <= set(options)
    for field in fields(config):
        flag = field.metadata.get("flag") or f"--{field.name.replace('_', '-')}"
        if not field.metadata.get("help") or (flag not in options and config not in (TrainConfig, CalibrationConfig)):
            continue  # a verb may take only some of the fields
        option = options[flag]
        assert option.help.startswith(field.metadata["help"].removesuffix("."))
        several = isinstance(field.default, tuple)
        shown = ",".join(map(str, field.default)) if several else field.default
        if verb == "train":  # which default holds depends on --draft
            assert option.default is None
            assert field.default in (None, ()) or f"(default: {shown}" in option.help
        elif field.default != ():
            assert option.default == shown


@dataclass(frozen=True)
class Few:
    """A config for the tests of flags."""

    count: int = setting(3, "How many.")
    places: tuple[int, ...] | None = setting(None, "Where.")
    names: tuple[str, ...] = setting((), "Who.", flag="--name")
    hidden: float = 0.5


@dataclass(frozen=True)
class Other:
    """A config with another width in drafts."""

    width: int = setting(512, "How wide.", draft=256)
    tails: tuple[int, ...] = setting((), "Which tails.")
    middle: int = setting(0, "Which block.")


CHANGED = Few(7, hidden=0.25)


def flagged(verb: Callable[..., None], *arguments: str) -> None:
    """Run a verb with these arguments."""
    small = typer.Typer()
    small.command()(with_flags(verb))
    typer.main.get_command(small)(list(arguments), standalone_mode=False)


def test_a_verb_gets_the_config_that_its_flags_make() -> None:
    seen: list[Any] = []

    def verb(*, few: Few) -> None:
        seen.append(few)

    flagged(verb, "--places", "1,2", "--name", "a", "--name", "b")
    flagged(verb)
    assert seen == [Few(3, (1, 2), ("a", "b")), Few()]
    with pytest.raises(BadInput, match="not a list of whole numbers"):
        flagged(verb, "--places", "1,b")
    with pytest.raises(Exception, match="No such option"):
        flagged(verb, "--hidden", "1")


def test_a_verb_may_take_some_fields_with_other_defaults_or_only_what_was_chosen() -> None:
    seen: list[Any] = []

    def verb(*, few: Annotated[Few, Only("count")] = CHANGED, chosen: Annotated[dict[str, Any], Chosen(Other)]) -> None:
        seen.append((few, chosen))

    flagged(verb)
    flagged(verb, "--count", "1", "--width", "9", "--middle", "0", "--tails", "0")
    assert seen == [(CHANGED, {}), (replace(CHANGED, count=1), {"width": 9, "middle": 0, "tails": (0,)})]
    with pytest.raises(Exception, match="No such option"):
        flagged(verb, "--places", "1")


def test_generate_prints_the_answer_that_the_engine_gives(world) -> None:
    ran = run(world, "generate", "model", "Hello there", "--max-tokens", "12", "--dtype", "float32")
    assert ran.stdout == Engine(tiny("llama")).generate("Hello there", max_tokens=12).text + "\n"


@pytest.mark.parametrize("arguments", ["generate model {}", "generate model {} --json", "chat model"])
def test_a_long_prompt_shows_its_progress_and_a_short_one_does_not(world, arguments: str, monkeypatch) -> None:
    from offramp.cli import progress
    from offramp.decode import batch

    reports: list[tuple[str, int, int]] = []

    @contextmanager
    def bars(transient: bool):
        yield lambda stage, completed, total, note: reports.append((stage, completed, total))

    monkeypatch.setattr(progress, "progress_bars", bars)
    monkeypatch.setattr(batch, "PIECE", 16)
    for prompt, shown in (("Hi", False), ("Hello there, " * 4, True)):
        filled = [argument.format(prompt) for argument in arguments.split()]
        run(world, *filled, "--max-tokens", "2", "--dtype", "float32", stdin=f"{prompt}\n")
        assert bool(reports) == shown
    assert [completed for _, completed, _ in reports] == [16, 32, 48, 51]
    assert {(stage, total) for stage, _, total in reports} == {("reading", 51)}


def test_generate_json_has_the_promised_fields(world) -> None:
    arguments = ("model", "Hello", "--exits", "exits", "--max-tokens", "12", "--dtype", "float32", "--compare", "--json")
    record = json.loads(run(world, "generate", *arguments, "--mode", "early").stdout)
    assert set(record) == ANSWER | {"full", "consistency"}
    assert set(record["full"]) == ANSWER
    assert all(set(token) == TOKEN for token in record["tokens"])
    assert (record["blocks"], record["mode"], record["fill"]) == (BLOCKS, "early", "project")
    assert record["thresholds"] == {"1": 0.9, "3": 0.5, "5": 0.5}
    assert record["mean_blocks"] < BLOCKS == record["full"]["mean_blocks"]
    assert 0 <= record["consistency"] <= 1
    assert record["full"]["flops_saved"] == 0


def test_a_threshold_of_one_is_full_depth(world) -> None:
    arguments = ("model", "Hello", "--exits", "exits", "--threshold", "1", "--max-tokens", "12", "--compare", "--json")
    record = json.loads(run(world, "generate", *arguments).stdout)
    assert record["consistency"] == 1
    assert record["flops_saved"] == 0


def test_many_prompts_give_json_lines(world) -> None:
    (world / "prompts.jsonl").write_text('{"prompt": "One"}\n{"prompt": "Two"}\n')
    lines = run(world, "generate", "model", "--prompts", "prompts.jsonl", "--max-tokens", "3").stdout.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["One", "Two"]


@compiled_only
def test_verified_json_is_full_depths_answer_with_its_books(world, monkeypatch) -> None:
    monkeypatch.setattr(plan, "row_costs", lambda format: (0.0,) * 8)  # of so small a model, no draft would pay
    monkeypatch.setattr(plan, "asking_cost", lambda *parts: 0.0)
    made = modest_exits("llama", gate="linear")
    fingerprint = offramp.load(str(world / "model"), "float32").backbone.source.fingerprint
    made.owner = replace(made.owner, fingerprint=fingerprint)
    made.save(world / "drafting")
    arguments = ("model", "Hello", "--exits", "drafting", "--threshold", "0.3", "--max-tokens", "16", "--dtype", "float32")
    draws = ("--temperature", "0.9", "--top-p", "0.99", "--seed", "7")
    for extra in ((), draws):
        record = json.loads(run(world, "generate", *arguments, "--mode", "exact", "--compare", "--json", *extra).stdout)
        assert record["text"] == record["full"]["text"]
        assert record["consistency"] == 1
        assert 0 <= record["acceptance_rate"] <= 1 <= record["tokens_per_deep_pass"]
        assert record["decode_tokens_per_second"] > 0 < record["full"]["decode_tokens_per_second"]


def test_answers_side_by_side_are_those_one_by_one(world) -> None:
    (world / "three.txt").write_text("One\nTwo, and a longer one\nThree\n")
    arguments = ("model", "--exits", "exits", "--prompts", "three.txt", "--max-tokens", "8", "--dtype", "float32")
    together = [json.loads(line) for line in run(world, "generate", *arguments).stdout.splitlines()]
    for record in together:
        alone = json.loads(
            run(world, "generate", "model", record["prompt"], *arguments[1:3], *arguments[5:], "--json").stdout
        )
        assert alone["text"] == record["text"]


def test_bench_compares_modes_and_fills(world) -> None:
    arguments = ("--model", "model", "--exits", "exits", "--compare", "full,defer,exact")
    sizes = ("--tokens", "6", "--pairs", "2", "--dtype", "float32")
    result = json.loads(run(world, "bench", *arguments, *sizes, "--json").stdout)
    assert list(result["speeds"]) == ["full", "defer", "exact"]
    assert result["speeds"]["full"]["ratio"] == result["speeds"]["exact"]["equal"] == 1
    assert result["ratio"] == result["speeds"]["exact"]["ratio"]
    table = run(world, "bench", *arguments, *sizes, COLUMNS="80").stdout.partition("└")[0]
    for word in ("tokens", "a pass", "drafts", "accepted", "exact"):
        assert word in table
    assert "…" not in table  # nothing is cut off where a terminal has 80 columns


def test_bench_measures_what_rows_cost(world) -> None:
    arguments = ("bench", "--model", "model", "--dtype", "float32", "--costs")
    result = json.loads(run(world, *arguments, "--json").stdout)
    assert [*result] == [*map(str, WIDTHS)]
    (kept,) = json.loads((world / "cache" / "costs.json").read_text()).values()
    assert kept == [*result.values()]
    shown = run(world, *arguments).stdout
    (world / "cache" / "costs.json").unlink()
    assert re.search(r"\b32\b.*\d\.\d\d", shown)
    assert "answers do not change" in shown


def test_compare_for_people_shows_both_answers(world) -> None:
    words = ("Hello", "--exits", "exits", "--compare", "--max-tokens", "8")
    early = run(world, "generate", "model", *words, "--mode", "early").stdout
    for word in ("full  ", "early  ", "left after block", "tokens/s", "FLOPs saved", "consistency"):
        assert word in early
    assert "left after block" not in run(world, "generate", "model", *words, "--mode", "exact").stdout


def test_chat_remembers_and_ends_at_the_end_of_input(world) -> None:
    lines = run(world, "chat", "model", "--json", "--max-tokens", "4", stdin="Hi\nAgain\n").stdout.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["Hi", "Again"]
    alone = run(world, "chat", "model", "--json", "--max-tokens", "4", stdin="Again\n").stdout
    assert json.loads(lines[1])["tokens"][0]["flops"] > json.loads(alone)["tokens"][0]["flops"]  # a longer context
    assert run(world, "chat", "model", "--max-tokens", "4", stdin="Hi\n\n").stdout.strip("\n ")


def test_inspect_describes_model_and_exits(world) -> None:
    facts = json.loads(run(world, "inspect", "model", "--exits", "exits", "--json").stdout)
    assert facts["blocks"] == BLOCKS == len(facts["parameters_per_block"])
    assert facts["exits"]["layers"] == [1, 3, 5]
    assert facts["head_in_blocks"] > 0 < facts["gate_in_blocks"]
    assert [row["after_block"] for row in facts["leaving"]] == [1, 3, 5, BLOCKS]
    assert all(low["flops"] < high["flops"] for low, high in zip(facts["leaving"], facts["leaving"][1:], strict=False))
    assert "one LM head call" in run(world, "inspect", "model").stdout


@pytest.mark.parametrize(
    ("name", "parameters", "kind", "blocks"),
    [
        ("mistralai/Mistral-7B-v0.3", 7_248_023_552, "attention", 32),
        ("mistralai/Mamba-Codestral-7B-v0.1", 7_285_403_648, "mamba", 64),
    ],
)
def test_inspect_knows_the_papers_models_from_their_config_alone(world, name, parameters, kind, blocks) -> None:
    facts = json.loads(run(world, "inspect", name, "--dtype", "int4", "--json").stdout)
    assert facts["parameters"] == parameters
    assert facts["kinds"] == [kind] * blocks
    full = facts["leaving"][-1]
    assert full["flops"] == pytest.approx(2 * parameters, rel=0.05)  # two for each weight, the embedding aside
    assert 0.6 * parameters < full["bytes"] < 0.75 * parameters  # 5 bits a weight; 8 in the head


def test_train_writes_exits_that_generate_uses(world) -> None:
    (world / "ask.txt").write_text("\n".join(f"Prompt number {n}" for n in range(12)))
    ran = run(
        world,
        *("train", "model", "-o", "mine", "--layers", "2,4", "--own-prompts", "ask.txt"),
        *("--epochs", "1", "--gate-epochs", "1", "--gate", "ffn", "--readout", "linear", "--json"),
    )
    record = json.loads(ran.stdout)
    assert [row["block"] for row in record["validation"]] == [2, 4]
    assert record["command"].startswith("offramp train model -o mine")
    answer = run(world, "generate", "model", "Hi", "--exits", "mine", "--threshold", "0", "--max-tokens", "3", "--json")
    assert json.loads(answer.stdout)["mean_blocks"] == 2


def test_calibrate_keeps_its_thresholds_with_the_exits(world) -> None:
    (world / "prompts.txt").write_text("".join(f"Prompt {number}\n" for number in range(40)))
    exits_for("llama", readout="none").save(world / "plain")  # random adapters would always be wrong
    arguments = ("model", "--prompts", "prompts.txt", "--policy", "decay", "--max-tokens", "4", "--delta", "0.2")
    ran = run(world, "calibrate", *arguments, "--risk", "0.9", "--exits", "plain", "-o", "calibrated", "--json")
    record = json.loads(ran.stdout)
    assert record["passed"]
    kept = json.loads((world / "calibrated" / "offramp.json").read_text())
    assert kept["policy"] == record["policy"] == kept["calibration"]["policy"]
    answer = json.loads(
        run(world, "generate", "model", "Prompt 41", "--exits", "calibrated", "--mode", "early", "--json").stdout
    )
    assert list(answer["thresholds"].values()) == record["policy"]["thresholds"]
    ran = run(world, "generate", "model", "Prompt 41", "--exits", "calibrated", "--fill", "copy", "--max-tokens", "4")
    assert "guarantee nothing" in ran.stderr
    # Without -o, the exits are calibrated in place. These cannot keep the risk, so all stay closed.
    assert "stay closed" in run(world, "calibrate", *arguments, "--exits", "calibrated", "--risk", "0.1").stdout
    kept = json.loads((world / "calibrated" / "offramp.json").read_text())
    assert kept["policy"]["thresholds"] == [1.0, 1.0, 1.0]


def test_exits_of_the_hub_are_calibrated_into_a_folder_that_is_named(world, monkeypatch) -> None:
    monkeypatch.setattr("offramp.exits.exit_set.fetched", lambda name, folders: world / "exits")
    (world / "asked.txt").write_text("".join(f"Prompt {number}\n" for number in range(20)))
    arguments = ("model", "--prompts", "asked.txt", "--max-tokens", "2", "--risk", "0.9", "--exits", "org/name")
    refused = run(world, "calibrate", *arguments, code=1)
    assert "no folder to keep" in refused.stderr
    assert "-o DIR" in refused.stderr
    assert not (world / "org").exists()
    run(world, "calibrate", *arguments, "-o", "org/name")
    run(world, "generate", "model", "Hi", "--exits", "org/name", "--max-tokens", "2")  # the folder's, which is whole


@pytest.mark.parametrize("named", ["", "coqa="])
def test_a_data_file_may_have_an_equals_sign_in_its_name(world, named: str) -> None:
    (world / "a=1").mkdir(exist_ok=True)
    shutil.copy(world / "coqa.json", world / "a=1" / "coqa.json")
    assert "coqa, 1 questions" in run(world, "eval", "model", "--task", "coqa", "--data", f"{named}a=1/coqa.json").stdout


def test_eval_scores_each_condition_and_report_shows_them(world) -> None:
    lines = [{"question_id": n, "question": f"Who {n}?", "answer": {"value": "Me", "aliases": []}} for n in range(9)]
    (world / "trivia.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ("eval", "model", "--task", "triviaqa", "--data", "trivia.jsonl", "--exits", "exits", "--limit", "3")
    ran = run(world, *command, "--threshold", "0.5", "--threshold", "1,1,0.9", "--json", "out.json")
    lines = [line for line in ran.stdout.splitlines() if line.startswith("triviaqa, 3 questions")]
    assert [", ".join(line.split(": ")[0].split(", ")[2:]) for line in lines] == [
        "full depth",
        "project, mamba, 0.5 0.5 0.5",
        "project, mamba, closed closed 0.9",
    ]
    results = json.loads((world / "out.json").read_text())["results"]
    assert [len(result["items"]) for result in results] == [3, 3, 3]
    assert not list(world.glob(".out.json*"))
    # Two processes share the questions, and the results are those of one.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(world / "launched.py")]
    (world / "launched.py").write_text("from offramp.cli.app import main; main()")
    shared = (*command, "--threshold", "0.5", "--threshold", "1,1,0.9", "--batch", "1", "--json", "shared.json")
    environment = {**os.environ, "OFFRAMP_CACHE": str(world / "cache"), "OMP_NUM_THREADS": "1"}
    both = subprocess.run(
        [sys.executable, *launch, *shared], cwd=world, env=environment, capture_output=True, text=True, timeout=200
    )
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("triviaqa, 3 questions") == 3
    for one, two in zip(results, json.loads((world / "shared.json").read_text())["results"], strict=True):
        for name in ("id", "text", "full_text", "scores", "exits"):
            assert [item[name] for item in one["items"]] == [item[name] for item in two["items"]]
    assert not list(world.glob(".shared.json*"))
    assert "report.html" in run(world, "report", "out.json", "-o", "report.html").stdout
    assert (world / "report-figures").is_dir()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("generate", "modle", "Hi"), "There is no model 'modle'"),
        (("generate", "some/model", "Hi"), "HF_HUB_OFFLINE"),
        (("generate", "model", ""), "The prompt is empty"),
        (("generate", "model"), "Give either a prompt or --prompts"),
        (("generate", "model", "x" * 600), "tokens long"),
        (("generate", "model", "Hi", "--exits", "nowhere"), "no folder nowhere"),
        (("generate", "model", "Hi", "--threshold", "0.5"), "No exits ship for model"),
        (("bench", "--model", "model", "--compare", "full,defer"), "No exits ship for model"),
        (("bench", "--model", "model", "--compare", "full,magic"), "no mode and no fill 'magic'"),
        (
            ("generate", "model", "Hi", "--mode", "full", "--fill", "copy"),
            "The mode full has no exits, so nothing for --fill",
        ),
        (("generate", "model", "Hi", "--mode", "magic"), "no mode 'magic'"),
        (("generate", "model", "Hi", "--exits", "exits", "--threshold", "2"), "not in [0, 1]"),
        (("generate", "model", "Hi", "--exits", "exits", "--fill", "magic"), "no fill 'magic'"),
        (("generate", "model", "Hi", "--dtype", "int3"), "'int3' is not a dtype"),
        (("generate", "model", "Hi", "--max-tokens", "0"), "0 tokens"),
        (("generate", "model", "--prompts", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("inspect", "some/model"), "could not be fetched"),
        (("inspect", "odd"), "cannot be read"),
        (("inspect", "shape", "--dtype", "int8"), "no code for its family"),
        (("bench", "--model", "model", "--tokens", "600"), "tokens do not fit"),
        (("bench", "--model", "model", "--tokens", "1"), "at least 2 tokens"),
        (("generate", "model", "Hi", "--exits", "exits", "--threshold", "0.5,0.9"), "2 thresholds do not fit 3 exits"),
        (("generate", "model", "Hi", "--exits", "exits", "--threshold", "half"), "'half' is not a threshold"),
        (
            ("eval", "model", "--task", "coqa", "--data", "coqa.json", "--exits", "exits", "--fill", "x"),
            "no fill 'x'",
        ),
        (("calibrate", "model", "--prompts", "nowhere.txt", "--exits", "exits"), "nowhere.txt cannot be read"),
        (("calibrate", "model", "--prompts", "few.txt", "--exits", "exits"), "2 prompts are too few"),
        (("calibrate", "model", "--prompts", "few.txt"), "no folder to keep"),
        (("calibrate", "model", "--prompts", "few.txt", "-o", "x"), "No exits ship"),
        (("eval", "model", "--task", "squad"), "no task 'squad'"),
        (("eval", "model", "--task", "coqa", "--data", "few.txt"), "not CoQA's JSON"),
        (("eval", "model", "--task", "coqa,triviaqa", "--data", "few.txt"), "not clear which --data"),
        (("eval", "model", "--task", "coqa", "--data", "coqa=coqa.json", "--data", "few.txt"), "not clear which --data"),
        (("report", "few.txt", "-o", "x.html"), "holds no results"),
        (("train", "model", "-o", "x", "--own-prompts", "few.txt", "--epochs", "1"), "2 texts are too few"),
        (("export", "model", "-o", "x"), "No exits ship for model"),
        (("export", "model", "-o", "x", "--exits", "nowhere"), "no folder nowhere"),
        (("export", "model", "-o", "x", "--gguf", "x"), "Name one folder"),
        (("export", "model", "-o", "model", "--exits", "exits"), "holds the model itself"),
        (("train", "model", "-o", "x", "--layers", "2,nine"), "not a list of whole numbers"),
        (("train", "model", "-o", "x", "--readout-width", "40"), "40 dims wide"),
        (("train", "model", "-o", "x", "--layers", "9"), "do not fit a model of 6"),
        (("train", "model", "-o", "x", "--gate", "oracle"), "no gate 'oracle'"),
        (("train", "model", "-o", "model/config.json/x", "--layers", "2"), "Not a directory"),
    ],
)
def test_mistakes_get_one_sentence_and_a_hint(world, arguments, sentence: str, monkeypatch, capsys) -> None:
    """Run in this process, since starting another takes longer than the whole test."""
    from offramp.cli import main

    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", ["offramp", *arguments])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main sets its own
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert printed.out == ""
    if "Not a directory" not in sentence:
        assert "hint: " in printed.err


def test_progress_in_a_log_is_one_whole_line_for_each_stage(capsys) -> None:
    with progress_bars() as report:
        for count in range(1, 4):
            report("a stage with a long name", count, 3, "loss 0.25" if count == 3 else "")
        report("second", 1, 2000)
        report("third", 2000, 2000)
        report("third", 7, 7)  # for other work
    lines = [re.sub(r"[\d.]+ s", "S", line) for line in capsys.readouterr().err.split("\n")]
    assert lines == [
        "a stage with a long name: 3 in S, loss 0.25",
        "second: 1 of 2,000 in S",
        "third: 2,000 in S",
        "third: 7 in S",
        "",
    ]
    with progress_bars(transient=True) as report:
        report("reading", 3, 3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("columns", [60, 80])
def test_progress_in_a_terminal_does_not_cut_the_stages_names(columns: int, monkeypatch) -> None:
    screen = io.StringIO()
    console = partial(Console, file=screen, width=columns, force_terminal=True, color_system=None)
    monkeypatch.setattr("offramp.cli.progress.console", lambda stderr: console())
    with progress_bars() as report:
        report("full depth", 3, 3)
        report("plan", 1, 1, "exits after blocks 10 + 4, 15 + 3, 20 + 3; 2,400 answers of about 100 tokens in 11 min")
    assert "full depth " in screen.getvalue()
    assert "plan " in screen.getvalue()
    assert "…" not in screen.getvalue()


def test_stopped_work_says_that_the_same_command_goes_on(world, monkeypatch, capsys) -> None:
    from offramp.cli import main
    from offramp.training import training

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", ["offramp", "train", "model", "-o", "stopped"])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main sets its own
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert "hint: Nothing is lost: the same command goes on from here." in capsys.readouterr().err


def test_a_mistake_ends_the_process_without_a_traceback(world) -> None:
    assert "error: There is no model" in run_process(world, "generate", "modle", "Hi", code=1).stderr
