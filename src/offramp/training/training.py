"""Train exits for a frozen backbone, from the backbone's own outputs (DYNAMAX, arXiv 2504.20922).

1. Teacher: the model answers prompts; hidden states at the exits and the final distribution are written to shards.
2. Adapters: each read-out is distilled towards the final distribution: cross-entropy with the teacher's most probable
   tokens. The softmax is over these tokens of the whole batch and a new random sample of the others. Each of the others is
   weighted by the inverse of its chance to be drawn, which estimates the full softmax at a fraction of the LM head's cost.
   Every second step, a `deep` read-out also learns from its own guess at the top state of the token before, as in a run of
   drafts.
3. Gates: binary cross-entropy on "the read-out's top token is among the oracle's top k".

Losses are summed over exits with weights that decay linearly with the exit's position (the paper). A text serves adapters,
gates or validation, never two of them: a gate must learn how the read-out does on text it was not fitted to.

Texts are read from disk when a step needs them, so memory does not grow with the text. Everything random is a function of
the seed and the step, so a run that was interrupted and resumed ends like one that was not.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp import __version__
from offramp.exits.exits import Exit, Exits, ExitsConfig, suggested_layers
from offramp.exits.parts import Standardise
from offramp.exits.policy import Policy
from offramp.files import write_atomically
from offramp.model.backbone import Backbone
from offramp.progress import Progress, silent
from offramp.training.config import TrainConfig
from offramp.training.data import Data, gather
from offramp.training.loop import Fit, Loss, accelerator_for, step_generator
from offramp.training.teacher import TeacherText
from offramp.training.validation import LabelledTexts, lowest_threshold, quality, scores

SKETCH_DIMS, CANDIDATES = 128, 2048  # all but 1 in 900 of SmolLM2's own tokens are among the candidates


def train(
    backbone: Backbone,
    folder: str | Path,
    config: TrainConfig | None = None,
    progress: Progress = silent,
    command: str = "",
) -> Exits:
    """Train exits and save them in `folder`; its subfolder `.training` holds unfinished work.

    Called again with the same config after an interruption, it resumes the work, and the result is the same. `command` is
    kept in the record. Raises `BadInput` for unusable files or settings, `CorruptFile` for damaged work files.
    """
    config = config or TrainConfig()
    folder, work = Path(folder), Path(folder) / ".training"
    accelerator = accelerator_for(backbone.device)
    progress = progress if accelerator.is_main_process else silent
    torch.manual_seed(config.seed)
    exits = _untrained(backbone, config)
    layers, reads_top = exits.config.layers, any(exit.adapter.reads_top for exit in exits)
    with _Clock(work / "seconds") as clock:
        all_layers = (*layers, backbone.n_blocks) if exits.config.sketch or reads_top else layers
        data = gather(backbone, config, all_layers, work, progress)
        if exits.config.shortlist:
            exits.shortlist = frequent_tokens(data.adapters, exits.config.shortlist, backbone.vocab_size)
        if exits.config.sketch:
            exits.sketch = sketch_of(backbone, data.adapters, exits.config.sketch)
        trainer = Trainer(backbone, exits, config, work, progress)
        trainer.standardise(data.adapters)
        if config.readout != "none":
            trainer.fit_adapters(data.adapters)
        labelled = trainer.labels(data.gates + data.held)
        trainer.fit_gates(labelled[: len(data.gates)])

    exits.modules.eval().requires_grad_(False)
    scored = scores(exits, labelled[len(data.gates) :])
    exits.policy = _default_policy(exits, config, scored, backbone.n_blocks)
    exits.training = {
        "command": command,
        "config": {**asdict(config), "layers": list(layers), "prompts": None, "texts": []},
        "text": data.files,
        "tokens": _counted_tokens(data),
        "seconds": round(clock.seconds, 1),
        "versions": {"torch": torch.__version__, "offramp": __version__},
        "validation": quality(exits, scored),
        "curve": trainer.fit.curve,
    }
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        exits.save(folder)
        shutil.rmtree(work)
    accelerator.wait_for_everyone()
    return Exits.load(folder, backbone)


def _untrained(backbone: Backbone, config: TrainConfig) -> Exits:
    """New exits of the shape that the config describes."""
    layers = config.layers or suggested_layers(backbone.n_blocks)
    shortlist = config.shortlist if config.shortlist < backbone.vocab_size else 0
    # With few tokens or dims, a sketch would cost as much as the head.
    large = backbone.vocab_size >= 8 * CANDIDATES and backbone.hidden_size >= 4 * SKETCH_DIMS
    sketch = (SKETCH_DIMS if large else 0) if config.sketch is None else config.sketch
    widths = config.gate_width, config.readout_width
    return Exits.new(backbone, ExitsConfig(tuple(layers), config.gate, config.readout, *widths, shortlist, sketch))


def _default_policy(exits: Exits, config: TrainConfig, scored: list[tuple[Tensor, Tensor]], n_blocks: int) -> Policy:
    """The config's threshold, or for each exit the lowest that reaches the config's precision on held-out text.

    An exit that skips many blocks leaves approximate states in them, and that alone can change the rest of an answer, even
    if the token was right. So exits before `open_from` stay closed. This is a guess that calibration should replace.
    """
    thresholds = []
    for exit, (confidence, agrees) in zip(exits, scored, strict=True):
        if config.threshold is not None:
            thresholds.append(config.threshold)
        elif exit.block >= config.open_from * n_blocks:
            thresholds.append(lowest_threshold(confidence, agrees, config.precision))
        else:
            thresholds.append(1.0)
    return Policy(tuple(thresholds), config.confidence, candidates=CANDIDATES if exits.config.sketch else 0)


def _counted_tokens(data: Data) -> dict[str, int]:
    parts = {"adapters": data.adapters, "gates": data.gates, "validation": data.held}
    return {name: sum(int(text.counted.sum()) for text in texts) for name, texts in parts.items()}


class _Clock:
    """Measures the seconds of work, including those of earlier interrupted runs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds = float(path.read_text() or 0) if path.exists() else 0.0

    def __enter__(self) -> _Clock:
        self._started = time.time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.time() - self._started
        if self._path.parent.is_dir():  # it is missing if the work never began
            write_atomically(self._path, str(self.seconds).encode())


class Trainer:
    """Fits the parts of `exits`; checkpoints go to the folder `work`."""

    def __init__(
        self, backbone: Backbone, exits: Exits, config: TrainConfig, work: Path, progress: Progress = silent
    ) -> None:
        self.backbone, self.exits, self.config = backbone, exits, config
        self.progress, self.device = progress, backbone.device
        self.fit = Fit(work, backbone.device, config.seed, config.batch, progress)
        exits.modules.to(backbone.device)
        count = len(exits)
        # Decays linearly with the exit's position (the paper); the sum is 1.
        self.weights = [2 * (count - index) / (count * (count + 1)) for index in range(count)]

    @torch.no_grad()
    def standardise(self, texts: Sequence[TeacherText], parts: str = "", most: int = 20_000) -> None:
        """Give all parts of the exits the mean and spread of their hidden states over about `most` tokens.

        With `parts` = "gate", only the gates get them.
        """
        enough, tokens = 0, 0
        while enough < len(texts) and tokens < most:
            tokens += int(texts[enough].counted.sum())
            enough += 1
        for index, exit in enumerate(self.exits):
            hidden = torch.cat([text.hidden[text.counted, index] for text in texts[:enough]]).float()
            for part in exit.get_submodule(parts).modules():
                if isinstance(part, Standardise):
                    part.fit(hidden)

    def fit_adapters(self, texts: Sequence[TeacherText]) -> None:
        """Train the read-outs towards the teacher's final distributions (step 2 above)."""

        def loss_of(batch: list[int], step: int) -> Loss:
            return self._weighted(self._adapter_losses([texts[index] for index in batch], step))

        adapters = nn.ModuleList(exit.adapter for exit in self.exits)
        self.fit.run("adapters", adapters, texts, self.config.epochs, self.config.learning_rate, loss_of)

    def fit_gates(self, labelled: LabelledTexts) -> None:
        """Train the gates to tell where their read-outs agree with the oracle (step 3 above)."""

        def loss_of(batch: list[int], step: int) -> Loss:
            agrees = torch.cat([labelled.agrees[index] for index in batch])
            return self._weighted(self._gate_losses([labelled.texts[index] for index in batch], agrees))

        gates = nn.ModuleList(exit.gate for exit in self.exits)
        self.fit.run("gates", gates, labelled, self.config.gate_epochs, self.config.gate_learning_rate, loss_of)

    def _weighted(self, losses: list[Tensor]) -> Loss:
        return torch.stack([weight * loss for weight, loss in zip(self.weights, losses, strict=True)]).sum(), losses

    def _adapter_losses(self, texts: list[TeacherText], step: int) -> list[Tensor]:
        """For each exit, the cross-entropy of its read-out with the teacher, in nats a token."""
        hidden = pad_batch([text.hidden for text in texts]).to(self.device).float()
        counted = pad_batch([text.counted for text in texts])
        teacher = pad_batch([text.top_ids for text in texts])[counted].long()  # (n, K)
        targets = pad_batch([text.top_logp for text in texts])[counted].float().softmax(-1)
        if self.exits.shortlist is None:
            generator = step_generator(self.config.seed, step, "vocabulary")
            rows, offset = sampled_vocabulary(teacher, self.backbone.vocab_size, generator)
        else:
            rows, offset = self.exits.shortlist, torch.zeros(len(self.exits.shortlist))
        columns = torch.searchsorted(rows, teacher).clamp(max=len(rows) - 1)
        targets = targets * (rows[columns] == teacher)  # tokens outside the short list count for nothing
        counted, targets, columns, rows, offset = (
            tensor.to(self.device) for tensor in (counted, targets, columns, rows, offset)
        )

        def cross_entropy(adapted: Tensor) -> Tensor:
            logits = self.backbone.logits(adapted[counted].to(self.backbone.dtype), rows) + offset
            return -(targets * logits.log_softmax(-1).gather(-1, columns)).sum(-1).mean()

        losses = []
        for index, exit in enumerate(self.exits):
            adapted, _ = exit.adapter(readout_input(exit, hidden, index))
            loss = cross_entropy(adapted)
            if exit.adapter.reads_top and step % 2:
                redrafted, _ = exit.adapter(readout_input(exit, hidden, index, top=adapted.detach()))
                loss = (loss + cross_entropy(redrafted)) / 2
            losses.append(loss)
        return losses

    def _gate_losses(self, texts: list[TeacherText], agrees: Tensor) -> list[Tensor]:
        """For each exit, the binary cross-entropy of its gate with `agrees` (n, J) at the texts' counted positions."""
        hidden = pad_batch([text.hidden for text in texts]).to(self.device).float()
        counted = pad_batch([text.counted for text in texts]).to(self.device)
        targets = agrees.to(self.device).float()
        losses = []
        for index, exit in enumerate(self.exits):
            score, _ = exit.gate(hidden[:, :, index])
            losses.append(F.binary_cross_entropy_with_logits(score[counted], targets[:, index]))
        return losses

    @torch.inference_mode()
    def labels(self, texts: Sequence[TeacherText]) -> LabelledTexts:
        """Read out every text at every exit, over all tokens or the short list, and compare with the oracle's top k."""
        labels = []
        rows = self.exits.shortlist
        head = self.backbone.logits if rows is None else self.backbone.head_of(rows)
        for number, text in enumerate(texts):
            hidden, counted = text.hidden[None].to(self.device).float(), text.counted
            oracle = text.top_ids[counted][:, : self.config.top_k]
            agrees = torch.zeros(len(oracle), len(self.exits), dtype=torch.bool)
            for index, exit in enumerate(self.exits):
                adapted, _ = exit.adapter(readout_input(exit, hidden, index))
                best = head(adapted[0, counted.to(self.device)].to(self.backbone.dtype)).argmax(-1).cpu()
                best = best if rows is None else rows[best]
                agrees[:, index] = (oracle == best[:, None]).any(-1)
            labels.append(agrees)
            self.progress("labels", number + 1, len(texts))
        return LabelledTexts(texts, labels)


def sampled_vocabulary(
    teacher: Tensor, vocabulary: int, generator: torch.Generator, sample: int = 6144
) -> tuple[Tensor, Tensor]:
    """The tokens of one step's softmax, rising, and what to add to their logits, both (n,).

    They are the teacher's tokens (n, K), each once, and a random sample of `sample` others.
    """
    taught = teacher.unique()
    is_other = torch.ones(vocabulary, dtype=torch.bool)
    is_other[taught] = False
    rest = is_other.nonzero().squeeze(1)
    if len(rest) <= sample:
        return torch.arange(vocabulary), torch.zeros(vocabulary)
    drawn = rest[torch.randperm(len(rest), generator=generator)[:sample]]
    offset = torch.zeros(vocabulary)
    offset[drawn] = float(torch.tensor(len(rest) / sample).log())
    rows = torch.cat([taught, drawn]).sort().values
    return rows, offset[rows]


def readout_input(exit: Exit, hidden: Tensor, index: int, top: Tensor | None = None) -> Tensor:
    """What the read-out of an exit reads: hidden (B, T, J, D) → (B, T, D), or (B, T, 2 D) if it reads the top.

    Such a read-out also gets the top state of the token before: from the last of the J, or from `top` (B, T, D) if given.
    """
    h = hidden[:, :, index]
    if not exit.adapter.reads_top:
        return h
    top = hidden[:, :, -1] if top is None else top
    return torch.cat([h, F.pad(top[:, :-1], (0, 0, 1, 0))], dim=-1)


@torch.inference_mode()
def sketch_of(backbone: Backbone, texts: Sequence[TeacherText], dims: int) -> tuple[Tensor, Tensor]:
    """Maps reduce (k, D) and expand (D, k) that change the head's logits least on hidden states like these; k is `dims`.

    The last of the texts' hidden states must be those at the top. Let W be the head's matrix and C the second moments of
    its inputs. The best map of rank k is L Q Qᵀ L⁻¹, where C = L Lᵀ and Q has the right singular vectors of W L with the k
    largest singular values (SVD-softmax, Shim et al. 2017, which takes C for the identity).
    """
    weight = backbone.head_weight()
    moments, tokens = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device), 0
    for text in texts:
        h = backbone.final(text.hidden[text.counted, -1].float().to(backbone.device)).double()
        moments += h.T @ h
        tokens += len(h)
    moments /= tokens
    values, vectors = torch.linalg.eigh(moments + 1e-6 * moments.diagonal().mean() * torch.eye(len(moments)).to(moments))
    root = values.clamp(min=1e-12).sqrt()
    gram = (weight.T @ weight).double()
    # Right singular vectors of W L are the eigenvectors of Lᵀ Wᵀ W L.
    _, order = torch.linalg.eigh((vectors * root).T @ gram @ (vectors * root))
    best = order[:, -dims:]
    return (best.T @ (vectors / root).T).float().cpu(), ((vectors * root) @ best).float().cpu()


def frequent_tokens(texts: Sequence[TeacherText], count: int, vocabulary: int) -> Tensor:
    """The `count` tokens with the most teacher probability over all counted positions, in rising order."""
    mass = torch.zeros(vocabulary)
    for text in texts:
        ids, logp = text.top_ids[text.counted], text.top_logp[text.counted]
        mass.index_add_(0, ids.flatten().long(), logp.float().exp().flatten())
    return mass.topk(count).indices.sort().values


def pad_batch(tensors: list[Tensor]) -> Tensor:
    """Tensors (T, …) of different lengths T → one batch (B, longest T, …), with zeros at the ends."""
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True)
