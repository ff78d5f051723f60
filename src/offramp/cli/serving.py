"""The verb that answers over HTTP."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli.options import DecodingOptions, Model, Ray, cluster_at
from offramp.decode.sampling import Sampling
from offramp.errors import BadInput
from offramp.files import install_hint
from offramp.machine import free_memory
from offramp.settings import setting

if TYPE_CHECKING:
    from fastapi import FastAPI

    from offramp.serve.menu import Menu


@dataclass(frozen=True)
class ServeOptions:
    """What the server allows, and how many requests it answers side by side."""

    rows: int = setting(16, "Answers side by side: those of n, and those whose prompt is still being read, count too.")
    waiting: int = setting(64, "Answers that may wait beyond these; more are refused with status 429.")
    memory: float | None = setting(
        None,
        "Memory for what runs, in GiB: each row's keys, values and Mamba states, for its prompt and longest answer. A "
        "request waits until it fits. Default: half of what is free beside the prompt cache, once the model is loaded.",
    )
    cache: float = setting(1.0, "Memory for the prompt cache, in GiB; 0: none.")
    max_tokens: int = setting(4096, "Longest answer, in tokens.")
    max_seconds: float = setting(600.0, "Longest time for a request, in seconds.")
    max_body: int = setting(1 << 20, "Largest body of a request, in bytes.")
    api_key: str | None = setting(
        None,
        "Key that clients must send. Better in the environment variable OFFRAMP_API_KEY, where other users cannot see it.",
    )
    allowed_host: tuple[str, ...] = setting(
        (),
        "A name that requests may call the server by, beside localhost, this machine's name, --host, and addresses. Can be "
        "given several times.",
    )
    replicas: tuple[int, ...] = setting(
        (1, 4), "With --ray: the least and the most replicas. One more starts when more than --rows requests run on each."
    )

    def __post_init__(self) -> None:
        least = {"rows": 1, "waiting": 0, "cache": 0, "max_tokens": 1, "max_body": 1}
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
    decoding: DecodingOptions,
    host: Annotated[str, typer.Option(help="The address to listen at. Default: this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen at.")] = 8000,
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
            from offramp.cluster import Replicas

            least, most = options.replicas
            replicas = Replicas(least, most, options.rows, 2 * (options.rows + options.waiting))
            with cluster.serving(partial(application, model, decoding, options), replicas, host, port):
                typer.echo(f"{model} on the cluster at {ray}: {address}", err=True)
                _wait_for_the_end()
            return
    menu = _menu(model, decoding)
    backbone = menu.backbone
    typer.echo(f"{backbone.name} ({backbone.weight_format}, {menu.usual.fill.name}) at {address}", err=True)
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
    from offramp.exits.exits import find_exits
    from offramp.serve.menu import Menu

    backbone = decoding.load(model)
    exits, drafts = (find_exits(backbone, decoding.exits, draft) for draft in (False, True))
    decoding = decoding.chosen_for(backbone, Sampling())
    _, engine = decoding.engines(backbone, drafts if decoding.verifies else exits)
    return Menu(backbone, exits, drafts, engine)


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
