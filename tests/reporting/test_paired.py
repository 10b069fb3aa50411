"""Intervals against printed tables, integration of the density, and a worked example of Student's own paper."""

import math

import pytest

from sltrain.reporting.paired import Difference, paired_difference, t_quantile

# NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2, column 0.975.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 9: 2.262, 10: 2.228}
TABLE |= {19: 2.093, 29: 2.045, 30: 2.042, 60: 2.000, 100: 1.984}


@pytest.mark.parametrize("degrees", TABLE)
def test_quantiles_are_those_of_the_printed_table(degrees: int) -> None:
    assert round(t_quantile(0.95, degrees), 3) == TABLE[degrees]


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 8, 24])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_the_density_between_the_quantiles_integrates_to_the_confidence(degrees: int, confidence: float) -> None:
    """By Simpson's rule over the density, which the closed form does not use."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    end, n = t_quantile(confidence, degrees), 4000
    values = [scale * (1 + (i * end / n) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(n + 1)]
    area = (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2])) * end / n / 3
    assert 2 * area == pytest.approx(confidence, abs=1e-9)


def test_students_sleep() -> None:
    """Extra hours of sleep under two drugs (Student 1908; R's `sleep`). R's t.test(paired = TRUE) prints mean -1.58 and
    the interval -2.4598858 -0.7001142."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired_difference(first, second)
    assert found.mean == pytest.approx(-1.58)
    assert found.mean - found.half_width == pytest.approx(-2.4598858, abs=1e-7)
    assert found.mean + found.half_width == pytest.approx(-0.7001142, abs=1e-7)
    assert found.ratio == pytest.approx(math.exp(-1.58)) and found.interval[0] < found.ratio < found.interval[1]


def test_what_seeds_share_does_not_widen_the_interval() -> None:
    assert paired_difference([4.0, 5.0, 6.0], [3.9, 4.9, 5.9]).half_width == pytest.approx(0, abs=1e-12)


def test_a_run_that_diverged_makes_the_mean_infinite() -> None:
    assert paired_difference([4.0, math.inf], [4.1, 4.0]).ratio == math.inf
    assert paired_difference([4.0, 4.0], [math.inf, 4.0]).ratio == 0
    both = paired_difference([4.0, math.inf], [4.0, math.inf])
    assert math.isnan(both.ratio) and math.isnan(both.interval[0])
    assert Difference(5000.0, 1.0).ratio == math.inf


@pytest.mark.parametrize("pairs", [([1.0], [1.0]), ([], []), ([1.0, 2.0], [1.0])])
def test_one_pair_has_no_interval(pairs: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="an interval needs two pairs or more"):
        paired_difference(*pairs)
