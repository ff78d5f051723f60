"""The blocks of the documentation hold: Python runs, commands exist with their flags. The site loads no foreign file.

Python and cheap commands run on mamba-tiny in place of smollm2, in a folder and a cache of their own. Other commands are
parsed by the command line that they are for.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import dropwhile, groupby
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer

import offramp
from helpers import modest_exits, run_cli
from models import saved, tiny
from offramp.cli.app import app
from offramp.model.hub import ALIASES
from offramp.serve.answers import Rules
from offramp.training.losses import read_questions
from test_serve import serving

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.svg"))
SERVER = "http://127.0.0.1:8000"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
PLACEHOLDERS = {"MODEL", "DIR", "FILE"}  # words that a reader replaces
# In Python blocks: a model that loads in no time, and a training of a second.
QUICK = {"smollm2": "mamba-tiny", "hours=0.5": "max_prompts=12, answer_tokens=8, epochs=1, gate_epochs=1"}
MACHINES = "compiled blocks multiply with"  # a line of `inspect` that depends on the processor
CHEAP = ("generate", "chat")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line of its first fence, its language, and what is in it."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str) -> list[Block]:
    """The fenced blocks of a Markdown text."""
    fences = re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [Block(page, 1 + text[: found.start()].count("\n"), found[1], found[2]) for found in fences]


BLOCKS = [block for path in PAGES for block in blocks_of(path.read_text(), str(path.relative_to(ROOT)))]


def named(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def commands(block: Block) -> list[list[str]]:
    """The commands of a block of shell, as lists of words, without variables that are set before them and redirections."""
    text = block.text
    if block.language == "console":
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    text = re.sub(r'\s+#\s[^"\n]*$|\s\d?>\s*\S+', "", text.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|;&\n")
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t", "", True
    found = []
    for separates, words in groupby(lexer, lambda word: not word.strip("|;&\n")):
        if not separates and (rest := [*dropwhile(re.compile(r"[A-Z_]+=").match, words)]):
            found.append(rest)
    return found


def parsed(*arguments: str) -> Any:
    """What `offramp ARGUMENTS` makes of its arguments. Raises the command line's own error for a mistake."""
    verb, *rest = arguments
    found = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    return found.make_context(verb, [*rest])


def check_make(target: str, *variables: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert targets
    assert target in targets[1].split()
    for variable in variables:
        assert f"$({variable.partition('=')[0]})" in makefile


def check_python(what: str, *arguments: str) -> None:
    if what == "-c":
        compile(arguments[0], "the code of -c", "exec")
    elif what == "-m":
        assert importlib.util.find_spec(arguments[0])
    else:
        source = (ROOT / what).read_text()
        for flag in (word for word in arguments if word.startswith("--")):
            assert f'"{flag}"' in source, flag


def check_llm(*arguments: str) -> None:
    from offramp.extras.llm import OfframpModel

    words = iter(arguments)
    options = {}
    for word in words:
        if word == "-m":
            assert next(words) in {f"offramp/{alias}" for alias in ALIASES}
        elif word == "-o":
            name = next(words)
            options[name] = next(words)
    assert OfframpModel.Options(**options).model_dump(exclude_unset=True).keys() == options.keys()


def check_program(*arguments: str) -> None:
    """offramp-run takes these options."""
    source = (ROOT / "core/program/run.c").read_text()
    for flag in (word for word in arguments if word.startswith("--")):
        assert f'{{"{flag[2:]}", ' in source, flag


def check_cc(*arguments: str) -> None:
    """What the compiler is given is there."""
    assert all([*ROOT.glob(word)] for word in arguments if word.endswith(".c"))


def check_pip(verb: str, *packages: str) -> None:
    """Extras that are asked for must exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert verb == "install"
    for package in packages:
        for found in re.findall(r"\[(.*?)\]", package):
            assert {*found.split(",")} <= extras.keys()


def check_from_a_wheel(*arguments: str) -> None:
    """uvx and pipx: what follows `offramp` is for offramp."""
    parsed(*arguments[arguments.index("offramp") + 1 :])


USAGE = typer.BadParameter.__mro__[1]  # what the command line raises for any mistake in arguments
MISTAKES = (AssertionError, KeyError, OSError, ValueError, USAGE)
CHECKS = {"offramp": parsed, "make": check_make, "python": check_python, "llm": check_llm, "sed": lambda *_: None}
CHECKS |= {
    "cc": check_cc,
    "offramp-run": check_program,
    "hf": lambda *_: None,
    "ray": lambda *_: None,
    "torchrun": lambda *words: check([*words[words.index("--no-python") + 1 :]]),
    "pip": check_pip,
    "uvx": check_from_a_wheel,
    "pipx": check_from_a_wheel,
}


def check(command: list[str]) -> None:
    """Fail for a command that does not exist, or does not take these arguments."""
    program, *arguments = command
    CHECKS[Path(program).name](*arguments)


def cheap_commands() -> list[str]:
    """Commands that answer in a second, each once, with mamba-tiny in place of smollm2.

    Its vocabulary is so small that its exits have no sketch of the head, which --candidates needs.
    """
    found = [command for block in named("bash", "console") for command in commands(block)]
    run = [words[1:] for words in found if Path(words[0]).name == "offramp" and words[1] in CHEAP]
    complete = [words for words in run if not PLACEHOLDERS & {*words} and "--candidates" not in words]
    return sorted({shlex.join(words).replace("smollm2", "mamba-tiny") for words in complete})


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[Path]:
    """A folder with a tiny model in it, and a cache that is filled once."""
    folder = tmp_path_factory.mktemp("docs")
    saved(tiny("llama"), folder / "model")
    modest_exits("llama").save(folder / "exits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFRAMP_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        exported = run_cli("export", "model", "-o", "exported", "--exits", "exits")
        assert exported.code == 0, exported.stderr
        yield folder


@pytest.fixture(scope="module")
def replaced(world) -> Iterator[dict[str, str]]:
    """What stands in Python blocks, and what runs in its place."""
    with serving(rules=Rules("mamba-tiny", most_tokens=16)) as served:
        folders = {"org/name": "model", '"MODEL"': '"model"', "org/exits": "./exported", 'exits="DIR"': 'exits="exits"'}
        yield {**QUICK, **folders, SERVER: served.address}


def test_a_block_says_what_it_is() -> None:
    fences = [line for path in PAGES for line in path.read_text().splitlines() if line.lstrip().startswith(("```", "~~~"))]
    assert len(fences) == 2 * len(BLOCKS)
    assert {block.language for block in BLOCKS} <= {"python", "bash", "console", "json", "text"}
    assert all(commands(block) for block in named("bash", "console"))


def test_blocks_and_commands_are_found() -> None:
    text = 'A\n\n```bash\nX=1 a b \\\n  --c "d # e"   # why\nf 2> /dev/null | g; h\n```\n\n```console\n$ i\nj\n```\n'
    shell, console = blocks_of(text, "page")
    assert (shell.language, shell.line, console.language, console.line) == ("bash", 3, "console", 9)
    assert commands(shell) == [["a", "b", "--c", "d # e"], ["f"], ["g"], ["h"]]
    assert commands(console) == [["i"]]


@pytest.mark.parametrize("block", named("bash", "console"), ids=str)
def test_commands_exist_and_take_their_arguments(block: Block) -> None:
    for command in commands(block):
        check(command)


@pytest.mark.parametrize(
    "command",
    [
        "offramp answer smollm2",
        "offramp generate smollm2 --mod exact",
        "offramp generate smollm2 Why? --max-tokens many",
        "make doc",
        "make demo MODLE=mamba-tiny",
        "python benchmarks/speed.py --our int4",
        "python benchmarks/spede.py",
        "python -m offramp.extras.harnes",
        "llm -m offramp/smollm3 Why?",
        "llm -m offramp/smollm2 -o mod exact Why?",
        "offrmp generate smollm2 Why?",
        "offramp-run model.gguf Why? --exist exits.gguf",
        "pip install offramp[serv]",
        "uvx --from WHEEL offramp answer smollm2",
    ],
)
def test_a_command_with_a_mistake_is_found(command: str) -> None:
    with pytest.raises(MISTAKES):
        check(shlex.split(command))


@pytest.mark.parametrize("command", cheap_commands())
def test_cheap_commands_run(world, command: str) -> None:
    ran = run_cli(*shlex.split(command), stdin="Hello\n")
    assert ran.code == 0, ran.stderr
    assert ran.stdout.strip()


def test_inspect_prints_what_the_page_shows(world) -> None:
    shown = [block for block in named("console") if block.text.startswith("$ offramp inspect")]
    assert shown
    for block in shown:
        command, _, output = block.text.partition("\n")
        ran = run_cli(*shlex.split(command)[2:], COLUMNS="80")
        found, wanted = (
            [line.rstrip() for line in text.splitlines() if MACHINES not in line] for text in (ran.stdout, output)
        )
        assert found == wanted


@pytest.mark.parametrize("page", sorted({block.page for block in named("python")}))
def test_python_runs(replaced: dict[str, str], page: str, capsys) -> None:
    """The blocks of a page run one after another, as a reader would type them."""
    namespace: dict[str, Any] = {}
    for block in (block for block in named("python") if block.page == page):
        text = "\n" * block.line + block.text
        for shown, run in replaced.items():
            text = text.replace(shown, run)
        exec(compile(text, block.page, "exec"), namespace)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("block", named("json"), ids=str)
def test_json_lines_are_questions_with_answers(block: Block, tmp_path) -> None:
    (tmp_path / "questions.jsonl").write_text(block.text)
    questions = read_questions(tmp_path / "questions.jsonl")
    assert len(questions) == len(block.text.splitlines())
    assert all(question.references or question.program for question in questions)


@pytest.mark.parametrize("block", named("text"), ids=str)
def test_trees_of_files_name_what_is_there(block: Block) -> None:
    folder = ROOT
    for line in block.text.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        folder = folder if line.startswith(" ") else ROOT
        assert all((folder / name).exists() for name in names), line
        if not line.startswith(" "):
            folder = ROOT / names[0]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        assert re.match(r"https?://", target) or (path.parent / target).exists(), target


def test_the_python_page_has_every_public_name_and_each_has_a_docstring() -> None:
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE)
    assert {f"offramp.{name}" for name in offramp.__all__} <= {*names}
    for dotted in names:
        module, _, name = dotted.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, dotted


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_picture_says_what_it_shows_and_is_legible_in_the_dark(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert all(root.findtext(f"{space}{part}") for part in ("title", "desc"))
    assert "prefers-color-scheme: dark" in str(root.findtext(f"{space}style"))
    assert f"(pictures/{path.name})" in (ROOT / "docs" / "concepts.md").read_text()


class Loads(HTMLParser):
    """Collects what a page loads by itself: scripts, pictures, frames and style sheets, and not what links lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = ("src", "srcset", "data", "href") if tag in ("link", "use", "image") else ("src", "srcset", "data")
        self.addresses += [value for name, value in attrs if name in names and value]


def from_elsewhere(site: Path) -> list[str]:
    """What the pages and style sheets of a site would take from another address."""
    pages = Loads()
    for path in site.rglob("*.html"):
        pages.feed(path.read_text())
    styles = [path.read_text() for path in [*site.rglob("*.css"), *site.rglob("*.html"), *site.rglob("*.svg")]]
    imported = [
        address
        for style in styles
        for address in re.findall(r"(?:@import\s+|url\()['\"]?((?:https?:)?//[^'\")\s]+)", style)
    ]
    return [address for address in [*pages.addresses, *imported] if re.match(r"(https?:)?//", address)]


def test_what_comes_from_elsewhere_is_found(tmp_path) -> None:
    tags = '<script src="https://a/b.js"></script><link href="//c/d.css"><img src="e.svg"><a href="https://f">F</a>'
    (tmp_path / "page.html").write_text(tags + "<style>@import 'https://g/h.css'</style>")
    assert from_elsewhere(tmp_path) == ["https://a/b.js", "//c/d.css", "https://g/h.css"]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("`make docs` installs what builds the site")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_takes_no_file_from_elsewhere(site) -> None:
    assert len([*site.rglob("*.html")]) > len([*(ROOT / "docs").rglob("*.md")])
    assert from_elsewhere(site) == []
    assert 'class="mermaid"' not in "".join(path.read_text() for path in site.rglob("*.html"))


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_the_site_opens_from_disk_and_its_search_finds(site) -> None:
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(("file:", "data:", "about:")) or wrong.append(asked.url))
        page.goto((site / "concepts.html").as_uri())
        link = page.locator('.md-search-result__link[href*="concepts.html#rollback"]')
        for _ in range(60):  # what is typed before the page's script is ready is not heard
            page.locator(".md-search__input").blur()
            page.fill(".md-search__input", "")
            page.type(".md-search__input", "journal")
            page.wait_for_timeout(500)
            if link.count():
                break
        assert link.count() == 1
        assert page.eval_on_selector_all("img", "all => all.every(one => one.naturalWidth > 0)")
        browser.close()
    assert wrong == []


def test_every_yes_about_reproducible_answers_is_a_test() -> None:
    page = (ROOT / "docs" / "experiments" / "reproducible.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")][1:]
    promised = [row for row in rows if "yes" in row[2] + row[3]]
    assert len(promised) >= 7
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    for row in promised:
        assert f"\ndef {row[4].strip(' `')}(" in tests, row
