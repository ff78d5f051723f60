"""Prompts are the field's, and scores follow the official scripts' rules, in cases worked out by hand."""

from __future__ import annotations

import json
import math

import pytest

from offramp.errors import BadInput
from offramp.evaluation.task import Item
from offramp.evaluation.tasks import (
    choices,
    load_task,
    rouge_l,
    score_choices,
    score_coqa,
    score_trivia,
    score_truthful,
)
from offramp.metrics import best_f1, best_match, best_recall, left_one_out, squad_words, trivia_words


@pytest.mark.parametrize(
    ("text", "squad", "trivia"),
    [
        ("The  Lone Ranger!", "lone ranger", "lone ranger"),
        ("It's a dog.", "its dog", "it s dog"),
        ("Hi-yo, Silver", "hiyo silver", "hi yo silver"),
        ("an A-team", "ateam", "team"),  # if the hyphen separates words, "A" is an article
        ("‘Another’ theatre", "‘another’ theatre", "another theatre"),
        ("snake_case", "snakecase", "snake case"),
        ("a–b", "–b", "–b"),  # an article ends at any character that is not part of a word
        ("The", "", ""),
    ],
)
def test_words_are_the_official_scripts(text: str, squad: str, trivia: str) -> None:
    assert " ".join(squad_words(text)) == squad
    assert " ".join(trivia_words(text)) == trivia


def test_scores_take_the_best_reference() -> None:
    assert best_f1("the white cat", ["black dog", "white cat sat"]) == pytest.approx(2 * 2 / (2 + 3))
    assert best_f1("white white", ["white"]) == pytest.approx(2 * 1 / 3)  # bags of words
    assert best_f1("", ["the"]) == 1  # both empty
    assert best_recall("It was the white cat, of course.", ["black dog", "white cat sat"]) == pytest.approx(2 / 3)
    assert best_recall("white", ["white white"]) == pytest.approx(1 / 2)
    assert best_recall("white", ["the"]) == best_recall("white", []) == 0
    assert best_f1("", ["white"]) == best_f1("white", []) == 0
    assert best_match("The White Cat.", ["dog", "white cat"]) == 1
    assert best_match("white cats", ["white cat"]) == 0


def test_coqa_leaves_each_reference_out_once() -> None:
    item = Item("1", "?", "", ("white", "white", "pure white", "snow"))
    # Without either "white", the other remains; without "pure white" or "snow", both do.
    assert score_coqa("white", item) == {"exact_match": 1, "f1": 1}
    # "snow" is right, except where it is left out: then F1 is 0.
    assert score_coqa("snow", item)["exact_match"] == pytest.approx(3 / 4)
    assert score_coqa("pure white", item)["f1"] == pytest.approx((3 * 1 + 2 / 3) / 4)
    assert left_one_out(best_match, "white", ["white"]) == 1


def test_triviaqa_scores_over_aliases() -> None:
    item = Item("1", "?", "", ("The Lone Ranger", "Lone Ranger (comics)"))
    assert score_trivia(" lone ranger", item) == {"exact_match": 1, "f1": 1}
    assert score_trivia("Lone Ranger comics!", item)["exact_match"] == 1
    assert score_trivia("the ranger", item) == {"exact_match": 0, "f1": pytest.approx(2 / 3)}


def test_truthfulqa_compares_right_with_wrong() -> None:
    item = Item("1", "?", "", ("No, you cannot",), ("Yes, you can",))
    right, wrong = score_truthful("No, you cannot.", item), score_truthful("Yes, you can.", item)
    assert right["rouge1_max"] == right["rougeL_max"] == pytest.approx(100)
    assert right["rouge1_acc"] == right["bleu_acc"] == 1
    assert wrong["rouge1_acc"] == wrong["rougeL_acc"] == 0
    assert right["rouge1_diff"] == pytest.approx(100 - 100 / 3)  # "you" is in both
    # "I have no comment" is always right.
    assert score_truthful("I have no comment.", item)["rougeL_max"] == pytest.approx(100)
    assert rouge_l("a b c d", "a x c d") == pytest.approx(0.75)


def test_choices_are_scored_by_likelihood() -> None:
    item = Item("1", "?", "", ("No", "Never"), ("Yes",), best="Never")
    assert choices(item) == (["Never", "No"], ["Yes"])
    found = score_choices([-1000.0, -1002.0], [-1001.0])
    odds = [1.0, math.exp(-2), math.exp(-1)]
    assert found == {"mc1": 1.0, "mc2": pytest.approx((odds[0] + odds[1]) / sum(odds))}
    # MC1 counts one right answer only. Another right answer that is likelier does not help.
    assert score_choices([-3.0, -1.0], [-2.0])["mc1"] == 0


@pytest.fixture
def files(tmp_path):
    (tmp_path / "truthful.csv").write_text(
        "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
        'Adversarial,Law,"Can you, there?",No,No; Never; ,Yes; Always,x\n'
        "Adversarial,Law,Why not?,Because,Because,Why not,x\n"
    )
    lines = [
        {
            "question_id": f"q{n}",
            "question": f"Which {n}?",
            "answer": {"value": str(n), "aliases": [f"no. {n}"]},
            "odd": "\u2028",
        }
        for n in range(8)
    ]
    (tmp_path / "trivia.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    story = {
        "id": "s",
        "story": "A cat sat.",
        "questions": [{"input_text": "Who?", "turn_id": 1}, {"input_text": "Did what?", "turn_id": 2}],
        "answers": [{"input_text": "a cat", "turn_id": 1}, {"input_text": "sat", "turn_id": 2}],
        "additional_answers": {"0": [{"input_text": "cat"}, {"input_text": "it sat"}]},
    }
    plain = {"id": "p", "story": "Rain.", "questions": ["What?"], "answers": [["rain", "the rain"]]}
    (tmp_path / "coqa.json").write_text(json.dumps({"version": "1", "data": [story, plain]}))
    return tmp_path


def test_truthfulqa_from_its_csv(files) -> None:
    task = load_task("truthfulqa", files / "truthful.csv")
    item = next(item for item in task.items if item.id == "0")
    assert item.prompt.startswith("Q: What is human life expectancy")
    assert item.prompt.endswith("Barcelona, Spain.\n\nQ: Can you, there?\nA:")
    assert (item.references, item.wrong, item.best) == (("No", "Never"), ("Yes", "Always"), "No")
    assert load_task("truthfulqa-mc", files / "truthful.csv").multiple_choice


def test_triviaqa_from_its_lines_leaves_its_examples_out(files) -> None:
    task = load_task("triviaqa", files / "trivia.jsonl")
    assert sorted(item.id for item in task.items) == ["q5", "q6", "q7"]
    item = next(item for item in task.items if item.id == "q5")
    shots = "".join(f"Question: Which {n}?\nAnswer: {n}\n\n" for n in range(5))
    assert item.prompt == f"{shots}Question: Which 5?\nAnswer:"
    assert item.references == ("5", "no. 5")
    few = load_task("triviaqa", files / "trivia.jsonl", limit=2)
    assert few.items == task.items[:2]
    with pytest.raises(BadInput, match="too few"):
        load_task("triviaqa", files / "trivia.jsonl", limit=0)


def test_coqa_from_its_json_asks_turn_by_turn(files) -> None:
    task = load_task("coqa", files / "coqa.json")
    assert [item.id for item in task.items] == ["s/0", "s/1", "p/0"]
    assert task.items[1].prompt == "A cat sat.\n\nQ: Who?\n\nA: a cat\n\nQ: Did what?\n\nA:"
    assert [item.references for item in task.items] == [("a cat", "cat"), ("sat", "it sat"), ("rain", "the rain")]
    assert "2 conversations" in task.note


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("truthfulqa", "Question,Answer\nWhy?,So\n", "TruthfulQA's CSV"),
        ("triviaqa", '{"question": "Why?"}\n', "TriviaQA's fields"),
        ("coqa", '{"data": [{"id": 1}]}', "CoQA's JSON"),
        ("truthfulqa", "Question,Best Answer,Correct Answers,Incorrect Answers\nWhy?,So,So,\n", "no right or no wrong"),
        ("triviaqa", '{"question": "Why?", "answer": {"value": "So", "aliases": null}}\n', "TriviaQA's fields"),
        ("coqa", '{"data": [{"id": 1, "story": "", "questions": ["a", "b"], "answers": ["c"]}]}', "not as many answers"),
        ("triviaqa", '{"question": "Why?", "answer": {"value": "So", "aliases": "So"}}\n', "no text"),
        ("triviaqa", '{"question": "Why?", "answer": {"value": 75, "aliases": []}}\n', "no text"),
        ("coqa", '{"data": [{"id": 1, "story": "", "questions": ["a"], "answers": [[]]}]}', "without an answer"),
        ("coqa", '{"data": [7]}', "CoQA's JSON"),
        ("coqa", "[" * 100_000, "CoQA's JSON"),
        ("triviaqa", "[" * 100_000, "TriviaQA's fields"),
        ("triviaqa", '{"question": "\\ud800", "answer": {"value": "a", "aliases": []}}', "TriviaQA's fields"),
        ("coqa", None, "cannot be read"),
        ("squad", "", "no task 'squad'"),
    ],
)
def test_other_files_are_refused(tmp_path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "data").write_text(content)
    with pytest.raises(BadInput, match=message) as caught:
        load_task(name, tmp_path / "data")
    assert caught.value.hint


def test_without_the_hub_a_file_is_asked_for() -> None:
    with pytest.raises(BadInput, match="could not be fetched") as caught:  # the tests run offline
        load_task("triviaqa")
    assert "--data" in caught.value.hint
