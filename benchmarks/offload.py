"""What do exits gain where the weights do not fit in memory? Time and bytes read from disk, for each token.

    .venv/bin/python benchmarks/offload.py [--model smollm2] [--dtype float32] [--share 0.5] [--held 120e6] [--tokens 16]
    .venv/bin/python benchmarks/offload.py --spread [--dtype float32]

Decoding runs in a process of its own, in a memory cgroup. There it may use what it needs beside the weights, and memory for
`--share` of the weights that a token reads at full depth. So the system reads the others from the disk again and again.
`--held` is that of `offramp.load`. With `--spread`, accelerate puts the upper half of the blocks of the library's own model
on the disk, and the share is of that half. Answers at full depth, with calibrated exits (`project`) and with `verify` take
turns; a ratio is the median over rounds. The prefill is left out. Needs Linux and the right to make a cgroup, as root has.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

import offramp
from offramp import Engine
from offramp.errors import OfframpError
from offramp.evaluation.bench import PROMPTS
from offramp.exits.exit_set import ExitSet
from offramp.files import cache_folder
from offramp.machine import machine
from offramp.model.backbone import Backbone
from offramp.model.loading import library_folder, outline

FULL = "full depth"
MB = 1e6
SPARE = 16_000_000  # bytes that a process may come to need beside the weights


@dataclass(frozen=True)
class Group:
    """A memory cgroup, of version 1 or 2."""

    folder: Path
    first: bool  # version 1

    @classmethod
    @contextmanager
    def made(cls) -> Iterator[Group]:
        """A new group, which is removed in the end. Raises `OSError` where none can be made."""
        first = Path("/sys/fs/cgroup/memory")
        parent = first if first.is_dir() else Path("/sys/fs/cgroup")
        group = cls(parent / f"offramp-{os.getpid()}", parent == first)
        group.folder.mkdir()
        try:
            if not group._limit.exists():
                raise OSError(f"{group.folder} has no memory controller")
            yield group
        finally:
            group.folder.rmdir()

    @property
    def _limit(self) -> Path:
        return self.folder / ("memory.limit_in_bytes" if self.first else "memory.max")

    def limit(self, size: int) -> None:
        """Allow so many bytes. Pages of files beyond that are let go."""
        self._limit.write_text(str(size))

    def enter(self) -> None:
        """Put this process into the group."""
        (self.folder / "cgroup.procs").write_text("0")

    def used(self) -> tuple[int, int]:
        """Bytes in memory: of files, and all others."""
        whole = int((self.folder / ("memory.usage_in_bytes" if self.first else "memory.current")).read_text())
        found = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        files = int(found["cache" if self.first else "file"])
        return files, whole - files


@dataclass(frozen=True)
class Answered:
    """What one round of answers took: seconds, bytes read from the disk, tokens, and passes to the top."""

    seconds: float
    read: int
    tokens: int
    passes: int


def read_bytes() -> int:
    """Bytes that this process has made the system read from disks."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def answered(engine: Engine, prompts: list[list[int]], tokens: int) -> Answered:
    """Answer each prompt, and measure from the end of its prefill on."""
    seconds, read, count, passes = 0.0, 0, 0, 0
    for prompt in prompts:
        batch = engine.batch()
        request = batch.add(prompt, max_tokens=tokens)
        while not request.prefilled:
            batch.step()
        started, before = time.perf_counter(), read_bytes()
        for _ in batch.run():
            pass
        seconds, read = seconds + time.perf_counter() - started, read + read_bytes() - before
        count, passes = count + len(request.tokens), passes + request.sequence.deep_passes
    return Answered(seconds, read, count, passes)


def in_turn(engines: dict[str, Engine], prompts: list[list[int]], tokens: int, pairs: int) -> Iterator[str]:
    """The lines of a table: what each engine's tokens take."""
    rounds = [{name: answered(engine, prompts, tokens) for name, engine in engines.items()} for _ in range(pairs)]
    yield "| | ms a token | times as fast | MB read a token | tokens a pass to the top |"
    yield "|---|---|---|---|---|"
    for name in engines:
        found = [answers[name] for answers in rounds]
        ratios = [
            (answers[FULL].seconds / answers[FULL].tokens) / (own.seconds / own.tokens)
            for answers, own in zip(rounds, found, strict=True)
        ]
        count = sum(own.tokens for own in found)
        cells = [
            name,
            f"{1000 * median(own.seconds / own.tokens for own in found):.2f}",
            f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
            f"{sum(own.read for own in found) / count / MB:.1f}",
            f"{count / max(1, sum(own.passes for own in found)):.2f}",
        ]
        yield f"| {' | '.join(cells)} |"


def engines_of(backbone: Backbone, exits: Path | None, drafts: Path | None) -> dict[str, Engine]:
    """Full depth, the calibrated exits, and `verify`."""
    deciding, drafting = ExitSet.find(exits, backbone).early, ExitSet.find(drafts, backbone).drafting
    return {
        FULL: Engine(backbone),
        "exits, `project`": Engine(backbone, deciding),
        "`verify`": Engine(backbone, drafting, fill="verify"),
    }


def spread(name: str, dtype: str | None, work: Path) -> Backbone:
    """The library's own model, with the upper half of its blocks on the disk."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shape, folder = outline(name), library_folder(name)
    family = shape.family
    trunk = getattr(shape.model, family.trunk)
    parts = [part for part, _ in shape.model.named_children() if part != family.trunk]
    parts += [f"{family.trunk}.{part}" for part, _ in trunk.named_children() if part != family.blocks]
    blocks = [f"{family.trunk}.{family.blocks}.{index}" for index in range(shape.n_blocks)]
    places = dict.fromkeys([*parts, *blocks[: shape.n_blocks // 2]], "cpu")
    places |= dict.fromkeys(blocks[shape.n_blocks // 2 :], "disk")
    settings = {"device_map": places, "offload_folder": work, "dtype": dtype or "bfloat16"}
    model = AutoModelForCausalLM.from_pretrained(folder, **settings, trust_remote_code=False)
    for parameter in model.parameters():
        if not parameter.is_meta:  # it may be mapped from a file, and the lower half is to stay in memory
            parameter.data = parameter.data.clone()
    return offramp.wrap(model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False), name).backbone


def decode(args: argparse.Namespace, group: Group) -> None:
    """Load the model, limit the memory, and print the table."""
    held = round(args.held)
    backbone = (
        spread(args.model, args.dtype, args.work)
        if args.spread
        else offramp.load(args.model, args.dtype, held=held).backbone
    )
    engines = engines_of(backbone, args.exits, args.drafts)
    prompts = [backbone.prompts.encode(text) for text in PROMPTS[: args.count]]
    for engine in engines.values():
        answered(engine, prompts, args.tokens)
    runtime, lowest = backbone.runtime, backbone.n_blocks // 2 if args.spread else 0
    whole = sum(runtime.block_bytes(index) for index in range(lowest, backbone.n_blocks))
    whole += 0 if args.spread else runtime.head_bytes()
    files, others = group.used()
    files, others = files + held, others - held
    if files < 0.9 * whole:
        raise OfframpError(
            f"Only {files / MB:.0f} MB of {whole / MB:.0f} MB of weights are counted as this process's memory.",
            "Another process uses the same weights: end it, or set OFFRAMP_CACHE to a new folder.",
        )
    group.limit(round(others + SPARE + args.share * whole))
    answered(engines[FULL], prompts[:1], 4)
    print(
        f"{backbone.name}, {backbone.weight_format}, {backbone.engine}: at full depth a token reads {whole / MB:.0f} MB of "
        f"weights{' that are on the disk' if args.spread else ''}; {args.share * whole / MB:.0f} MB have room, "
        f"{held / MB:.0f} MB of them held, beside {others / MB:.0f} MB of the process; {machine()}"
    )
    for line in in_turn(engines, prompts, args.tokens, args.pairs):
        print(line, flush=True)


def forget() -> None:
    """Let the system drop what it has in memory of the weights: pages that are there already are charged to nobody."""
    for file in (*cache_folder().glob("formats/*/*.bin"), *cache_folder().glob("models/*/*.safetensors")):
        with suppress(OSError), file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype")
    parser.add_argument("--exits", type=Path)
    parser.add_argument("--drafts", type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="of the weights, that memory is left for")
    parser.add_argument("--held", type=float, default=0, help="bytes of weights that stay in memory")
    parser.add_argument("--spread", action="store_true", help="the library's model, with its upper half on the disk")
    parser.add_argument("--count", type=int, default=len(PROMPTS), help="prompts")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("build/offload"), help="where accelerate may put weights")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.inside:
        try:
            decode(args, Group(args.inside, (args.inside / "memory.limit_in_bytes").exists()))
        except OfframpError as error:
            parser.error(f"{error} {error.hint}")
        return
    try:
        with Group.made() as group:
            forget()
            command = [sys.executable, __file__, *argv, "--inside", str(group.folder)]
            code = subprocess.run(command, preexec_fn=group.enter).returncode
    except (OSError, subprocess.SubprocessError) as error:
        parser.error(f"This process cannot make a memory cgroup: {error}. Run it as root, on Linux.")
    if code:
        sys.exit(code)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    main()
