"""Makes a verb's flags from the fields of frozen dataclasses: name, type, default and help stand in one place.

A verb takes the dataclass itself, and `with_flags` gives it a signature that typer can read:

    @app.command()
    @with_flags
    def calibrate(model: Model, *, config: CalibrationConfig) -> None: ...

Each field with a help line (see `offramp.settings`) becomes a flag. A verb may also take only some of the fields
(`Annotated[DecodingOptions, Only("dtype")]`), or instead of the dataclass a dict of the fields that the user set
(`Annotated[dict[str, Any], Chosen(TrainConfig)]`). A default instance in the verb's signature gives other defaults.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from offramp.errors import BadInput


class Only:
    """Marks a dataclass parameter of a verb: only these fields become flags; the others keep their defaults."""

    def __init__(self, *names: str) -> None:
        self.names = names


@dataclass(frozen=True)
class Chosen:
    """Marks a dict parameter of a verb: it gets those fields of `config` whose value is not None."""

    config: type


@dataclass(frozen=True)
class _Flag:
    """One field as a flag: `parameter` is what typer reads; `read` makes the field's value from what typer gives."""

    parameter: inspect.Parameter
    read: Callable[[Any], Any]


@dataclass(frozen=True)
class _Group:
    """The flags of one dataclass, and `make`, which turns their values into the verb's argument."""

    flags: Mapping[str, _Flag]
    make: Callable[[dict[str, Any]], Any]

    def take(self, values: dict[str, Any]) -> Any:
        """Take the group's own values out of all that typer gave."""
        return self.make({name: flag.read(values.pop(name)) for name, flag in self.flags.items()})


def with_flags(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with a flag for each field of the dataclasses that it takes."""
    hints = get_type_hints(verb, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, _Group] = {}
    for parameter in inspect.signature(verb).parameters.values():
        hint = hints[parameter.name]
        group = _group(hint, parameter.default)
        if group is None:
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))
        else:
            groups[parameter.name] = group
            parameters += [flag.parameter for flag in group.flags.values()]

    def run(**values: Any) -> None:
        configs = {name: group.take(values) for name, group in groups.items()}
        verb(**values, **configs)

    run.__name__, run.__doc__, run.__module__ = verb.__name__, verb.__doc__, verb.__module__
    run.__annotations__ = {}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _group(hint: Any, default: Any) -> _Group | None:
    """The flags that a verb's parameter stands for; None for an ordinary parameter."""
    config, marks = (hint, ()) if get_origin(hint) is not Annotated else (get_args(hint)[0], get_args(hint)[1:])
    for mark in marks:
        if isinstance(mark, Chosen):
            return _Group(_flags(mark.config(), chosen=True), _chosen)
    if not is_dataclass(config):
        return None
    only = next((mark.names for mark in marks if isinstance(mark, Only)), None)
    assert isinstance(config, type)
    start = config() if default is inspect.Parameter.empty else default
    return _Group(_flags(start, only), lambda values: replace(start, **values))


def _chosen(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, ())}


def _flags(start: Any, only: tuple[str, ...] | None = None, chosen: bool = False) -> dict[str, _Flag]:
    """The flags of a dataclass instance, whose values are the defaults. With `chosen`, a flag that is not given is None."""
    hints = get_type_hints(type(start))
    flags = {}
    for item in fields(start):
        help = item.metadata.get("help")
        if not help or (only is not None and item.name not in only):
            continue
        flag = item.metadata["flag"] or "--" + item.name.replace("_", "-")
        default = getattr(start, item.name)
        draft = item.metadata["draft"]
        if chosen and default not in (None, ()):
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
            drafts = "" if draft is None else f"; with --draft: {draft}"
            help = f"{help.removesuffix('.')} (default: {shown}{drafts})."
        default = None if chosen else default
        kind, read = _kind(hints[item.name], flag)
        if isinstance(default, tuple):
            default = ",".join(map(str, default)) or None
        option = typer.Option(flag, help=help, show_default=default is not None, rich_help_panel=item.metadata["panel"])
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameter = inspect.Parameter(item.name, keyword, default=default, annotation=Annotated[kind, option])
        flags[item.name] = _Flag(parameter, read)
    return flags


def _kind(hint: Any, flag: str) -> tuple[Any, Callable[[Any], Any]]:
    """The type that typer reads for a field of this type, and the function from what typer reads to the field's value."""
    parts = get_args(hint)
    plain = parts[0] if type(None) in parts else hint
    if get_origin(plain) is not tuple:
        return hint, lambda value: value
    if (number := get_args(plain)[0]) in (int, float):
        missing = None if type(None) in parts else ()
        return str | None, lambda text: missing if text is None else _numbers(text, flag, number)
    return list[get_args(plain)[0]] | None, lambda values: tuple(values or ())  # type: ignore[misc]


def _numbers(text: str, flag: str, number: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        return tuple(number(part) for part in text.split(","))
    except ValueError:
        kind, example = ("whole numbers", "10,15,20,25") if number is int else ("numbers", "0,0.7,0.9")
        raise BadInput(f"'{text}' is not a list of {kind}.", f"For example: {flag} {example}") from None
