"""The harness's own model and ours give the same answers and likelihoods, on the Mamba weights that come with offramp."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from models import tiny
from offramp.errors import BadInput

pytest.importorskip("lm_eval")
PAIRS = [
    ("Question: What is the capital of France?\nAnswer:", " Paris"),
    ("The King was ", "dead and gone"),
    ("", "Once upon a time"),
]


def requests(*arguments):
    return [SimpleNamespace(args=pair) for pair in arguments]


@pytest.fixture(scope="module")
def ours():
    from offramp.extras.harness import Harnessed

    return Harnessed(pretrained="mamba-tiny", threshold=1.0, dtype="float32")


@pytest.fixture(scope="module")
def theirs():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from offramp.model.hub import ALIASES

    folder = str(ALIASES["mamba-tiny"])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def test_likelihoods_are_the_librarys(ours, theirs) -> None:
    model, tokenizer = theirs
    for (context, continuation), (total, best) in zip(PAIRS, ours.loglikelihood(requests(*PAIRS)), strict=True):
        before = tokenizer(context.rstrip())["input_ids"] or [tokenizer.eos_token_id]
        whole = tokenizer(context + continuation)["input_ids"]
        tokens = whole[len(before) :] if context else whole
        logp = model(torch.tensor([before + tokens])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        assert total == pytest.approx(float(logp.gather(1, torch.tensor(tokens)[:, None]).sum()), abs=1e-3)
        assert best == (logp.argmax(-1).tolist() == tokens)


@torch.inference_mode()
def test_a_rolling_likelihood_counts_every_token(ours, theirs) -> None:
    model, tokenizer = theirs
    text = "It was a dark and stormy night."
    ids = tokenizer(text)["input_ids"]
    logp = model(torch.tensor([[tokenizer.bos_token_id, *ids]])).logits[0, :-1].log_softmax(-1)
    wanted = float(logp.gather(1, torch.tensor(ids)[:, None]).sum())
    assert ours.loglikelihood_rolling(requests((text,))) == [pytest.approx(wanted, abs=1e-3)]


@torch.inference_mode()
def test_answers_are_the_librarys_up_to_where_they_stop(ours, theirs) -> None:
    model, tokenizer = theirs
    ids = torch.tensor([tokenizer(PAIRS[0][0])["input_ids"]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    text = tokenizer.decode(made, skip_special_tokens=True)
    two_requests = requests(
        (PAIRS[0][0], {"until": [], "max_gen_toks": 12}), (PAIRS[0][0], {"until": [text[6]], "max_gen_toks": 12})
    )
    whole, cut = ours.generate_until(two_requests)
    assert whole == text
    assert cut == text[: text.index(text[6])]


@pytest.mark.parametrize(
    ("arguments", "sentence", "hint"),
    [
        ("pretrained=mamba-tiny,fill=projekt", "no fill 'projekt'", "project"),
        ("pretrained=mamba-tiny,treshold=0.8", "no model argument 'treshold'", "threshold"),
        ("fill=project", "name no model", "pretrained=smollm2"),
    ],
)
def test_misspelt_arguments_are_refused_before_a_model_is_loaded(arguments, sentence, hint, monkeypatch) -> None:
    import offramp
    from offramp.extras.harness import Harnessed

    monkeypatch.setattr(offramp, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(BadInput, match=sentence) as caught:
        Harnessed.create_from_arg_string(arguments, {"batch_size": 1, "device": None})
    assert hint in caught.value.hint


def test_without_exits_only_full_depth_can_be_asked_for() -> None:
    from offramp import Model
    from offramp.extras.harness import ModelArguments

    model = Model(tiny("llama"))  # no exits ship for it
    assert ModelArguments("tiny").condition(model).exits is None
    with pytest.raises(BadInput, match="No exits ship for tiny-llama"):
        ModelArguments("tiny", threshold=0.5).condition(model)
    with pytest.raises(BadInput, match="no fill 'projekt'"):
        ModelArguments("tiny", fill="projekt").check()


def test_a_mistake_on_the_command_line_gets_one_sentence_and_a_hint(monkeypatch) -> None:
    from offramp.extras import harness

    arguments = ("run", "--model", "offramp", "--tasks", "wikitext", "--model_args", "pretrained=mamba-tiny,fill=projekt")
    monkeypatch.setattr(sys, "argv", ["harness", *arguments])
    with pytest.raises(SystemExit) as stopped:
        harness.main()
    error, hint = str(stopped.value).splitlines()
    assert error == "error: There is no fill 'projekt'."
    assert hint.startswith("hint: Choose from project")


def test_the_harness_knows_the_model() -> None:
    command = [
        sys.executable,
        "-m",
        "offramp.extras.harness",
        "--help",
    ]  # listing the tasks takes a quarter of a minute
    assert "lm-eval" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    from lm_eval.api.registry import get_model

    from offramp.extras.harness import Harnessed

    assert get_model("offramp") is Harnessed
