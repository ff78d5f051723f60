"""The server, asked by OpenAI's own client, over HTTP, on tiny models."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import pytest
import torch
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import modest_exits, sketched
from models import COMPILED, tiny
from offramp import Engine, Policy
from offramp.decode.batch import Batch
from offramp.decode.modes import MODES
from offramp.decode.sampling import Sampling
from offramp.errors import BadNumbers
from offramp.exits.exit_set import ExitSet
from offramp.serve.answers import JsonLines, Post, Rules
from offramp.serve.api import app_of
from offramp.serve.choices import Choice, Choices
from offramp.serve.menu import Menu
from offramp.serve.protocol import ChatRequest
from offramp.serve.scheduler import Full, Job, Scheduler

FAMILIES = [f"{family}/compiled" if COMPILED else family for family in ("llama", "mamba2", "bamba")]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SYSTEM = {"role": "system", "content": "You are a very short answerer. " * 2}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


def calibration(*tested: tuple[Policy, bool]) -> dict[str, Any]:
    """The record of a calibration that tested these policies, with whether each passed."""
    return {
        "fill": "copy", "weights": "float32", "max_tokens": 24, "raw": False, "repetition_penalty": 1.0, "stop": [],
        "loss": "f1", "risk": 0.05, "delta": 0.1,
        "tested": [
            {"policy": asdict(policy), "loss": 0.01, "flops_saved": 0.1, "passed": passed} for policy, passed in tested
        ],
    }  # fmt: skip


class Served:
    """A server on a free port, and OpenAI's client for it."""

    def __init__(self, family: str, rules: Rules, calibration: dict[str, Any] | None = None, **options: Any) -> None:
        self.backbone = tiny(family)
        exits = modest_exits(family.partition("/")[0])
        exits.policy, exits.calibration = Policy((0.3, 0.3, 0.3)), calibration or {}
        self.exits = ExitSet(exits)
        self.engine = Engine(self.backbone, self.exits, mode="exact")
        self.scheduler = Scheduler(**options)
        app = app_of(Menu(self.backbone, self.exits, self.engine), self.scheduler, rules)
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key=rules.key or "none", max_retries=0)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def alone(self, messages: list[dict[str, str]], tokens: int = 12, **sampling: Any) -> str:
        """The answer of full depth."""
        engine = Engine(self.backbone, sampling=Sampling(**sampling))
        return engine.generate(self.backbone.prompts.encode_chat(messages), max_tokens=tokens).text


@contextmanager
def serving(family: str = FAMILIES[0], rules: Rules | None = None, **options: Any) -> Iterator[Served]:
    tokenizer = tiny(family).tokenizer
    before, tokenizer.chat_template = tokenizer.chat_template, TEMPLATE
    served = Served(family, rules or Rules("tiny"), **options)
    try:
        yield served
    finally:
        served.close()
        tokenizer.chat_template = before


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as one:
        yield one


def asks(number: int = 0) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": f"What is {number}?"}]


def fetch(address: str, body: Any = None, **headers: str) -> Any:
    """What the server answers to a GET, or to a POST of JSON: `status`, `headers`, and the body as text."""
    data = None if body is None else json.dumps(body).encode()
    kind = {} if body is None else {"Content-Type": "application/json"}
    try:
        with urlopen(Request(address, data, {**kind, **headers}), timeout=20) as answer:
            return SimpleNamespace(status=answer.status, headers=answer.headers, text=answer.read().decode())
    except HTTPError as error:
        return SimpleNamespace(status=error.code, headers=error.headers, text=error.read().decode())


@contextmanager
def posting(served: Served, path: str, body: bytes, length: int | None = None, more: str = "") -> Iterator[socket.socket]:
    """A connection that has sent a body, and from which nothing was read. At the end, it closes.

    The head may promise a body of another `length`, and have `more` lines.
    """
    head = (
        f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}"
        f"Content-Length: {length or len(body)}\r\n\r\n"
    )
    address, port = served.address.removeprefix("http://").split(":")
    with socket.create_connection((address, int(port)), timeout=10) as line:
        line.sendall(head.encode() + body)
        yield line


def until(holds: Callable[[], Any]) -> None:
    """Wait until something holds, for twenty seconds at most."""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def chat(served: Served, messages: list[dict[str, str]], **more: Any) -> Any:
    settings = {"model": "tiny", "max_tokens": 12, "temperature": 0, **more}
    return served.client.chat.completions.create(messages=messages, **settings)  # type: ignore[call-overload]


def test_a_point_that_passed_guarantees_only_what_was_tested() -> None:
    """Another mode, template, temperature, length, stop text or weight format was not tested."""
    backbone, exits = tiny("llama"), modest_exits("llama")
    exits.policy = Policy((0.9,) * 3)
    exits.calibration = calibration((exits.policy, True), (Policy((0.3,) * 3), False))
    found = ExitSet(exits)
    menu = Menu(backbone, found, Engine(backbone, found, mode="exact"))
    use = {"max_tokens": 24, "raw": False, "temperature": 0.0, "repetition_penalty": 1.0, "stop": ()}
    promise = {"loss": "f1", "risk": 0.05, "delta": 0.1}
    for mode in ("early:1", "early"):
        engine = menu.engine(mode)
        assert (engine.mode, engine.plan.fill.name) == ("early", "copy")
        assert menu.guarantee(engine, **use) == promise
    for other in ({"max_tokens": 25}, {"raw": True}, {"temperature": 0.7}, {"repetition_penalty": 1.1}, {"stop": ("x",)}):
        assert menu.guarantee(menu.engine("early:1"), **{**use, **other}) is None
    for mode in ("early:2", "full", "exact", None):
        assert menu.guarantee(menu.engine(mode), **use) is None
    said = menu.describe()
    assert [point["passed"] for point in said["points"]] == [True, False]
    assert said["tested"] == {"max_tokens": 24}
    assert "at most 0.05 of an answer is lost on average, with probability 0.9" in said["modes"][-1]["promise"]
    exits.calibration["weights"] = "int4"
    said = menu.describe()
    assert not any(point["passed"] for point in said["points"])
    assert "RISK" in said["modes"][-1]["promise"]


def test_a_sketch_of_the_head_is_not_called_full_depth() -> None:
    """Closed exits whose policy reads out few tokens: the policy decides, so it is not the mode `full`."""
    backbone, exits = tiny("llama"), sketched("llama")
    exits.policy = Policy((1.0,) * 3, candidates=64)
    exits.calibration = {**calibration((exits.policy, True)), "fill": "project"}
    usual = Engine(backbone, exits)
    menu = Menu(backbone, ExitSet(exits), usual)
    assert menu.describe()["usual"] == "early:1"
    assert menu.engine("early") is menu.engine("early:1") is menu.engine(None) is usual
    assert menu.engine("full").plan.is_full
    assert menu.guarantee(usual) == {"loss": "f1", "risk": 0.05, "delta": 0.1}
    assert menu.guarantee(menu.engine("full")) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_full_depths_whole_and_streamed(family: str) -> None:
    with serving(family) as served:
        for number in range(3):
            messages = asks(number)
            whole, parts = chat(served, messages), [*chat(served, messages, stream=True)]
            assert whole.choices[0].message.content == served.alone(messages)
            assert "".join(part.choices[0].delta.content or "" for part in parts) == served.alone(messages)
            assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
            about = whole.choices[0].model_extra["offramp"]
            assert len(about["tokens"]) == whole.usage.completion_tokens
            assert about["mode"] == "exact"
            assert parts[-1].choices[0].model_extra["offramp"]["tokens_per_pass"] >= 1


@pytest.mark.parametrize("mode", MODES)
def test_a_request_chooses_the_mode_and_hears_where_each_token_came_from(served: Served, mode: str) -> None:
    way = {"offramp": {"mode": mode}}
    whole, parts = (chat(served, asks(), max_tokens=24, extra_body=way, stream=stream) for stream in (False, True))
    about = whole.choices[0].model_extra["offramp"]
    notes = [part.choices[0].model_extra["offramp"] for part in parts]
    assert [{name: note[name] for name in about["tokens"][0]} for note in notes[:-1]] == about["tokens"]
    assert about["mode"] == notes[-1]["mode"] == mode
    wanted = Engine(served.backbone, served.exits, mode=mode).generate(
        served.backbone.prompts.encode_chat(asks()), max_tokens=24
    )
    assert about["tokens"] == [
        {
            "block": token.exit_block,
            "confidence": token.confidence,
            "drafted": token.drafted,
            "source": token.source,
        }
        for token in wanted.tokens
    ]
    assert sum(token["drafted"] for token in about["tokens"]) == about["num_accepted_tokens"]
    assert (mode == "exact") == (about["num_draft_tokens"] > 0)


def test_sampled_answers_are_those_of_their_seed(served: Served) -> None:
    sampling = {"temperature": 0.9, "top_p": 0.8, "seed": 5}
    found = chat(served, asks(), **sampling, n=3)
    texts = [choice.message.content for choice in found.choices]
    for number, text in enumerate(texts):
        assert text == served.alone(asks(), temperature=0.9, top_p=0.8, seed=5 + number)
    assert len(set(texts)) == 3
    assert found.usage.completion_tokens == sum(len(choice.model_extra["offramp"]["tokens"]) for choice in found.choices)


def test_completions_continue_texts_and_ids(served: Served) -> None:
    prompt = "Once upon"
    ids = served.backbone.prompts.encode(prompt, raw=True)
    wanted = Engine(served.backbone).generate(ids, max_tokens=10)
    for asked in (prompt, ids):
        found = served.client.completions.create(model="tiny", prompt=asked, max_tokens=10, temperature=0, logprobs=3)
        assert found.choices[0].text == wanted.text
        assert found.choices[0].logprobs is not None
        tokens = found.choices[0].logprobs.tokens
        assert tokens == [served.backbone.tokenizer.decode([id]) for id in wanted.ids]
        best = [max(each.values()) for each in found.choices[0].logprobs.top_logprobs]
        assert best == found.choices[0].logprobs.token_logprobs


@torch.inference_mode()
def test_log_probabilities_are_full_depths(served: Served) -> None:
    found = chat(served, asks(), logprobs=True, top_logprobs=4)
    ids = served.backbone.prompts.encode_chat(asks())
    answer = Engine(served.backbone).generate(ids, max_tokens=12).ids
    h, step = served.backbone.embed(torch.tensor([[*ids, *answer[:-1]]]))
    blocks = served.backbone.n_blocks
    nats = served.backbone.logits(served.backbone.run(h, 0, blocks, served.backbone.state(), step))[0].log_softmax(-1)
    content = found.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx(
        [float(row[id]) for row, id in zip(nats[len(ids) - 1 :], answer, strict=True)], abs=1e-4
    )
    assert all(len(entry.top_logprobs) == 4 for entry in content)


def test_an_answer_ends_before_a_stop_text(served: Served) -> None:
    whole = served.alone(asks(), 30)
    stop = whole[4:6]
    found = chat(served, asks(), max_tokens=30, stop=stop)
    assert found.choices[0].message.content == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_an_answer_fits_a_schema_with_drafts_too(served: Served) -> None:
    schema = {
        "type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"], "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    for seed in range(4):
        for way in ({}, {"offramp": {"mode": "full"}}):
            found = chat(
                served, asks(seed), max_tokens=200, temperature=1.0, seed=seed, response_format=form, extra_body=way
            )
            if found.choices[0].finish_reason == "stop":
                made = json.loads(found.choices[0].message.content)
                assert isinstance(made["a"], int)
                assert made["b"] in ("x", "y")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "no model 'gpt'"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "long " * 300}]}, openai.APIStatusError, "tokens long"),
        ({"n": 17}, openai.APIStatusError, "more than the 16"),
        ({"presence_penalty": 1}, openai.BadRequestError, "presence_penalty"),
        ({"tools": [{}]}, openai.BadRequestError, "tools"),
        ({"extra_body": {"offramp": {"mode": "none"}}}, openai.BadRequestError, "no mode 'none'"),
        ({"extra_body": {"offramp": {"mode": "early:9"}}}, openai.BadRequestError, "no calibrated points"),
        ({"extra_body": {"offramp": {"mode": "exact:1"}}}, openai.BadRequestError, "of early"),
        ({"extra_body": {"offramp": {"mode": "close"}}}, openai.BadRequestError, "close is gone"),
        ({"extra_body": {"offramp": {"mode": "close"}}, "stream": True}, openai.BadRequestError, "close is gone"),
        ({"extra_body": {"offramp": {"mode": "early:" + "0" * 5000 + "1"}}}, openai.BadRequestError, "no mode"),
        ({"extra_body": {"offramp": {"fill": "copy"}}}, openai.BadRequestError, "offramp.fill"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}},
         openai.BadRequestError, "schema"),
    ],
)  # fmt: skip
def test_bad_requests_get_openais_errors(
    served: Served, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as raised:
        chat(served, change.pop("messages", asks()), **change)
    assert words in raised.value.body["message"]
    assert chat(served, asks()).choices[0].message.content == served.alone(asks())


def test_a_key_and_a_limit_for_bodies() -> None:
    with serving(rules=Rules("tiny", key="secret", most_body=400)) as served:
        assert chat(served, asks()).choices
        with pytest.raises(openai.AuthenticationError):
            chat(replace_client(served, "wrong"), asks())
        with pytest.raises(openai.APIStatusError) as raised:
            chat(served, [{"role": "user", "content": "x" * 500}])
        assert raised.value.status_code == 413
        assert "Access-Control-Allow-Origin" not in fetch(f"{served.address}/health").headers


def replace_client(served: Served, key: str) -> Any:
    other = object.__new__(Served)
    other.client = openai.OpenAI(base_url=f"{served.address}/v1", api_key=key, max_retries=0)
    return other


@pytest.mark.parametrize("family", FAMILIES)
def test_many_requests_side_by_side_get_their_answers_alone(family: str) -> None:
    with serving(family, rows=6) as served:
        wanted = {number: served.alone(asks(number), 4 + number % 9) for number in range(24)}

        def ask(number: int) -> str:
            if number % 3:
                return chat(served, asks(number), max_tokens=4 + number % 9).choices[0].message.content
            parts = chat(served, asks(number), max_tokens=4 + number % 9, stream=True)
            return "".join(part.choices[0].delta.content or "" for part in parts)

        with ThreadPoolExecutor(12) as threads:
            assert dict(zip(wanted, threads.map(ask, wanted), strict=True)) == wanted
        assert served.scheduler.running == served.scheduler.waiting == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_cached_prompts_change_no_answer(family: str, mode: str) -> None:
    with serving(family) as served, serving(family, cache=0) as fresh:
        for number in range(3):
            messages = asks(number)
            for _ in range(2):
                way = {"offramp": {"mode": mode}}
                found, other = (chat(each, messages, extra_body=way) for each in (served, fresh))
                assert other.usage.prompt_tokens_details.cached_tokens == 0
                assert found.choices[0].message.content == other.choices[0].message.content
                messages = [*messages, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
        cached = found.usage.prompt_tokens_details.cached_tokens
        assert cached >= len(served.backbone.prompts.encode_chat([SYSTEM])) - 20


def test_the_prompt_cache_keeps_to_its_budget() -> None:
    with serving(cache=200_000) as served:
        for number in range(12):
            chat(served, [{"role": "user", "content": f"{number} " * 40}])
        cache = served.scheduler.cache
        assert 0 < cache.bytes <= 200_000
        assert len(cache) < 24


def test_a_client_that_leaves_frees_its_row() -> None:
    with serving(rows=1, waiting=4) as served:
        stream = chat(served, asks(), max_tokens=400, stream=True)
        next(iter(stream))
        stream.close()
        assert chat(served, asks(1)).choices[0].message.content == served.alone(asks(1))
        until = time.monotonic() + 5
        while served.scheduler.running and time.monotonic() < until:
            time.sleep(0.02)
        assert served.scheduler.running == 0


def job(served: Served, tell: Any, tokens: int = 300) -> Job:
    ids = served.backbone.prompts.encode("Go", raw=True)
    return Job(served.engine, ids, {"max_tokens": tokens, "end_ids": frozenset()}, Sampling().chooser(), tell)


def test_an_answer_that_nobody_reads_keeps_none_of_the_models_memory() -> None:
    with serving(cache=0) as served:
        told = threading.Event()
        done = job(served, lambda token: told.set() if token is None else None, tokens=5)
        served.scheduler.submit(done)
        assert told.wait(10)
        assert done.made is not None
        assert (done.outcome, len(done.made.tokens)) == ("length", 5)
        assert done.talk is done.request is None


def test_too_many_requests_are_refused_and_cancelled_ones_make_room() -> None:
    with serving(rows=1, waiting=1) as served:
        held = threading.Event()
        first = job(served, lambda token: held.wait(10))
        waiting = job(served, lambda token: None)
        served.scheduler.submit(first)
        while not served.scheduler.running:
            time.sleep(0.01)
        served.scheduler.submit(waiting)
        with pytest.raises(openai.RateLimitError) as raised:
            chat(served, asks())
        assert int(raised.value.response.headers["retry-after"]) >= 1
        with pytest.raises(Full):
            served.scheduler.submit(job(served, lambda token: None))
        served.scheduler.cancel(waiting)
        assert served.scheduler.waiting == 0
        served.scheduler.cancel(first)
        held.set()
        until = time.monotonic() + 5
        while served.scheduler.running + served.scheduler.waiting and time.monotonic() < until:
            time.sleep(0.02)
        assert chat(served, asks()).choices


@pytest.mark.parametrize("error", [BadNumbers("NaN.", "Try float32."), MemoryError("no memory"), SystemExit(1)])
def test_a_failing_step_ends_its_requests_and_not_the_server(monkeypatch, error: BaseException) -> None:
    with serving() as served:
        step = served.engine.batch().__class__.step
        broken = threading.Event()
        broken.set()

        def fail(self: Any) -> Any:
            if broken.is_set():
                raise error
            return step(self)

        monkeypatch.setattr("offramp.decode.batch.Batch.step", fail)
        with pytest.raises(openai.InternalServerError):
            chat(served, asks())
        parts = [*served.client.with_options(timeout=20).chat.completions.with_raw_response.create(
            model="tiny", messages=asks(), stream=True
        ).http_response.iter_lines()]  # fmt: skip
        assert "error" in json.loads(next(part for part in parts if part).removeprefix("data: "))
        broken.clear()
        assert chat(served, asks()).choices[0].message.content == served.alone(asks())
        assert served.scheduler.failures == 2


def test_metrics_health_and_models(served: Served) -> None:
    chat(served, asks())
    text = fetch(f"{served.address}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["offramp:generation_tokens_total"]) >= 1
    assert float(values["offramp:spec_decode_num_draft_tokens_total"]) >= float(
        values["offramp:spec_decode_num_accepted_tokens_total"]
    )
    assert float(values['offramp:request_success_total{finished_reason="length"}']) >= 1
    assert json.loads(fetch(f"{served.address}/health").text) == {"status": "ok"}
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("other")
    assert fetch(f"{served.address}/nowhere").status == 404


def test_a_log_line_says_what_was_done_and_not_what_was_said(served: Served, caplog) -> None:
    with caplog.at_level("INFO", logger="offramp.serve"):
        chat(served, [{"role": "user", "content": "my secret"}])
    (record,) = (record for record in caplog.records if record.msg == "answered")
    line = json.loads(JsonLines().format(record))
    assert line["event"] == "answered"
    assert line["tokens"] == 12
    assert line["prompt_tokens"] > line["cached_tokens"]
    assert "secret" not in json.dumps(line)


def test_a_large_body_is_refused_as_it_comes_in(served: Served) -> None:
    head = (
        "POST /v1/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        "Transfer-Encoding: chunked",
    )
    with socket.create_connection(served.address.removeprefix("http://").split(":")) as line:
        line.sendall("\r\n".join([*head, "", ""]).encode())
        for _ in range(20):
            line.sendall(b"%x\r\n%s\r\n" % (1 << 16, b" " * (1 << 16)))
        assert b" 413 " in line.recv(1000).splitlines()[0]


PATHS = {"chat/completions": {"messages": [{"role": "user", "content": "Hi"}]}, "completions": {"prompt": "Hi"}}


@given(body=st.dictionaries(st.sampled_from([*ChatRequest.model_fields, "other"]), JSON))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_makes_the_server_fail(served: Served, body: dict[str, Any]) -> None:
    if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] > 5:
        body["max_tokens"] = 5  # so that no answer takes long
    for path, own in PATHS.items():
        for sent in (body, {**own, **body}):
            found = fetch(f"{served.address}/v1/{path}", sent)
            assert found.status in (200, 400, 404), found.text
            if found.status != 200:
                assert set(json.loads(found.text)["error"]) == {"message", "type", "param", "code"}


def test_nothing_that_the_openapi_document_allows_makes_the_server_fail(served: Served) -> None:
    """Schemathesis makes requests from the document, right ones and wrong ones."""
    import schemathesis

    document = schemathesis.openapi.from_url(f"{served.address}/openapi.json")
    asked = []
    for operation in document.get_all_operations():

        @given(case=operation.ok().as_strategy())
        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        def ask(case: Any) -> None:
            if isinstance(case.body, dict):
                case.body["max_tokens"], case.body["n"] = 3, 1
            asked.append(case.operation.path)
            assert case.call(timeout=20).status_code < 500

        ask()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models"} <= set(asked)


def test_closing_finishes_what_runs() -> None:
    with serving() as served, ThreadPoolExecutor(1) as threads:
        answer = threads.submit(chat, served, asks(), max_tokens=200)
        while not served.scheduler.running:
            time.sleep(0.005)
        served.close()
        assert answer.result(20).usage.completion_tokens > 1


def test_the_page_and_its_files_come_from_the_server_alone(served: Served) -> None:
    page = fetch(served.address)
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    for file in ("style.css", "main.js", "api.js", "answers.js"):
        assert fetch(f"{served.address}/page/{file}").status == 200
    assert "http" not in page.text.replace("http-equiv", "")
    menu = json.loads(fetch(f"{served.address}/offramp/menu").text)
    assert menu["modes"] == [asdict(mode) for mode in MODES.values()]
    assert menu["usual"] == "exact"


def test_a_loop_is_woken_once_for_all_that_a_step_decides() -> None:
    post, sent = Post(), []

    class Loop:
        def call_soon_threadsafe(self, deliver: Any, things: list[Any]) -> None:
            sent.append(len(things))
            deliver(things)

    loop = Loop()
    queues = [asyncio.Queue(), asyncio.Queue()]
    for queue in queues:
        for number in range(3):
            post.put(loop, queue, number)
    post.send()
    post.send()
    assert sent == [6]
    assert [[queue.get_nowait() for _ in range(3)] for queue in queues] == [[0, 1, 2]] * 2


def test_tokens_that_came_before_an_error_are_told() -> None:
    arrived, error = asyncio.Queue(), ValueError("late")
    made = Choices([Choice(False, None, None, None), Choice(False, None, None, None)], arrived)
    for what in ((0, "a"), (1, "b"), (0, "c"), (0, None), (1, error)):
        arrived.put_nowait(what)
    assert asyncio.run(made.more()) == [(0, 0), (1, 0), (0, 1), (0, None)]
    with pytest.raises(ValueError, match="late"):
        asyncio.run(made.more())


def test_several_answers_to_one_prompt_and_requests_that_begin_alike_read_it_once(monkeypatch) -> None:
    with serving() as served:
        step, go, rows = Batch._step, threading.Event(), []

        def counted(batch: Batch, reading: Any, deciding: Any) -> Any:
            go.wait(10)
            rows.extend(end - request.sequence.run for request, end in reading)
            return step(batch, reading, deciding)

        monkeypatch.setattr(Batch, "_step", counted)
        with ThreadPoolExecutor(3) as threads:
            answers = [threads.submit(chat, served, asks(number), n=3, temperature=0.5, seed=1) for number in range(3)]
            until(lambda: served.scheduler.running + served.scheduler.waiting == 9)
            go.set()
            found = [answer.result(20).choices for answer in answers]
        prompt = len(served.backbone.prompts.encode_chat(asks()))
        assert prompt < sum(rows) < 2 * prompt
        for number, choices in enumerate(found):
            alone = [served.alone(asks(number), temperature=0.5, seed=seed) for seed in (1, 2, 3)]
            assert [choice.message.content for choice in choices] == alone
