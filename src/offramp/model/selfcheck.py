"""The self-check: whether offramp computes a model as the library's own code does.

Both compute in float32, with the weights as the format holds them. So where they differ, a family's row is wrong, or the
code. What the format itself changes is another question, which `reading.change_of` answers.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from offramp.errors import UnsupportedModel
from offramp.model.backbone import Backbone
from offramp.model.hooks import is_offloaded
from offramp.model.lending import OWN, Lender, lent, require_finite

# The largest difference from the library's logits that rounding explains, as a share of the largest logit, by the format of
# weights. In formats that are not named here, rows are rounded to 16 bits. Where accelerate's hooks bring weights in, the
# library's model stays in its own dtype.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-4}
TOLERANCE_OF_INTEGERS = 1e-3
TOLERANCE_OF_HOOKS = {"float32": 1e-4, "bfloat16": 5e-2}
ROUNDED = 10.0  # how many times as far as one layer's output the logits may be off because 16 bits cannot hold its input


@cache
def code_hash() -> str:
    """A hash of the Python code that runs models."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def check(backbone: Backbone, lender: Lender = OWN, lost: float = 0.0) -> tuple[float, float]:
    """Compare a full pass, and a pass in pieces over a state, with the library's own logits.

    A model on the meta device needs a `lender`. `lost`: the largest share of a layer's output that rows of 16 bits lose.
    Returns the largest differences (full, cached), as shares of the largest logit. Raises `UnsupportedModel` when one
    exceeds what `TOLERANCE` and `lost` explain, and `BadNumbers` where logits are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(16, backbone.context)
    ids = torch.randint(0, backbone.vocab_size, (1, length), generator=generator).to(backbone.device)
    spread = is_offloaded(backbone.model)  # hooks of accelerate's bring in its weights as they are
    with ExitStack() as exact:
        if not spread:
            exact.enter_context(lent(backbone, lender))
            exact.enter_context(backbone.runtime.exact())
        wanted = backbone.model(ids, use_cache=False).logits.float()
        require_finite(backbone, wanted)
        whole, pieces = backbone.forward(ids), _in_pieces(backbone, ids)
        known = TOLERANCE_OF_HOOKS if is_offloaded(backbone.model) else TOLERANCE
        allowed = known.get(backbone.weight_format, TOLERANCE_OF_INTEGERS) + ROUNDED * lost
    require_finite(backbone, whole if spread else backbone.forward(ids))
    scale = wanted.abs().max().clamp(min=1e-6)
    full, cached = (float((logits - wanted).abs().max() / scale) for logits in (whole, pieces))
    if not (full <= allowed and cached <= allowed):
        raise UnsupportedModel(
            f"offramp would decode {backbone.name} wrongly: its logits differ from the library's by {full:.1e} in a full "
            f"pass and {cached:.1e} in a cached one, as shares of the largest logit ({allowed:.0e} is allowed).",
            f"The row for the family '{backbone.config.model_type}' in families.FAMILIES does not fit this model.",
        )
    return full, cached


def _in_pieces(backbone: Backbone, ids: Tensor) -> Tensor:
    """Our logits for the ids, read in three pieces, each in two ranges of blocks."""
    logits, state, seen, middle = [], backbone.state(), 0, backbone.n_blocks // 2
    length = ids.shape[1]
    for piece in (ids[:, : length - 4], ids[:, length - 4 : length - 1], ids[:, length - 1 :]):
        h, step = backbone.embed(piece, seen)
        h = backbone.run(h, 0, middle, state, step)
        logits.append(backbone.logits(backbone.run(h, middle, backbone.n_blocks, state, step)))
        seen += piece.shape[1]
    return torch.cat(logits, 1)
