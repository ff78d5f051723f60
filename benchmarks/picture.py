"""Makes the picture of the README, docs/demo.svg: what `offramp demo` prints on this machine.

    .venv/bin/python benchmarks/picture.py [-o docs/demo.svg]

The times in it are measured while it is made, so the machine should have nothing else to do. Other arguments, such as
--model, are the demo's.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 102  # columns
COMMAND = [sys.executable, "-c", "from offramp.cli.app import main; main()", "demo"]


def picture(printed: str) -> str:
    """What a terminal shows for this text with its colours, as SVG that loads no font from elsewhere."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text.from_ansi(printed.strip()))
    return re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="make demo"), flags=re.S)


def main(argv: list[str] | None = None) -> None:
    """Run the demo and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/demo.svg"))
    options, arguments = parser.parse_known_args(argv)
    colours = {"COLUMNS": str(WIDTH), "FORCE_COLOR": "1"}
    ran = subprocess.run([*COMMAND, *arguments], env=os.environ | colours, stdout=subprocess.PIPE, text=True, check=True)
    options.output.write_text(picture(ran.stdout), "utf-8")


if __name__ == "__main__":
    main()
