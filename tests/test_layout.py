"""Imports within the package run one way, and the command line starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import offramp

PACKAGE = Path(offramp.__file__).parent
# A module may import only modules on the lines above its own.
ORDER = [
    ("errors",),
    ("sources",),
    ("state", "scan", "metrics", "policy", "sampling", "text", "weights"),
    ("native", "mamba"),
    ("lean", "families"),
    ("lean_mamba",),
    ("backbone",),
    ("loading",),
    ("exits",),
    ("sequence",),
    ("flops",),
    ("fill",),
    ("engine",),
    ("library",),
    ("bench",),
    ("harvest",),
    ("training",),
    ("calibration", "tuning", "tasks"),
    ("evaluation",),
    ("report", "harness"),
    ("show",),
    ("cli",),
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def for_types_only(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def run_nodes(tree):
    """Every node below `tree`, functions included, but not the body of an `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(tree):
        if for_types_only(child):
            for statement in child.orelse:
                yield statement
                yield from run_nodes(statement)
        else:
            yield child
            yield from run_nodes(child)


def imports(source):
    """Names of the package's own modules that `source` imports when it runs."""
    found = set()
    for node in run_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(filter(None, ["offramp" if node.level else "", node.module]))
            dotted = [f"{home}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in dotted:
            package, _, rest = name.partition(".")
            if package == "offramp" and rest:
                first = rest.split(".")[0]
                found.add(offramp._HOME_OF.get(first, first))
    return {name for name in found if not name.startswith("__")}


def test_imports_are_found_in_functions_and_not_under_type_checking():
    source = (
        "from typing import TYPE_CHECKING\n"
        "import offramp.state\n"
        "from offramp import Policy, scan, __version__\n"
        "from . import sources\n"
        "if TYPE_CHECKING:\n    from offramp.training import train\nelse:\n    import offramp.metrics\n"
        "def f():\n    from offramp.exits import Mixer\n    from .flops import Costs\n"
    )
    assert imports(source) == {"state", "policy", "scan", "sources", "metrics", "exits", "flops"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_modules_above_it(module):
    assert module in RANK, f"Place the new module '{module}' in the ORDER of {Path(__file__).name}."
    for other in sorted(imports((PACKAGE / f"{module}.py").read_text())):
        assert other in RANK, f"{module} imports '{other}': place it in the ORDER of {Path(__file__).name}."
        assert RANK[other] < RANK[module], f"{module} imports {other}, which is not above it in ORDER."


def test_the_order_names_no_module_that_is_gone():
    assert set(RANK) <= set(MODULES)


@pytest.mark.parametrize("module", ["offramp", *(["offramp.cli"] if "cli" in MODULES else [])])
def test_importing_it_does_not_import_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
