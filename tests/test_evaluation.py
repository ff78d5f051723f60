"""Evaluating a condition: the books add up, an interrupted run goes on, likelihoods are the library's."""

from __future__ import annotations

import json
import lzma
from statistics import fmean

import pytest
import torch

from helpers import exits_for, sketched, task
from models import BLOCKS, tiny
from offramp import Engine, Policy
from offramp.errors import BadInput, CorruptFile
from offramp.evaluation.evaluation import (
    Condition,
    Evaluation,
    Forced,
    difference,
    load_results,
    log_likelihoods,
    save_results,
    summary,
)
from offramp.evaluation.tasks import score_coqa


def evaluation(folder, batch: int = 1, **changed) -> Evaluation:
    return Evaluation(tiny("llama"), task(**changed), folder / "work", batch=batch, command="offramp eval")


OPEN = Condition("project", Policy((0.5,) * 3), exits_for("llama"))


def test_a_result_is_what_the_engine_gives(tmp_path) -> None:
    run = evaluation(tmp_path)
    full, early = run.run(Condition()), run.run(OPEN)
    engine = Engine(tiny("llama"), OPEN.exits, OPEN.policy)
    for item, kept in zip(run.task.items, early["items"], strict=True):
        answer = engine.generate(tiny("llama").tokenizer(item.prompt)["input_ids"], max_tokens=8, stop=("\n",))
        assert kept["text"] == answer.text
        assert kept["exits"] == [token.exit_block for token in answer.tokens]
        assert kept["scores"] == score_coqa(answer.text.strip(), item)
        assert kept["measures"]["flops_saved"] == pytest.approx(answer.flops_saved)
        assert kept["measures"]["mean_blocks"] == answer.mean_blocks
        assert kept["measures"]["flops_per_request"] > kept["measures"]["flops_per_token"] * len(answer.tokens)
    assert full["summary"]["token_f1"] == {"mean": 1, "low": 1, "high": 1}
    assert full["summary"]["mean_blocks"]["mean"] == BLOCKS
    assert early["summary"]["token_f1"]["mean"] == pytest.approx(
        fmean(one["measures"]["token_f1"] for one in early["items"])
    )
    assert (
        early["summary"]["token_f1"]["low"] <= early["summary"]["token_f1"]["mean"] <= early["summary"]["token_f1"]["high"]
    )
    assert sum(early["exit_histogram"].values()) == sum(len(one["exits"]) for one in early["items"])
    assert early["condition"]["policy"]["thresholds"] == (0.5,) * 3
    assert early["machine"]["torch"]
    assert early["peak_memory_bytes"] > 10**7


def test_side_by_side_gives_the_same_answers(tmp_path) -> None:
    alone, together = (evaluation(tmp_path / str(batch), batch).run(OPEN) for batch in (1, 4))
    assert [one["text"] for one in alone["items"]] == [one["text"] for one in together["items"]]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch) -> None:
    straight = evaluation(tmp_path / "straight").run(OPEN)
    run = evaluation(tmp_path / "resumed")

    def interrupt(stage: str, done: int, total: int, note: str = "") -> None:
        if stage != "full depth" and done == 3:
            raise KeyboardInterrupt

    run.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        run.run(OPEN)
    file = max(run.work.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    assert len(file.read_text().splitlines()) == 3
    file.write_text(file.read_text() + '{"id": "3", "te')  # cut off while it was written
    answered: list[int] = []
    generate = Engine.generate_batch
    monkeypatch.setattr(Engine, "generate_batch", lambda self, *a: answered.append(1) or generate(self, *a))
    resumed = evaluation(tmp_path / "resumed").run(OPEN)
    assert len(answered) == 3
    for one, other in zip(straight["items"], resumed["items"], strict=True):
        assert (one["id"], one["text"], one["scores"]) == (other["id"], other["text"], other["scores"])
    file.write_text("{}\n")
    with pytest.raises(CorruptFile, match="damaged"):
        evaluation(tmp_path / "resumed").run(OPEN)


@torch.inference_mode()
def test_log_likelihoods_are_the_librarys(family: str) -> None:
    backbone, forced = tiny(family), Forced()
    prompt, continuation = "Some words", " and more of them"
    ids = torch.tensor([backbone.tokenizer(prompt + continuation)["input_ids"]])
    start = len(backbone.tokenizer(prompt)["input_ids"])
    logp = backbone.model(ids).logits.float().log_softmax(-1)[0, start - 1 : -1]
    wanted = float(logp.gather(1, ids[0, start:, None]).sum())
    for engine in (
        Engine(backbone, sampling=forced),
        Engine(backbone, exits_for(family), Policy((0.5,) * 3), "verify", forced),
    ):
        alone, *_, again = log_likelihoods(engine, forced, prompt, [continuation, " something else", continuation])
        assert alone == again == pytest.approx(wanted, abs=1e-3)
    # A wrong draft does not make the full model's choice another.
    verifying = Engine(backbone, exits_for(family), Policy((0.0,) * 3), "verify", forced)
    forced.begin(start, [int(logp[0].argmax())])
    list(verifying.stream(ids[0, :start].tolist(), max_tokens=1, end_ids=frozenset()))
    assert forced.best
    early = Engine(backbone, exits_for(family), Policy((0.0,) * 3), "project", forced)
    assert log_likelihoods(early, forced, prompt, [continuation]) != [pytest.approx(wanted, abs=1e-3)]


def test_multiple_choice_is_scored_by_likelihood(tmp_path) -> None:
    run = evaluation(tmp_path, multiple_choice=True, score=lambda answer, item: {})
    full, early = run.run(Condition()), run.run(OPEN)
    assert full["summary"]["same_choice"]["mean"] == 1
    assert 0 <= early["summary"]["mc2"]["mean"] <= 1
    forced = Forced()
    engine = Engine(tiny("llama"), sampling=forced)
    wanted = log_likelihoods(engine, forced, run.task.items[0].prompt, [" two", " one"])
    assert full["items"][0]["right"] == pytest.approx(wanted)


def test_likelihoods_are_of_all_tokens_whatever_the_candidates(tmp_path) -> None:
    exits = sketched("llama")
    few, all_ = (Condition("project", Policy((1.0,) * len(exits), candidates=number), exits) for number in (4, 0))
    runs = [evaluation(tmp_path, multiple_choice=True, score=lambda answer, item: {}).run(one) for one in (few, all_)]
    assert [one["right"] for one in runs[0]["items"]] == [one["right"] for one in runs[1]["items"]]
    assert "4 candidates" in runs[0]["condition"]["name"]


def test_intervals_cover_and_differences_are_paired() -> None:
    def items(values):
        return [{"id": str(n), "scores": {"f1": value}, "measures": {}} for n, value in enumerate(values)]

    low = items([0.1 * (n % 5) for n in range(200)])
    high = items([0.1 * (n % 5) + 0.05 for n in range(200)])
    found = summary(low)["f1"]
    assert found["mean"] == pytest.approx(0.2)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 0.1414 / 200**0.5, rel=0.15)
    gap = difference(high[::-1], low, "f1")
    assert (gap["low"], gap["mean"], gap["high"]) == pytest.approx((0.05, 0.05, 0.05))


def test_results_are_kept_and_others_refused(tmp_path) -> None:
    result = evaluation(tmp_path).run(OPEN)
    save_results([result], tmp_path / "out.json")
    assert load_results([tmp_path / "out.json"]) == json.loads(json.dumps([result]))
    (tmp_path / "out.json.xz").write_bytes(lzma.compress((tmp_path / "out.json").read_bytes()))
    assert load_results([tmp_path / "out.json.xz"]) == load_results([tmp_path / "out.json"])
    (tmp_path / "cut.json.xz").write_bytes((tmp_path / "out.json.xz").read_bytes()[:-40])
    (tmp_path / "other.json").write_text('{"results": [{"offramp": 1}]}')
    for name in ("other.json", "nowhere.json", "cut.json.xz"):
        with pytest.raises(BadInput, match="holds no results"):
            load_results([tmp_path / name])


def test_a_task_without_questions_is_refused(tmp_path) -> None:
    with pytest.raises(BadInput, match="no questions"):
        evaluation(tmp_path, count=0).run(OPEN)


def test_turns_of_one_conversation_are_resampled_together() -> None:
    def items(ids):
        return [{"id": id, "scores": {"f1": float(n // 10)}, "measures": {}} for n, id in enumerate(ids)]

    alone = summary(items([str(n) for n in range(40)]))["f1"]
    together = summary(items([f"{n // 10}/{n % 10}" for n in range(40)]))["f1"]
    one = summary(items([f"0/{n}" for n in range(40)]))["f1"]  # of one conversation, its turns
    assert one["high"] - one["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.25)
    assert together["mean"] == alone["mean"] == pytest.approx(1.5)
    assert together["high"] - together["low"] > 2 * (alone["high"] - alone["low"])


def test_other_runs_answers_stay(tmp_path) -> None:
    run, other = evaluation(tmp_path), evaluation(tmp_path, max_tokens=4)
    run.run(OPEN)
    other.run(OPEN)
    assert len(set(run.files)) == len(set(other.files)) == 2
    assert not set(run.files) & set(other.files)


def test_gates_that_read_the_prompt_are_counted() -> None:
    exits = exits_for("llama")
    engine = Engine(tiny("llama"), exits, Policy((0.5,) * 3))
    parts = [part for exit in exits for part in (exit.gate, exit.adapter)]
    assert engine.prefill_flops == sum(part.flops() for part in parts)
    assert Engine(tiny("llama"), exits_for("llama", "ffn", "linear"), Policy((0.5,) * 3)).prefill_flops == 0
    assert Engine(tiny("llama"), exits, Policy((1.0,) * 3)).prefill_flops == 0
