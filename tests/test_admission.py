"""No request stops the server: what it takes is bounded, and it is given up when its client leaves."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn

from helpers import run_cli
from models import saved, tiny
from offramp import Engine, machine
from offramp.decode.batch import Batch
from offramp.decode.request import Talk
from offramp.model.families import UNBOUNDED
from offramp.model.prompts import Prompts
from offramp.serve import api, scheduler
from offramp.serve.answers import Rules
from offramp.serve.protocol import MOST_MESSAGES, MOST_STOP
from test_serve import FAMILIES, SYSTEM, Served, asks, chat, job, posting, serving, until

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as one:
        yield one


@contextmanager
def endless(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[Served]:
    """A server of a model whose context has no end."""
    backbone = tiny(FAMILIES[1])
    monkeypatch.setattr(backbone, "context", UNBOUNDED)
    monkeypatch.setattr(backbone, "prompts", Prompts(backbone.tokenizer, UNBOUNDED, "tiny", backbone.vocab_size))
    with serving(FAMILIES[1], **options) as served:
        yield served


def sent(served: Served, body: dict[str, Any], length: int | None = None) -> AbstractContextManager[socket.socket]:
    """A connection that has sent a request for a chat."""
    return posting(served, "chat/completions", json.dumps(body).encode(), length)


class Rendering:
    """The tokenizer's chat template, which counts conversations, and can be held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, served: Served) -> None:
        tokenizer, self.begun, self.go = served.backbone.tokenizer, list[str](), threading.Event()
        render = tokenizer.apply_chat_template

        def held(messages: list[dict[str, str]], **options: Any) -> Any:
            self.begun.append(messages[-1]["content"])
            self.go.wait(20)
            return render(messages, **options)

        monkeypatch.setattr(tokenizer, "apply_chat_template", held)


def test_six_clients_that_ask_for_much_and_leave_do_not_stop_the_server(monkeypatch) -> None:
    with endless(monkeypatch) as served:
        rendering = Rendering(monkeypatch, served)
        rendering.go.set()
        for _ in range(6):
            with sent(served, {"messages": [{"role": "user", "content": ""}] * MOST_MESSAGES}):
                until(lambda: rendering.begun)
        assert chat(served, HI, timeout=20).choices[0].message.content == served.alone(HI)
    # `serving` has asserted that the server has ended.


def test_a_conversation_is_rendered_thrice_and_kept_where_others_go_on(monkeypatch) -> None:
    with endless(monkeypatch) as served:
        rendering = Rendering(monkeypatch, served)
        rendering.go.set()
        talk = [SYSTEM, *({"role": "user", "content": f"Number {number}."} for number in range(40))]
        chat(served, talk)
        assert len(rendering.begun) == 3
        for messages, shared in (([*talk[:-1], *HI], talk[:-1]), ([SYSTEM, *HI], [SYSTEM])):
            found = chat(served, messages).usage.prompt_tokens_details.cached_tokens
            assert found >= len(served.backbone.prompts.encode_chat(shared)) - len("<assistant>")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": HI * (MOST_MESSAGES + 1)}, f"at most {MOST_MESSAGES}"),
        ({"messages": [{"role": "user", "content": "x" * 50_000}]}, "characters"),
        ({"stop": ["x" * (MOST_STOP + 1)]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"n": 16}, "more than the 15"),
        ({"max_tokens": 200}, "--memory"),
    ],
)
def test_what_can_never_be_answered_is_refused(change: dict[str, Any], words: str) -> None:
    with serving(rows=15, memory=100_000) as served:
        with pytest.raises(openai.APIStatusError) as raised:
            chat(served, change.pop("messages", HI), **change)
        assert raised.value.status_code in (400, 413)
        assert words in raised.value.body["message"]
        assert chat(served, HI).choices[0].message.content == served.alone(HI)


def test_requests_whose_prompts_are_not_read_yet_count_as_waiting(monkeypatch) -> None:
    with serving(rows=1, waiting=2) as served, ThreadPoolExecutor(3) as threads:
        rendering = Rendering(monkeypatch, served)
        answers = [threads.submit(chat, served, asks(number)) for number in range(3)]
        until(lambda: served.scheduler._preparing == 3)
        with pytest.raises(openai.RateLimitError):
            chat(served, asks(), timeout=5)
        rendering.go.set()
        assert all(answer.result(20).choices for answer in answers)
        assert chat(served, asks()).choices


def test_prompts_of_clients_that_left_are_not_rendered(monkeypatch) -> None:
    with serving() as served:
        rendering = Rendering(monkeypatch, served)
        with ThreadPoolExecutor(2) as threads:
            answers = [threads.submit(chat, served, asks(number)) for number in range(2)]
            until(lambda: rendering.begun and served.scheduler._preparing == 2)
            with ExitStack() as lines:
                for _ in range(8):
                    lines.enter_context(sent(served, {"messages": [{"role": "user", "content": "gone"}]}))
                until(lambda: served.scheduler._preparing == 10)
            until(lambda: served.scheduler._preparing == 2)
            rendering.go.set()
            assert all(answer.result(20).choices for answer in answers)
        assert "gone" not in rendering.begun


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_prompt_is_read_frees_its_row(monkeypatch, stream: bool) -> None:
    with endless(monkeypatch, rows=1) as served:
        step, pieces, go = Batch.step, [], threading.Event()

        def held(batch: Batch) -> Any:
            if pieces:
                go.wait(10)
            pieces.append([len(request.sequence.ids) for request in batch.requests])
            return step(batch)

        monkeypatch.setattr(Batch, "step", held)
        with sent(served, {"messages": [{"role": "user", "content": "long " * 2000}], "max_tokens": 2, "stream": stream}):
            until(lambda: pieces)
        until(lambda: all(each.cancelled for each in served.scheduler._admitted))
        go.set()
        assert chat(served, HI).choices[0].message.content == served.alone(HI)
        assert sum(lengths[0] > 5000 for lengths in pieces) <= 2


def test_a_body_that_does_not_arrive_is_not_waited_for() -> None:
    with serving(rules=Rules("tiny", most_arrival=0.2)) as served, sent(served, {}, length=100) as line:
        answer = b""
        while part := line.recv(1000):  # until the server closes the connection
            answer += part
        assert b" 408 " in answer.splitlines()[0]
        assert served.scheduler.running == served.scheduler.waiting == 0


def test_a_client_that_never_reads_loses_its_answer(monkeypatch) -> None:
    monkeypatch.setattr(api, "LAST_READING", 0.1)
    messages = [{"type": "http.request", "body": json.dumps({"messages": HI, "stream": True}).encode()}]

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(_: Any) -> None:
        await asyncio.Event().wait()

    step, go = Batch.step, threading.Event()
    monkeypatch.setattr(Batch, "step", lambda batch: (go.wait(10), step(batch))[1])
    with serving(rules=Rules("tiny", most_arrival=0.1, most_seconds=0.5)) as served:
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "root_path": "",
                 "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")]}  # fmt: skip
        asyncio.run(asyncio.wait_for(served._server.config.app(scope, receive, send), 10))
        assert [each.cancelled for each in served.scheduler._admitted] == [True]
        go.set()
        until(lambda: not served.scheduler.running)


def test_the_server_ends_whatever_its_clients_do(monkeypatch) -> None:
    monkeypatch.setattr(scheduler, "LAST_STEP", 0.1)
    go = threading.Event()
    with serving() as served:
        served._server.config.timeout_graceful_shutdown = 0.2
        step, begun = Batch.step, threading.Event()

        def held(batch: Batch) -> Any:
            begun.set()
            go.wait(20)
            return step(batch)

        monkeypatch.setattr(Batch, "step", held)
        with sent(served, {"messages": HI, "stream": True, "max_tokens": 200}), sent(served, {}, length=100):
            begun.wait(10)
            rendering = Rendering(monkeypatch, served)
            with sent(served, {"messages": HI}):
                until(lambda: rendering.begun)
                served.close()
    go.set()
    rendering.go.set()


def test_closing_gives_up_what_runs_and_what_waits() -> None:
    with serving(rows=1) as served:
        ended, running = threading.Semaphore(0), threading.Event()

        def tell(token: Any) -> None:
            running.set()
            if token is None:
                ended.release()

        for _ in range(3):
            served.scheduler.submit(job(served, tell, tokens=200))
        running.wait(10)
        served.scheduler.close()
        assert all(ended.acquire(timeout=5) for _ in range(3))
        with pytest.raises(scheduler.Full):
            served.scheduler.take()


def most_side_by_side(monkeypatch, served: Served, jobs: int, answers: int, bytes: int = 0) -> int:
    """The most requests in the batch while some jobs, each of some answers, are done."""
    step, seen, go, ended = Batch.step, [], threading.Event(), threading.Semaphore(0)

    def held(batch: Batch) -> Any:
        go.wait(10)
        seen.append(len(batch.requests))
        return step(batch)

    def tell(token: Any) -> None:
        assert not isinstance(token, Exception)
        if token is None:
            ended.release()

    monkeypatch.setattr(Batch, "step", held)
    for _ in range(jobs):
        first, *others = (job(served, tell, tokens=9) for _ in range(answers))
        first.twins = others
        for each in (first, *others):
            each.bytes = bytes
        served.scheduler.submit(first)
    go.set()
    assert all(ended.acquire(timeout=10) for _ in range(jobs * answers))
    return max(seen)


def test_several_answers_to_one_prompt_take_a_row_each(monkeypatch) -> None:
    with serving(rows=3) as served:
        assert most_side_by_side(monkeypatch, served, jobs=3, answers=2) in (2, 3)


def test_requests_wait_until_their_memory_is_free(monkeypatch) -> None:
    with serving(memory=5_000) as served:
        assert most_side_by_side(monkeypatch, served, jobs=4, answers=1, bytes=2_000) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_no_request_takes_more_memory_than_was_counted(family: str) -> None:
    engine, talk = Engine(tiny(family)), Talk()
    one = engine.read([0, 0]).sequence
    assert one is not None
    for _ in engine.stream("Some words", talk, max_tokens=40):
        pass
    assert talk.sequence is not None
    taken, counted = talk.sequence.state.bytes, one.state.bytes_for(talk.sequence.prompt + 40)
    assert taken <= counted <= 2 * taken


def test_free_memory_ends_at_the_containers_limit(monkeypatch, tmp_path: Path) -> None:
    texts = ("1000\n", "700\n", "anon 600\ninactive_file 100\n")
    monkeypatch.setattr(machine, "CGROUP", tuple(str(tmp_path / str(number)) for number in range(3)))
    free = machine.free_memory(torch.device("cpu"))
    assert free > 2**20
    for number, text in enumerate(texts):
        (tmp_path / str(number)).write_text(text)
    assert machine.free_memory(torch.device("cpu")) == 400
    (tmp_path / "0").write_text("max\n")
    assert machine.free_memory(torch.device("cpu")) > 2**20


def test_the_command_bounds_the_servers_end_and_its_memory(monkeypatch, tmp_path: Path) -> None:
    started: dict[str, Any] = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: started.update(options))
    made = []
    init = scheduler.Scheduler.__init__
    monkeypatch.setattr(scheduler.Scheduler, "__init__", lambda self, *sizes: (made.append(sizes), init(self, *sizes))[1])
    cache = str(tmp_path / "cache")
    folder = str(saved(tiny("llama"), tmp_path / "model"))
    assert run_cli("serve", folder, "--memory", "0.5", OFFRAMP_CACHE=cache).code == 0
    assert started["timeout_graceful_shutdown"] == api.LAST_ANSWERS
    assert run_cli("serve", folder, OFFRAMP_CACHE=cache).code == 0
    assert made[0][3] == 2**29
    assert 0 < made[1][3] < machine.free_memory(torch.device("cpu"))
    assert "--memory" in run_cli("serve", folder, "--memory", "0").stderr
