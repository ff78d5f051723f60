"""The model answers prompts and reads texts, and what exits learn from is kept on the way.

All texts under way take part in the same pass over the model: a prompt or a plain text with all its tokens, an answer with
its newest one. So the hidden states of an answer come with its tokens, and nothing is read twice.
"""

from __future__ import annotations

import copy
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from offramp.decode.embedding import embed_all
from offramp.decode.sampling import LEAST_TEMPERATURE, Sampler, noise
from offramp.decode.sequence import begin_alike
from offramp.files import write_atomically
from offramp.model.backbone import Backbone
from offramp.model.costs import Costs
from offramp.model.runtime import AnyState, BlockInput
from offramp.training.teacher import FIELDS, TEACHER, TeacherText, TextGroup

SIDE_BY_SIDE = 64  # texts side by side; more would be hardly faster, and would need more memory
CHUNK = 512  # new tokens of a pass, or one text
HEAD_ROWS = 256  # positions whose logits are in memory at once
BUCKET = 64  # entries

MakeShards = Callable[[Backbone, list[TextGroup], tuple[int, ...], int], Iterator[tuple[int, bytes]]]


class _Begun(NamedTuple):
    """The common beginning of texts: the blocks' memory of it, and its states at the exits (n, J, D)."""

    state: AnyState
    hidden: Tensor


class _Likeliest(NamedTuple):
    """The most probable tokens of n positions, best first: ids, logits and log probabilities, each (n, TEACHER)."""

    ids: Tensor
    logits: Tensor
    logp: Tensor


@dataclass(eq=False)
class _Text:
    """A text under way: its ids so far, and what is kept of it for each pass."""

    place: int
    ids: list[int]
    choose: Sampler
    hidden: list[Tensor]
    top_ids: list[Tensor] = field(default_factory=list)
    top_logp: list[Tensor] = field(default_factory=list)

    def kept(self, first: int) -> TeacherText:
        """The text, whose positions count from `first` on."""
        top_ids, top_logp = (F.pad(torch.cat(parts), (0, 0, first, 0)) for parts in (self.top_ids, self.top_logp))
        counted = torch.arange(len(self.ids)) >= first
        return TeacherText(torch.tensor(self.ids, dtype=torch.int32), torch.cat(self.hidden), top_ids, top_logp, counted)


class _Batch:
    """Texts of one length that share their positions and one memory. Texts that have ended leave it.

    `index`: that of their group; `left`: tokens that their answers may still get; `first`: the first position that counts;
    `read`: the tokens that the memory holds.
    """

    def __init__(self, backbone: Backbone, index: int, group: TextGroup, places: list[int], begun: _Begun) -> None:
        self.index, self.read = index, len(begun.hidden)
        length = len(group.ids[places[0]])
        self.left = min(group.answer_tokens, backbone.context - length)
        self.first = length - 1 if group.answer_tokens else 0
        self.texts = [_Text(at, [*group.ids[at]], group.choose(at), [begun.hidden.cpu()]) for at in places]
        self.state = copy.deepcopy(begun.state)
        if self.read:
            self.state.select(torch.zeros(len(places), dtype=torch.int64, device=backbone.device))
        self.state.reserve(length + self.left)

    def took(self, hidden: Tensor, likeliest: _Likeliest, stop_ids: frozenset[int]) -> list[_Text]:
        """Keep what a pass gave: states (B, T, J, D), and the tokens of the positions that count. Returns who ended."""
        rows, self.read = len(self.texts), len(self.texts[0].ids)
        top_ids, logits, top_logp = (part.unflatten(0, (rows, -1)) for part in likeliest)
        ended = []
        for row, text in enumerate(self.texts):
            text.hidden.append(hidden[row].clone())  # not a view: other rows of this pass may end sooner
            text.top_ids.append(top_ids[row].int())
            text.top_logp.append(top_logp[row].half())
            token = _chosen(top_ids[row, -1], logits[row, -1], text.choose, len(text.ids)) if self.left > 0 else -1
            if self.left <= 1 or token in stop_ids:
                ended.append(text)
            else:
                text.ids.append(token)
        self.left -= 1
        if ended:
            going_on = [row for row, text in enumerate(self.texts) if text not in ended]
            self.texts = [self.texts[row] for row in going_on]
            if going_on:
                self.state.select(torch.tensor(going_on, device=hidden.device))
        return ended


def made_shards(
    backbone: Backbone, groups: list[TextGroup], layers: tuple[int, ...], shared: int
) -> Iterator[tuple[int, bytes]]:
    """Run the model over the groups, whose prompts have their first `shared` ids in common.

    Yields the index and the shard of each group when it is done.
    """
    prompts = [ids for group in groups if group.answer_tokens for ids in group.ids]
    alike, nothing = (_begun(backbone, [*ids], layers) for ids in (prompts[0][:shared] if prompts else (), ()))
    for index, texts in _ended(backbone, groups, layers, lambda group: alike if group.answer_tokens else nothing):
        tensors = {name: torch.cat([getattr(text, name) for text in texts]) for name in FIELDS}
        tensors["lengths"] = torch.tensor([len(text.ids) for text in texts])
        yield index, save(tensors)


def write_shards(
    backbone: Backbone,
    groups: list[TextGroup],
    layers: tuple[int, ...],
    folder: Path,
    after_group: Callable[[TextGroup], None] = lambda group: None,
    share: slice = slice(None),
    make: MakeShards = made_shards,
) -> list[Path]:
    """Run the model over the groups, and write a shard for each that has none yet. Returns the paths of all shards.

    The order is random, so that unfinished text is a fair sample of the whole: groups are sorted by length.
    `share`: the groups that this process runs; other processes run the others. `after_group` is called after
    each group of the share. `make` makes the shards, as `made_shards` does.
    """
    shards = [folder / f"shard-{index:05d}.safetensors" for index in range(len(groups))]
    missing = []
    for group, shard in zip(groups[share], shards[share], strict=True):
        if shard.exists():
            after_group(group)
        else:
            missing.append((group, shard))
    random.Random(0).shuffle(missing)
    # Over all prompts, so that resumed work computes the same as work without interruption.
    shared = begin_alike([ids for group in groups if group.answer_tokens for ids in group.ids])
    for index, content in make(backbone, [group for group, _ in missing], layers, shared):
        group, shard = missing[index]
        write_atomically(shard, content)
        after_group(group)
    return shards


def _ended(
    backbone: Backbone, groups: list[TextGroup], layers: tuple[int, ...], begun: Callable[[TextGroup], _Begun]
) -> Iterator[tuple[int, list[TeacherText]]]:
    """The index of each group whose texts have all ended, and its texts in order."""
    costs = Costs(backbone)
    waiting, running = deque(_parts(backbone, groups, lambda group: len(begun(group).hidden))), list[_Batch]()
    done: dict[int, dict[int, TeacherText]] = defaultdict(dict)
    while waiting or running:
        new = 0  # tokens of prompts and plain texts in the next pass
        while waiting:
            index, places = waiting[0]
            group, longest = groups[index], max(len(each.texts[0].ids) + each.left for each in running) if running else 0
            length = len(group.ids[places[0]])
            size = costs.at_once(max(longest, length + group.answer_tokens), SIDE_BY_SIDE)
            new += len(places) * (length - len(begun(group).hidden))
            if running and (sum(len(each.texts) for each in running) + len(places) > size or new > CHUNK):
                break
            waiting.popleft()
            running.append(_Batch(backbone, index, group, places, begun(group)))
        for batch, texts in _pass(backbone, running, layers):
            done[batch.index] |= {text.place: text.kept(batch.first) for text in texts}
            if len(done[batch.index]) == len(groups[batch.index].ids):
                of_group = done.pop(batch.index)
                yield batch.index, [of_group[place] for place in sorted(of_group)]
        running = [batch for batch in running if batch.texts]


def _parts(
    backbone: Backbone, groups: list[TextGroup], known: Callable[[TextGroup], int]
) -> Iterator[tuple[int, list[int]]]:
    """The groups in parts that fit into a pass: the index of a group, and the places of texts of one length."""
    costs = Costs(backbone)
    for index, group in enumerate(groups):
        for ids in group.ids:
            backbone.prompts.check([*ids])
        longest, places = max(map(len, group.ids)), [*range(len(group.ids))]
        size = costs.at_once(longest + group.answer_tokens, min(SIDE_BY_SIDE, max(1, CHUNK // (longest - known(group)))))
        size = size if group.answer_tokens else 1
        yield from ((index, places[at : at + size]) for at in range(0, len(places), size))


@torch.inference_mode()
def _pass(backbone: Backbone, batches: list[_Batch], layers: tuple[int, ...]) -> list[tuple[_Batch, list[_Text]]]:
    """Run the tokens of all batches that the blocks do not know yet. Returns the texts of each batch that ended."""
    unread = [[text.ids[batch.read :] for text in batch.texts] for batch in batches]
    embedded = embed_all(backbone, unread, [batch.read for batch in batches])
    parts = [(h, batch.state, step) for batch, (h, step) in zip(batches, embedded, strict=True)]
    through, tops = _through(backbone, parts, layers)
    counting = [top[:, max(0, batch.first - batch.read) :].flatten(0, 1) for batch, top in zip(batches, tops, strict=True)]
    found = [_most_probable(backbone, rows) for rows in torch.cat(counting).split(HEAD_ROWS)]
    columns = [torch.cat(each).cpu().split([len(rows) for rows in counting]) for each in zip(*found, strict=True)]
    ended = []
    for batch, hidden, *likeliest in zip(batches, through, *columns, strict=True):
        ended.append((batch, batch.took(hidden.cpu(), _Likeliest(*likeliest), backbone.stop_ids)))
    return ended


@torch.inference_mode()
def _begun(backbone: Backbone, ids: list[int], layers: tuple[int, ...]) -> _Begun:
    """Read the common beginning of texts, which may be empty."""
    state = backbone.state(len(ids))
    if not ids:
        return _Begun(state, torch.zeros(0, len(layers), backbone.hidden_size, dtype=torch.bfloat16))
    h, step = backbone.embed(torch.tensor([ids], device=backbone.device))
    (hidden,), _ = _through(backbone, [(h, state, step)], layers)
    return _Begun(state, hidden[0])


def _through(backbone: Backbone, parts: list[BlockInput], layers: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Run texts (B, T, D) through all blocks → bfloat16 states at the exits (B, T, J, D), and the top ones (B, T, D)."""
    hidden, at_exits, start = [h for h, _, _ in parts], [], 0
    for stop in (*layers, backbone.n_blocks):
        running = [(h, state, step) for h, (_, state, step) in zip(hidden, parts, strict=True)]
        hidden = backbone.run_all(running, start, stop)
        at_exits.append([h.bfloat16() for h in hidden])
        start = stop
    return [torch.stack(states, dim=2) for states in zip(*at_exits[:-1], strict=True)], hidden


def _most_probable(backbone: Backbone, top: Tensor) -> _Likeliest:
    """The most probable tokens by hidden states at the top (n, D). Raises `BadNumbers` for logits that are not finite."""
    logits = backbone.logits(top)
    ids = _largest(logits, min(TEACHER, backbone.vocab_size))
    chosen, together = logits.gather(1, ids), logits.logsumexp(-1, keepdim=True)
    if not torch.isfinite(together).all():
        raise backbone.bad_numbers()
    return _Likeliest(ids, chosen, chosen - together)


def _largest(rows: Tensor, count: int) -> Tensor:
    """The places (n, count) of the largest entries of each row (n, V), the largest first."""
    width = rows.shape[1]
    if rows.device.type != "cpu" or width % BUCKET or width < BUCKET * count:
        return rows.topk(count, dim=-1).indices
    # The largest entries are in the buckets with the largest maxima. This is several times as fast as topk over all.
    buckets: Tensor = rows.unflatten(1, (-1, BUCKET))
    chosen = buckets.amax(-1).topk(count, dim=-1).indices
    places: Tensor = buckets.gather(1, chosen[:, :, None].expand(-1, -1, BUCKET)).flatten(1).topk(count, dim=-1).indices
    return chosen.gather(1, places // BUCKET) * BUCKET + places % BUCKET


def _chosen(ids: Tensor, logits: Tensor, sampler: Sampler, position: int) -> int:
    """The token that a sampler takes at this position, by the ids and logits of the most probable ones (TEACHER,)."""
    if not sampler.temperature:
        return int(ids[0])
    warmth = max(sampler.temperature, LEAST_TEMPERATURE)
    drawn = logits.float().numpy() / np.float32(warmth) + noise(sampler.seed, position, ids.numpy())
    return int(ids[int(drawn.argmax())])
