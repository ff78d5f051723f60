"""Exits in the library's own API: `model.generate(**inputs, custom_generate=offramp.decoding(exits, fill="verify"))`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from offramp.decode.engine import Engine
from offramp.decode.request import Decided
from offramp.decode.sampling import chooser
from offramp.errors import BadInput, ExitsMismatch
from offramp.exits.exits import Exits
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
        engine = Engine(backbone, exits, policy, fill, chooser(logits_processor, seed), max_pending)
        room = generation_config.max_length - input_ids.shape[1]
        rows = _continue(engine, input_ids, inputs.get("attention_mask"), room, stopping_criteria, streamer)
        pad = generation_config._pad_token_tensor
        sequences = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0 if pad is None else int(pad))
        return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences

    return generate


def _continue(
    engine: Engine, input_ids: Tensor, mask: Tensor | None, room: int, stopping_criteria: Any, streamer: Any
) -> list[Tensor]:
    """Continue each row (T,) of input_ids (B, T). Returns the rows, their pads included, with the new tokens."""
    end_id_lists = [
        criterion.eos_token_id.tolist() for criterion in stopping_criteria if hasattr(criterion, "eos_token_id")
    ]
    end_ids = frozenset(chain.from_iterable(end_id_lists))
    masks = torch.ones_like(input_ids) if mask is None else mask
    prompts = [row[row_mask.bool()].tolist() for row, row_mask in zip(input_ids, masks, strict=True)]
    batch, rows = engine.batch(), {}
    for prompt, talk, row in zip(prompts, engine.shared_talks(prompts), input_ids, strict=True):
        rows[batch.add(prompt, talk, max_tokens=room, end_ids=end_ids)] = row
    for event in batch.run():
        if not isinstance(event, Decided) or event.request.finish_reason == "cancelled":
            continue  # a step can decide several tokens, and a criterion ended the text at an earlier one
        new = torch.tensor([event.token.id], device=input_ids.device)
        rows[event.request] = row = torch.cat([rows[event.request], new])
        if streamer is not None:
            streamer.put(new.cpu())
        if bool(stopping_criteria(row[None], None)):
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
            "Load it with offramp.load(name, keep=True) and use its `model`, or call offramp.wrap(model, tokenizer) first.",
        )
    if backbone.source.sha256 != exits.backbone["sha256"]:
        raise ExitsMismatch(
            f"The exits were trained for {exits.backbone['name']}, and {backbone.name} has other weights.",
            f"Train exits for this model: offramp train {backbone.name} -o DIR",
        )
    return backbone
