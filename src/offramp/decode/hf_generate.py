"""Exits in the library's own API: `model.generate(**inputs, custom_generate=offramp.decoding(exits, fill="verify"))`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from offramp.decode.batch import Batch
from offramp.decode.engine import Engine
from offramp.decode.request import Decided, Request
from offramp.decode.sampling import chooser
from offramp.errors import BadInput, ExitsMismatch
from offramp.exits.exits import Exits, belong
from offramp.exits.policy import Policy
from offramp.model.backbone import Backbone

UNSUPPORTED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def decoding(
    exits: Exits, policy: Policy | None = None, fill: str = "project", max_pending: int = 7, streamer: Any = None
) -> Callable[..., Any]:
    """A `custom_generate` for the library's `generate`; arguments as for `Engine`.

    The library's logits processors, stopping criteria, `do_sample`, left-padded batches, `num_return_sequences` and
    `return_dict_in_generate` work as usual. Draws have the library's distribution but not its random numbers; they
    are a function of torch's global seed. transformers 5.24 does not pass its `streamer` on: give it here as well as there.
    Raises `BadInput` for beams and for `output_scores`, `ExitsMismatch` for another model's exits.
    """

    def generate(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **inputs: Any
    ) -> Any:
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        _check_supported(generation_config)
        backbone = _backbone_of(model, exits)
        seed = int(torch.randint(2**62, ())) if generation_config.do_sample else None
        # Rows may have the same prompt: each draws by a seed of its own.
        choosers = [chooser(logits_processor, None if seed is None else seed + row) for row in range(len(input_ids))]
        engine = Engine(backbone, exits, policy, fill, max_pending=max_pending)
        batch = engine.batch()
        masks = inputs.get("attention_mask")
        room, ends = generation_config.max_length - input_ids.shape[1], _end_ids(stopping_criteria)
        prompts = _without_pads(input_ids, masks)
        rows = {
            batch.add(prompt, talk, choose, max_tokens=room, end_ids=ends): row
            for prompt, talk, choose, row in zip(prompts, engine.shared_talks(prompts), choosers, input_ids, strict=True)
        }
        finished = _continue(batch, rows, stopping_criteria, streamer)
        pad = generation_config._pad_token_tensor
        sequences = torch.nn.utils.rnn.pad_sequence(
            finished, batch_first=True, padding_value=0 if pad is None else int(pad)
        )
        return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences

    return generate


def _end_ids(stopping_criteria: Any) -> frozenset[int]:
    """The tokens that end a text, as the library's criteria name them."""
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
    if any(getattr(generation_config, output) for output in UNSUPPORTED):
        raise BadInput("Exits keep no scores, logits, attentions or hidden states.", "Ask for none of them.")


def _backbone_of(model: Any, exits: Exits) -> Backbone:
    """The backbone that `load` or `wrap` made of the library's model."""
    backbone = Backbone.of(model)
    if backbone is None:
        raise BadInput(
            "This model was not given to offramp.",
            "Keep what offramp.load(name, keep=True) or offramp.wrap(model, tokenizer) returns, and use its `model`.",
        )
    if not belong(exits.backbone, backbone):
        raise ExitsMismatch(
            f"The exits were trained for {exits.backbone['name']}, and {backbone.name} has other weights.",
            f"Train exits for this model: offramp train {backbone.name} -o DIR",
        )
    return backbone
