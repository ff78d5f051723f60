"""The verb that answers over HTTP."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Annotated

import typer

from offramp.cli.options import DecodingOptions, Model
from offramp.decode.sampling import Sampling
from offramp.errors import BadInput
from offramp.settings import setting


@dataclass(frozen=True)
class ServeOptions:
    """What the server allows, and how many requests it answers side by side."""

    rows: int = setting(16, "Requests that are answered side by side.")
    waiting: int = setting(64, "Requests that may wait beyond these; more are refused with status 429.")
    cache: float = setting(1.0, "Memory for the prompt cache, in GiB; 0: none.")
    max_tokens: int = setting(4096, "Longest answer, in tokens.")
    max_seconds: float = setting(600.0, "Longest time for a request, in seconds.")
    max_body: int = setting(1 << 20, "Largest body of a request, in bytes.")
    api_key: str | None = setting(
        None,
        "Key that clients must send. Better in the environment variable OFFRAMP_API_KEY, where other users cannot see it.",
    )

    def __post_init__(self) -> None:
        least = {"rows": 1, "waiting": 0, "cache": 0, "max_tokens": 1, "max_body": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise BadInput(f"--{name.replace('_', '-')} must be {lowest} or more.")
        if not self.max_seconds > 0:
            raise BadInput("--max-seconds must be more than 0.")


def serve(
    model: Model,
    *,
    decoding: DecodingOptions,
    host: Annotated[str, typer.Option(help="The address to listen at. Default: this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen at.")] = 8000,
    options: ServeOptions,
) -> None:
    """Answer over HTTP as OpenAI's API does, many requests side by side, with a page to chat at /. Ctrl-C ends it."""
    try:
        import uvicorn

        from offramp.serve.answers import JsonLines, Rules, log
        from offramp.serve.api import app_of
    except ImportError as error:
        raise BadInput(f"Serving needs the package {error.name}.", "Install it: pip install 'offramp[serve]'") from error
    from offramp.exits.exits import find_exits
    from offramp.serve.menu import Menu
    from offramp.serve.scheduler import Scheduler

    backbone = decoding.load(model)
    exits, drafts = (find_exits(backbone, decoding.exits, draft) for draft in (False, True))
    decoding = decoding.chosen_for(backbone, Sampling())
    _, engine = decoding.engines(backbone, drafts if decoding.verifies else exits)
    menu = Menu(backbone, exits, drafts, engine)
    scheduler = Scheduler(options.rows, options.waiting, int(options.cache * 2**30))
    key = options.api_key or os.environ.get("OFFRAMP_API_KEY") or None
    rules = Rules(backbone.name, key, options.max_body, options.max_tokens, options.max_seconds)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"{backbone.name} ({backbone.weight_format}, {engine.fill.name}) at http://{shown}:{port}", err=True)
    uvicorn.run(app_of(menu, scheduler, rules), host=host, port=port, log_level="warning", timeout_graceful_shutdown=None)
