"""The plug-in for `llm`, through the real package."""

from __future__ import annotations

import os

os.environ["LLM_LOAD_PLUGINS"] = ""  # other plug-ins in this environment may not load

import llm
import pytest

from models import saved, tiny
from offramp import Engine
from offramp.extras.llm import OfframpModel
from offramp.model import hub

TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


@pytest.fixture
def model(tmp_path, own_cache, monkeypatch):
    folder = saved(tiny("llama"), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setattr(hub, "ALIASES", {"tiny": folder})
    return OfframpModel("tiny")


def wanted(*messages: str) -> str:
    ids = tiny("llama").tokenizer("".join(f"{message}\n" for message in messages))["input_ids"]
    return Engine(tiny("llama")).generate(ids, max_tokens=8).text


def test_a_prompt_and_a_conversation_get_the_models_answers(model) -> None:
    response = model.prompt("Hello", max_tokens=8, dtype="float32")
    assert "".join(response) == wanted("Hello")
    assert response.response_json["blocks"] == 6
    assert response.response_json["finish_reason"] == "length"
    assert response.input_tokens == len("Hello\n")
    assert response.output_tokens == 8
    talk = model.conversation()
    first = talk.prompt("Hello", system="Be brief", max_tokens=8, dtype="float32").text()
    assert first == wanted("Be brief", "Hello")
    assert talk.prompt("And?", max_tokens=8, dtype="float32").text() == wanted("Be brief", "Hello", first, "And?")


def test_what_a_user_can_mend_is_said_in_words(model) -> None:
    with pytest.raises(llm.ModelError, match="no mode 'none'"):
        model.prompt("Hello", mode="none", dtype="float32").text()
    with pytest.raises(Exception, match="greater than or equal to 1"):
        model.prompt("Hello", max_tokens=0)


def test_llm_finds_the_models_by_the_entry_point() -> None:
    from importlib.metadata import entry_points

    (entry,) = (point for point in entry_points(group="llm") if point.name == "offramp")
    registered: list[llm.Model] = []
    entry.load().register_models(registered.append)
    assert "offramp/smollm2" in {model.model_id for model in registered}
