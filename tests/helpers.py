"""What test modules share: random exits, prompts, comparisons with full depth, and a request decoded step by step."""

from __future__ import annotations

import copy
import io
import json
import random
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from rich.console import Console

from models import BLOCKS, tiny
from offramp import Engine, Exits, ExitsConfig
from offramp.cli import main
from offramp.decode.batch import Batch
from offramp.decode.compiled import CompiledStepper
from offramp.decode.fills import FILLS
from offramp.decode.request import Prefilled
from offramp.decode.sampling import Sampling
from offramp.decode.sequence import Sequence
from offramp.errors import BadInput
from offramp.evaluation.task import Item, Task
from offramp.evaluation.tasks import score_coqa
from offramp.model.backbone import Backbone
from offramp.model.compiled.library import MOST_DRAFTS
from offramp.model.hub import Source
from offramp.serve.grammar import Grammar, compile_schema
from offramp.training import teacher
from offramp.training.sketch import closest

MADE_AT_ONCE = [name for name, fill in FILLS.items() if not fill.waits]  # fills that leave nothing for later
PROMPT = "Some words to go on from"
LAYERS = (1, 3, 5)
TAILS = (2, 1, 0)
with_and_without_tails = pytest.mark.parametrize("tails", [(), TAILS], ids=["no_tails", "tails"])
HYBRIDS = ["bamba", "jamba", "granitemoehybrid", "falcon_h1", "nemotron_h"]
# How far a memory may be from a float32 reference, as a share of its largest value. A pass in float32 differs from one in
# float64 by at most 2e-6 of it in every family.
SHARE = 1e-5
NEAR = 1e-4  # if the two best logits are closer than this, either token may win
SOURCE = {"source": "made up", "sha256": "0"}


def exits_for(
    family: str, gate: str = "mamba", readout: str = "mamba", seed: int = 0, tails: tuple[int, ...] = ()
) -> Exits:
    """Random exits: the gates' confidences spread over [0, 1], and the adapters change the hidden state."""
    backbone = tiny(family)  # first, since making it draws from the generator, too
    torch.manual_seed(seed)
    exits = Exits.new(backbone, ExitsConfig(LAYERS, gate, readout, gate_width=32, readout_width=32, tails=tails))
    with torch.no_grad():
        for parameter in exits.modules.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    exits.modules.eval().requires_grad_(False)
    return exits


def modest_exits(
    family: str, seed: int = 0, gate: str = "mamba", readout: str = "linear", tails: tuple[int, ...] = ()
) -> Exits:
    """Random gates that open and close, and read-outs near the untrained one, which are sometimes right."""
    backbone = tiny(family)  # first, since making it draws from the generator, too
    torch.manual_seed(seed)
    exits = Exits.new(backbone, ExitsConfig(LAYERS, gate, readout, gate_width=32, readout_width=32, tails=tails))
    with torch.no_grad():
        for exit in exits:
            for parameter in exit.gate.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
            for parameter in exit.adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    exits.modules.eval().requires_grad_(False)
    return exits


def sketched(family: str, dims: int = 32) -> Exits:
    """Exits with a sketch. It is exact at 32 dims, the tiny models' width, and rough with fewer."""
    exits = exits_for(family, "ffn")
    backbone = tiny(family)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (12, 40), generator=g)
    with torch.inference_mode():
        h, step = backbone.embed(ids)
        h = backbone.run(h, 0, backbone.n_blocks, backbone.state(), step)
    everything = torch.ones(40, dtype=torch.bool)
    texts = [
        teacher.TeacherText(row.int(), top[:, None], row[:, None], row[:, None], everything)
        for row, top in zip(ids, h, strict=True)
    ]
    exits.config, exits.sketch = replace(exits.config, sketch=dims), closest(backbone, texts, dims)
    return exits


def damaged(backbone: Backbone) -> Backbone:
    """A copy whose embeddings are NaN."""
    model = copy.deepcopy(backbone.model)
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    return Backbone(model, backbone.tokenizer, Source("damaged", ""))


def costing(engine: Engine, row: float = 0.0, asking: float = 0.0) -> Engine:
    """The engine, whose drafts cost so much: in steps of full depth, of a row of a chunk, and of asking an exit."""
    assert engine.plan.drafts
    rows = tuple(row * drafts for drafts in range(MOST_DRAFTS + 1))
    engine.plan.drafts = replace(engine.plan.drafts, rows=rows, asking=(asking,) * len(engine.plan.drafts.asking))
    engine.steppers.compiled = engine.steppers.compiled and CompiledStepper.of(engine.plan)
    return engine


def some_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of 1 to 12 tokens, all printable."""
    dice = random.Random(seed)
    return [[dice.randrange(32, 127) for _ in range(dice.randrange(1, 13))] for _ in range(count)]


@torch.inference_mode()
def library_tokens(family: str, prompt: str, n: int, **kwargs) -> list[int]:
    """The new tokens of the library's own `generate`."""
    backbone = tiny(family)
    ids = torch.tensor([backbone.prompts.encode(prompt)])
    kwargs = {"pad_token_id": 257, "max_new_tokens": n, "do_sample": False, **kwargs}
    return backbone.model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)[0, ids.shape[1] :].tolist()


@torch.inference_mode()
def same_or_tied(family: str, prompt: list[int], ours: list[int], theirs: list[int]) -> bool:
    """Whether two answers are equal, or first differ where full depth's two best logits are within `NEAR`."""
    for place, (our_id, their_id) in enumerate(zip(ours, theirs, strict=False)):
        if our_id != their_id:
            logits = tiny(family).forward(torch.tensor([prompt + ours[:place]]))[0, -1]
            best = logits.topk(2).values
            return float(best[0] - best[1]) <= NEAR
    return len(ours) == len(theirs)


def refused(fill: str, family: str) -> bool:
    """Whether the fill is refused for this family, for the reason that it should be."""
    if fill != "freeze" or {"mamba", "both"} & set(tiny(family).kinds):
        return False
    with pytest.raises(BadInput, match="no Mamba blocks"):
        Engine(tiny(family), fill=fill)
    return True


def begun(engine: Engine, tokens: int = 48) -> tuple[Batch, Sequence]:
    """A batch of one request whose prompt has been read, and its sequence."""
    batch = engine.batch()
    request = batch.add(engine.backbone.prompts.encode(PROMPT), max_tokens=tokens)
    assert [type(event) for event in batch.step()] == [Prefilled]
    return batch, request.sequence


def after(engine: Engine, tokens: int) -> Sequence:
    """The sequence after `tokens` new tokens."""
    batch, sequence = begun(engine)
    for _ in range(tokens):
        batch.step()
    return sequence


@torch.inference_mode()
def exact(sequence: Sequence, family: str) -> None:
    """Assert that each block's memory equals that of a full-depth pass over the tokens that the block has seen.

    While tokens are pending, the tails' blocks also remember what stands in for them; they can forget it.
    """
    backbone = tiny(family)
    first_tail = BLOCKS - max((exit.tail for exit in sequence.exits), default=0)
    counts = [sequence.run] * BLOCKS  # tokens that each block has seen
    for number, exit in enumerate(sequence.exits):
        for block in range(exit.block, BLOCKS):
            counts[block] -= sequence.waits(number)
    state = copy.deepcopy(sequence.state)
    for block in range(first_tail, BLOCKS):
        assert state.length(block) == (0 if backbone.kinds[block] == "neither" else sequence.run)
        state.crop(counts[block], block, block + 1)
    for count in set(counts) - {0}:
        h, step = backbone.embed(torch.tensor([sequence.ids[:count]]))
        reference = backbone.state()
        backbone.run(h, 0, BLOCKS, reference, step)
        for block in range(BLOCKS):
            if counts[block] != count:
                continue
            kv, ssm = state.kv[block], state.ssm[block]
            if kv is not None:
                assert kv.length == count
                near(kv.keys, reference.kv[block].keys)
                near(kv.values, reference.kv[block].values)
            if ssm is not None:
                assert ssm.length == count
                near(ssm.window, reference.ssm[block].window)
                near(ssm.h, reference.ssm[block].h)


def near(memory: torch.Tensor, reference: torch.Tensor) -> None:
    """Assert that a memory differs from its reference by no more than float32 rounds."""
    largest = float(reference.abs().max()) if reference.numel() else 0.0  # a convolution has no state
    torch.testing.assert_close(memory, reference, rtol=0, atol=SHARE * largest)


def task(count: int = 6, **changed) -> Task:
    """A made-up CoQA of `count` questions."""
    items = [
        Item(str(n), f"Question {n}?", f"Q: Question {n}?\nA:", ("one", "two"), ("three",), "two") for n in range(count)
    ]
    usual = {"name": "coqa", "items": items, "stop": ("\n",), "max_tokens": 8, "score": score_coqa}
    return Task(**{**usual, **SOURCE, **changed})


class Ran(NamedTuple):
    """A command's exit code and output."""

    code: int
    stdout: str
    stderr: str


def run_cli(*arguments: str, folder: Path | None = None, stdin: str = "", **environment: str) -> Ran:
    """Run `offramp ARGUMENTS` in this process, in `folder`: a process of its own needs seconds to import torch.

    The working folder, the environment, the standard streams and the warnings are as before afterwards. An error that
    `main` lets through, and so would end a process in a traceback, is raised here.
    """
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    from offramp.cli import terminal

    settings = {"COLUMNS": "200", "TRANSFORMERS_VERBOSITY": "error", **environment}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), redirect_stdout(stdout), redirect_stderr(stderr):
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)  # as Python does by itself, and pytest does not
        for name, value in settings.items():
            patch.setenv(name, value)
        # The module's console took its width from the environment when it was imported.
        patch.setattr(terminal, "console", Console(highlight=False))
        patch.chdir(folder or Path.cwd())
        patch.setattr(sys, "argv", ["offramp", *arguments])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return Ran(code, stdout.getvalue(), stderr.getvalue())


def grammar_of(backbone: Backbone, schema: dict[str, object], prompt: int = 0, sampling: Sampling | None = None) -> Grammar:
    """What keeps an answer to a prompt of so many ids within a schema."""
    return Grammar(compile_schema(backbone, json.dumps(schema)), prompt, (sampling or Sampling()).chooser())
