"""Exits in the library's own API: `model.generate(**inputs, custom_generate=offramp.decoding(exits, mode="exact"))`.

The library also takes the name of a repository as `custom_generate`; the code of those that `offramp export` writes calls
`generate_with_exits`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from offramp.decode.batch import Batch
from offramp.decode.engine import Engine
from offramp.decode.fills import FILLS
from offramp.decode.modes import mode_of, parted, settled, usual_mode
from offramp.decode.request import Decided, Request
from offramp.decode.sampling import chooser
from offramp.errors import BadInput
from offramp.exits.exit_set import ExitSet
from offramp.exits.exits import Exits
from offramp.exits.policy import Policy
from offramp.exits.sharing import on_the_hub
from offramp.model.backbone import Backbone
from offramp.model.checkpoint import fingerprint
from offramp.model.loading import adopt

UNSUPPORTED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# Arguments of the library's `generate` that do not reach the exits, and what to use instead.
REFUSED = {
    "assistant_model": 'With mode="exact", exits draft.',
    "stop_strings": "Give a StopStringCriteria in stopping_criteria.",
    "token_healing": "Leave it out.",
    "inputs_embeds": "Give input_ids.",
    "cache": "Give all ids from the beginning.",
    "past_key_values": "Give all ids from the beginning.",
    "negative_prompt_ids": "Leave it out.",
    "synced_gpus": "Use one process.",
}


def generate_with_exits(
    model: Any,
    mode: str | None = None,
    threshold: float | Sequence[float] | None = None,
    streamer: Any = None,
    revision: str | None = None,
    fill: str | None = None,
    **arguments: Any,
) -> Any:
    """The library's `generate` with the exits of the repository, or folder, that the call names as `custom_generate`.

    `mode`: full, exact or early; for research, `fill` replaces the mode's own, or names the mode. `threshold`: one
    number for all exits, or one for each, in place of the exits' own policy. `revision`: the repository's. The rest is as
    for the library's `generate`, and goes through `decoding`. You need not give the model to offramp: the first call makes
    a backbone of it and keeps it with the model; a later call makes it anew if the weights have changed.

    Raises `BadInput` for an unknown mode and for arguments that exits cannot honour, and otherwise as `adopt`,
    `ExitSet.load` and `decoding` do.
    """
    if mode in FILLS:  # as repositories of before call it
        mode, fill = None, mode
    mode = mode or (mode_of(fill) if fill else None)
    if mode is not None:
        parted(mode)
    settings = arguments.get("generation_config")
    for name, hint in REFUSED.items():
        given = arguments.get(name, getattr(settings, name, None))
        if given is not None and given is not False:
            raise BadInput(f"Exits cannot decode with {name}.", hint)
    repository = _named_repository()
    if revision is not None and on_the_hub(repository):
        repository = f"{repository}@{revision}"
    backbone = _adopted(model)
    exits = ExitSet.load(repository, backbone)
    mode = mode or (usual_mode(backbone, exits) if threshold is None else "early")
    policy = None if threshold is None else _policy(settled(mode, exits, backbone, fill).exits, threshold)
    custom = decoding(exits, policy, fill, mode=mode, streamer=streamer)
    return model.generate(custom_generate=custom, streamer=streamer, **arguments)


def _named_repository() -> str:
    """The `custom_generate` argument of the library's `generate` that is running now.

    transformers 5.24 hands a repository's code all arguments but this one, and runs a copy of the code in another place.
    """
    frame = inspect.currentframe()
    while frame is not None:
        named = frame.f_locals.get("custom_generate")
        if isinstance(named, str):
            return named
        frame = frame.f_back
    raise BadInput("No repository is named.", 'Call model.generate(…, custom_generate="org/name", trust_remote_code=True).')


class _Kept:
    """Keeps a backbone with the library's model that it was made of. Copies of the model begin without one."""

    backbone: Backbone | None = None
    made_of: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


def _adopted(model: Any) -> Backbone:
    """The backbone of a model: its owner's, or one that was made here and still has the model's weights."""
    kept: _Kept = vars(model).setdefault("_offramp", _Kept())
    known = Backbone.of(model)
    if known is not None and known is not kept.backbone:
        return known
    made_of = fingerprint(model), model.dtype, model.device
    if kept.made_of != made_of:
        kept.backbone, kept.made_of = adopt(model), made_of
    assert kept.backbone is not None
    return kept.backbone


def _policy(exits: Exits | None, threshold: float | Sequence[float]) -> Policy:
    if exits is None:
        raise BadInput("A threshold was given, but there are no exits.", "Leave it out, or choose another mode.")
    numbers = [threshold] * len(exits) if isinstance(threshold, int | float) else threshold
    try:
        return Policy(tuple(map(float, numbers)), exits.policy.confidence)
    except (TypeError, ValueError):
        raise BadInput(f"{threshold!r} is not a threshold.", "Give a number, or one for each exit: (1, 1, 0.9)") from None


def decoding(
    exits: ExitSet | Exits | None,
    policy: Policy | None = None,
    fill: str | None = None,
    *,
    mode: str | None = None,
    max_pending: int | None = None,
    streamer: Any = None,
) -> Callable[..., Any]:
    """A `custom_generate` for the library's `generate`; arguments as for `Engine`.

    The library's logits processors, stopping criteria, `do_sample`, left-padded batches, `num_return_sequences` and
    `return_dict_in_generate` work as usual. Draws have the library's distribution but not its random numbers; they
    are a function of torch's global seed. transformers 5.24 does not pass its `streamer` on: give it here as well as there.
    Raises `BadInput` for other ways to search than greedy and sampling, for `output_scores` and the like, and for a
    streamer or a prefix function beside several rows; `ExitsMismatch` for another model's exits.
    """

    def generate(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **inputs: Any
    ) -> Any:
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        _check_supported(generation_config)
        if len(input_ids) > 1:
            _check_several(logits_processor, streamer)
        backbone = _backbone_of(model, exits)
        seed = int(torch.randint(2**62, ())) if generation_config.do_sample else None
        # Rows may have the same prompt: each draws by a seed of its own.
        choosers = [chooser(logits_processor, None if seed is None else seed + row) for row in range(len(input_ids))]
        engine = Engine(backbone, exits, policy, fill, mode=mode, max_pending=max_pending)
        batch = engine.batch()
        masks = inputs.get("attention_mask")
        room, ends = generation_config.max_length - input_ids.shape[1], _end_ids(stopping_criteria)
        prompts = _without_pads(input_ids, masks)
        rows = {
            batch.add(prompt, None, choose, max_tokens=room, end_ids=ends): row
            for prompt, choose, row in zip(prompts, choosers, input_ids, strict=True)
        }
        finished = _continue(batch, rows, stopping_criteria, streamer)
        pad = generation_config._pad_token_tensor
        sequences = torch.nn.utils.rnn.pad_sequence(
            finished, batch_first=True, padding_value=0 if pad is None else int(pad)
        )
        return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences

    return generate


def _end_ids(stopping_criteria: Any) -> frozenset[int]:
    """The tokens that end a text, by the library's criteria."""
    ids = [criterion.eos_token_id.tolist() for criterion in stopping_criteria if hasattr(criterion, "eos_token_id")]
    return frozenset(chain.from_iterable(ids))


def _without_pads(input_ids: Tensor, masks: Tensor | None) -> list[list[int]]:
    """The rows of input_ids (B, T) without the tokens that the masks (B, T) hide."""
    masks = torch.ones_like(input_ids) if masks is None else masks
    return [row[mask.bool()].tolist() for row, mask in zip(input_ids, masks, strict=True)]


def _continue(batch: Batch, rows: dict[Request, Tensor], stopping_criteria: Any, streamer: Any) -> list[Tensor]:
    """Decode until every request has ended. Returns each one's row (T,), its pads included, with the new tokens."""
    stopped: set[Request] = set()
    for event in batch.run():
        # A step can decide several tokens, and a criterion may have ended the text at an earlier one.
        if not isinstance(event, Decided) or event.request in stopped:
            continue
        new = torch.tensor([event.token.id], device=rows[event.request].device)
        rows[event.request] = row = torch.cat([rows[event.request], new])
        if streamer is not None:
            streamer.put(new.cpu())
        if bool(stopping_criteria(row[None], None)):
            stopped.add(event.request)
            batch.cancel(event.request)
    if streamer is not None:
        streamer.end()
    return list(rows.values())


def _check_supported(generation_config: Any) -> None:
    if generation_config.num_beams != 1:
        raise BadInput(f"Exits decode one token after another, not with {generation_config.num_beams} beams.", "Use 1.")
    mode = generation_config.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        raise BadInput(f"Exits cannot decode by {mode.replace('_', ' ')}.", "Use greedy search, or do_sample=True.")
    if generation_config.guidance_scale not in (None, 1):
        raise BadInput("Exits cannot decode with a guidance_scale.", "Leave it out.")
    if any(getattr(generation_config, output) for output in UNSUPPORTED):
        raise BadInput("Exits keep no scores, logits, attentions or hidden states.", "Ask for none of them.")


def _check_several(logits_processor: Any, streamer: Any) -> None:
    """Raise `BadInput` for arguments that only work with one text."""
    from transformers import PrefixConstrainedLogitsProcessor

    if streamer is not None:
        raise BadInput("A streamer works with one prompt, not with several.", "Give one prompt, or no streamer.")
    if any(isinstance(each, PrefixConstrainedLogitsProcessor) for each in logits_processor):
        raise BadInput("A prefix_allowed_tokens_fn works with one prompt, not with several.", "Give one prompt.")


def _backbone_of(model: Any, exits: ExitSet | Exits | None) -> Backbone:
    """The backbone that `load` or `wrap` made of the library's model."""
    backbone = Backbone.of(model)
    if backbone is None:
        raise BadInput(
            "offramp did not load or wrap this model.",
            "Keep what offramp.load(name, keep=True) or offramp.wrap(model, tokenizer) returns, and use its `model`.",
        )
    if isinstance(exits, Exits) and not exits.owner.fits(backbone):
        raise exits.owner.mismatch(backbone, "The exits")
    return backbone
