"""How exits are trained and calibrated, and how models are tuned.

One frozen dataclass for each verb. A field with a help line is a flag of that verb (see `offramp.cli.flags`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from offramp.errors import BadInput
from offramp.settings import setting

PROMPTS_HELP = "A file of prompts to answer: lines, or JSON lines with 'prompt'. Default: a list that comes with offramp."
TEXT_HELP = "A file to read too: plain text, or JSON lines with 'text'. May be repeated."
MAX_PROMPTS_HELP = "Use only this many prompts, the first ones. Default: all."


@dataclass(frozen=True)
class TrainConfig:
    """How exits are trained.

    `shortlist` is a number of tokens: an exit reads out only the most frequent ones of the answers (0: all). `confidence`
    and `threshold` are the default policy's;
    with a `threshold` of None, `precision` chooses the thresholds. `batch` counts the sequences of a step.
    """

    layers: tuple[int, ...] | None = setting(None, "Blocks that run before each exit: 10,15,20,25. Default: three places.")
    tails: tuple[int, ...] = setting(
        (), "The number of the model's last blocks that each exit runs: 4,3,3. Default: by trial; none with --layers."
    )
    gate: str = setting("mamba", "Exit classifier: linear, ffn or mamba.", draft="linear")
    readout: str = setting("ffn", "Adapter before the LM head: none, linear, ffn, mamba or deep.", draft="deep")
    gate_width: int = setting(64, "Bottleneck of a gate, in dims; a multiple of 16.")
    gate_target: str = setting(
        "harmless",
        "What gates learn to foresee: key (that the read-out will be sure enough), harmless (also that later tokens will "
        "not miss what the skipped blocks would remember) or agreement (that the read-out is right).",
        draft="key",
    )
    readout_width: int = setting(512, "Bottleneck of a read-out, in dims; a multiple of 32.", draft=1024)
    middle: int = setting(
        0,
        "A deep read-out also reads the state after this many blocks; 0: it does not. With --draft, and without --layers, "
        "two thirds of the blocks are meant where nothing is given.",
    )
    top_k: int = setting(1, "An exit agrees if its token is among the full model's k most probable ones.")
    prompts: str | None = setting(None, PROMPTS_HELP, flag="--own-prompts")
    texts: tuple[str, ...] = setting((), TEXT_HELP, flag="--text")
    max_prompts: int | None = setting(None, MAX_PROMPTS_HELP)
    hours: float = setting(0.5, "Time to spend, unless --epochs says how much to do.")
    answers: int | None = setting(
        None, "Answers to train on. Default: as many as --hours allows, or with --epochs one for each prompt."
    )
    temperatures: tuple[float, ...] = setting(
        (0.0, 0.7, 0.9),
        "Temperatures of the answers, in turn; 0 is greedy. A prompt is answered once at each, or more often.",
    )
    answer_tokens: int = setting(128, "Longest answer to a prompt, in tokens.")
    epochs: int | None = setting(None, "Passes over the text for the read-outs' adapters. Default: as --hours allows.")
    gate_epochs: int | None = setting(None, "Passes over the text for the gates. Default: as --hours allows.")
    batch: int = setting(16, draft=4)
    learning_rate: float = setting(1e-3, "Highest learning rate of the adapters.")
    gate_learning_rate: float = 1e-3
    precision: float = setting(0.98, "The default thresholds are set so that an exit that fires agrees this often.")
    shortlist: int = setting(0, draft=8192)
    sketch: int | None = setting(
        None,
        "Dims of the sketch of the head that --candidates needs; a multiple of 32; 0 makes none. "
        "Default: 64 for a large vocabulary; none for a small one and with --draft.",
        draft=0,
    )
    confidence: str = setting("gate", draft="max-prob")
    threshold: float | None = setting(None, draft=0.1)
    seed: int = setting(0, "Seed of everything random.")

    def __post_init__(self) -> None:
        _check_least(self, top_k=1, max_prompts=1, answers=1, answer_tokens=1, epochs=0, gate_epochs=0, batch=1)
        if not self.hours > 0:
            raise BadInput(f"{self.hours} hours are no time to train in.", "Give a number above 0, such as 0.5.")
        if self.gate_target not in ("key", "harmless", "agreement"):
            raise BadInput(f"Gates cannot foresee '{self.gate_target}'.", "Choose from key, harmless, agreement.")
        if not self.temperatures or min(self.temperatures) < 0:
            raise BadInput("Temperatures must be 0 or more, and there must be one.", "For example 0,0.7,0.9.")
        _check_rates(self.learning_rate, self.gate_learning_rate)
        if not 0 <= self.precision <= 1:
            raise BadInput(f"A precision of {self.precision} is not in [0, 1].", "0.98 is the default.")


def draft_config(kinds: list[str], **changed: Any) -> TrainConfig:
    """How the exit that drafts for `verify` is trained, in a model with blocks of these kinds; `changed` fields win.

    It reads the token's embedding, and of the token before the top state and a middle one, after two thirds of the blocks.
    Its tail is the model's last block, if that is attention, and it reads out a short list of tokens. A draft costs little,
    and a wrong one is only rejected. So drafting pays even if only a quarter of them are right.
    """
    drafts = {item.name: item.metadata.get("draft") for item in fields(TrainConfig)}
    usual = {name: value for name, value in drafts.items() if value is not None}
    place: dict[str, Any] = {}
    if not changed.get("layers"):
        place = {"layers": (0,), "tails": (int(kinds[-1] == "attention"),), "middle": round(len(kinds) * 2 / 3)}
    return TrainConfig(**{**place, **usual, **changed})


@dataclass(frozen=True)
class CalibrationConfig:
    """What a calibration must guarantee, and how the answers are generated."""

    risk: float = setting(0.05, "Highest expected loss of an answer, 0 to 1.")
    delta: float = setting(0.05, "Highest probability that the guarantee fails, 0 to 1.")
    loss: str = setting(
        "f1",
        "How an answer's loss is measured: f1 (1 − token F1 with full depth's answer), exact (1 if the answers differ), "
        "task (how many more words of the prompt's 'answer' it misses, as a share).",
    )
    kind: str = setting(
        "precision",
        "Policies to choose from: precision (thresholds and second keys under which every exit is right equally often), "
        "thresholds (one for all exits), decay (thresholds that fall along an answer), patience, fixed (one exit for every "
        "token).",
        flag="--policy",
    )
    whole_head: bool = setting(False, "Read out all tokens at full depth: only exits use the sketch of the head.")
    confidence: str | None = setting(
        None, "What thresholds are compared with: gate, max-prob, margin or entropy. Default: as the exits have it."
    )
    fill: str = setting("project", "The fill to calibrate for: project, copy, freeze or defer (see generate).")
    max_tokens: int = setting(128, "Longest answer, in tokens. The guarantee holds for every lower limit, too.")
    stop: tuple[str, ...] = setting((), "End an answer before this text. May be repeated.")
    retest: bool = setting(
        False,
        "Test the path of the exits' last calibration again, on new prompts. All of them test; there is no pilot.",
    )
    raw: bool = setting(False, "Give the prompts as they are, without the model's chat template.")
    repetition_penalty: float = setting(1.0, "Repetition penalty of the answers; 1 is none.")


@dataclass(frozen=True)
class TuneConfig:
    """How a model is tuned.

    `every`: a step reads out one block in this many, and the last. `bfloat16`: multiply in it, which is faster where the
    processor can. `batch` counts the sequences of a step.
    """

    rank: int = setting(32, "Rank of the low-rank update.")
    skip: float = setting(0.05, "Share of the samples that skip the last block; earlier blocks are skipped less often.")
    exit_scale: float = setting(0.02, "Weight of early blocks' losses relative to the last block's.")
    every: int = 4
    bfloat16: bool = True
    prompts: str | None = setting(None, PROMPTS_HELP, flag="--own-prompts")
    texts: tuple[str, ...] = setting((), TEXT_HELP, flag="--text")
    max_prompts: int | None = setting(None, MAX_PROMPTS_HELP)
    answer_tokens: int = setting(96, "Longest answer to a prompt, in tokens.")
    epochs: int = setting(2, "Passes over the text.")
    batch: int = 8
    learning_rate: float = setting(2e-4, "Highest learning rate.")
    seed: int = setting(0, "Seed of everything random.")

    def __post_init__(self) -> None:
        _check_least(self, rank=1, every=1, max_prompts=1, answer_tokens=1, epochs=0, batch=1)
        _check_rates(self.learning_rate)
        if not 0 <= self.skip < 1:
            raise BadInput(f"A share of {self.skip} samples cannot skip a block.", "Give a number from 0 to below 1.")


def _check_least(config: Any, **least: int) -> None:
    """Raises `BadInput` for a field of the config that is below its least value."""
    for name, value in least.items():
        setting_value = getattr(config, name)
        if setting_value is not None and setting_value < value:
            raise BadInput(
                f"The setting '{name.replace('_', ' ')}' is {setting_value}, which is too low.", f"Give {value} or more."
            )


def _check_rates(*rates: float) -> None:
    """Raises `BadInput` for a learning rate that cannot train."""
    for rate in rates:
        if not rate > 0:
            raise BadInput(f"A learning rate of {rate} cannot train.", "Give a number above 0, such as 0.001.")
