"""The verb that answers over HTTP."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli.flags import Only
from offramp.cli.options import DecodingOptions, Model, Ray, cluster_at
from offramp.cli.shown import say
from offramp.errors import BadInput
from offramp.files import install_hint
from offramp.machine import free_memory
from offramp.settings import SEVERAL, setting

if TYPE_CHECKING:
    from fastapi import FastAPI

    from offramp.serve.menu import Menu


@dataclass(frozen=True)
class ServeOptions:
    """What the server allows, and how many requests it answers side by side."""

    rows: int = setting(16, "Answers that are made side by side; four times as many may wait.")
    memory: float | None = setting(
        None, "GiB for what the answers remember; a request waits until it fits (default: half of what is free)."
    )
    cache: float = setting(1.0, "GiB for the prompt cache (0: none).")
    max_tokens: int = setting(4096, "Longest answer, in tokens.")
    max_seconds: float = setting(600.0, "Longest time for a request, in seconds.")
    max_body: int = 1 << 20  # bytes of a request's body
    api_key: str | None = setting(
        None, "Key that clients must send. Set it in OFFRAMP_API_KEY instead to hide it from other users."
    )
    allowed_host: tuple[str, ...] = setting((), "One more host name that requests may use; may be repeated.")
    replicas: tuple[int, ...] = setting((1, 4), "With --ray, the least and the most replicas.", panel=SEVERAL)

    @property
    def waiting(self) -> int:
        """Answers that may wait; more are refused with status 429."""
        return 4 * self.rows

    def __post_init__(self) -> None:
        least = {"rows": 1, "cache": 0, "max_tokens": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise BadInput(f"--{name.replace('_', '-')} must be {lowest} or more.")
        if self.memory is not None and not self.memory > 0:
            raise BadInput("--memory must be more than 0.")
        if not self.max_seconds > 0:
            raise BadInput("--max-seconds must be more than 0.")
        if len(self.replicas) != 2 or not 1 <= self.replicas[0] <= self.replicas[1]:
            raise BadInput("--replicas must be two numbers, the least and the most.", "For example: --replicas 1,4")


def serve(
    model: Model,
    *,
    decoding: Annotated[DecodingOptions, Only("mode", "exits", "dtype")],
    host: Annotated[str, typer.Option(help="Address to listen at; the default is for this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    options: ServeOptions,
    ray: Ray = None,
) -> None:
    """Answer over HTTP as OpenAI's API does, many requests side by side, with a page to chat at /. Ctrl-C ends it."""
    try:
        import uvicorn

        from offramp.serve.api import LAST_ANSWERS
    except ImportError as error:
        raise BadInput(f"Serving needs the package {error.name}.", install_hint("serve")) from error
    hosts = (*options.allowed_host, host, socket.gethostname())  # replicas may run on other machines
    key = options.api_key or os.environ.get("OFFRAMP_API_KEY") or None
    options = replace(options, api_key=key, allowed_host=hosts)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    with cluster_at(ray) as cluster:
        if cluster:
            from offramp.extras.cluster import Replicas

            least, most = options.replicas
            replicas = Replicas(least, most, options.rows, 2 * (options.rows + options.waiting))
            with cluster.serving(partial(application, model, decoding, options), replicas, host, port):
                say(f"{model} on the cluster at {ray}: {address}", stream=sys.stderr)
                _wait_for_the_end()
            return
    menu = _menu(model, decoding)
    backbone = menu.backbone
    say(f"{backbone.name} ({backbone.weight_format}, mode {menu.usual.mode}) at {address}", stream=sys.stderr)
    uvicorn.run(_app(menu, options), host=host, port=port, log_level="warning", timeout_graceful_shutdown=LAST_ANSWERS)


def _wait_for_the_end() -> None:
    """Return at Ctrl-C or SIGTERM."""
    ended = threading.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: ended.set())
    ended.wait()


def application(model: str, decoding: DecodingOptions, options: ServeOptions) -> FastAPI:
    """The application that answers with a model, which is loaded."""
    return _app(_menu(model, decoding), options)


def _menu(model: str, decoding: DecodingOptions) -> Menu:
    from offramp.serve.menu import Menu

    loaded = decoding.load(model)
    return Menu(loaded.backbone, loaded.exits, decoding.engine(loaded))


def _app(menu: Menu, options: ServeOptions) -> FastAPI:
    from offramp.serve.answers import JsonLines, Rules, log
    from offramp.serve.api import app_of
    from offramp.serve.scheduler import Scheduler

    cache = int(options.cache * 2**30)
    free = free_memory(menu.backbone.device)
    memory = max(free - cache, free // 2) // 2 if options.memory is None else int(options.memory * 2**30)
    scheduler = Scheduler(options.rows, options.waiting, cache, memory)
    name = menu.backbone.name
    rules = Rules(
        name, options.api_key, options.max_body, options.max_tokens, options.max_seconds, hosts=options.allowed_host
    )
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    return app_of(menu, scheduler, rules)
