"""Numbers -> verdicts: McNemar's test, a bootstrap over texts and seeds, Holm's correction, the Pareto front."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05  # a corrected p value at or above it says "not distinguishable"
RESAMPLES = 2_000


@dataclass(frozen=True)
class Difference:
    """Accuracy of the first minus accuracy of the second, as fractions of 1, with its 95 % interval and p value."""

    mean: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class SeedSpread:
    """How far runs of one method lie apart by their seed: the deviation of accuracies, and its degrees of freedom."""

    deviation: float
    degrees: int


def seed_spread(methods: Sequence[Sequence[float]]) -> SeedSpread | None:
    """Pooled over methods, each with the accuracies of its seeds; ``None`` where none has two."""
    degrees = sum(len(accuracies) - 1 for accuracies in methods)
    if not degrees:
        return None
    return SeedSpread(math.sqrt(sum(map(squares, methods)) / degrees), degrees)


def squares(values: Sequence[float]) -> float:
    """The sum of squared distances from the mean; 0 for a single value."""
    return statistics.variance(values) * (len(values) - 1) if len(values) > 1 else 0.0


def mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean, and the standard deviation with n - 1; ``None`` where there are too few values for it."""
    return (
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """The two-sided p value of McNemar's test (1947): an exact sign test on the texts that one run alone got right.

    Args:
        first: ``(n,)`` bool, whether the first run got each text right.
        second: the same for the second run, of the same texts in the same order.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    n = only_first + only_second
    tail, ways = 0, 1  # exact integers: for thousands of texts no float holds 2**n
    for k in range(min(only_first, only_second) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def bootstrap_difference(
    first: np.ndarray,
    second: np.ndarray,
    spread: SeedSpread | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The difference of two methods' mean accuracy, from resamples of the texts and draws of the seeds.

    Texts that all runs treat alike are drawn together, which is the same multinomial with far fewer classes. Seeds are
    not resampled: three of them would never leave the range of the three, and one would seem to have no spread. Their
    mean instead moves by a draw of Student's t, scaled to the spread that the methods share; a single run moves most.

    Args:
        first: ``(seeds, n)`` bool, whether each run of the first method got each text right.
        second: ``(seeds, n)`` bool for the second method, of the same texts in the same order.
        spread: over seeds; without it the difference is that of these very runs.
        resamples: the smallest p value that it can give is 2 / (resamples + 1).
        seed: of the generator.
    """
    texts = first.shape[1]
    patterns, counts = np.unique(np.concatenate([first, second]).T, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(texts, counts / texts, size=resamples)  # (resamples, patterns)
    accuracies = drawn @ patterns / texts  # (resamples, runs)
    differences = accuracies[:, : len(first)].mean(axis=1) - accuracies[:, len(first) :].mean(axis=1)
    if spread is not None:
        scale = spread.deviation * math.sqrt(1 / len(first) + 1 / len(second))
        differences += scale * generator.standard_t(spread.degrees, size=resamples)
    low, high = np.quantile(differences, [0.025, 0.975])
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    p = min(1.0, 2 * (rarer + 1) / (resamples + 1))  # the data itself counts as one resample: p is never 0
    return Difference(float(first.mean() - second.mean()), float(low), float(high), float(p))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number by Holm's step-down method (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def resamples_for(pairs: int) -> int:
    """Enough that a p value can stay below ``LEVEL`` after Holm's correction over ``pairs`` comparisons."""
    return max(RESAMPLES, 100 * pairs)


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[bool]:
    """Which points no other one beats: none costs as little or less and scores as high or higher, better in one."""
    points = list(zip(costs, scores, strict=True))
    return [not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points) for cost, score in points]
