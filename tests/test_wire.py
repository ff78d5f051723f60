"""What goes over the wire: mistakes are refused in OpenAI's form, one request fails alone, and what is counted is right."""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import openai
import pytest
import torch
from openai.types import completion_create_params as of_completions
from openai.types.chat import completion_create_params as of_chats
from pydantic import ValidationError

from helpers import exits_for, grammar_of, modest_exits, run_cli, some_prompts
from models import BLOCKS, compiled_only, tiny
from offramp import Engine, Policy
from offramp.decode.request import Prefilled, Talk
from offramp.decode.sampling import Sampling
from offramp.decode.sequence import Sequence
from offramp.errors import BadInput, BadNumbers, NothingFits
from offramp.model.backbone import Backbone
from offramp.model.compiled import steps as of_steps
from offramp.model.compiled.session import Session
from offramp.serve import scheduler as of_scheduler
from offramp.serve.answers import Rules
from offramp.serve.api import Stream
from offramp.serve.cache import PromptCache
from offramp.serve.choices import Recorder
from offramp.serve.grammar import Grammars
from offramp.serve.protocol import ChatRequest, CompletionRequest
from offramp.serve.scheduler import Job
from test_serve import FAMILIES, PATHS, Served, asks, chat, fetch, posting, serving, until

DOCS = Path(__file__).parents[1] / "docs" / "serve.md"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as one:
        yield one


def sent(served: Served, path: str, body: bytes) -> tuple[int, Any]:
    """The status and the JSON that a body of bytes gets."""
    with posting(served, path, body, more="Connection: close\r\n") as line:
        answer = b"".join(iter(lambda: line.recv(1 << 16), b""))
    head_of_answer, _, text = answer.partition(b"\r\n\r\n")
    return int(head_of_answer.split()[1]), json.loads(text)


# One request fails alone


class Fails:
    """A tell or a `choose` that raises at its n-th call."""

    def __init__(self, call: int, what: Callable[..., Any]) -> None:
        self.left, self.what = call, what

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.left -= 1
        if not self.left:
            raise RuntimeError("mine alone")
        return self.what(*given, **named)


def with_nan(backbone: Backbone, sequence: Sequence) -> None:
    """Let all blocks remember NaN: attention in the place of the newest token, a mixer after it."""
    h, first = torch.full((1, 1, backbone.hidden_size), torch.nan), sequence.state.length(0) - 1
    if "mamba" not in backbone.kinds:
        sequence.state.crop(first)
    backbone.project(h, 0, BLOCKS, sequence.state, backbone.step(h, first))


@pytest.mark.parametrize("way", ["choose", "text", "numbers"])
@pytest.mark.parametrize("fill", ["project", "defer", "verify"])
@pytest.mark.parametrize("family", FAMILIES[:2])
def test_a_request_that_fails_changes_no_answer_beside_it(family: str, fill: str, way: str) -> None:
    engine = Engine(tiny(family), modest_exits(family.partition("/")[0]), Policy((0.4,) * 3), fill)
    if way == "numbers" and "mamba" in engine.backbone.kinds:
        engine.steppers.compiled = None  # it refuses a mixer that has taken in more than the text
    prompts = some_prompts(3, seed=4)
    alone = [engine.generate(prompt, max_tokens=12).ids for prompt in prompts]
    batch, choose = engine.batch(), Sampling().chooser()
    requests = [
        batch.add(prompt, choose=Fails(3, choose) if number == 1 and way == "choose" else choose, max_tokens=12)
        for number, prompt in enumerate(prompts)
    ]
    bad, events = requests[1], []
    if way == "text":
        bad.detokenizer.push = Fails(3, bad.detokenizer.push)  # type: ignore[method-assign]
    while batch.requests:
        events += batch.step()
        if way == "numbers" and len(bad.tokens) >= 3:
            with torch.inference_mode():
                with_nan(engine.backbone, bad.sequence)
    assert bad.finish_reason == "failed"
    assert isinstance(bad.error, BadNumbers if way == "numbers" else RuntimeError)
    assert not bad.sequence.whole
    assert [event.request for event in events].count(bad) >= 2
    for number in (0, 2):
        assert [token.id for token in requests[number].tokens] == alone[number]


@pytest.mark.parametrize("way", ["choose", "tell"])
def test_a_job_that_fails_changes_no_answer_beside_it(served: Served, way: str) -> None:
    heard: list[list[Any]] = [[], [], [], []]
    ended = [threading.Event() for _ in heard]

    def teller(number: int) -> Callable[[Any], None]:
        def tell(what: Any) -> None:
            heard[number].append(what)
            if what is None or isinstance(what, Exception):
                ended[number].set()

        return Fails(3, tell) if way == "tell" and number == 1 else tell

    prompts, choose = [*some_prompts(2, seed=4), *some_prompts(1, seed=5)], Sampling(0.9).chooser()
    prompts.append(prompts[1])  # a twin of the one that fails
    jobs = [
        Job(
            served.engine, prompt, {"max_tokens": 9}, Fails(3, choose) if way == "choose" and number == 1 else choose,
            teller(number),
        )
        for number, prompt in enumerate(prompts)
    ]  # fmt: skip
    jobs[1].twins = [jobs[3]]
    for job in jobs[:3]:
        served.scheduler.submit(job)
    for number, each in enumerate(ended):
        if way == "choose" or number != 1:
            assert each.wait(20)
    until(lambda: jobs[1].state == "done")
    assert str(jobs[1].error) == "mine alone"
    for number in (0, 2, 3):
        alone = Engine(served.backbone, sampling=choose).generate(prompts[number], max_tokens=9)
        assert [token.id for token in heard[number][:-1]] == alone.ids
        assert jobs[number].error is None
    assert served.scheduler.trouble is None
    assert not served.scheduler.running


UNUSABLE = [
    {"repetition_penalty": 1e-39}, {"repetition_penalty": 1e39}, {"temperature": 2.1}, {"temperature": float("nan")},
    {"top_k": -1}, {"top_k": 2**63}, {"top_p": 0}, {"min_p": 1.1}, {"seed": 2**63}, {"seed": -(2**63) - 1},
    {"max_tokens": 2**63}, {"response_format": {"type": "json_schema"}},
]  # fmt: skip
EXTREME = [
    {"repetition_penalty": 0.01, "temperature": 1e-39}, {"repetition_penalty": 100, "temperature": 2},
    {"top_k": 2**63 - 1, "top_p": 1e-45, "min_p": 1e-45}, {"seed": 2**63 - 1, "n": 2}, {"seed": -(2**63)},
]  # fmt: skip


@pytest.mark.parametrize("settings", UNUSABLE + EXTREME, ids=str)
def test_numbers_are_bounded_so_that_float32_survives_them(served: Served, settings: dict[str, Any]) -> None:
    for path, own in PATHS.items():
        if path == "chat/completions" or "response_format" not in settings:
            found = fetch(f"{served.address}/v1/{path}", {**own, "max_tokens": 3, **settings})
            assert found.status == (400 if settings in UNUSABLE else 200), found.text


# Bodies


HALF = r'"\ud800"'  # of a pair of surrogates
OWN = '"prompt": "a", "messages": [{"role": "user", "content": "a"}], '
FORM = '{"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [HALF]}}}'
WITH_HALF = [
    '"prompt": HALF, "messages": [{"role": "user", "content": HALF}]', '"model": HALF', '"logit_bias": {HALF: 1}',
    '"messages": [{"role": "user", "content": "a", "name": HALF}], "stop": HALF',
    f'"response_format": {FORM}, "stop": HALF',
]  # fmt: skip
BODIES = [
    *(f"{{{OWN}{each}}}".replace("HALF", HALF) for each in WITH_HALF), f"[{HALF}]", HALF, "{", "", "null", "[" * 100_000,
    '{"messages":' + "[" * 100_000, f'{{{OWN}"tools":{"[" * 960}{"]" * 960}}}', f'{{{OWN}"seed": {"9" * 5000}}}',
    f'{{"prompt": [{"9" * 400}]}}', '{"prompt": [true, null]}', '{"prompt": {}, "messages": {}}',
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", [*BODIES, b"\xff\xfe\x00"], ids=lambda body: str(body)[:40])
def test_no_body_whatever_gets_anything_but_openais_error(served: Served, path: str, body: str | bytes) -> None:
    status, answer = sent(served, path, body if isinstance(body, bytes) else body.encode())
    assert status == 400, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_a_bug_gets_openais_error_too(served: Served, monkeypatch) -> None:
    monkeypatch.setattr("offramp.serve.answers.Server.rendered", lambda *_: 1 / 0)
    found = fetch(f"{served.address}/v1/chat/completions", PATHS["chat/completions"])
    assert found.status == 500
    assert json.loads(found.text)["error"] == {
        "message": "The engine failed.", "type": "server_error", "param": None, "code": None,
    }  # fmt: skip


def test_ids_that_are_no_tokens_are_refused_before_a_stream_begins(served: Served) -> None:
    for ids in ([1, 260], [-1], [10**30]):
        with pytest.raises(openai.BadRequestError, match="has 260 tokens"):
            served.client.completions.create(model="tiny", prompt=ids, stream=True)


# Draws and schemas


def test_answers_differ_without_a_seed_and_repeat_with_one(served: Served) -> None:
    def drawn(**more: Any) -> str:
        return chat(served, asks(), temperature=1.0, max_tokens=30, **more).choices[0].message.content

    assert drawn() != drawn()
    assert drawn(seed=7) == drawn(seed=7)
    assert drawn(extra_body={"seed": None}) != drawn(seed=0)


SCHEMA = {"enum": ["maybe", "never"]}


@pytest.mark.parametrize("tails", [(), (2, 1, 0)], ids=["no_tails", "tails"])
@pytest.mark.parametrize("thresholds", [(1.0, 1.0, 1.0), (0.0, 1.0, 0.2)])
@pytest.mark.parametrize("fill", ["project", "copy", "defer", "verify"])
@pytest.mark.parametrize("family", FAMILIES[:2])
def test_a_schema_holds_where_a_sketch_names_few_tokens(
    family: str, fill: str, thresholds: tuple[float, ...], tails: tuple[int, ...]
) -> None:
    backbone, exits = tiny(family), exits_for(family.partition("/")[0], "ffn", tails=tails)
    sketch = torch.eye(backbone.hidden_size), torch.eye(backbone.hidden_size)
    exits.sketch = sketch
    policy = Policy(thresholds, candidates=2)
    if fill == "verify":
        exits.shortlist, policy = torch.tensor([5, 6]), Policy(thresholds)
    engine = Engine(backbone, exits, policy, fill)
    batch, prompts = engine.batch(), some_prompts(2, seed=3)
    requests = [
        batch.add(prompt, choose=grammar_of(backbone, SCHEMA, len(prompt), Sampling(1.0, seed=3)), max_tokens=20)
        for prompt in prompts
    ]
    list(batch.run())
    for request in requests:
        assert json.loads("".join(token.text for token in request.tokens)) in SCHEMA["enum"]
        assert request.finish_reason == "stop"


OBJECTS = [{"type": "object", "properties": {f"a{number}": {"type": "string"}}} for number in range(4500)]
# Following it overflows the stack.
CHAIN = {f"d{number}": {"items": {"$ref": f"#/$defs/d{number + 1}"}} for number in range(1500)}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 9999991},
        {"type": "number", "multipleOf": 0.9999991},
        {"properties": {"a": {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}}},
        {"type": "integer", "multipleOf": 10**400},
        {"type": "integer", "multipleOf": True},
        {"type": "integer", "multipleOf": math.inf},
        {"anyOf": OBJECTS},
        {"$defs": CHAIN, "$ref": "#/$defs/d0"},
    ],
)
def test_a_schema_that_takes_too_much_is_refused(schema) -> None:
    with pytest.raises(BadInput, match=r"too large|cannot be used|characters"):
        asyncio.run(Grammars(tiny("llama")).matcher(schema))


def test_a_schema_may_have_multiples() -> None:
    backbone, schema = tiny("llama"), {"type": "number", "minimum": 0, "multipleOf": 0.25}
    grammar = grammar_of(backbone, schema)
    *begun, two = backbone.prompts.encode("0.2", raw=True)
    words = grammar.allowed([*begun, two])
    assert [id - two + 2 for id in range(backbone.vocab_size) if words[id // 32] >> id % 32 & 1] == [5]


def test_a_long_list_that_is_no_prompt_is_refused_at_its_first_entry() -> None:
    with pytest.raises(ValidationError) as refused:
        CompletionRequest(prompt=[""] * 1000)
    assert refused.value.error_count() < 4
    assert CompletionRequest(prompt=[1, 2]).prompt == [1, 2]


def test_any_of_the_models_ends_may_end_an_answer_in_json(monkeypatch) -> None:
    backbone, schema = tiny("llama"), {"type": "integer"}
    monkeypatch.setattr(type(backbone), "stop_ids", frozenset({7, 8, 10**6}))
    grammar = grammar_of(backbone, schema)
    number = backbone.prompts.encode("4", raw=True)[-1:]
    words = grammar.allowed(number)
    assert [bool(words[id // 32] >> id % 32 & 1) for id in (7, 8)] == [True, True]


def test_where_nothing_fits_the_request_ends_with_an_error(served: Served, monkeypatch) -> None:
    grammar = grammar_of(served.backbone, SCHEMA)
    with pytest.raises(NothingFits):
        grammar(torch.full((260,), -torch.inf), [])
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
    monkeypatch.setattr("llguidance.LLMatcher.compute_bitmask", lambda _: bytes(36), raising=False)
    with pytest.raises(openai.BadRequestError, match="No token of the model fits"):
        chat(served, asks(), response_format=form)


# What is counted, and health


def metrics(served: Served) -> dict[str, float]:
    lines = fetch(f"{served.address}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def ends(served: Served) -> dict[str, float]:
    """How many requests have ended, by reason."""
    pattern = re.compile(r'request_success_total\{finished_reason="(\w+)"\}')
    return {found[1]: value for name, value in metrics(served).items() if (found := pattern.search(name))}


def held(served: Served, go_on: threading.Event) -> Job:
    """A job that holds a row until it may go on."""
    job = Job(served.engine, [1, 2], {"max_tokens": 2}, Sampling().chooser(), lambda _: go_on.wait(20))
    served.scheduler.submit(job)
    until(lambda: served.scheduler.running)
    return job


def test_each_request_is_counted_once_under_its_reason(monkeypatch) -> None:
    with serving(rows=3) as served:
        chat(served, asks(), n=3)
        assert ends(served) == {"length": 1}
        assert metrics(served)["offramp:prompt_tokens_total"] == len(served.backbone.prompts.encode_chat(asks()))
        go_on = threading.Event()
        held(served, go_on)
        for stream in (True, False):
            body = json.dumps({"prompt": "a", "stream": stream}).encode()
            with posting(served, "completions", body):
                until(lambda: served.scheduler.waiting)
            until(lambda: not served.scheduler.waiting)
        go_on.set()
        until(lambda: ends(served).get("abort") == 2)
        monkeypatch.setattr("offramp.decode.batch.Batch.step", lambda _: 1 / 0)
        with pytest.raises(openai.InternalServerError):
            chat(served, asks())
        monkeypatch.undo()
        with pytest.raises(openai.BadRequestError):
            chat(served, asks(), temperature=-1)
        assert ends(served) == {"length": 1, "abort": 2, "error": 1}
        found = metrics(served)
        assert found["offramp:e2e_request_latency_seconds_count"] == 4
        assert found["offramp:time_to_first_token_seconds_count"] == 1
        assert found["offramp:time_per_output_token_seconds_count"] == 3
        assert all(value >= 0 for value in found.values())


def test_a_stream_that_never_begins_is_given_up() -> None:
    ended = []

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        await asyncio.sleep(1)  # until the stream is given up

    async def events() -> Any:
        yield ""

    stream = Stream(events(), lambda: ended.append("answers"))
    asyncio.run(stream({"type": "http", "asgi": {"spec_version": "2.3"}}, gone, send))  # type: ignore[arg-type]
    assert ended == ["answers"]


def test_health_is_the_engines(monkeypatch) -> None:
    with serving() as served:
        monkeypatch.setattr("offramp.decode.batch.Batch.step", lambda _: 1 / 0)
        with pytest.raises(openai.InternalServerError):
            chat(served, asks())
        found = fetch(f"{served.address}/health")
        assert found.status == 503
        assert json.loads(found.text)["error"]["message"] == "The engine's last step failed."
        monkeypatch.undo()
        chat(served, asks())
        assert fetch(f"{served.address}/health").status == 200
        go_on = threading.Event()
        held(served, go_on)
        monkeypatch.setattr(of_scheduler, "STUCK", 0.0)
        assert "has taken more than" in fetch(f"{served.address}/health").text
        go_on.set()
        until(lambda: not served.scheduler.running)
        until(lambda: fetch(f"{served.address}/health").status == 200)
        served.scheduler.close()
        assert "thread has ended" in fetch(f"{served.address}/health").text


# Names of the server


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/health", "/v1/models", "/nowhere"])
def test_a_name_of_elsewhere_is_refused(path: str) -> None:
    with serving(rules=Rules("tiny", hosts=("My.Name",))) as served:
        own = ("localhost", "LOCALHOST.", "127.0.0.1", "[::1]", "192.168.1.7", socket.gethostname(), "my.name")
        for host in own:
            for port in ("", ":80"):
                assert fetch(served.address + path, Host=host + port).status != 403, host
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "name", ""):
            found = fetch(served.address + path, Host=host)
            assert found.status == 403, host
            assert "not called" in json.loads(found.text)["error"]["message"]


def test_names_of_the_command_line_reach_the_server(monkeypatch) -> None:
    backbone = SimpleNamespace(name="tiny", weight_format="float32", device=torch.device("cpu"))
    menu = SimpleNamespace(backbone=backbone, usual=SimpleNamespace(mode="full"))
    made: list[Rules] = []
    monkeypatch.setattr("offramp.cli.serving._menu", lambda *_: menu)
    monkeypatch.setattr("offramp.serve.api.app_of", lambda _, scheduler, rules: made.append(rules) or scheduler.close())
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: None)
    run_cli("serve", "tiny", "--host", "my.host", "--allowed-host", "a.b", "--allowed-host", "c")
    assert made[0].hosts == ("a.b", "c", "my.host", socket.gethostname())


# The prompt cache


def tensors_of(what: Any) -> list[torch.Tensor]:
    if isinstance(what, torch.Tensor):
        return [what]
    if isinstance(what, dict):
        return tensors_of([*what.values()])
    if isinstance(what, list | tuple):
        return [tensor for each in what for tensor in tensors_of(each)]
    return []


def storages(sequence: Sequence) -> int:
    """The bytes of all that a sequence keeps alive."""
    state = sequence.state
    compiled = isinstance(state, Session)  # core/tests looks at what the library keeps
    parts = [*sequence.followers] if compiled else [*state.kv, *state.ssm, *sequence.followers]
    found = tensors_of([sequence.deep, *(vars(part) for part in parts if part is not None)])
    return sum({each.data_ptr(): each.untyped_storage().nbytes() for each in found}.values()) + compiled * state.bytes


@pytest.mark.parametrize("gate", ["mamba", "ffn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_counts_all_that_it_keeps_and_copies_nothing_that_it_cannot(monkeypatch, family: str, gate: str) -> None:
    backbone = tiny(family)
    engine = Engine(backbone, exits_for(family.partition("/")[0], gate), Policy((0.4,) * 3), "verify")
    talk, cache = engine.read(some_prompts(1)[0] * 9), PromptCache(1 << 30)
    assert isinstance(talk, Talk)
    cache.keep(engine, talk)
    (entry,) = cache._entries.values()
    kept, ids = storages(entry.sequence), len(entry.sequence.ids)
    assert kept + 32 * ids <= cache.bytes <= kept + 128 * ids
    monkeypatch.setattr("offramp.decode.sequence.Sequence.fork", lambda _: 1 / 0)
    for most in (0, cache.bytes - 1):
        small = PromptCache(most)
        small.keep(engine, talk)
        assert len(small) == small.bytes == 0


@compiled_only
def test_a_text_is_found_again_by_a_stepper_that_can_go_on_with_it() -> None:
    engine = Engine(tiny("llama/compiled"), modest_exits("llama", 0, "ffn", "linear"), Policy((0.4,) * 3), "defer")
    cache, ids, plain = PromptCache(1 << 30), some_prompts(1)[0] * 9, Sampling().chooser()
    ways = plain, Recorder(plain, 2)
    for choose in ways:
        assert cache.talk(engine, ids, choose)[1] == 0
        batch, talk = engine.batch(), Talk()
        batch.add(ids, talk, choose, max_tokens=1)
        next(event for event in batch.run() if isinstance(event, Prefilled))
        cache.keep(engine, talk)
    assert [cache.talk(engine, ids, choose)[1] for choose in ways] == [len(ids) - 1] * 2
    assert len(cache) == 2


@compiled_only
def test_a_step_of_many_requests_is_made_in_several_calls(monkeypatch) -> None:
    engine, prompts = Engine(tiny("llama/compiled")), some_prompts(5)
    alone = [engine.generate(prompt, max_tokens=6).ids for prompt in prompts]
    sizes, most = [], 2
    monkeypatch.setattr(of_steps, "MOST_LANES", most)
    real = of_steps.call

    def counted(name: str, *inputs: Any) -> Any:
        sizes.extend(inputs[2:3] if name == "offramp_step" else ())
        return real(name, *inputs)

    monkeypatch.setattr(of_steps, "call", counted)
    assert [made.ids for made in engine.generate_batch(prompts, max_tokens=6)] == alone
    assert max(sizes) == most


# OpenAI's parameters


def table() -> dict[str, str]:
    """OpenAI's fields by the table of the docs, each with what becomes of it."""
    part = DOCS.read_text().partition("## OpenAI's parameters")[2].partition("\n## ")[0]
    found = {}
    for row in part.splitlines():
        if row.startswith("| ") and "`" in row:
            what, names = row.strip("| ").split(" | ")[:2]
            found |= dict.fromkeys(re.findall(r"`(\w+)`", names), what)
    return found


REFUSED: dict[str, tuple[Any, list[Any]]] = {  # a value that asks for something, and those that ask for nothing
    "frequency_penalty": (0.1, [0, 0.0, None]),
    "presence_penalty": (-1, [0, 0.0, None]),
    "logit_bias": ({"5": 1}, [{}, None]),
    "tools": ([{"type": "function", "function": {"name": "f"}}], [[], None]),
    "tool_choice": ("required", ["none", "auto", None]),
    "functions": ([{"name": "f"}], [[], None]),
    "function_call": ({"name": "f"}, ["none", "auto", None]),
    "modalities": (["text", "audio"], [["text"], None]),
    "audio": ({"voice": "alloy", "format": "wav"}, [None]),
    "moderation": ({"model": "m"}, [None]),
    "reasoning_effort": ("high", ["none", None]),
    "verbosity": ("low", ["medium", None]),
    "web_search_options": ({}, [None]),
    "best_of": (2, [1, None]),
    "echo": (True, [False, None]),
    "suffix": ("end", ["", None]),
}


@pytest.mark.parametrize(
    ("path", "params", "asked"),
    [
        ("chat/completions", of_chats.CompletionCreateParamsStreaming, ChatRequest),
        ("completions", of_completions.CompletionCreateParamsStreaming, CompletionRequest),
    ],
)
def test_the_docs_say_of_each_parameter_of_openais_client_what_becomes_of_it(
    served: Served, path: str, params: Any, asked: Any
) -> None:
    said = table()
    assert set(said.values()) == {"done", "refused", "no effect"}
    address, own = f"{served.address}/v1/{path}", {**PATHS[path], "max_tokens": 1}
    for name in get_type_hints(params):
        assert name in said, f"Say in {DOCS.name} what becomes of {name}."
        assert (name in asked.model_fields) == (said[name] != "no effect"), name
        if said[name] == "refused":
            something, nothing = REFUSED[name]
            found = fetch(address, {**own, name: something})
            assert found.status == 400, name
            assert json.loads(found.text)["error"]["param"] == name
            for value in nothing:
                assert fetch(address, {**own, name: value}).status == 200, (name, value)
        elif said[name] == "no effect":
            assert fetch(address, {**own, name: "anything"}).status == 200, name
