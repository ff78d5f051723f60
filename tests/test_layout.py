"""Imports within the package run one way, extras wait until they are asked for, and the command line starts fast."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import offramp

PACKAGE = Path(offramp.__file__).parent
# A folder may import only what stands before it here. So may a file at the bottom.
FOLDERS = ["model", "exits", "decode", "training", "evaluation", "serve", "cli", "extras"]
BOTTOM = ["errors", "settings", "progress", "files", "metrics", "machine", "sandbox_child", "sandbox"]
ORDER = [*BOTTOM, *FOLDERS]
# What a file below asks of extras. It imports them inside a function.
ASKED = {
    "model/hub.py": {"offload"},
    "cli/options.py": {"cluster"},
    "cli/serving.py": {"cluster"},
    "cli/evaluating.py": {"report"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def home_of(dotted):
    """The folder that a module of the package is in, or the module itself at the bottom: model.compiled.blocks → model."""
    return dotted.split(".")[0]


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


def names_in(nodes):
    """The dotted names that these nodes import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(filter(None, ["offramp" if node.level else "", node.module]))
            yield from (f"{home}.{alias.name}" for alias in node.names)


def imports(source):
    """Names of the package's own modules that `source` imports when it runs."""
    homes = set()
    for name in names_in(run_nodes(ast.parse(source))):
        package, _, rest = name.partition(".")
        if package == "offramp" and rest:
            first = rest.split(".")[0]
            homes.add(home_of(offramp._HOME_OF.get(first, first)))
    return {name for name in homes if not name.startswith("__")}


def extras_in(nodes):
    """The modules of `offramp.extras` that these nodes import."""
    return {name.split(".")[2] for name in names_in(nodes) if name.startswith("offramp.extras.")}


def test_imports_are_found_in_functions_and_not_under_type_checking():
    source = (
        "from typing import TYPE_CHECKING\n"
        "import offramp.model.state\n"
        "from offramp import Policy, files, __version__\n"
        "if TYPE_CHECKING:\n    from offramp.training import train\nelse:\n    import offramp.metrics\n"
        "def f():\n    from offramp.evaluation.tasks import Task\n"
    )
    assert imports(source) == {"model", "exits", "files", "metrics", "evaluation"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_its_own_folder_and_those_before_it(path):
    home = home_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    assert home in ORDER, f"Place '{home}' in the order of {Path(__file__).name}."
    for other in sorted(imports(path.read_text()) - {home, "extras"}):
        assert ORDER.index(other) < ORDER.index(home), f"{path.name} in {home} imports {other}, which comes after it."


def test_an_extra_is_imported_only_where_it_is_asked_for():
    asked = {}
    for path in FILES:
        if home_of(".".join(path.relative_to(PACKAGE).parts)) != "extras":
            tree = ast.parse(path.read_text())
            functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
            inside = {id(node) for function in functions for node in ast.walk(function)}
            nodes = list(run_nodes(tree))
            assert not extras_in(node for node in nodes if id(node) not in inside), path
            if found := extras_in(nodes):
                asked[str(path.relative_to(PACKAGE))] = found
    assert asked == ASKED


def test_the_order_names_nothing_that_is_gone():
    here = {home_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts)) for path in FILES}
    assert set(ORDER) == here


@pytest.mark.parametrize("module", ["offramp", "offramp.cli"])
def test_importing_it_does_not_import_what_takes_seconds(module):
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_knows_every_target_that_the_makefile_names() -> None:
    """`make -n` prints what would be done; a rule that make takes for something else fails here."""
    root = Path(__file__).parents[1]
    names = re.search(r"^\.PHONY: (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert names
    for target in names[1].split():
        found = subprocess.run(["make", "-n", target], cwd=root, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr


def test_no_hint_installs_a_strangers_package_from_pypi() -> None:
    """No package is on PyPI. A path, a URL after the name, or a clone's extras are right."""
    root = PACKAGE.parents[1]
    names = ("src", "lm", "hybrid", "benchmarks", "examples", "docs", ".ci")
    folders = [*(root / name for name in names), *root.glob("offramp-*")]
    files = [root / "README.md", root / "Makefile", *(path for folder in folders for path in folder.rglob("*"))]
    files = [path for path in files if path.parent.name != "libraries"]  # compiled
    texts = [path for path in files if path.is_file() and path.suffix in ("", ".md", ".py", ".toml", ".ipynb")]
    from_pypi = re.compile(r"""(?:pipx?|uv) (?:tool )?install (?:-\S+ )*["']?(?:offramp|\{MODELS)(?!\S* @ )""")
    assert len(texts) > 150
    assert from_pypi.search("pip install --quiet 'offramp[eval]'")
    assert {path.name: found[0] for path in texts if (found := from_pypi.search(path.read_text("utf-8")))} == {}


def test_no_modules_import_each_other():
    homes = {
        f"offramp.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}".removesuffix(".__init__"): path
        for path in FILES
    }
    wanted = {}
    for home, path in homes.items():
        found = set()
        for name in names_in(run_nodes(ast.parse(path.read_text()))):
            while name and name not in homes:
                name = name.rpartition(".")[0]
            found |= {name} - {"", home}
        wanted[home] = found
    while free := {home for home, found in wanted.items() if not found}:
        wanted = {home: found - free for home, found in wanted.items() if home not in free}
    assert not wanted, f"These import each other, or modules that do: {', '.join(sorted(wanted))}."
