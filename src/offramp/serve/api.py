"""The HTTP interface: OpenAI's completions and chat, models, health and metrics.

Answers have the types of the package `openai`. Other facts stand in the field `offramp`, which clients ignore.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offramp.errors import OfframpError
from offramp.serve.answers import Refused, Rules, Server, refused
from offramp.serve.choices import Choices
from offramp.serve.forms import ChatForm, CompletionForm, Form
from offramp.serve.menu import Menu
from offramp.serve.metrics import Metrics
from offramp.serve.protocol import AnswerRequest, ChatRequest, CompletionRequest
from offramp.serve.scheduler import Scheduler

OPEN = ("/", "/health", "/metrics")  # paths that need no key, beside the page's files
PAGE = Path(__file__).parent / "page"
ONLY_OWN_FILES = "default-src 'self'; img-src data:; frame-ancestors 'none'"
LAST_READING = 10.0  # seconds that a client has to take the last of what was written for it
LAST_ANSWERS = 20  # seconds that answers have to end when the server is to end

T = TypeVar("T")


async def answered(server: Server, chosen: Choices, form: Form, request: Request) -> Response:
    """Wait for all answers. Cancels them if the client leaves, or the time is over."""

    async def collected() -> None:
        while await chosen.more():
            pass

    def written() -> Response:
        return JSONResponse(form.answer(chosen).model_dump(mode="json"))

    try:
        await unless_left(request, collected())
        # Not in the loop's thread: sixteen long answers with log probabilities take seconds.
        return await asyncio.to_thread(written)
    finally:
        server.end(chosen)


async def unless_left(request: Request, work: Awaitable[T]) -> T:
    """Wait for work. If the client leaves before it is done, cancels it and raises `Refused`."""
    gone, doing = asyncio.ensure_future(_left(request)), asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, doing}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Refused(499, "The client has left.")
        return doing.result()
    finally:
        gone.cancel()
        doing.cancel()


class Stream(StreamingResponse):
    """Server-sent events, with a function that runs when they end, even if they never begin."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def streamed(server: Server, asked: AnswerRequest, chosen: Choices, form: Form, until: float) -> AsyncIterator[str]:
    """The answers as server-sent events. An error becomes the last event. `until`: when it ends, in the loop's time."""
    try:
        while True:
            async with asyncio.timeout_at(until):  # not around `yield`, where the client's reading is waited for
                news = await chosen.more()
            if not news:
                break
            yield "".join(_event(form.part(index, chosen[index], at)) for index, at in news)
        if asked.stream_options.include_usage:
            yield _event(form.last(chosen))
        yield "data: [DONE]\n\n"
    except TimeoutError:
        yield _event({"error": _late(server.rules).error})
    except Exception as error:
        yield _event({"error": refused(error).error})


def _event(what: dict[str, Any]) -> str:
    return f"data: {json.dumps(what)}\n\n"


def _late(rules: Rules) -> Refused:
    return Refused(408, f"The answer took more than {rules.most_seconds:.0f} seconds.")


async def _left(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _name_in(host: str) -> str | None:
    """The name in a Host header; None for an address, which needs no name."""
    name, _, _ = host[1:].partition("]") if host.startswith("[") else host.partition(":")
    try:
        ip_address(name)
    except ValueError:
        return name.rstrip(".").lower()
    return None


def _is_foreign(headers: Headers, host: str) -> bool:
    """Whether a browser sends a request for a page that is not this server's own."""
    origin = headers.get("origin")
    return headers.get("sec-fetch-site", "none") not in ("none", "same-origin") or (
        origin is not None and urlsplit(origin).netloc.lower() != host.lower()
    )


class Guard:
    """Lets a request through that calls the server by one of its names, comes from no foreign page, and has the key.

    A page from elsewhere can let its own name point to this machine (DNS rebinding), but not name this machine; and a
    browser says where a page is from. The body may not be too large or too late. A client that does not take its answer in
    time loses it.
    """

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules
        self._names = {None, "localhost", *(name.lower() for name in (socket.gethostname(), *rules.hosts))}

    def _refusal(self, method: str, path: str, headers: Headers) -> Refused | None:
        """Why a request is refused before its body is read, if it is."""
        key, host = self._rules.key, headers.get("host", "")
        if (name := _name_in(host)) not in self._names:
            return Refused(403, f"This server is not called '{name}'. If it is, start it with --allowed-host {name}")
        if _is_foreign(headers, host) and not (method == "GET" and path == "/"):
            return Refused(403, "This server answers no page from elsewhere.")
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return Refused(415, "The body must be JSON: send Content-Type: application/json")
        if key is not None and path not in OPEN and not path.startswith("/page/"):
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), key.encode()):
                return Refused(401, "The API key is wrong or missing.", code="invalid_api_key")
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        rules, seen = self._rules, 0
        if refusal := self._refusal(scope["method"], scope["path"], Headers(scope=scope)):
            await refusal.response(scope, receive, send)
            return

        arrives: float | None = asyncio.get_running_loop().time() + rules.most_arrival

        async def limited() -> Message:
            nonlocal seen, arrives
            try:
                async with asyncio.timeout_at(arrives):
                    message = await receive()
            except TimeoutError:
                words = f"The body took more than {rules.most_arrival:.0f} seconds"
                raise HTTPException(408, words, {"Connection": "close"}) from None
            seen += len(message.get("body", b""))
            if seen > rules.most_body:
                raise HTTPException(413, f"The body has more than {rules.most_body} bytes")
            arrives = arrives if message.get("more_body") else None
            return message

        with suppress(TimeoutError):
            async with asyncio.timeout(rules.most_arrival + rules.most_seconds + LAST_READING):
                await self._app(scope, limited, send)


def app_of(menu: Menu, scheduler: Scheduler, rules: Rules) -> FastAPI:
    """The application. It closes the scheduler when it ends."""
    metrics = Metrics(scheduler)
    server = Server(menu, scheduler, rules, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.close()
        scheduler.close()

    # FastAPI's pages of docs load scripts from elsewhere.
    app = FastAPI(title="offramp", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, rules=rules)

    _say_errors(app)

    @app.get("/", include_in_schema=False)
    async def _page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": ONLY_OWN_FILES})

    app.mount("/page", StaticFiles(directory=PAGE))

    _tell_facts(app, menu, scheduler, rules, metrics)

    @app.post("/v1/chat/completions")
    async def _chat(asked: ChatRequest, request: Request) -> Response:
        return await respond(server, asked, request, ChatForm, asked.response_format.schema_of_answers)

    @app.post("/v1/completions")
    async def _complete(asked: CompletionRequest, request: Request) -> Response:
        return await respond(server, asked, request, CompletionForm)

    return app


def _say_errors(app: FastAPI) -> None:
    """Let the application give errors in OpenAI's form."""

    @app.exception_handler(Refused)
    @app.exception_handler(OfframpError)
    @app.exception_handler(Exception)
    async def _refuse(_: Request, error: Exception) -> Response:
        return refused(error).response

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return Refused(400, f"{place or 'The body'}: {first['msg']}", place or None).response

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        words = f"There is no {request.url.path} here." if error.status_code == 404 else f"{error.detail}."
        return Refused(error.status_code, words, headers=error.headers).response


def _tell_facts(app: FastAPI, menu: Menu, scheduler: Scheduler, rules: Rules, metrics: Metrics) -> None:
    """Let the application tell of its health, its model and its modes."""

    @app.get("/health")
    async def _health() -> dict[str, str]:
        if scheduler.trouble:
            raise Refused(503, scheduler.trouble)
        return {"status": "ok"}

    @app.get("/metrics")
    async def _metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def _models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(rules.name)]}

    @app.get("/v1/models/{name:path}")
    async def _one_model(name: str) -> dict[str, Any]:
        if name != rules.name:
            raise _no_model(name, rules)
        return _model(rules.name)

    @app.get("/offramp/menu")
    async def _menu() -> dict[str, Any]:
        return {"model": rules.name, **menu.describe()}


async def respond(
    server: Server, asked: AnswerRequest, request: Request, form: type[Form], schema: dict[str, Any] | None = None
) -> Response:
    """Answer a request as one whole, or as a stream. Raises `Refused`."""
    if asked.model not in ("", server.rules.name):
        raise _no_model(asked.model, server.rules)
    until = asyncio.get_running_loop().time() + server.rules.most_seconds
    place = server.scheduler.take(asked.n)
    try:
        async with asyncio.timeout_at(until):
            chosen = await prepared(server, asked, request, schema)
            server.scheduler.submit(chosen[0].job, place)
            made = form(server, server.rules.name)
            if not asked.stream:
                return await answered(server, chosen, made, request)
        return Stream(streamed(server, asked, chosen, made, until), partial(server.end, chosen))
    except TimeoutError:
        raise _late(server.rules) from None
    except Exception as error:
        raise refused(error) from error
    finally:
        server.scheduler.give_back(place)


async def prepared(server: Server, asked: AnswerRequest, request: Request, schema: dict[str, Any] | None) -> Choices:
    """What a request asks for, made in other threads, part by part. Drops the parts to come where the client leaves."""
    loop, thread = asyncio.get_running_loop(), server.thread_for(asked.characters)

    async def apart(work: Callable[..., T], *inputs: Any) -> T:
        return await unless_left(request, loop.run_in_executor(thread, work, *inputs))

    ids: list[int] = []
    borders: tuple[int, ...] = ()
    matcher = None if schema is None else await unless_left(request, server.grammars.matcher(schema))
    if isinstance(asked, ChatRequest):
        messages = [message.model_dump() for message in asked.messages]
        ids = await apart(server.rendered, messages)
        borders = await apart(server.borders, messages, ids)
    elif isinstance(asked, CompletionRequest):
        prompt = asked.prompt
        ids = await apart(server.backbone.prompts.encode, prompt, True) if isinstance(prompt, str) else prompt
    return await apart(server.choices, loop, asked, ids, borders, matcher)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "offramp"}


def _no_model(name: str, rules: Rules) -> Refused:
    return Refused(404, f"There is no model '{name}' here, only '{rules.name}'.", "model", "model_not_found")
