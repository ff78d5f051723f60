"""How exits are trained and calibrated.

One frozen dataclass for each verb. A field with a help line is a flag of that verb (see `offramp.cli.flags`). The other
fields are for Python.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from offramp.errors import BadInput
from offramp.settings import RESEARCH, setting


@dataclass(frozen=True)
class TrainConfig:
    """How exits are trained.

    `gate_target`: what gates learn to foresee: `key` (that the read-out will be sure enough), `harmless` (also that later
    tokens will not miss what the skipped blocks would remember) or `agreement` (that the read-out is right). `middle`: a
    deep read-out also reads the state after this many blocks; 0: it does not. `top_k`: an exit agrees if its token is among
    the full model's k most probable ones. `texts`: files to read, too, plain or as JSON lines with 'text'. `max_prompts`:
    use only the first ones, this many. `answers`: how many to train on; None: as many as `hours` allows, or with `epochs`
    one for each prompt. `temperatures`: those of the answers, in turn; 0 is greedy. `answer_tokens`: the longest answer.
    `batch`: sequences of a step; many short steps learn more from a text than few long ones. `learning_rate`,
    `gate_learning_rate`: the highest ones. `precision`: the thresholds are set so that an exit that fires agrees this
    often; a `threshold` and its `confidence` take their place. `shortlist`: an exit reads out only so many tokens, the most
    frequent ones of the answers; 0: all. `sketch`: dims of the sketch of the head, a multiple of 32; 0: none; None: for a
    large vocabulary, as few as miss few of the model's own tokens.
    """

    prompts: str | None = setting(
        None,
        "File of prompts to answer, as lines or as JSON lines with 'prompt' (default: a list that comes with offramp).",
        flag="--own-prompts",
    )
    hours: float = setting(0.5, "Hours to spend, unless --epochs says how much to do.")
    layers: tuple[int, ...] | None = setting(
        None, "How many blocks run before each exit, such as 10,15,20 (default: three places).", panel=RESEARCH
    )
    tails: tuple[int, ...] = setting(
        (),
        "How many of the model's last blocks run after each exit, such as 4,3,3 (default: by trial; with --layers: none).",
        panel=RESEARCH,
    )
    gate: str = setting("mamba", "What decides whether a token leaves: {gates}.", draft="linear", panel=RESEARCH)
    gate_width: int = setting(64, "Inner dims of a gate, a multiple of 16.", panel=RESEARCH)
    readout: str = setting("ffn", "What stands before the LM head at an exit: {readouts}.", draft="deep", panel=RESEARCH)
    readout_width: int = setting(512, "Inner dims of a read-out, a multiple of 32.", draft=1024, panel=RESEARCH)
    epochs: int | None = setting(
        None, "How often the read-outs see each text (default: as often as --hours allows).", panel=RESEARCH
    )
    gate_epochs: int | None = setting(
        None, "How often the gates see each text (default: as often as --hours allows).", panel=RESEARCH
    )
    gate_target: str = setting("harmless", draft="key")
    middle: int = 0
    top_k: int = 1
    texts: tuple[str, ...] = ()
    max_prompts: int | None = None
    answers: int | None = None
    temperatures: tuple[float, ...] = (0.0, 0.7, 0.0, 0.9)
    answer_tokens: int = 256
    batch: int = 4
    learning_rate: float = 1e-3
    gate_learning_rate: float = 1e-3
    precision: float = 0.98
    shortlist: int = setting(0, draft=8192)
    sketch: int | None = setting(None, draft=0)
    confidence: str = setting("gate", draft="max-prob")
    threshold: float | None = setting(None, draft=0.1)
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, top_k=1, max_prompts=1, answers=1, answer_tokens=1, epochs=0, gate_epochs=0, batch=1)
        if not self.hours > 0:
            raise BadInput(f"{self.hours} hours are no time to train in.", "Give a number above 0, such as 0.5.")
        if self.gate_target not in ("key", "harmless", "agreement"):
            raise BadInput(f"Gates cannot foresee '{self.gate_target}'.", "Choose from key, harmless, agreement.")
        if not self.temperatures or min(self.temperatures) < 0:
            raise BadInput("Temperatures must be 0 or more, and there must be one.", "For example 0,0.7.")
        check_rates(self.learning_rate, self.gate_learning_rate)
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
    """What a calibration must guarantee, and how the answers are generated.

    The loss `f1` is 1 − token F1 with full depth's answer; `exact` is 1 if the answers differ;
    `task` is the share of the words of the prompt's 'answer' that full depth's answer has and this one misses. If the
    prompt has a 'program', `task` is 1 if full depth's code passes it and this answer's does not; `run_code` allows that it
    runs. The policies of the kind `precision` have thresholds
    and second keys under which every exit is right equally often; `thresholds` has one for all exits; those of `decay` fall
    along an answer; `fixed` is one exit for every token. `confidence`: what thresholds are
    compared with; None: as the exits have it. `stop`: texts before which an answer ends. `raw`: prompts are given without
    the model's chat template. `repetition_penalty`: 1 is none.
    """

    risk: float = setting(0.05, "Highest mean loss of an answer that is allowed, 0 to 1.")
    delta: float = setting(0.05, "Highest probability that the guarantee fails, 0 to 1.")
    loss: str = setting("f1", "How an answer's loss is measured: {losses} (task needs right answers in the file).")
    max_tokens: int = setting(128, "Longest answer, in tokens; the guarantee holds for every lower limit, too.")
    kind: str = setting("precision", "Policies to choose from: {policies}.", flag="--policy", panel=RESEARCH)
    whole_head: bool = setting(
        False, "At full depth, read out all tokens, not only those that the sketch of the head finds.", panel=RESEARCH
    )
    fill: str = "project"
    retest: bool = setting(
        False, "Test the policies of the exits' last calibration again, on new prompts, with no pilot.", panel=RESEARCH
    )
    run_code: bool = setting(False, "Run programs that the model writes, in a sandbox (--loss task with a 'program').")
    confidence: str | None = None
    stop: tuple[str, ...] = ()
    raw: bool = False
    repetition_penalty: float = 1.0


def check_least(config: Any, **least: int) -> None:
    """Raises `BadInput` for a field of the config that is below its least value."""
    for name, value in least.items():
        setting_value = getattr(config, name)
        if setting_value is not None and setting_value < value:
            raise BadInput(
                f"The setting '{name.replace('_', ' ')}' is {setting_value}, which is too low.", f"Give {value} or more."
            )


def check_rates(*rates: float) -> None:
    """Raises `BadInput` for a learning rate that cannot train."""
    for rate in rates:
        if not rate > 0:
            raise BadInput(f"A learning rate of {rate} cannot train.", "Give a number above 0, such as 0.001.")
