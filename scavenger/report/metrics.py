"""Metrics and their uncertainty: ratios of sums over items, bootstrap intervals, and paired differences."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats


LEVEL = 0.95  # of every interval
RESAMPLES = 2000  # the ends of an interval are then accurate to about a fiftieth of its width
LEAST_ITEMS = 5  # with four items even their full range misses the population's median 1 time in 8
LEAST_EFFECTIVE = 2.5  # (Σ w)² / Σ w²: with less one or two items have nearly all of the weight and decide alone
BATCH = 100  # resamples drawn at once: 5,000 items take 8 MB


@dataclass(frozen=True)
class Metric:
    """Σ numerators / Σ denominators over items (documents, questions, sequences), or exp of it.

    Items are what the bootstrap resamples, so dependent observations form one item. For all models, metrics of the same
    name have the same items in the same order.
    """

    name: str
    numerators: list[float]
    denominators: list[float]
    unit: Literal["", "share", "nats", "bits", "rate"] = ""  # a share is shown in percent
    better: Literal["higher", "lower", ""] = ""
    exponential: bool = False  # a perplexity: compared by ratio
    group: str = ""  # metrics of a group form one curve over x
    x: float | None = None  # distance or position, tokens
    headline: bool = False  # whether the table of a comparison has a row for it
    relative: bool = False  # nearness to a reference, meaningless for the reference itself

    @property
    def by_ratio(self) -> bool:
        """Whether models are compared by the ratio of their values: perplexities and speeds."""
        return self.exponential or self.unit == "rate"


@dataclass(frozen=True)
class Estimate:
    """A value and its interval at LEVEL, which is None for too few items or too unequal ones."""

    value: float
    low: float | None
    high: float | None
    items: int


def estimate(metric: Metric, seed: int = 0) -> Estimate:
    """The metric and its percentile interval over items; no interval for items that are `_too_few`.

    A share of 0 or 1 would have an interval of width 0 from resampling; it has Wilson's interval instead.
    """
    sums = _sums(metric)
    value = float(_ratio(*sums, exponential=metric.exponential))
    count = int((sums[1] > 0).sum())
    if _too_few(sums[1]):
        return Estimate(value, None, None, count)
    if metric.unit == "share" and value in (0.0, 1.0):
        wilson = stats.binomtest(int(value) * count, count).proportion_ci(LEVEL, "wilson")
        return Estimate(value, float(wilson.low), float(wilson.high), count)
    ends = _bootstrap(sums, lambda n, d, axis=-1: _ratio(n, d, axis, metric.exponential), seed)
    return Estimate(value, *ends, count)


def difference(metric: Metric, reference: Metric, seed: int = 0) -> Estimate:
    """metric - reference, or metric / reference for perplexities and speeds; the same items are resampled for both.

    The items of speeds are rounds, few and equal: their ratio is the geometric mean over rounds, with the t interval
    of its logarithm. Raises ValueError if the metrics do not have the same items.
    """
    pairs = [*_sums(metric), *_sums(reference)]
    if metric.name != reference.name or len(pairs[0]) != len(pairs[2]):
        raise ValueError(
            f"found {metric.name} of {len(pairs[0])} items and {reference.name} of {len(pairs[2])}; "
            "expected one metric of the same items"
        )

    if metric.unit == "rate":
        return _ratio_of_rates(*pairs)

    def apart(n, d, reference_n, reference_d, axis=-1):
        mine, other = _ratio(n, d, axis), _ratio(reference_n, reference_d, axis)
        return np.exp(mine - other) if metric.exponential else mine - other

    value, count = float(apart(*pairs)), int((pairs[1] > 0).sum())
    if _too_few(pairs[1]):
        return Estimate(value, None, None, count)
    return Estimate(value, *_bootstrap(pairs, apart, seed), count)


def separates(found: Estimate, metric: Metric) -> bool:
    """Whether a difference's interval excludes the value of equal models (0, or 1 for ratios)."""
    equal = 1.0 if metric.by_ratio else 0.0
    return found.low is not None and (found.low > equal or found.high < equal)  # False for NaN


def packed(metric: Metric) -> dict:
    """The metric for JSON: fields that differ from their defaults, sums rounded to eight digits."""
    plain = {field.name: field.default for field in dataclasses.fields(Metric)}
    short = {key: value for key, value in dataclasses.asdict(metric).items() if value != plain[key]}
    return short | {key: [float(f"{x:.8g}") for x in short[key]] for key in ("numerators", "denominators")}


def show(found: Estimate, unit: str, signed: bool = False, ratio: bool = False) -> str:
    """An estimate as text, e.g. 19.29 [18.90, 19.71]; shares in percent, differences of shares in points.

    `signed` is for differences; `ratio` for those that are ratios.
    """
    if not math.isfinite(found.value):
        return "∞" if found.value > 0 else "not a number"
    scale, digits = (
        (100, 1) if unit == "share" else (1, 1 if abs(found.value) >= 100 or (unit == "rate" and not ratio) else 3)
    )
    if 0 < scale * abs(found.value) < 0.01:
        digits = 5  # e.g. the KL between a student and its recurrence
    of = "" if unit != "share" else " points" if signed else " %"
    sign = "" if ratio or not signed else "+"
    shown = f"{'× ' if ratio else ''}{scale * found.value:{sign},.{digits}f}{of}"
    if found.low is None:
        return shown
    return f"{shown} [{', '.join(f'{scale * end:,.{digits}f}' for end in (found.low, found.high))}]"


def _sums(metric):
    return np.asarray(metric.numerators, float), np.asarray(metric.denominators, float)


def _ratio(numerators, denominators, axis=-1, exponential=False):
    ratio = numerators.sum(axis) / denominators.sum(axis)
    return np.exp(ratio) if exponential else ratio


def _ratio_of_rates(numerators, denominators, other_numerators, other_denominators):
    logs = np.log(numerators / denominators) - np.log(other_numerators / other_denominators)
    value, count = logs.mean(), len(logs)
    if count < LEAST_ITEMS:
        return Estimate(float(np.exp(value)), None, None, count)
    half = stats.t.ppf((1 + LEVEL) / 2, count - 1) * logs.std(ddof=1) / math.sqrt(count)
    return Estimate(*(float(np.exp(end)) for end in (value, value - half, value + half)), count)


def _too_few(weights):
    """Whether items with these weights have no interval: fewer than LEAST_ITEMS, or effectively LEAST_EFFECTIVE."""
    return int((weights > 0).sum()) < LEAST_ITEMS or _effective(weights) < LEAST_EFFECTIVE


def _effective(weights):
    """The number of equal items that would tell as much: (Σ w)² / Σ w²."""
    return weights.sum() ** 2 / (weights**2).sum()


def _expanded(weights):
    """The nominal level at which a percentile interval over few items has the coverage LEVEL.

    `1 - 2 Φ(-sqrt(n / (n - 1)) t)`, t the quantile of Student's distribution with n - 1 degrees of freedom: Hesterberg,
    arXiv:1411.5279, "expanded percentile". n is the effective number of items: nine documents of which two have four
    fifths of the tokens count as fewer than nine.
    """
    freedom = _effective(weights) - 1
    quantile = stats.t.ppf((1 + LEVEL) / 2, freedom)
    return 1 - 2 * stats.norm.cdf(-math.sqrt((freedom + 1) / freedom) * quantile)


def _bootstrap(samples, statistic, seed):
    counted = np.all(samples[1::2], axis=0)  # a resample with a denominator of 0 would have no ratio
    found = stats.bootstrap(
        [sample[counted] for sample in samples],
        statistic,
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=_expanded(samples[1][counted]),
        n_resamples=RESAMPLES,
        batch=BATCH,
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
