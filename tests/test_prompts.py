"""Prompts become token ids, through the chat template if there is one. Prompts that cannot be answered are refused."""

import copy

import pytest

from models import byte_tokenizer
from offramp.errors import BadInput
from offramp.files import read_lines
from offramp.model.prompts import Prompts

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def prompts(template=None, context=64):
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.chat_template = template
    return Prompts(tokenizer, context, "tiny", 260), tokenizer


def test_a_prompt_goes_through_the_chat_template():
    templated, tokenizer = prompts(TEMPLATE)
    assert tokenizer.decode(templated.encode("Hello")) == "[user] Hello\n[assistant] "


def test_a_raw_prompt_and_one_without_a_template_are_encoded_as_they_are():
    templated, tokenizer = prompts(TEMPLATE)
    plain, _ = prompts()
    assert tokenizer.decode(templated.encode("Hello", raw=True)) == "Hello"
    assert plain.encode("Hello") == templated.encode("Hello", raw=True)


def test_a_conversation_ends_where_the_answer_begins():
    templated, tokenizer = prompts(TEMPLATE)
    messages = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Yes?"), ("user", "Go"))]
    assert tokenizer.decode(templated.encode_chat(messages)) == "[user] Hi\n[assistant] Yes?\n[user] Go\n[assistant] "


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_prompt_is_refused(empty):
    with pytest.raises(BadInput, match="empty") as raised:
        prompts()[0].encode(empty)
    assert raised.value.hint


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused():
    plain, _ = prompts(context=64)
    assert len(plain.encode("x" * 63)) == 63
    with pytest.raises(BadInput, match="64 tokens long; tiny holds 64"):
        plain.encode("x" * 64)
    with pytest.raises(BadInput, match="empty"):
        plain.check([])


@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": "\\ud800"}', "{}", "7"])
def test_a_line_that_is_no_prompt_is_named(line, tmp_path):
    (tmp_path / "mine.jsonl").write_text(f'{{"prompt": "Hello"}}\n{line}\n')
    with pytest.raises(BadInput, match="line 2, is not a JSON object with 'prompt'"):
        read_lines(tmp_path / "mine.jsonl", ("prompt",))
