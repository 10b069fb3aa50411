"""Is one candidate better than another? Differences of paired runs, with an interval.

Two candidates are trained with the same n seeds, so that run i of both reads the same rows in the same order. The
losses of such a pair vary together, and of their differences

    d_i = log perplexity of the candidate - log perplexity of the reference, seed i

the mean lies within t(n - 1) s / sqrt(n) of the true one in 95 of 100 studies (Student's paired t), where s is the
standard deviation of the d_i and t(n - 1) the 97.5 % quantile of the t distribution. exp of the mean and of both ends
gives the ratio of perplexities. The interval covers seeds, not another corpus, size or budget.

A run that diverged has an infinite loss and stays in: the mean is then infinite, and there is no interval.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MAX_EXPONENT = 700.0  # of e, in a double


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences of loss, nats a token, and half the width of its interval; NaN where it has none."""

    mean: float
    half_width: float

    @property
    def ratio(self) -> float:
        """Perplexity of the candidate over that of the reference."""
        return _exp(self.mean)

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends of the ratio's interval."""
        return _exp(self.mean - self.half_width), _exp(self.mean + self.half_width)


def _exp(number: float) -> float:
    return math.inf if number > MAX_EXPONENT else math.exp(number)


def paired_difference(candidate: Sequence[float], reference: Sequence[float], confidence: float = 0.95) -> Difference:
    """The difference of the losses of `candidate` and `reference`, run i of both with the same seed. Raises ValueError
    for fewer than two pairs: one difference says nothing of its spread."""
    if len(candidate) != len(reference) or len(candidate) < 2:
        raise ValueError(f"{len(candidate)} and {len(reference)} runs: an interval needs two pairs or more")
    differences = [own - other for own, other in zip(candidate, reference, strict=True)]
    if not all(map(math.isfinite, differences)):
        return Difference(sum(differences), math.nan)
    mean, count = statistics.fmean(differences), len(differences)
    spread = statistics.stdev(differences)
    return Difference(mean, t_quantile(confidence, count - 1) * spread / math.sqrt(count))


def t_quantile(confidence: float, degrees: int) -> float:
    """The t for which |T| <= t has this probability, T of Student's distribution with so many degrees of freedom."""
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):  # to the last bit of the angle
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """The probability of |T| <= sqrt(degrees) tan(angle): Abramowitz and Stegun, Handbook of Mathematical Functions,
    equations 26.7.3 and 26.7.4, exact for whole degrees of freedom."""
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = degrees % 2
    term = total = 1.0 if not is_odd else cosine * (degrees > 1)
    for k in range(2 + is_odd, degrees - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total
