"""Learn then Test (Angelopoulos et al., arXiv 2110.01052): find a policy that keeps a risk, from the policies' losses.

The expected loss of a policy is shown to be at most α by a p-value; policies along a path are tested one after another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

LONGEST_PATH = 8  # policies on the path; more would only cost time


def p_value(mean: float, n: int, risk: float) -> float:
    """Hoeffding–Bentkus p-value (section 3.1) of "the expected loss is above the risk α", given the mean of n losses.

    It is the smaller of exp(−n h(min(mean, α), α)), where h is the relative entropy of two coins, and
    e · P(Binomial(n, α) ≤ ⌈n mean⌉).
    """
    below = min(mean, risk)
    entropy = sum(p * math.log(p / q) for p, q in ((below, risk), (1 - below, 1 - risk)) if p)
    # Rounding must not lift a mean of k / n above k.
    tail = sum(map(math.exp, _log_binomial(n, risk, math.ceil(n * mean - 1e-9))))
    return min(1.0, math.exp(-n * entropy), math.e * tail)


def _log_binomial(n: int, p: float, most: int) -> Iterator[float]:
    """log P(Binomial(n, p) = k) for k up to `most`."""
    for k in range(min(n, most) + 1):
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        yield ways + k * math.log(p) + (n - k) * math.log1p(-p)


MOST_PROMPTS = 1_000_000  # the largest number of prompts that `prompts_needed` gives


def prompts_needed(mean: float, risk: float, delta: float) -> int | None:
    """The number of prompts needed to show that a policy with this mean loss keeps the risk; None above a million."""
    if mean >= risk:
        return None
    n = 1
    while p_value(mean, n, risk) > delta:
        n *= 2
        if n > MOST_PROMPTS:  # nobody has more prompts, and the sum in `p_value` would take minutes
            return None
    low, high = n // 2, n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p_value(mean, middle, risk) <= delta else (middle, high)
    return high


def fixed_sequence(losses: Iterator[Sequence[float]], risk: float, delta: float) -> Iterator[tuple[float, float, bool]]:
    """Test policies along a path, up to the first that fails.

    Takes each policy's losses. Yields each policy's mean loss, its p-value, and whether it passed.
    """
    for policy_losses in losses:
        mean = fmean(policy_losses)
        p = p_value(mean, len(policy_losses), risk)
        yield mean, p, p <= delta
        if p > delta:
            return


def path(pilot: list[tuple[float, float]], risk: float, longest: int = LONGEST_PATH) -> list[int]:
    """The indices of the candidates to test, in the order of the test.

    `pilot` has each candidate's mean loss and gain on the pilot prompts. A candidate is left out if another loses less and
    gains at least as much, if it gains nothing, or if it loses twice the risk. Candidates of equal loss all stay: the pilot
    is too small to tell them apart. The order is that of rising gain, so the safest comes first. If more than `longest`
    candidates are left, every n-th is kept, from the first on.
    """
    order = [
        index
        for index, (loss, gain) in enumerate(pilot)
        if gain > 0 and loss < 2 * risk and not any(lower < loss and higher >= gain for lower, higher in pilot)
    ]
    order.sort(key=lambda index: pilot[index][1])
    return order[:: -(-len(order) // longest)] if order else []
