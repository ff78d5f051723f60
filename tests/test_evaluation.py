"""Evaluating a condition: the books add up, an interrupted run goes on, likelihoods are the library's."""

from __future__ import annotations

import json
from statistics import fmean

import pytest
import torch

from helpers import exits_for, sketched, task
from models import BLOCKS, LLAMA, tiny
from offramp import Engine, Policy
from offramp.decode.sampling import Sampling
from offramp.errors import BadInput, CorruptFile
from offramp.evaluation.evaluation import Condition, Evaluation
from offramp.evaluation.likelihood import Forced, log_likelihoods
from offramp.evaluation.metrics_table import METRICS
from offramp.evaluation.results import Interval, ScoredChoice, difference, load_results, save_results, summary
from offramp.evaluation.tasks import score_choices, score_coqa, score_trivia, score_truthful
from offramp.extras.report.curves import curves


def evaluation(folder, batch: int = 1, **changed) -> Evaluation:
    return Evaluation(tiny(LLAMA), task(**changed), folder / "work", batch=batch, command="offramp eval")


OPEN = Condition("project", Policy((0.5,) * 3), exits_for(LLAMA))


def test_modes_that_share_exits_and_fill_are_told_apart_and_drafts_need_no_exits(tmp_path) -> None:
    exits, run = exits_for(LLAMA), evaluation(tmp_path)
    conditions = [Condition(), *(Condition("verify", None, each) for each in (exits, None))]
    assert len({condition.name for condition in conditions}) == len(conditions)
    results = [run.run(condition) for condition in conditions]
    assert len(run.files) == len(conditions)
    assert [result.condition.fill for result in results] == [None, "verify", "verify"]
    assert len(curves(results)) == len(conditions)
    assert [result.summary["token_f1"].mean for result in results] == [1.0] * 3


def test_a_result_is_what_the_engine_gives(tmp_path) -> None:
    run = evaluation(tmp_path)
    full, early = run.run(Condition()), run.run(OPEN)
    engine = Engine(tiny(LLAMA), OPEN.exits, OPEN.policy)
    for item, kept in zip(run.task.items, early.items, strict=True):
        answer = engine.generate(tiny(LLAMA).tokenizer(item.prompt)["input_ids"], max_tokens=8, stop=("\n",))
        assert kept.text == answer.text
        assert kept.exits == [token.exit_block for token in answer.tokens]
        assert kept.scores == score_coqa(answer.text.strip(), item)
        assert kept.measures["flops_saved"] == pytest.approx(answer.flops_saved, rel=1e-5)
        assert kept.measures["mean_blocks"] == pytest.approx(answer.mean_blocks, rel=1e-5)
        assert kept.measures["flops_per_request"] > kept.measures["flops_per_token"] * len(answer.tokens)
    assert full.summary["token_f1"] == Interval(1, 1, 1)
    assert full.summary["mean_blocks"].mean == BLOCKS
    consistency = early.summary["token_f1"]
    assert consistency.mean == pytest.approx(fmean(item.measures["token_f1"] for item in early.items))
    assert consistency.low <= consistency.mean <= consistency.high
    assert sum(early.exit_histogram.values()) == sum(len(item.exits) for item in early.items)
    assert early.condition.policy == OPEN.policy
    assert early.machine["torch"]
    assert early.peak_memory_bytes > 10**7


def test_a_repetition_penalty_is_full_depths_too(tmp_path) -> None:
    """Answers under exits are compared with full depth's under the same penalty, side by side and one by one."""
    plain = evaluation(tmp_path).run(Condition())
    penalty = Sampling(repetition_penalty=1.8)
    for batch in (1, 4):
        run = evaluation(tmp_path, batch, repetition_penalty=penalty.repetition_penalty)
        full, early = run.run(Condition()), run.run(OPEN)
        assert [item.text for item in full.items] != [item.text for item in plain.items]
        engines = Engine(tiny(LLAMA), sampling=penalty), Engine(tiny(LLAMA), OPEN.exits, OPEN.policy, sampling=penalty)
        for item, kept in zip(run.task.items, early.items, strict=True):
            ids = tiny(LLAMA).tokenizer(item.prompt)["input_ids"]
            wanted = [engine.generate(ids, max_tokens=8, stop=("\n",)).text for engine in engines]
            assert [kept.full_text, kept.text] == wanted
        assert full.task.repetition_penalty == early.task.repetition_penalty == 1.8
    save_results([full, early], tmp_path / "results.json")
    assert load_results([tmp_path / "results.json"])[0].task == full.task


def test_side_by_side_gives_the_same_answers(tmp_path) -> None:
    alone, together = (evaluation(tmp_path / str(batch), batch).run(OPEN) for batch in (1, 4))
    assert [item.text for item in alone.items] == [item.text for item in together.items]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch) -> None:
    straight = evaluation(tmp_path / "straight").run(OPEN)
    run = evaluation(tmp_path / "resumed")

    def interrupt(stage: str, completed: int, total: int, note: str = "") -> None:
        if stage != "full depth" and completed == 3:
            raise KeyboardInterrupt

    run.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        run.run(OPEN)
    file = max(run.work.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    assert len(file.read_text().splitlines()) == 3
    file.write_text(file.read_text() + '{"id": "3", "te')  # cut off while it was written
    answered: list[int] = []
    summarise = Engine.summarise
    monkeypatch.setattr(Engine, "summarise", lambda self, *a: answered.append(1) or summarise(self, *a))
    resumed = evaluation(tmp_path / "resumed").run(OPEN)
    assert len(answered) == 3
    for before, after in zip(straight.items, resumed.items, strict=True):
        assert (before.id, before.text, before.scores) == (after.id, after.text, after.scores)
    for content in ("{}\n", '{"id": "3"}\n', "[\n"):
        file.write_text(content)
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
    full = Engine(backbone, sampling=forced)
    alone, *_, again = log_likelihoods(full, forced, prompt, [continuation, " something else", continuation])
    assert alone == again == pytest.approx(wanted, abs=1e-3)
    early = Engine(backbone, exits_for(family), Policy((0.0,) * 3), "project", forced)
    assert log_likelihoods(early, forced, prompt, [continuation]) != [pytest.approx(wanted, abs=1e-3)]


def test_multiple_choice_is_scored_by_likelihood(tmp_path) -> None:
    run = evaluation(tmp_path, multiple_choice=True, score=lambda answer, item: {})
    full, early = run.run(Condition()), run.run(OPEN)
    assert full.summary["same_choice"].mean == 1
    assert 0 <= early.summary["mc2"].mean <= 1
    forced = Forced()
    engine = Engine(tiny(LLAMA), sampling=forced)
    wanted = log_likelihoods(engine, forced, run.task.items[0].prompt, [" two", " one"])
    assert full.items[0].right == pytest.approx(wanted)


def test_likelihoods_are_of_all_tokens_whatever_the_candidates(tmp_path) -> None:
    exits = sketched(LLAMA)
    few, all_ = (Condition("project", Policy((1.0,) * len(exits), candidates=number), exits) for number in (4, 0))
    runs = [
        evaluation(tmp_path, multiple_choice=True, score=lambda answer, item: {}).run(condition)
        for condition in (few, all_)
    ]
    assert [item.right for item in runs[0].items] == [item.right for item in runs[1].items]
    assert "4 candidates" in runs[0].condition.name


def scored(values: dict[str, float]) -> list[ScoredChoice]:
    return [ScoredChoice(id, [], [], {"f1": value}, {}) for id, value in values.items()]


def test_intervals_cover_and_differences_are_paired() -> None:
    low = scored({str(n): 0.1 * (n % 5) for n in range(200)})
    high = scored({str(n): 0.1 * (n % 5) + 0.05 for n in range(200)})
    interval = summary(low)["f1"]
    assert interval.mean == pytest.approx(0.2)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.1414 / 200**0.5, rel=0.15)
    gap = difference(high[::-1], low, "f1")
    assert (gap.low, gap.mean, gap.high) == pytest.approx((0.05, 0.05, 0.05))


def test_results_are_kept_and_others_refused(tmp_path, monkeypatch) -> None:
    run = evaluation(tmp_path)
    results = [run.run(Condition()), run.run(OPEN)]
    file = tmp_path / "out.json"
    save_results(results, file)
    assert load_results([file]) == results
    (tmp_path / "cut.json").write_bytes(file.read_bytes()[:-40])
    (tmp_path / "other.json").write_text('{"results": [{"offramp": 1}]}')
    damaged = [{**results[0].to_json(), "task": {}}]
    (tmp_path / "damaged.json").write_text(json.dumps({"results": damaged}))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name in ("other.json", "nowhere.json", "cut.json", "damaged.json", "deep.json"):
        with pytest.raises(BadInput, match="holds no results"):
            load_results([tmp_path / name])


RESULT = {
    *("offramp", "command", "seed", "machine", "model", "exits", "condition", "task", "blocks", "summary"),
    *("exit_histogram", "peak_memory_bytes", "items"),
}


def test_results_on_disk_have_the_promised_fields_and_say_which_way_is_better(tmp_path) -> None:
    save_results([evaluation(tmp_path).run(OPEN)], tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    (record,) = content["results"]
    assert set(record) == RESULT
    assert set(record["condition"]) == {"name", "fill", "gate", "policy", "calibration", "label"}
    fields = {"thresholds", "confidence", "decay", "candidates", "exit_candidates", "perhaps", "keys", "key"}
    assert set(record["condition"]["policy"]) == fields
    assert set(record["summary"]["f1"]) == {"mean", "low", "high"}
    assert set(content["metrics"]) == set(record["summary"])
    assert content["metrics"]["mean_blocks"] == {"label": "mean blocks run", "unit": "blocks", "better": "lower"}


def test_a_misspelt_fill_is_refused_with_and_without_exits() -> None:
    for exits in (None, OPEN.exits):
        with pytest.raises(BadInput, match="no fill 'projekt'") as caught:
            Condition("projekt", exits=exits)
        assert "project" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("flops_saved", 0.125, "12.5%"),
        ("flops_per_token", 14_862_840, "15 M"),
        ("f1", 0.5, "0.500"),
        ("bleu_max", 31, "31.0"),
    ],
)
def test_a_metric_shows_its_values(name: str, value: float, shown: str) -> None:
    assert METRICS[name].show(value) == shown


@pytest.mark.parametrize("score", [score_coqa, score_trivia, score_truthful])
def test_every_score_of_a_task_is_in_the_table_of_metrics(score) -> None:
    assert set(score("two", task().items[0])) <= {name for name, metric in METRICS.items() if metric.score}
    assert set(score_choices([-1.0], [-2.0])) <= set(METRICS)


def test_a_task_without_questions_is_refused(tmp_path) -> None:
    with pytest.raises(BadInput, match="no questions"):
        evaluation(tmp_path, count=0).run(OPEN)


def test_turns_of_one_conversation_are_resampled_together() -> None:
    def width(ids: list[str]) -> float:
        interval = summary(scored({id: float(n // 10) for n, id in enumerate(ids)}))["f1"]
        assert interval.mean == pytest.approx(1.5)
        return interval.high - interval.low

    apart = width([str(n) for n in range(40)])
    in_four_conversations = width([f"{n // 10}/{n % 10}" for n in range(40)])
    in_one_conversation = width([f"0/{n}" for n in range(40)])  # then its turns are resampled
    assert in_one_conversation == pytest.approx(apart, rel=0.25)
    assert in_four_conversations > 2 * apart


def test_other_runs_answers_stay(tmp_path) -> None:
    run, shorter = evaluation(tmp_path), evaluation(tmp_path, max_tokens=4)
    run.run(OPEN)
    shorter.run(OPEN)
    assert len(set(run.files)) == len(set(shorter.files)) == 2
    assert not set(run.files) & set(shorter.files)


def test_gates_that_read_the_prompt_are_counted() -> None:
    exits = exits_for(LLAMA)
    engine = Engine(tiny(LLAMA), exits, Policy((0.5,) * 3))
    parts = [part for exit in exits for part in (exit.gate, exit.adapter)]
    assert engine.plan.prefill_flops == sum(part.flops() for part in parts)
    assert Engine(tiny(LLAMA), exits_for(LLAMA, "ffn", "linear"), Policy((0.5,) * 3)).plan.prefill_flops == 0
    assert Engine(tiny(LLAMA), exits, Policy((1.0,) * 3)).plan.prefill_flops == 0
