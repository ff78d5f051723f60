"""Fits the parts of exits to texts: adapters by distillation, gates by whether the read-outs are right.

Adapters: cross-entropy with the teacher's most probable tokens, or for drafts −log of the probability of all that will do
(`distillation`). Exits with tails share each pass through the model's last blocks: a random share of a text's tokens jump,
each at one of the exits, and the others stay exact. A `deep` read-out learns every token as the first, second and third
draft of a run (`drafting`).

Gates: binary cross-entropy on whether the token could leave (`gate_targets`).

Losses are summed over exits with weights that decay linearly with the exit's position (DYNAMAX, arXiv 2504.20922).
Everything random is a function of the seed and the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence, Sized
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from offramp.exits.exits import Exit, Exits
from offramp.exits.ngrams import LONGEST_CONTEXT, Ngrams
from offramp.exits.parts import Standardise
from offramp.exits.policy import max_prob
from offramp.exits.readouts import DeepAdapter
from offramp.model.backbone import Backbone
from offramp.model.compiled.weights import multiplies_bfloat16
from offramp.model.runtime import Runtime
from offramp.progress import Progress, silent
from offramp.training import drafting
from offramp.training.config import TrainConfig
from offramp.training.distillation import Distillation, pad_batch
from offramp.training.harm import harms
from offramp.training.loop import Budget, Fit, Loss, step_generator
from offramp.training.tails import LEAST_SHARE, Jumped, drawn_exits, first_tail, through_tails
from offramp.training.teacher import TeacherText, lengths_of
from offramp.training.validation import LabelledTexts, Labels, lowest

EPOCHS = 4  # passes over the text, if neither a number nor a time is given
SURE = 0.97  # the precision of the second key whose answer the gate learns to foresee
LIKELY = 0.8  # harm is measured if the read-out's confidence is above this: no good rule lets other tokens leave
MISSED = 0.1  # if so many later tokens change, the gate's target is 1/e
MEASURED = 4  # tokens of a text whose harm is measured at each exit: many texts say more than many tokens of a text
LABELLED = 1 / 3  # share of a text's tokens that jump when exits are judged: about as many as leave in decoding


def needed_layers(exits: Exits) -> tuple[int, ...]:
    """The blocks after which training needs the hidden states, as rising numbers of blocks."""
    n_blocks = exits.owner.blocks
    needed = {exit.block for exit in exits} | {n_blocks - exit.tail for exit in exits if exit.tail}
    if exits.config.sketch or any(exit.adapter.reads for exit in exits):
        needed.add(n_blocks)
    if exits.config.middle:
        needed.add(exits.config.middle)
    return tuple(sorted(needed))


class Trainer:
    """Fits the parts of `exits` to texts; checkpoints go to the folder `work`.

    The texts' hidden states are those after the blocks `layers`, by default those of `needed_layers`.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: Exits,
        config: TrainConfig,
        work: Path,
        progress: Progress = silent,
        layers: tuple[int, ...] | None = None,
    ) -> None:
        self.backbone, self.exits, self.config = backbone, exits, config
        self.progress, self.device = progress, backbone.device
        bfloat16 = backbone.precision != "float32" and multiplies_bfloat16(backbone.device)
        self.fit = Fit(work, backbone.device, config.seed, config.batch, progress, bfloat16)
        self.place = {block: index for index, block in enumerate(layers or needed_layers(exits))}
        self.tails = [exit for exit in exits if exit.tail and not exit.adapter.reads]
        self.start = first_tail(exits, backbone.n_blocks)
        exits.modules.to(backbone.device)
        count = len(exits)
        # Decays linearly with the exit's position (the paper); the sum is 1.
        self.weights = [2 * (count - index) / (count * (count + 1)) for index in range(count)]

    @torch.no_grad()
    def standardise(self, texts: Sequence[TeacherText], parts: str = "", most: int = 20_000) -> None:
        """Give all parts of the exits the mean and spread of their hidden states over about `most` tokens.

        Jumps and drafts start from the linear map that fits these tokens best. With `parts` = "gate", only gates change.
        """
        enough, tokens = 0, 0
        while enough < len(texts) and tokens < most:
            tokens += int(texts[enough].counted.sum())
            enough += 1
        for exit in self.exits:
            hidden = self._counted(texts[:enough], exit.block)
            for part in exit.get_submodule(parts).modules():
                if isinstance(part, Standardise):
                    part.fit(hidden)
            jump, depth = getattr(exit.adapter, "jump", None), self.backbone.n_blocks
            if isinstance(exit.adapter, DeepAdapter) and not parts:
                target = self._counted(texts[:enough], depth - exit.tail)
                blocks = [depth, self.exits.config.middle][: exit.adapter.reads]
                deep = torch.cat([self._counted(texts[:enough], block, before=1) for block in blocks], dim=1)
                exit.adapter.fit(hidden, deep, target)
            elif jump is not None and not parts:
                jump.fit(hidden, exit.adapter.norm(hidden), self._counted(texts[:enough], depth - exit.tail))

    def _counted(self, texts: Sequence[TeacherText], block: int, before: int = 0) -> Tensor:
        """The hidden states (n, D) after a block, at all counted positions of the texts, or so many tokens `before`."""
        states = (F.pad(text.hidden[:, self.place[block]], (0, 0, before, 0))[: len(text.ids)] for text in texts)
        return torch.cat([h[text.counted] for h, text in zip(states, texts, strict=True)]).float().to(self.device)

    def fit_adapters(self, texts: Sequence[TeacherText], hours: float | None = None) -> None:
        """Train the read-outs towards the teacher's final distributions, for the config's epochs or so many `hours`."""
        runtime = self.backbone.trainable_from(self.start)

        def loss_of(batch: list[int], step: int) -> Loss:
            return self._weighted(self._adapter_losses([texts[index] for index in batch], step, runtime))

        adapters = nn.ModuleList(exit.adapter for exit in self.exits)
        budget = self._budget(texts, self.config.epochs, hours)
        # On a CPU, attention as plain products trains faster than torch's fused kernel.
        with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext():
            self.fit.run("adapters", adapters, texts, budget, self.config.learning_rate, loss_of, lengths_of(texts))

    def fit_gates(self, labelled: LabelledTexts, hours: float | None = None) -> None:
        """Train the gates to foresee the target `config.gate_target`, for as long as `fit_adapters`."""
        targets, weights = gate_targets(labelled, self.config.gate_target)

        def loss_of(batch: list[int], step: int) -> Loss:
            wanted = torch.cat([targets[index] for index in batch])
            return self._weighted(self._gate_losses([labelled.texts[index] for index in batch], wanted, weights))

        gates = nn.ModuleList(exit.gate for exit in self.exits)
        budget = self._budget(labelled, self.config.gate_epochs, hours)
        lengths = lengths_of(labelled.texts)
        self.fit.run("gates", gates, labelled, budget, self.config.gate_learning_rate, loss_of, lengths)

    def _budget(self, texts: Sized, epochs: int | None, hours: float | None) -> Budget:
        return Budget(hours=hours) if hours else Budget(self.fit.steps_of(texts, EPOCHS if epochs is None else epochs))

    def _weighted(self, losses: list[Tensor]) -> Loss:
        return torch.stack([weight * loss for weight, loss in zip(self.weights, losses, strict=True)]).sum(), losses

    def _adapter_losses(self, texts: list[TeacherText], step: int, runtime: Runtime) -> list[Tensor]:
        """For each exit, the loss of its read-out, in nats a token."""
        hidden = self._padded([text.hidden for text in texts]).float()
        counted = self._padded([text.counted for text in texts])
        score = self._scorer(texts, step)
        tops: dict[Exit, tuple[Tensor, Tensor]] = {}
        if self.tails:
            generator = step_generator(self.config.seed, step, "exits of the tokens")
            share = LEAST_SHARE + (1 - LEAST_SHARE) * torch.rand(len(texts), 1, generator=generator)
            chosen = drawn_exits(counted.cpu(), len(self.tails), share, generator).to(self.device)
            tops = self._jump(hidden, chosen, runtime)
        losses = []
        for exit in self.exits:
            if exit in tops:
                where, top = tops[exit]
                losses.append(score(top[where], where[counted]))
                continue
            drafts = self._read_out(exit, hidden, runtime)
            weights = drafting.WEIGHTS[: len(drafts)]
            each = [weight * score(top[counted]) for weight, top in zip(weights, drafts, strict=True)]
            losses.append(torch.stack(each).sum() / sum(weights))
        return losses

    def _read_out(self, exit: Exit, hidden: Tensor, runtime: Runtime, length: int = drafting.LENGTH) -> list[Tensor]:
        """An exit's output for every token of hidden (B, T, J, D), before the final norm: (B, T, D).

        A read-out that reads the top has several outputs: one for each draft of a run of this length. Other exits here have
        no tail.
        """
        if exit.adapter.reads:
            states = {block: hidden[:, :, place] for block, place in self.place.items()}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.fit.bfloat16):  # as in training
                return drafting.runs(self.backbone, runtime, exit, self.exits.config.middle, states, length)
        return [exit.adapter(hidden[:, :, self.place[exit.block]])[0]]

    def _reading_runtime(self) -> Runtime:
        """The runtime for tails in `_read_out` if nothing is trained. Only exits that draft need the library's blocks."""
        drafts = any(exit.adapter.reads and exit.tail for exit in self.exits)
        return self.backbone.trainable_from(self.start) if drafts else self.backbone.runtime

    def _scorer(self, texts: list[TeacherText], step: int) -> Callable[..., Tensor]:
        """A function that computes the mean loss (`Distillation`) from states (n, D) before the final norm.

        The states are at all counted positions, or at those where its second argument is true.
        """
        generator = step_generator(self.config.seed, step, "vocabulary")
        near = drafting.NEAR if self.exits.drafts else 0.0
        wanted = Distillation.of(texts, self.backbone.vocab_size, generator, self.device, self.exits.shortlist, near)

        def score(h: Tensor, which: Tensor | slice = slice(None)) -> Tensor:
            return wanted.loss(self.backbone.logits(h.to(self.backbone.dtype), wanted.rows), which)

        return score

    def _jump(self, hidden: Tensor, chosen: Tensor, runtime: Runtime) -> dict[Exit, tuple[Tensor, Tensor]]:
        """Let tokens jump at the exits with tails: `chosen` (B, T) is the index of each one's exit, −1 for none.

        Returns the places of each exit's tokens, (B, T), and the states at the top, (B, T, D), which all exits share.
        """
        jumps = []
        for index, exit in enumerate(self.tails):
            where = chosen == index
            x = hidden[:, :, self.place[exit.block]]
            # A part without a memory does not need the tokens that do not jump.
            adapted = exit.adapter(x)[0][where] if exit.adapter.recurrent else exit.adapter(x[where][None])[0][0]
            jumps.append(Jumped(exit, where, adapted))
        top = through_tails(self.backbone, runtime, hidden[:, :, self.place[self.start]], jumps)
        return {jump.exit: (jump.where, top) for jump in jumps}

    def _padded(self, tensors: list[Tensor]) -> Tensor:
        return pad_batch(tensors).to(self.device)

    def _gate_losses(self, texts: list[TeacherText], wanted: Tensor, weights: Tensor) -> list[Tensor]:
        """For each exit, the binary cross-entropy of its gate with `wanted` (n, J) at the texts' counted positions.

        −1 means that it is unknown; such positions are left out. Those above 0 count by `weights` (J,).
        """
        hidden = self._padded([text.hidden for text in texts]).float()
        counted = self._padded([text.counted for text in texts])
        wanted = wanted.to(self.device)
        losses = []
        for index, exit in enumerate(self.exits):
            score, _ = exit.gate(hidden[:, :, self.place[exit.block]])
            known = wanted[:, index] >= 0
            target = wanted[known, index].float()
            weight = torch.where(target > 0, float(weights[index]), 1.0)
            loss = F.binary_cross_entropy_with_logits(score[counted][known], target, weight, reduction="sum")
            losses.append(loss / weight.sum().clamp(min=1))
        return losses

    @torch.inference_mode()
    def labels(self, texts: Sequence[TeacherText], rounds: int = 2) -> LabelledTexts:
        """Read out the texts at every exit, over all tokens or the short list, and compare with the oracle's top k.

        Exits without a tail read out every position. In each of the `rounds`, the share `LABELLED` of the tokens jumps,
        each at one of the other exits. A token's label stays unknown at exits where it did not jump.
        """
        labelled: list[Labels] = []
        runtime = self._reading_runtime()
        for first in range(0, len(texts), self.config.batch):
            batch = [texts[index] for index in range(first, min(first + self.config.batch, len(texts)))]
            hidden = self._padded([text.hidden for text in batch]).float()
            counted = self._padded([text.counted for text in batch])
            labels = Labels.unknown(torch.cat([text.top_ids[text.counted] for text in batch]), len(self.exits))
            for index, exit in enumerate(self.exits):
                if exit not in self.tails:
                    adapted = self._read_out(exit, hidden, runtime, length=1)[0]
                    self._label(labels, index, adapted[counted], torch.ones(len(labels.oracle), dtype=torch.bool))
            for number in range(rounds if self.tails else 0):
                generator = step_generator(self.config.seed, first, f"labels {number}")
                chosen = drawn_exits(counted.cpu(), len(self.tails), LABELLED, generator).to(self.device)
                tops = self._jump(hidden, chosen, self.backbone.runtime)
                for index, exit in enumerate(self.exits):
                    if exit in tops:
                        where, top = tops[exit]
                        self._label(labels, index, top[where], where[counted].cpu())
            labelled += labels.split([int(text.counted.sum()) for text in batch])
            self.progress("labels", first + len(batch), len(texts))
        return LabelledTexts(texts, labelled, self.place)

    @torch.inference_mode()
    def acceptance(self, texts: Sequence[TeacherText]) -> list[dict[str, list[float]]]:
        """The shares of right ones among each exit's first, second, … drafts whose earlier drafts are right.

        EAGLE (arXiv 2401.15077) calls them 1-α, 2-α, … `acceptance` are those of the exit alone, and `with_table` those if
        the table of n-grams makes a draft where it is more sure than the exit is right. An exit that does not draft has
        none.
        """
        found: list[dict[str, list[float]]] = [{} for _ in self.exits]
        drafters = [(index, exit) for index, exit in enumerate(self.exits) if exit.adapter.reads]
        for index, exit in drafters:
            runs = [
                self._drafts_of(exit, texts[first : first + self.config.batch])
                for first in range(0, len(texts), self.config.batch)
            ]
            known = [table_guesses(self.exits.ngrams, text.ids) for text in texts]
            for number in range(drafting.LENGTH):
                drafts = [draft for run in runs for draft in run[number]]
                own = torch.cat([right for right, _ in drafts]).float().mean().nan_to_num()
                together = [
                    torch.where(chance[where] > own, guess[where] == text.top_ids[where, 0], right)
                    for text, (guess, chance), (right, where) in zip(texts, known, drafts, strict=True)
                ]
                found[index].setdefault("acceptance", []).append(float(own))
                if self.exits.ngrams is not None:
                    share = torch.cat(together).float().mean().nan_to_num()
                    found[index].setdefault("with_table", []).append(float(share))
        return found

    def _drafts_of(self, exit: Exit, texts: Sequence[TeacherText]) -> list[list[tuple[Tensor, Tensor]]]:
        """For each place in a run, and each text: whether the exit's drafts are right, and where they are (T,)."""
        runtime, rows = self._reading_runtime(), self.exits.shortlist
        head = self.backbone.logits if rows is None else self.backbone.head_of(rows)
        hidden = self._padded([text.hidden for text in texts]).float()
        oracle = pad_batch([text.top_ids[:, 0] for text in texts])
        within = where = pad_batch([text.counted for text in texts])
        made = []
        for top in self._read_out(exit, hidden, runtime):
            best = head(top[where].to(self.backbone.dtype)).argmax(-1).cpu()
            right = torch.zeros_like(where)
            right[where] = (best if rows is None else rows[best]) == oracle[where]
            cut = [mask[: len(text.ids)] for mask, text in zip(where, texts, strict=True)]
            made.append([(row[: len(mask)][mask], mask) for row, mask in zip(right, cut, strict=True)])
            where = within & F.pad(where[:, :-1], (1, 0))
        return made

    @torch.inference_mode()
    def measure_harm(self, labelled: LabelledTexts, hours: float | None = None, most: int = MEASURED) -> None:
        """Measure the harm of leaving at each exit for some tokens of each text, in at most so many `hours`.

        The tokens are drawn at random, until `most` of them may leave. If the read-out is not sure of a token (`LIKELY`),
        its harm is set to one token. A wrong token has no harm, since it counts as wrong already.
        """
        until = time.monotonic() + 3600 * (math.inf if hours is None else hours)
        for number, (text, labels) in enumerate(zip(labelled.texts, labelled.labels, strict=True)):
            if time.monotonic() > until:
                return
            positions = text.counted.nonzero()[:, 0]
            order = torch.randperm(len(positions), generator=step_generator(self.config.seed, number, "harm"))
            for index, exit in enumerate(self.exits):
                if exit.adapter.reads:  # it drafts, and full depth decides
                    continue
                likely, place = labels.top_prob[:, index] > LIKELY, self.place[exit.block]
                drawn = order[likely[order].cumsum(0) <= most]
                labels.harm[drawn, index] = (~likely[drawn]).float()
                right, last = labels.agrees[drawn, index] == 1, positions[drawn] == len(text.ids) - 1
                measured = drawn[likely[drawn] & right & ~last]
                if len(measured):
                    adapted, _ = exit.adapter(text.hidden[None, :, place].float().to(self.device))
                    chosen = positions[measured].tolist()
                    labels.harm[measured, index] = harms(self.backbone, exit, text, place, adapted, chosen)
            self.progress("harm", number + 1, len(labelled))

    def _label(self, labels: Labels, index: int, h: Tensor, which: Tensor) -> None:
        """Fill in the labels of exit `index` at the positions `which` (n,), from states h before the final norm."""
        rows = self.exits.shortlist
        head = self.backbone.logits if rows is None else self.backbone.head_of(rows)
        for part, place in zip(h.split(256), which.nonzero()[:, 0].split(256), strict=True):
            logits = head(part.to(self.backbone.dtype))
            best = logits.argmax(-1).cpu()
            best = best if rows is None else rows[best]
            agrees = (labels.oracle[place, : self.config.top_k] == best[:, None]).any(-1)
            labels.agrees[place, index] = agrees.to(torch.int8)
            labels.top_prob[place, index] = max_prob(logits).cpu()


def table_guesses(table: Ngrams | None, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that a table of n-grams expects after each of the ids (T,), −1 for none, and their chances (T,)."""
    known = ids.tolist()
    ends = range(1, len(known) + 1)
    found = [(table and table.after(known[max(0, end - LONGEST_CONTEXT) : end])) or (-1, 0.0) for end in ends]
    return torch.tensor([guess for guess, _ in found]), torch.tensor([chance for _, chance in found])


def gate_targets(labelled: LabelledTexts, target: str) -> tuple[list[Tensor], Tensor]:
    """The gates' targets for each text, (n, J): from 0 to 1, or −1 if unknown; and the weights of those above 0, (J,).

    With the target `agreement`: whether the read-out agrees with the oracle (the paper's). With `key`: whether the
    read-out's own confidence lets the token leave, at a precision of `SURE`. Few tokens are both right and known to be
    right. A gate that foresees these wastes fewer read-outs than one that foresees agreement. If no threshold reaches that
    precision, agreement is the target. With `harmless`: the target of `key`, times exp(−harm / `MISSED`). A token that may
    not leave needs no harm for it. Of those that may, only the measured ones count, and each stands for several. Where none
    was measured at an exit, the target is that of `key`.
    """
    labels = labelled.together()
    if labels.harm.isnan().all():
        target = "key" if target == "harmless" else target
    targets, weights = labels.agrees.float(), torch.ones(labels.agrees.shape[1])
    for index in range(targets.shape[1] if target != "agreement" else 0):
        known, key = targets[:, index] >= 0, labels.top_prob[:, index]
        threshold, leaving = lowest(key[known], targets[known, index], SURE)
        if leaving:
            targets[known, index] = (key[known] > threshold).to(targets.dtype)
        if target == "harmless":
            harm, leaves = labels.harm[:, index], targets[:, index] > 0
            measured = leaves & ~harm.isnan()
            if not measured.any():
                continue
            targets[measured, index] *= torch.exp(-harm[measured] / MISSED)
            targets[leaves & ~measured, index] = -1
            weights[index] = leaves.sum() / measured.sum()
    return list(targets.split([len(labels.agrees) for labels in labelled.labels])), weights
