"""The command line. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from offramp import __version__
from offramp.cli.decoding import chat, generate
from offramp.cli.demo import demo
from offramp.cli.evaluating import bench, evaluate, inspect, report
from offramp.cli.flags import with_flags
from offramp.cli.names import Verb
from offramp.cli.progress import Interrupted
from offramp.cli.serving import serve
from offramp.cli.shown import say
from offramp.cli.training import calibrate, export, train
from offramp.errors import OfframpError

app = typer.Typer(
    help="Faster answers from Hugging Face language models: exits guess tokens, and the whole model checks them. "
    "docs/words.md explains the words.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for verb in (demo, generate, chat, train, calibrate, export, evaluate, report, inspect, bench, serve):
    app.command("eval" if verb is evaluate else verb.__name__, cls=Verb)(with_flags(verb))


def _say_version(asked: bool) -> None:
    if asked:
        print(f"offramp {__version__}")
        raise typer.Exit


@app.callback()
def offramp(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """What may stand before a verb."""


def main() -> None:
    """Entry point. An error that a user can cause ends in one sentence and a hint, never in a traceback."""
    warnings.showwarning = lambda message, *_, **__: say(f"note: {message}", stream=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except OfframpError as error:
        _fail(str(error), error.hint, 130 if isinstance(error, Interrupted) else 1)
    except KeyboardInterrupt:
        _fail("Stopped.", "", 130)
    except BrokenPipeError:
        # The reader has gone. Python must not write to it when it exits, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.", "", 1)


def _fail(message: str, hint: str, code: int) -> NoReturn:
    say(f"error: {message}", stream=sys.stderr)
    if hint:
        say(f"hint: {hint}", stream=sys.stderr)
    sys.exit(code)
