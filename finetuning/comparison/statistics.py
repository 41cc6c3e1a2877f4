"""Numbers -> verdicts: McNemar's test, a bootstrap over texts and seeds, Holm's correction, the Pareto front."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.optimize import brentq
from scipy.special import bdtr, stdtr, stdtrit

LEVEL = 0.05  # a corrected p value at or above it means "no significant difference"
RESAMPLES = 2_000
POOLED_DRAWS = 100_000  # of known distributions: Student's t has long tails with few seeds
BLOCK = 100  # resamples that are in memory at once
EXACT = 1e-12  # a chance below it is the rounding of the transform
LEAST_P = 1e-12  # smaller ones cannot be told from 0
POSTERIOR_DRAWS = 50_000


@dataclass(frozen=True)
class Difference:
    """The score of the first minus the score of the second, as fractions of 1, with its 95 % interval and p value."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def cell(self) -> str:
        """In a table: points, and the interval in brackets."""
        return f"{100 * self.mean:+z.2f} ({100 * self.low:+z.2f} to {100 * self.high:+z.2f})"

    def __str__(self) -> str:
        return self.cell.replace("(", "points (95 % interval ")


@dataclass(frozen=True)
class SeedSpread:
    """How much accuracy varies with the seed: standard deviation, and its degrees of freedom."""

    deviation: float
    degrees: int


def seed_spread(methods: Sequence[Sequence[float]]) -> SeedSpread | None:
    """The spread over seeds, pooled over methods; ``None`` if no method has two seeds.

    Args:
        methods: for each method the accuracies of its seeds.
    """
    degrees = sum(len(accuracies) - 1 for accuracies in methods)
    if not degrees:
        return None
    return SeedSpread(math.sqrt(sum(map(squares, methods)) / degrees), degrees)


def squares(values: Sequence[float]) -> float:
    """The sum of squared distances from the mean; 0 for one value."""
    return statistics.variance(values) * (len(values) - 1) if len(values) > 1 else 0.0


def mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean, and the standard deviation with n - 1; ``None`` if there are too few values."""
    return (statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """The two-sided p value of McNemar's test (1947): an exact sign test on texts that only one of two runs got right.

    Args:
        first: ``(n,)`` bool, whether the first run got each text right.
        second: the same for the second run, with the same texts in the same order.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def accuracy(counts: np.ndarray) -> np.ndarray:
    """Accuracy from numbers of answers, ``(..., 2)``: right, and wrong."""
    return counts[..., 0] / counts.sum(axis=-1)


def micro_f1(counts: np.ndarray) -> np.ndarray:
    """Micro F1 from numbers of labels, ``(..., 2)``: found and right, wrongly given or missed; 0 without any label."""
    right, wrong = counts[..., 0], counts[..., 1]
    return 2 * right / np.maximum(2 * right + wrong, 1)


SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"accuracy": accuracy, "micro_f1": micro_f1}


def pooled_difference(
    sets: Sequence[tuple[np.ndarray, np.ndarray, SeedSpread | None]],
    resamples: int = RESAMPLES,
    score: str = "accuracy",
) -> Difference:
    """The difference of two methods' mean score, by a bootstrap over texts and a random draw for the seeds.

    For accuracy the distribution of the draws is computed: on one data set nothing is drawn, over several each set's
    quantiles are added in random orders. For other scores, texts that all runs treat alike are drawn together: this is
    the same multinomial with far fewer classes. Seeds are not resampled, because three values would never leave their
    own range, and one value would have no spread. Instead the difference moves by a draw from Student's t, scaled to
    the spread that all methods share. The fewer seeds a method has, the further it moves. Each data set is drawn by
    itself, and all sets weigh the same.

    Args:
        sets: for each data set three values. The first is ``(seeds, n, 2)``: for each run of the first method and each
            text, what ``score`` counts. The second is the same for the second method, with the same texts in the same
            order. The third is how much the score varies with the seed; without it the result is about these runs only.
        resamples: number of draws of another score than accuracy, whose smallest p value is 2 / (resamples + 1).
        score: a key of ``SCORES``.
    """
    if score == "accuracy" and len(sets) == 1:
        return _exact_difference(*sets[0])
    generator = np.random.default_rng(0)
    score_of = SCORES[score]
    mean = np.mean([float(score_of(a.sum(axis=1)).mean() - score_of(b.sum(axis=1)).mean()) for a, b, _ in sets])
    if score == "accuracy":
        drawn = [_shuffled_quantiles(a, b, spread, generator) for a, b, spread in sets]
    else:
        drawn = [_drawn_differences(a, b, spread, resamples, score, generator) for a, b, spread in sets]
    differences = np.mean(drawn, axis=0)
    low, high = np.quantile(differences, [0.025, 0.975])
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    p = min(1.0, 2 * (rarer + 1) / (len(differences) + 1))  # the data counts as one resample, so p is never 0
    return Difference(float(mean), float(low), float(high), float(p))


def _exact_difference(first: np.ndarray, second: np.ndarray, spread: SeedSpread | None) -> Difference:
    """What ``pooled_difference`` draws, without a draw, for accuracy on one data set."""
    mean, differences, chances = _over_texts(first, second)
    if spread is None or not spread.deviation:
        low, high = differences[np.searchsorted(np.cumsum(chances), [0.025, 0.975])]
        tails = [chances[differences <= 0].sum(), chances[differences >= 0].sum()]
    else:
        scale, degrees = _scale(first, second, spread), spread.degrees

        def excess(end: float, chance: float) -> float:
            """How much more than this chance lies below an end."""
            return float(chances @ stdtr(degrees, (end - differences) / scale)) - chance

        def end_of(chance: float) -> float:
            lowest, highest = differences[[0, -1]] + scale * stdtrit(degrees, chance)
            return float(brentq(excess, lowest, highest, (chance,))) if lowest < highest else float(lowest)

        low, high = end_of(0.025), end_of(0.975)
        tails = [chances @ stdtr(degrees, sign * differences / scale) for sign in (-1, 1)]
    p = min(1.0, max(LEAST_P, 2 * float(min(tails))))
    return Difference(mean, float(low), float(high), p)


def _shuffled_quantiles(
    first: np.ndarray, second: np.ndarray, spread: SeedSpread | None, generator: np.random.Generator
) -> np.ndarray:
    """``(POOLED_DRAWS,)``: as ``_drawn_differences`` for accuracy, but evenly over the known distributions."""

    def chances_in_random_order() -> np.ndarray:
        return (generator.permutation(POOLED_DRAWS) + 0.5) / POOLED_DRAWS

    _, differences, chances = _over_texts(first, second)
    drawn: np.ndarray = differences[np.searchsorted(np.cumsum(chances)[:-1], chances_in_random_order())]
    if spread is None:
        return drawn
    return drawn + _scale(first, second, spread) * stdtrit(spread.degrees, chances_in_random_order())


def _over_texts(first: np.ndarray, second: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The difference of the two accuracies; those in draws of as many texts, rising, and the chance of each."""
    right, other = (runs[..., 0].astype(np.int64).sum(axis=0) for runs in (first, second))
    of_text = right * len(second) - other * len(first)  # (n,) whole numbers: a text's difference times ``unit``
    unit = len(first) * len(second)
    sums, chances = _sum_of_draws(of_text)
    return float(of_text.mean()) / unit, sums / (len(of_text) * unit), chances


def _scale(first: np.ndarray, second: np.ndarray, spread: SeedSpread) -> float:
    """The standard deviation that the seeds give to the difference of two means of runs."""
    return spread.deviation * math.sqrt(1 / len(first) + 1 / len(second))


def _sum_of_draws(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The possible sums of n draws, with replacement, from n whole numbers, and their chances.

    The distribution of a sum of draws is the n-fold convolution of one draw's: a power of its Fourier transform.
    """
    count, step = len(values), max(1, int(np.gcd.reduce(values)))  # the sums are this far apart
    lowest = int(values.min()) // step
    shares = np.bincount(values // step - lowest) / count
    size = count * (len(shares) - 1) + 1
    length = next_fast_len(size, real=True)
    chances = irfft(_power(rfft(shares, length), count), length)[:size]
    likely = np.flatnonzero(chances > EXACT)
    return (likely + count * lowest) * step, chances[likely] / chances[likely].sum()


def _power(values: np.ndarray, exponent: int) -> np.ndarray:
    """Complex numbers to a power of at least 1. Squaring is several times as fast as ``**``."""
    if exponent == 1:
        return values
    half = _power(values, exponent // 2)
    return half * half * values if exponent % 2 else half * half


def _drawn_differences(
    first: np.ndarray,
    second: np.ndarray,
    spread: SeedSpread | None,
    resamples: int,
    score: str,
    generator: np.random.Generator,
) -> np.ndarray:
    """``(resamples,)``: the difference in each draw of texts and seeds, see ``pooled_difference``."""
    runs = np.concatenate([first, second])  # (runs, n, 2)
    texts = runs.shape[1]
    patterns, counts = _distinct(runs.transpose(1, 0, 2).reshape(texts, -1))
    blocks = [min(BLOCK, resamples - done) for done in range(0, resamples, BLOCK)]  # each of (block, patterns)
    sums = np.concatenate([generator.multinomial(texts, counts / texts, size=size) @ patterns for size in blocks])
    scores = SCORES[score](sums.reshape(resamples, len(runs), 2))  # (resamples, runs)
    differences: np.ndarray = scores[:, : len(first)].mean(axis=1) - scores[:, len(first) :].mean(axis=1)
    if spread is None:
        return differences
    return differences + _scale(first, second, spread) * generator.standard_t(spread.degrees, size=resamples)


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rows of numbers from 0 in their order, and how often each occurs.

    Rows become single numbers where 63 bits are enough: these are sorted ten times as fast. NumPy makes them of 32
    columns at most.
    """
    sizes = rows.max(axis=0) + 1
    if math.prod(sizes.tolist()) >= 2**63 or len(sizes) > 32:
        patterns, counts = np.unique(rows, axis=0, return_counts=True)
        return patterns, counts
    codes, counts = np.unique(np.ravel_multi_index(tuple(rows.T), sizes), return_counts=True)
    return np.stack(np.unravel_index(codes, sizes), axis=1), counts


def p_text(p: float) -> str:
    """A p value to two digits; to four if two would be those of the level."""
    return f"{p:.4g}" if f"{p:.2g}" == f"{LEVEL:g}" else f"{p:.2g}"


def holm(p_values: Sequence[float]) -> list[float]:
    """p values, corrected for their number by Holm's step-down method (Holm 1979), in the same order."""
    p = np.array(p_values)
    order, corrected = np.argsort(p, kind="stable"), np.empty(len(p))
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(p), 0, -1) * p[order]))
    return corrected.tolist()


def interval_over_sets(differences: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of independent values, at least two: Student's t."""
    half = float(stdtrit(len(differences) - 1, 0.975)) * statistics.stdev(differences) / math.sqrt(len(differences))
    mean = statistics.fmean(differences)
    return mean - half, mean + half


def bayesian_signed_rank(first: Sequence[float], second: Sequence[float], rope: float) -> dict[str, float]:
    """The Bayesian signed-rank test with a region of practical equivalence (Benavoli et al. 2014 and 2017).

    Args:
        first, second: the score of each method on each data set, in the same order.
        rope: differences up to this size are equivalent, in the unit of the scores.

    Returns:
        How probable it is that the first method is typically ``better``, ``equivalent``, ``worse``. One set can differ.
    """
    differences = np.array([0.0, *np.subtract(first, second)])  # 0: the prior's pseudo-observation
    sums = differences[:, None] + differences
    above, below = (np.heaviside(side - 2 * rope, 0.5) for side in (sums, -sums))
    weights = np.random.default_rng(0).dirichlet([0.5, *np.ones(len(first))], POSTERIOR_DRAWS)
    shares = [((weights @ side) * weights).sum(1) for side in (above, below)]
    mass = np.stack([shares[0], 1 - shares[0] - shares[1], shares[1]])
    best = mass == mass.max(0)  # of equal ones each gets its part
    return dict(zip(("better", "equivalent", "worse"), (best / best.sum(0)).mean(1).tolist(), strict=True))


def resamples_for(pairs: int) -> int:
    """Enough resamples for a p value below ``LEVEL`` after Holm's correction over ``pairs`` comparisons."""
    return max(RESAMPLES, 100 * pairs)


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[bool]:
    """Which points are on the front: no other one is at least as good in cost and score and better in one of them."""
    points = list(zip(costs, scores, strict=True))
    return [not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points) for cost, score in points]


@dataclass(frozen=True)
class TuningCurve:
    """The best score of k trials, for k = 1, 2, ...: its median, and the ends of a band that holds at all k at once."""

    median: np.ndarray
    low: np.ndarray  # NaN where the trials are too few for a bound
    high: np.ndarray


def tuning_curve(scores: Sequence[float], most: int) -> TuningCurve:
    """The median tuning curve with its 95 % band (Lourie et al. 2023, https://arxiv.org/abs/2311.09480).

    The best of k independent trials has the distribution F^k, so its median is the 0.5^(1/k) quantile of F. The band of
    Dvoretzky, Kiefer and Wolfowitz around the empirical F, with Massart's constant, bounds all quantiles.

    Args:
        scores: of independent random trials.
        most: the largest k.
    """
    ordered, n = np.sort(scores), len(scores)
    width = math.sqrt(math.log(2 / LEVEL) / (2 * n))
    quantiles = 0.5 ** (1 / np.arange(1, most + 1))

    def at(levels: np.ndarray) -> np.ndarray:
        ranks = np.ceil(np.round(levels * n, 9)).astype(int)
        return np.where((ranks >= 1) & (ranks <= n), ordered[np.clip(ranks, 1, n) - 1], np.nan)

    return TuningCurve(at(quantiles), at(quantiles - width), at(quantiles + width))
