"""Train exits for a frozen backbone, from the backbone's own outputs (DYNAMAX, arXiv 2504.20922).

1. Harvest: the model answers prompts; hidden states at the exits and the final distribution are kept (`harvest`).
2. Adapters: each read-out is distilled towards the final distribution: cross-entropy with the teacher's most probable
   tokens. The softmax is over those tokens of the batch and a fresh random sample of the others, each weighted up by the
   inverse of its chance to be drawn, which estimates the full softmax at a fraction of the LM head's cost.
   A `deep` read-out learns half the time from its own guess at the top state of the token before, as in a run of drafts.
3. Gates: binary cross-entropy on "the read-out's top token is among the oracle's top k".

Losses are summed over exits with weights that decay linearly with the exit's position (the paper). A sequence serves
adapters, gates or validation, never two of them: a gate must learn how the read-out does on text it was not fitted to.

Everything random is a function of the seed and the step, so a run that was interrupted and resumed ends like one that
was not.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.errors import BadInput, BadNumbers, CorruptFile
from offramp.exits.exits import Exit, Exits, ExitsConfig, suggested_layers
from offramp.exits.parts import Standardise
from offramp.exits.policy import Policy
from offramp.files import ASSETS, read_lines, write_atomically
from offramp.metrics import auroc
from offramp.model.backbone import Backbone
from offramp.progress import Progress, silent
from offramp.training.config import TrainConfig
from offramp.training.teacher import Sequence, harvest, load_shards, read_texts, units

SKETCH_DIMS, CANDIDATES = 128, 2048  # for SmolLM2's own tokens, all but 1 in 900 are among these
PROMPTS = ASSETS / "prompts.txt"


def train(
    backbone: Backbone,
    folder: str | Path,
    config: TrainConfig | None = None,
    progress: Progress = silent,
    command: str = "",
) -> Exits:
    """Train exits and save them in `folder`, which also holds the work until it is done (`.training`).

    Called again after an interruption with the same config, it goes on where it stopped, to the same result. `command` is
    kept in the record. Raises `BadInput` for unusable files or settings, `CorruptFile` for damaged work files.
    """
    config = config or TrainConfig()
    folder, work = Path(folder), Path(folder) / ".training"
    layers = config.layers or suggested_layers(backbone.n_blocks)
    torch.manual_seed(config.seed)
    shortlist = config.shortlist if config.shortlist < backbone.vocab_size else 0
    widths = config.gate_width, config.readout_width
    # With few tokens or dims, a sketch would cost as much as the head.
    large = backbone.vocab_size >= 8 * CANDIDATES and backbone.hidden_size >= 4 * SKETCH_DIMS
    sketch = (SKETCH_DIMS if large else 0) if config.sketch is None else config.sketch
    shape = ExitsConfig(tuple(layers), config.gate, config.readout, *widths, shortlist, sketch)
    exits = Exits.new(backbone, shape)
    top = bool(sketch) or any(exit.adapter.reads_top for exit in exits)
    with _Clock(work / "seconds") as clock:
        data = gather(backbone, config, (*layers, backbone.n_blocks) if top else tuple(layers), work, progress)
        if shortlist:
            exits.shortlist = frequent(data.adapters, shortlist, backbone.vocab_size)
        if sketch:
            exits.sketch = sketch_of(backbone, data.adapters, sketch)
        trainer = Trainer(backbone, exits, config, work, progress)
        trainer.standardise(data.adapters)
        if config.readout != "none":
            trainer.fit_adapters(data.adapters)
        labelled = trainer.labels(data.gates + data.held)
        trainer.fit_gates(labelled[: len(data.gates)])
    valid = labelled[len(data.gates) :]

    exits.modules.eval().requires_grad_(False)
    quality = validate(exits, valid)
    # An exit that skips many blocks leaves them approximate states, and that alone can turn the rest of an answer, however
    # right the token was: `open_from` is a guess that calibration should replace.
    thresholds = (
        config.threshold
        if config.threshold is not None
        else _threshold(*scored, config.precision)
        if exit.block >= config.open_from * backbone.n_blocks
        else 1.0
        for exit, scored in zip(exits, scores(exits, valid), strict=True)
    )
    exits.policy = Policy(tuple(thresholds), config.confidence, candidates=CANDIDATES if sketch else 0)
    exits.training = {
        "command": command,
        "config": {**asdict(config), "layers": list(layers), "prompts": None, "texts": []},
        "text": data.files,
        "tokens": {
            "adapters": sum(int(s.counted.sum()) for s in data.adapters),
            "gates": sum(int(s.counted.sum()) for s in data.gates),
            "validation": sum(int(s.counted.sum()) for s in data.held),
        },
        "seconds": round(clock.seconds, 1),
        "versions": {"torch": torch.__version__, "offramp": _version()},
        "validation": quality,
        "curve": trainer.fit.curve,
    }
    exits.save(folder)
    shutil.rmtree(work)
    return Exits.load(folder, backbone)


class _Clock:
    """Seconds of work, earlier interrupted runs included."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds = float(path.read_text()) if path.exists() else 0.0

    def __enter__(self) -> _Clock:
        self._started = time.time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.time() - self._started
        if self._path.parent.is_dir():  # not where the work never began
            write_atomically(self._path, str(self.seconds).encode())


@dataclass(frozen=True)
class Data:
    """Harvested sequences, each in one part only, and the files that they came from."""

    adapters: list[Sequence]
    gates: list[Sequence]
    held: list[Sequence]
    files: list[dict[str, Any]]


def gather(
    backbone: Backbone,
    config: TrainConfig,
    layers: tuple[int, ...],
    work: Path,
    progress: Progress = silent,
    claim: dict[str, Any] | None = None,
) -> Data:
    """Harvest the config's prompts and texts into the folder `work`, or go on there, and split them 7 : 2 : 1.

    `claim`, by default the config, is what must not have changed since the work there was begun.
    """
    prompts, texts, files = _corpus(backbone, config)
    plan = units(prompts, texts, config.answer_tokens, batch=48)
    if len(prompts) + len(texts) < 3:
        raise BadInput(
            f"{len(prompts) + len(texts)} texts are too few to train on.", "Give at least three; a thousand is better."
        )
    _claim(work, backbone, claim or asdict(config), files)
    total = sum(len(ids) + unit.answer_tokens for unit in plan for ids in unit.ids)
    seen = 0

    def harvested(tokens: int) -> None:
        nonlocal seen
        seen += tokens
        progress("reading", seen, total)

    sequences = load_shards(harvest(backbone, plan, layers, work, harvested))
    order = torch.randperm(len(sequences), generator=step_generator(config.seed, 0)).tolist()
    fifth, tenth = max(1, len(order) // 5), max(1, len(order) // 10)
    adapters, gates, held = (
        [sequences[index] for index in part]
        for part in (order[tenth + fifth :], order[tenth : tenth + fifth], order[:tenth])
    )
    return Data(adapters, gates, held, files)


@dataclass(frozen=True)
class Labelled:
    """A sequence with, for each exit, whether its read-out's top token is among the oracle's top k: agrees (T, J)."""

    hidden: Tensor
    counted: Tensor
    agrees: Tensor


class Fit:
    """Fits modules step by step; checkpoints go to the folder `work`, the losses to `curve`.

    Interrupted, the same call goes on from the last checkpoint, to the same result.
    """

    def __init__(self, work: Path, seed: int = 0, batch: int = 8, progress: Progress = silent) -> None:
        self.work, self.seed, self.batch, self.progress = work, seed, batch, progress
        self.curve: list[dict[str, Any]] = []

    def run(
        self,
        stage: str,
        module: nn.Module,
        sequences: list[Any],
        epochs: int,
        rate: float,
        loss_of: Callable[[list[Any], int], tuple[Tensor, list[Tensor]]],
    ) -> None:
        """AdamW with a short warm-up and a cosine to zero over `epochs`.

        `loss_of` a batch and its step: what to minimise, and the parts of it that go to the curve.
        """
        module.train()
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        per_epoch = -(-len(sequences) // self.batch)
        steps = per_epoch * epochs
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(steps, 2), pct_start=0.05)
        step = self._restore(stage, module, optimizer, schedule)
        saved = time.monotonic()
        while step < steps:
            order = torch.randperm(len(sequences), generator=step_generator(self.seed, step // per_epoch, stage)).tolist()
            at = (step % per_epoch) * self.batch
            torch.manual_seed(step_generator(self.seed, step, stage).initial_seed())  # dropout
            total, parts = loss_of([sequences[index] for index in order[at : at + self.batch]], step)
            if not torch.isfinite(total):
                raise BadNumbers(f"The {stage}' loss became NaN at step {step}.", "Try a lower --learning-rate.")
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            losses = [round(float(loss.detach()), 4) for loss in parts]
            if step % max(1, steps // 60) == 0 or step == steps:
                self.curve.append({"stage": stage, "step": step, "loss": losses})
            self.progress(stage, step, steps, f"loss {sum(losses) / len(losses):.3f}")
            if step == steps or time.monotonic() - saved > 20:
                self._checkpoint(stage, step, module, optimizer, schedule)
                saved = time.monotonic()
        module.eval()

    def _checkpoint(self, stage: str, step: int, module: nn.Module, optimizer: Any, schedule: Any) -> None:
        learned = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        kept = {name: value for name, value in module.state_dict().items() if name in learned}
        buffer = io.BytesIO()
        content = {"step": step, "curve": self.curve, "module": kept}
        torch.save({**content, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, buffer)
        write_atomically(self.work / f"{stage}.pt", buffer.getvalue())

    def _restore(self, stage: str, module: nn.Module, optimizer: Any, schedule: Any) -> int:
        path = self.work / f"{stage}.pt"
        if not path.exists():
            return 0
        try:
            saved = torch.load(path, weights_only=True)
        except Exception as error:
            raise CorruptFile(f"The checkpoint {path} is damaged.", "Delete it and run the command again.") from error
        module.load_state_dict(saved["module"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        self.curve[:] = saved["curve"]
        return int(saved["step"])


class Trainer:
    """Fits the parts of `exits`; checkpoints go to the folder `work`."""

    def __init__(
        self, backbone: Backbone, exits: Exits, config: TrainConfig, work: Path, progress: Progress = silent
    ) -> None:
        self.backbone, self.exits, self.config = backbone, exits, config
        self.progress = progress
        self.fit = Fit(work, config.seed, config.batch, progress)
        count = len(exits)
        # Decays linearly with the exit's position (the paper); the sum is 1.
        self.weights = [2 * (count - index) / (count * (count + 1)) for index in range(count)]

    @torch.no_grad()
    def standardise(self, sequences: list[Sequence], parts: str = "", most: int = 20_000) -> None:
        """Give every part, or only the `gate`s, the mean and spread of its hidden states over some of the text."""
        pieces, tokens = [], 0
        for sequence in sequences:
            pieces.append(sequence.hidden[sequence.counted])
            tokens += len(pieces[-1])
            if tokens >= most:
                break
        hidden = torch.cat(pieces).float()
        for index, exit in enumerate(self.exits):
            for part in exit.get_submodule(parts).modules():
                if isinstance(part, Standardise):
                    part.fit(hidden[:, index])

    def fit_adapters(self, sequences: list[Sequence]) -> None:
        adapters = nn.ModuleList(exit.adapter for exit in self.exits)
        self.fit.run(
            "adapters",
            adapters,
            sequences,
            self.config.epochs,
            self.config.learning_rate,
            self._weighted(self._adapter_loss),
        )

    def fit_gates(self, labelled: list[Labelled]) -> None:
        gates, rate = nn.ModuleList(exit.gate for exit in self.exits), self.config.gate_learning_rate
        self.fit.run("gates", gates, labelled, self.config.gate_epochs, rate, self._weighted(self._gate_loss))

    def _weighted(
        self, losses_of: Callable[[list[Any], int], list[Tensor]]
    ) -> Callable[[list[Any], int], tuple[Tensor, list[Tensor]]]:
        def loss_of(batch: list[Any], step: int) -> tuple[Tensor, list[Tensor]]:
            losses = losses_of(batch, step)
            return torch.stack([weight * loss for weight, loss in zip(self.weights, losses, strict=True)]).sum(), losses

        return loss_of

    def _adapter_loss(self, batch: list[Sequence], step: int) -> list[Tensor]:
        hidden, counted = padded([s.hidden for s in batch]).float(), padded([s.counted for s in batch])
        teacher = padded([s.top_ids for s in batch])[counted].long()  # (n, K)
        wanted = padded([s.top_logp for s in batch])[counted].float().softmax(-1)
        if self.exits.shortlist is None:
            rows, offset = sampled(teacher, self.backbone.vocab_size, step_generator(self.config.seed, step, "vocabulary"))
        else:
            rows, offset = self.exits.shortlist, torch.zeros(len(self.exits.shortlist))
        columns = torch.searchsorted(rows, teacher).clamp(max=len(rows) - 1)
        wanted = wanted * (rows[columns] == teacher)  # none for tokens outside the short list

        def cross_entropy(adapted: Tensor) -> Tensor:
            logits = self.backbone.logits(adapted[counted].to(self.backbone.dtype), rows) + offset
            return -(wanted * logits.log_softmax(-1).gather(-1, columns)).sum(-1).mean()

        losses = []
        for index, exit in enumerate(self.exits):
            adapted, _ = exit.adapter(inputs(exit, hidden, index))
            loss = cross_entropy(adapted)
            if exit.adapter.reads_top and step % 2:
                again, _ = exit.adapter(inputs(exit, hidden, index, top=adapted.detach()))
                loss = (loss + cross_entropy(again)) / 2
            losses.append(loss)
        return losses

    def _gate_loss(self, batch: list[Labelled], step: int) -> list[Tensor]:
        hidden, counted = padded([s.hidden for s in batch]).float(), padded([s.counted for s in batch])
        agrees = padded([s.agrees for s in batch])[counted].float()
        losses = []
        for index, exit in enumerate(self.exits):
            score, _ = exit.gate(hidden[:, :, index])
            losses.append(F.binary_cross_entropy_with_logits(score[counted], agrees[:, index]))
        return losses

    @torch.inference_mode()
    def labels(self, sequences: list[Sequence]) -> list[Labelled]:
        """Read every sequence out at every exit, over the full vocabulary, and compare with the oracle's top k."""
        out = []
        rows = self.exits.shortlist
        head = self.backbone.logits if rows is None else self.backbone.head_of(rows)
        for number, sequence in enumerate(sequences):
            hidden, counted = sequence.hidden[None].float(), sequence.counted
            oracle = sequence.top_ids[counted][:, : self.config.top_k]
            agrees = torch.zeros(len(counted), len(self.exits), dtype=torch.bool)
            for index, exit in enumerate(self.exits):
                adapted, _ = exit.adapter(inputs(exit, hidden, index))
                best = head(adapted[0, counted].to(self.backbone.dtype)).argmax(-1)
                best = best if rows is None else rows[best]
                agrees[counted, index] = (oracle == best[:, None]).any(-1)
            out.append(Labelled(sequence.hidden, counted, agrees))
            self.progress("labels", number + 1, len(sequences))
        return out


def sampled(teacher: Tensor, vocabulary: int, generator: torch.Generator, sample: int = 6144) -> tuple[Tensor, Tensor]:
    """The tokens of one step's softmax, rising, and what to add to their logits: the teacher's and a random sample."""
    mine = teacher.unique()
    others = torch.ones(vocabulary, dtype=torch.bool)
    others[mine] = False
    rest = others.nonzero().squeeze(1)
    if len(rest) <= sample:
        return torch.arange(vocabulary), torch.zeros(vocabulary)
    drawn = rest[torch.randperm(len(rest), generator=generator)[:sample]]
    offset = torch.zeros(vocabulary)
    offset[drawn] = float(torch.tensor(len(rest) / sample).log())
    rows = torch.cat([mine, drawn]).sort().values
    return rows, offset[rows]


def inputs(exit: Exit, hidden: Tensor, index: int, top: Tensor | None = None) -> Tensor:
    """What the read-out of an exit reads: hidden (B, T, J, D) → (B, T, D), or if it is `deep` (B, T, 2 D).

    Then the last of the J is the top, unless `top` (B, T, D) takes its place.
    """
    h = hidden[:, :, index]
    if not exit.adapter.reads_top:
        return h
    top = hidden[:, :, -1] if top is None else top
    return torch.cat([h, F.pad(top[:, :-1], (0, 0, 1, 0))], dim=-1)


@torch.inference_mode()
def sketch_of(backbone: Backbone, sequences: list[Sequence], dims: int) -> tuple[Tensor, Tensor]:
    """Maps reduce (k, D) and expand (D, k) for which the head, behind both, errs least on hidden states like these.

    The last of the sequences' hidden states must be those at the top. With W the head and C the second moments of what it
    is multiplied with, h: the best map of rank k is L Q Qᵀ L⁻¹, where C = L Lᵀ and Q has the k largest right singular
    vectors of W L (SVD-softmax, Shim et al. 2017, but for the hidden states that there are).
    """
    h = backbone.final(torch.cat([one.hidden[one.counted][:, -1] for one in sequences]).float()).double()
    moments = h.T @ h / len(h)
    values, vectors = torch.linalg.eigh(moments + 1e-6 * moments.diagonal().mean() * torch.eye(h.shape[1]).double())
    root = values.clamp(min=1e-12).sqrt()
    weight = backbone.head_weight()
    gram = (weight.T @ weight).double()
    # Right singular vectors of W L are the eigenvectors of Lᵀ Wᵀ W L.
    _, order = torch.linalg.eigh((vectors * root).T @ gram @ (vectors * root))
    best = order[:, -dims:]
    return (best.T @ (vectors / root).T).float(), ((vectors * root) @ best).float()


def frequent(sequences: list[Sequence], count: int, vocabulary: int) -> Tensor:
    """The `count` tokens that the model deems most probable most often, rising."""
    mass = torch.zeros(vocabulary)
    for sequence in sequences:
        ids, logp = sequence.top_ids[sequence.counted], sequence.top_logp[sequence.counted]
        mass.index_add_(0, ids.flatten().long(), logp.float().exp().flatten())
    return mass.topk(count).indices.sort().values


@torch.inference_mode()
def scores(exits: Exits, labelled: list[Labelled]) -> list[tuple[Tensor, Tensor]]:
    """For each exit: its gate's confidence and whether its read-out agrees, over all counted positions, both (n,)."""
    out = []
    for index, exit in enumerate(exits):
        confidence = [exit.gate(s.hidden[None, :, index].float())[0][0].sigmoid()[s.counted] for s in labelled]
        out.append((torch.cat(confidence), torch.cat([s.agrees[s.counted, index] for s in labelled])))
    return out


def validate(exits: Exits, labelled: list[Labelled]) -> list[dict[str, Any]]:
    """For each exit, on held-out text: agreement with the oracle's top k, and its gate's area under the ROC curve."""
    return [
        {
            "block": exit.block,
            "agreement": round(float(agrees.float().mean()), 4),
            "gate_auroc": round(auroc(confidence, agrees), 4),
        }
        for exit, (confidence, agrees) in zip(exits, scores(exits, labelled), strict=True)
    ]


def _threshold(confidence: Tensor, agrees: Tensor, precision: float, least: int = 50) -> float:
    """The lowest threshold of four decimals above which the read-out agreed with the oracle at least this often.

    Only thresholds that at least `least` held-out tokens pass are trusted; 1 if there is none.
    """
    ordered, index = confidence.double().sort()
    thresholds = torch.arange(10_000, dtype=torch.float64) / 10_000
    first = torch.searchsorted(ordered, thresholds, right=True)  # tokens from here on pass
    passed = len(ordered) - first
    right = F.pad(agrees[index].flip(0).long().cumsum(0), (1, 0))[passed]
    good = thresholds[(passed >= least) & (right >= precision * passed)]
    return float(good[0]) if len(good) else 1.0


def _corpus(backbone: Backbone, config: TrainConfig) -> tuple[list[list[int]], list[list[int]], list[dict[str, Any]]]:
    """Prompts and texts as token ids, and a record of the files they came from."""
    source = config.prompts or PROMPTS
    lines = read_lines(source, ("prompt", "question"))[: config.max_prompts]
    record = [{"prompts": Path(source).name, "lines": len(lines), "sha256": _digest(Path(source))}]
    texts: list[list[int]] = []
    for path in config.texts:
        pieces = read_texts(path, backbone)
        record.append({"text": Path(path).name, "pieces": len(pieces), "sha256": _digest(Path(path))})
        texts += pieces
    return [backbone.prompts.encode(line) for line in lines], texts, record


def _claim(work: Path, backbone: Backbone, config: dict[str, Any], corpus: list[dict[str, Any]]) -> None:
    """Note in the work folder what is trained there, or check that it is the same as last time."""
    mine = json.dumps(
        {"weights": backbone.source.sha256, "dtype": backbone.weight_format, "config": config, "text": corpus}
    )
    note = work / "plan.json"
    if not note.exists():
        write_atomically(note, mine.encode())
    elif note.read_text() != mine:
        raise BadInput(
            f"{work} holds an unfinished training with other settings.",
            "Run it again with its own settings to finish it, or delete that folder to start anew.",
        )


def padded(parts: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(parts, batch_first=True)


def step_generator(seed: int, step: int, stage: str = "") -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _version() -> str:
    from offramp import __version__

    return __version__
