"""The rule of consent, for the mode `close`: a draft stands if full depth finds it nearly as likely as its own token.

The regret of a token is log(p_max / p) in nats, by full depth's probabilities after penalties: 0 for full depth's own
token. Full depth sees every token of the answer, so its states are exact, and both bounds hold for each answer:

- every token is at least `share` times as likely as the likeliest one;
- the mean regret of the first t tokens is at most `regret`, for each t.

The second bound holds from the first token on, since the first tokens decide what the rest is about. With the regret of 16
tokens given beforehand, answers to TruthfulQA lost three times as much of their ROUGE-L.

Consent is for the drafts of exits and of a table of n-grams. A draft that repeats the text must be full depth's own token:
with consent to these, twice as much of an answer repeated itself.

Typical acceptance (Medusa, arXiv 2401.10774) also lets drafts stand that full depth finds likely, without a bound for the
answer. Rejection with a lenience (arXiv 2211.17192) bounds each token, when tokens are drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from offramp.errors import BadInput
from offramp.model.compiled.library import MOST_DRAFTS

MOST_COST = 1e9  # of a pass, in steps of full depth; the library in C has the same limit


@dataclass(frozen=True)
class Consent:
    """When full depth consents to a draft that is not its own token.

    `share`: of the likeliest token's probability, in (0, 1); `regret`: the highest mean of an answer's tokens, in nats.
    `rows`: what 0, 1, … more rows of a pass cost, in steps of full depth. These costs decide what is drafted, and drafts
    decide what is said: so they are part of the rule, and not the machine's own. Empty: the `usual_costs` of
    `decode.row_costs`.
    """

    share: float
    regret: float
    rows: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or not 0 <= self.regret < math.inf:
            raise BadInput(
                f"Full depth cannot consent to a share of {self.share} with a regret of {self.regret}.",
                "Give a share between 0 and 1, such as 0.5, and a regret of 0 or more, such as 0.03.",
            )
        rise = all(0 <= cost < MOST_COST for cost in self.rows) and [*self.rows] == sorted(self.rows)
        if self.rows and (len(self.rows) != MOST_DRAFTS + 1 or not rise):
            raise BadInput("The costs of rows are not those of 0 to 31 more rows.", "Leave them out.")

    @cached_property
    def token_regret(self) -> float:
        """The highest regret of a token."""
        return -math.log(self.share)

    @property
    def mode(self) -> str:
        """The mode's name, with the number of its point unless it is the first, or with the rule's own numbers."""
        same = [number for number, point in enumerate(POINTS) if (point.share, point.regret) == (self.share, self.regret)]
        if not same:
            return f"close ({self.share:g}, {self.regret:g})"
        return "close" if same == [0] else f"close:{same[0] + 1}"

    def allows(self, regret: float, before: float, number: int) -> bool:
        """Whether a draft with this regret may be the answer's token `number` (from 1), after a regret `before`."""
        return regret <= self.token_regret and before + regret <= self.regret * number


POINTS = Consent(0.5, 0.03), Consent(0.3, 0.1)
