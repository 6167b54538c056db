"""Intervals and paired differences of ratios of sums."""

import json
import math

import numpy as np
import pytest

from scavenger.report import metrics
from scavenger.report.metrics import Metric


def drawn(seed, count=400, spread=1.0):
    return np.random.default_rng(seed).normal(3.0, spread, count)


def metric(values, counts=None, **what):
    counts = np.ones(len(values)) if counts is None else counts
    return Metric("loss", list(map(float, values)), list(map(float, counts)), **what)


def test_the_interval_of_a_mean_is_the_textbook_one():
    values = drawn(1)
    found = metrics.estimate(metric(values))
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean()) and found.items == 400
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_a_ratio_is_of_sums_and_items_that_do_not_count_are_none():
    """Not the mean of ratios: a document of ten tokens weighs ten times one of one."""
    found = metrics.estimate(metric([1, 30, 0], [1, 10, 0]))
    assert found.value == pytest.approx(31 / 11) and found.items == 2
    assert metrics.estimate(metric([2, 30], [1, 10], exponential=True)).value == pytest.approx(math.exp(32 / 11))


def test_few_items_have_no_interval():
    found = metrics.estimate(metric([2.5]))
    assert found == metrics.Estimate(2.5, None, None, 1)
    four, five = ([1.0, 2.0, 4.0, 3.0, 0.0][:count] for count in (4, 5))
    assert metrics.estimate(metric(four)).low is None and metrics.difference(metric(four), metric(four)).low is None
    found = metrics.estimate(metric(five))
    assert 0 <= found.low < 1 and 3 < found.high <= 4, "nearly their whole range"
    with_empty = metric([*four, 0.0], [1, 1, 1, 1, 0])
    assert metrics.estimate(with_empty).low is None, "an item that does not count is none"
    found = metrics.estimate(metric([2.5]))
    assert metrics.show(found, "") == "2.500" and metrics.show(found, "share") == "250.0 %"
    assert metrics.show(metrics.Estimate(math.nan, None, None, 0), "") == "not a number"
    assert metrics.show(metrics.Estimate(math.inf, None, None, 9), "") == "∞"
    assert metrics.show(metrics.Estimate(3.21e-4, 2e-4, 4e-4, 9), "nats") == "0.00032 [0.00020, 0.00040]"
    assert metrics.show(metrics.Estimate(-92.554, -110.5, -75.2, 9), "rate", signed=True) == "-92.6 [-110.5, -75.2]"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_where_all_items_agree_there_is_doubt_left(value):
    """Wilson's interval for k of n, written out."""
    found = metrics.estimate(metric([value] * 17, unit="share"))
    z, n = 1.959964, 17
    middle, half = (value + z * z / 2 / n) / (1 + z * z / n), z * z / 2 / n / (1 + z * z / n)
    assert found.low == pytest.approx(middle - half, abs=1e-6) and found.high == pytest.approx(middle + half, abs=1e-6)


def test_a_difference_is_paired():
    """What two models share, hard documents above all, does not widen the interval of what divides them."""
    hard = drawn(2, spread=5.0)
    mine, other = metric(hard + drawn(3, spread=0.1) - 2.9), metric(hard)
    found = metrics.difference(mine, other)
    assert found.value == pytest.approx(0.1, abs=0.02) and found.high - found.low < 0.03
    assert metrics.separates(found, mine)
    alone = metrics.estimate(mine)
    assert alone.high - alone.low > 0.8
    same = metrics.difference(mine, mine)
    assert (same.value, same.low, same.high) == (0, 0, 0) and not metrics.separates(same, mine)


def test_perplexities_are_compared_by_their_ratio():
    counts = np.arange(1, 51)
    mine, other = (metric(counts * loss, counts, exponential=True) for loss in (2.5, 2.0))
    found = metrics.difference(mine, other)
    assert found.value == pytest.approx(math.exp(0.5)) and found.low == pytest.approx(math.exp(0.5))
    assert metrics.separates(found, mine)
    same = metrics.difference(mine, mine)
    assert same.value == 1 and not metrics.separates(same, mine)
    assert metrics.show(found, "", signed=True, ratio=True).startswith("× 1.649 [")
    assert metrics.show(metrics.Estimate(-0.05, -0.1, 0.0, 9), "share", signed=True) == "-5.0 points [-10.0, 0.0]"


@pytest.mark.slow
def test_an_interval_holds_what_it_says():
    """Of 200 samples about 95 % have the truth in their interval."""
    held = 0
    for seed in range(200):
        found = metrics.estimate(metric(drawn(100 + seed, 60)), seed=seed)
        held += found.low <= 3.0 <= found.high
    assert 182 <= held <= 198  # 190 ± 3 and the bootstrap's own narrowness at 60 items


# What the documents of a small test split weigh: two of nine have four fifths of the tokens.
UNEQUAL = np.array([32.0, 19, 7, 3, 1, 1, 1, 1, 0.5])


@pytest.mark.slow
@pytest.mark.parametrize("weights", [np.ones(6), np.ones(20), UNEQUAL])
def test_few_and_unequal_items_have_wide_intervals(weights):
    """Models that are equal are told apart one time in twenty, or seldomer where items have all they can say."""
    apart = 0
    for seed in range(300):
        losses = np.random.default_rng(seed).normal(size=(2, len(weights)))
        mine, other = (metric(weights * each, weights) for each in losses)
        apart += metrics.separates(metrics.difference(mine, other, seed), mine)
    assert 2 <= apart <= 27  # 15 ± 4; by the plain percentile interval 45 and more, of six items and of unequal ones


def test_other_items_are_refused():
    with pytest.raises(ValueError, match="loss of 3 items and loss of 2; expected one metric of the same items"):
        metrics.difference(metric([1, 2, 3]), metric([1, 2]))


def test_a_seed_decides():
    values = metric(drawn(5, 30))
    assert metrics.estimate(values, 1) == metrics.estimate(values, 1) != metrics.estimate(values, 2)


def test_through_json():
    before = metric([1.123456789, 2], [3, 4], unit="nats", group="position", x=4.0)
    after = Metric(**json.loads(json.dumps(metrics.packed(before))))
    assert after.numerators == pytest.approx(before.numerators, rel=1e-7) and after.x == 4 and after.group == "position"
    assert "headline" not in metrics.packed(before)


def test_what_is_no_number_is_not_better():
    none = metrics.Estimate(math.nan, math.nan, math.nan, 9)
    assert not metrics.separates(none, metric([1.0])) and not metrics.separates(none, metric([1.0], exponential=True))


def test_two_of_nearly_all_the_weight_have_no_interval():
    for weights, judged in (
        ([49.5, 49.5, 0.3, 0.3, 0.4], False),
        ([95.0, *[0.5] * 10], False),
        ([5.0] * 5, True),
        (UNEQUAL.tolist(), True),  # the test split of the quickstart
    ):
        weights = np.array(weights)
        mine, other = (metric(weights * drawn(seed, len(weights)), weights) for seed in (1, 2))
        for found in (metrics.estimate(mine), metrics.difference(mine, other)):
            assert (found.low is not None) == judged and found.items == len(weights)
