"""Tuning: loss and layer dropout are LayerSkip's, early blocks learn, full depth stays, and a run can be resumed."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import offramp
from lm.tune import TuneConfig, draw_layer_dropout, exit_weights, main, measure_held_out, print_table, record_states, tune
from models import BLOCKS, saved, tiny
from offramp.errors import BadInput
from offramp.model.loading import wrap

CONFIG = TuneConfig(rank=8, skip=0.1, exit_scale=0.2, answer_tokens=12, epochs=12, learning_rate=5e-3, bfloat16=False)


def test_exits_weigh_more_with_depth_and_take_turns() -> None:
    read = [exit_weights(12, step, exit_scale=0.2, every=3) for step in range(3)]
    assert [sorted(weights) for weights in read] == [[3, 6, 9, 11], [1, 4, 7, 10, 11], [2, 5, 8, 11]]
    for weights in read:
        assert sum(weights.values()) == pytest.approx(1)
        assert list(weights.values()) == sorted(weights.values())


def test_deep_blocks_are_skipped_more_often() -> None:
    keep = draw_layer_dropout(12, 2000, 0.4, torch.Generator().manual_seed(0)).mean(1)
    assert keep[0] == 1
    assert keep[-1] == pytest.approx(0.6, abs=0.05)
    assert keep[3] > keep[7] > keep[-1]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba2", "jamba"])
def test_a_sample_that_skips_all_blocks_comes_out_as_it_went_in(family: str) -> None:
    backbone = tiny(family)
    ids = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(0))
    keep = torch.ones(BLOCKS, 2)
    keep[:, 1] = 0
    with record_states(backbone) as plain:
        logits = backbone.model(ids, use_cache=False).logits
    with record_states(backbone, keep) as states:
        backbone.model(ids, use_cache=False)
    assert len(plain) == len(states) == BLOCKS
    torch.testing.assert_close(backbone.logits(plain[-1]), logits)
    for mine, other in zip(states, plain, strict=True):
        torch.testing.assert_close(mine[0], other[0])
    torch.testing.assert_close(states[-1][1], states[0][1])
    assert not torch.equal(states[-1][1], plain[-1][1])


@pytest.fixture
def prompts(tmp_path) -> str:
    (tmp_path / "prompts.txt").write_text("".join(f"Say something about {number}\n" for number in range(60)))
    return str(tmp_path / "prompts.txt")


def fresh(folder, family: str):
    """A copy of the model, since tuning changes it."""
    if not (folder / "config.json").exists():
        saved(tiny(family), folder)
    return offramp.load(str(folder), "float32", keep=True).backbone


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_early_blocks_learn_to_say_what_the_model_says(family: str, prompts: str, tmp_path) -> None:
    config = TuneConfig(**{**vars(CONFIG), "prompts": prompts})
    backbone = fresh(tmp_path / "model", family)
    record = tune(backbone, tmp_path / "tuned", config)
    before, after = record["held_out"]["before"], record["held_out"]["after"]
    if family == "llama":  # the other's answers at random weights are too varied for 60 prompts to teach
        assert sum(after["agreement"][:-1]) > sum(before["agreement"][:-1])
    losses = [point["loss"][0] for point in record["curve"]]
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])
    assert before["agreement"][-1] == 1
    assert record["parameters"] > 0
    # The saved model is the measured one. It loads like any model, and its weights differ from before.
    tuned = offramp.load(str(tmp_path / "tuned"), "float32", keep=True).backbone
    assert tuned.source.fingerprint != record["untuned"]["fingerprint"]
    assert json.loads((tmp_path / "tuned" / "tuning.json").read_text()) == record
    assert not (tmp_path / "tuned" / ".training").exists()
    # The backbone that was tuned runs the tuned weights.
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(backbone.forward(ids), tuned.forward(ids), rtol=1e-4, atol=1e-4)


def test_an_interrupted_tuning_goes_on_to_the_same_weights(prompts: str, tmp_path, monkeypatch) -> None:
    config = TuneConfig(**{**vars(CONFIG), "prompts": prompts, "epochs": 2})
    tune(fresh(tmp_path / "model", "llama"), tmp_path / "straight", config)

    clock = itertools.count(step=50)  # every step is late enough for a checkpoint
    monkeypatch.setattr("offramp.training.loop.time.monotonic", lambda: next(clock))

    def interrupt(stage: str, completed: int, total: int, note: str = "") -> None:
        if stage == "tuning" and completed > 0.3 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(fresh(tmp_path / "model", "llama"), tmp_path / "resumed", config, interrupt)
    with pytest.raises(BadInput, match="other settings"):
        tune(fresh(tmp_path / "model", "llama"), tmp_path / "resumed", TuneConfig(**{**vars(config), "rank": 4}))
    (checkpoint,) = (tmp_path / "resumed" / ".training" / "tuning").glob("step-*")
    saved = sum(tensor.numel() for tensor in load_file(checkpoint / "model.safetensors").values())
    record = tune(fresh(tmp_path / "model", "llama"), tmp_path / "resumed", config)
    assert saved == record["parameters"]  # the update alone, not the model
    straight, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "resumed"))
    assert straight == resumed


def test_an_untuned_model_agrees_with_itself(prompts: str, tmp_path) -> None:
    from offramp.training.config import TrainConfig
    from offramp.training.data import gather

    backbone = wrap(tiny("llama").model, tiny("llama").tokenizer)
    data = gather(backbone, TrainConfig(prompts=prompts, answer_tokens=8), (BLOCKS,), tmp_path / "work")
    measured = measure_held_out(backbone, data.held)
    assert measured["agreement"][-1] == 1
    assert measured["perplexity"] >= 1
    assert measured["positions"] == sum(int(text.counted.sum()) for text in data.held)


def test_the_model_itself_is_not_written_over(tmp_path) -> None:
    backbone = fresh(tmp_path / "model", "llama")
    with pytest.raises(BadInput, match="would be lost"):
        tune(backbone, tmp_path / "model", CONFIG)
    with pytest.raises(BadInput, match="rank"):
        TuneConfig(rank=0)


@pytest.mark.parametrize(("after", "said"), [(2.1, True), (2.01, False)])
def test_a_tuning_that_costs_too_much_is_said_to(after: float, said: bool, capsys) -> None:
    held_out = {"before": {"perplexity": 2.0, "agreement": [0.5]}, "after": {"perplexity": after, "agreement": [0.6]}}
    print_table({"held_out": held_out}, Path("tuned"))
    assert ("more than 2% worse" in capsys.readouterr().out) is said


def test_the_command_tunes_a_model_and_says_what_it_cost(prompts: str, tmp_path, monkeypatch, capsys) -> None:
    fresh(tmp_path / "model", "llama")
    arguments = [tmp_path / "model", "-o", tmp_path / "tuned", "--own-prompts", prompts, "--max-prompts", "6"]
    sizes = ["--answer-tokens", "4", "--epochs", "1", "--rank", "4"]
    monkeypatch.setattr(sys, "argv", ["lm/tune.py", *map(str, arguments), *sizes])
    main()
    assert "Perplexity of those answers" in capsys.readouterr().out
    assert json.loads((tmp_path / "tuned" / "tuning.json").read_text())["command"].startswith("python -m lm.tune model")
