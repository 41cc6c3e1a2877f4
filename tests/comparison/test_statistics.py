from math import comb, sqrt

import baycomp
import numpy as np
import pytest

from finetuning.comparison.statistics import (
    LEVEL,
    SeedSpread,
    _distinct,
    _drawn_differences,
    _sum_of_draws,
    bayesian_signed_rank,
    holm,
    mcnemar,
    mean_and_deviation,
    micro_f1,
    pareto_front,
    pooled_difference,
    resamples_for,
    seed_spread,
    tuning_curve,
)
from tests.synthetic_runs import outcomes


def paired(only_first: int, only_second: int, both: int = 5, neither: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Two runs' outcomes with these numbers of texts that one, both or none got right."""
    first = [True] * only_first + [False] * only_second + [True] * both + [False] * neither
    second = [False] * only_first + [True] * only_second + [True] * both + [False] * neither
    return np.array(first), np.array(second)


def counted(right: np.ndarray) -> np.ndarray:
    """(seeds, n) of right answers as the bootstrap takes them: right, and wrong."""
    return np.stack([right, ~right], axis=-1)


@pytest.mark.parametrize("seeds", [1, 16, 17])
def test_rows_without_a_wrong_answer_are_compared(seeds: int) -> None:
    right = counted(np.ones((seeds, 30), dtype=bool))
    found = pooled_difference([(right, right, None)])
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_the_deviation_is_that_of_a_sample() -> None:
    assert list(mean_and_deviation([1.0, 2.0, 4.0])) == pytest.approx([7 / 3, sqrt(7 / 3)])
    assert mean_and_deviation([0.5]) == (0.5, None)
    assert mean_and_deviation([]) == (None, None)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (0, 5), (3, 3), (9, 2), (2, 9), (40, 61)])
def test_mcnemar_is_the_binomial_test(b: int, c: int) -> None:
    """Against the probability of every outcome that is as rare as the one seen, or rarer."""
    ways = [comb(b + c, k) for k in range(b + c + 1)]
    expected = sum(way for way in ways if way <= ways[b]) / 2 ** (b + c)
    assert mcnemar(*paired(b, c)) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_on_thousands_of_texts_is_near_its_normal_limit() -> None:
    p = mcnemar(*paired(2600, 2400))
    assert p == pytest.approx(0.00487, abs=2e-5)  # z = (200 - 1) / sqrt(5000) = 2.8143, two-sided


def test_holm_by_hand() -> None:
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, each at least what stands before it (Holm 1979)."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.2, 0.2]) == pytest.approx([0.4, 0.4])
    assert holm([]) == []


def test_holm_by_its_definition() -> None:
    """A hypothesis is rejected at a level exactly if all steps up to it pass; brute force over many levels."""
    p_values = np.random.default_rng(0).random(7) ** 3
    corrected, order = holm(p_values.tolist()), np.argsort(p_values)
    for level in np.linspace(0.001, 0.999, 333):
        rejected: set[int] = set()
        for step, i in enumerate(order):
            if p_values[i] > level / (len(p_values) - step):
                break
            rejected.add(int(i))
        assert rejected == {i for i, p in enumerate(corrected) if p <= level}


def test_bootstrap_interval_of_two_single_runs_is_the_normal_one() -> None:
    """The difference of paired proportions has the variance (b + c - (b - c)^2 / n) / n^2."""
    n, b, c = 10_000, 400, 300
    first, second = paired(b, c, both=8000, neither=n - 8000 - b - c)
    found = pooled_difference([(counted(first[None]), counted(second[None]), None)])
    half = 1.959964 * sqrt(b + c - (b - c) ** 2 / n) / n
    assert found.mean == pytest.approx(0.01)
    assert found.low == pytest.approx(0.01 - half, abs=0.03 * half)
    assert found.high == pytest.approx(0.01 + half, abs=0.03 * half)
    assert found.p == pytest.approx(0.000156, rel=0.06)  # z = 100 / sqrt(699)


def test_the_spread_over_seeds_is_pooled() -> None:
    """Variances 1 / 2 and 1 with 1 and 2 degrees of freedom; a single run adds nothing."""
    found = seed_spread([[1.0, 2.0], [5.0, 6.0, 7.0], [3.0]])
    assert found is not None
    assert found.deviation == pytest.approx(sqrt((0.5 + 2 * 1.0) / 3))
    assert found.degrees == 3
    assert seed_spread([[1.0], [2.0]]) is None


@pytest.mark.parametrize("seeds", [1, 3])
def test_seeds_move_a_difference_as_student_says(seeds: int) -> None:
    """Texts on which runs do not differ but by their seed: only the spread is left. 4.30 is t's 0.975 quantile."""
    n, deviation, quantile = 100_000, 0.002, 4.302653
    first, second = (np.stack([outcomes(0.8, n, seed=0)] * count) for count in (seeds, 3))
    found = pooled_difference([(counted(first), counted(second), SeedSpread(deviation, 2))])
    half = quantile * deviation * sqrt(1 / seeds + 1 / 3)
    assert (found.low, found.high) == pytest.approx((-half, half), rel=1e-5)
    assert found.p == pytest.approx(1)


@pytest.mark.parametrize("seeds", [(3, 1), (3, 3)])
def test_methods_that_are_equal_are_seldom_told_apart(seeds: tuple[int, int]) -> None:
    """Runs of one accuracy but for a large spread over seeds: no more than one in twenty finds what is not there."""
    generator, trials, texts = np.random.default_rng(3), 400, 2000
    found = []
    for _ in range(trials):
        first, second = (
            np.stack([outcomes(0.9 + 0.02 * z, texts, 0) for z in generator.normal(size=count)]) for count in seeds
        )
        spread = seed_spread([first.mean(axis=1).tolist(), second.mean(axis=1).tolist()])
        found.append(pooled_difference([(counted(first), counted(second), spread)]).p < LEVEL)
    assert 0.02 <= np.mean(found) <= 0.07


def test_bootstrap_of_texts_against_brute_force() -> None:
    """Resampling texts one by one, as the method is written, gives the same distribution."""
    generator = np.random.default_rng(5)
    n, resamples = 400, 4000
    difficulty = generator.normal(size=n)
    first = np.stack([outcomes(a, n, seed, difficulty) for seed, a in enumerate([0.86, 0.88, 0.89])])
    second = np.stack([outcomes(a, n, seed + 9, difficulty) for seed, a in enumerate([0.84, 0.87])])
    drawn = generator.integers(n, size=(resamples, n))
    differences = first.mean(axis=0)[drawn].mean(axis=1) - second.mean(axis=0)[drawn].mean(axis=1)
    found = pooled_difference([(counted(first), counted(second), None)])
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])), abs=0.004)
    assert found.p == pytest.approx(2 * np.mean(differences <= 0), abs=0.04)


@pytest.mark.parametrize("seeds", [(1, 1), (3, 3), (2, 5), (4, 1)])
@pytest.mark.parametrize("spread", [None, SeedSpread(0.01, 4)])
def test_what_needs_no_draw_equals_a_long_one(seeds: tuple[int, int], spread: SeedSpread | None) -> None:
    first, second = (
        counted(np.stack([outcomes(0.9 - 0.02 * k, 300, seed + 10 * k) for seed in range(count)]))
        for k, count in enumerate(seeds)
    )
    found = pooled_difference([(first, second, spread)])
    assert spread or found == pooled_difference([(first, second, SeedSpread(0.0, 4))])
    drawn = _drawn_differences(first, second, spread, 200_000, "accuracy", np.random.default_rng(0)).round(12)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02 * (high - low))
    assert found.p == pytest.approx(2 * min((drawn <= 0).mean(), (drawn >= 0).mean()), abs=0.005)
    mirrored = pooled_difference([(second, first, spread)])
    assert (mirrored.mean, mirrored.p) == pytest.approx((-found.mean, found.p))
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1 / 300 / seeds[0] / seeds[1])


def test_the_sum_of_draws_of_two_values_is_binomial() -> None:
    """Nine draws of -2 or 4, with a third of them 4: each possible sum against the binomial distribution."""
    sums, chances = _sum_of_draws(np.array([4, -2, -2] * 3))
    assert sums.tolist() == [-18 + 6 * k for k in range(10)]
    assert chances.tolist() == pytest.approx([comb(9, k) * (1 / 3) ** k * (2 / 3) ** (9 - k) for k in range(10)])


def test_bootstrap_of_micro_f1_against_brute_force() -> None:
    generator = np.random.default_rng(1)
    right = generator.integers(0, 4, (2, 2, 60))  # of two methods, two seeds, sixty texts
    wrong = np.stack([generator.integers(0, most, (2, 60)) for most in (3, 5)])
    first, second = np.stack([right, wrong], axis=-1)
    found = pooled_difference([(first, second, None)], resamples=4000, score="micro_f1")
    drawn = generator.integers(0, 60, (4000, 60))

    def scores(counts: np.ndarray) -> np.ndarray:
        right, wrong = counts[:, drawn].sum(2).transpose(2, 0, 1)  # (runs, resamples) each
        return (2 * right / (2 * right + wrong)).mean(0)

    differences = scores(first) - scores(second)
    assert found.low == pytest.approx(np.quantile(differences, 0.025), abs=0.02)
    assert found.high == pytest.approx(np.quantile(differences, 0.975), abs=0.02)
    assert found.mean == pytest.approx(differences.mean(), abs=0.02)
    assert micro_f1(np.array([[3, 2], [0, 0]])).tolist() == [6 / 8, 0]


def test_data_sets_are_pooled_with_equal_weights() -> None:
    """The mean of independent differences has a quarter of the sum of their variances, whatever the sets' sizes."""
    n, b, c = 2000, (90, 60), (30, 50)
    sets = [paired(b[i], c[i], both=1000 * (i + 1), neither=n - b[i] - c[i]) for i in range(2)]
    found = pooled_difference([(counted(a[None]), counted(b[None]), None) for a, b in sets])
    sizes = [len(a) for a, _ in sets]
    means = [(b[i] - c[i]) / sizes[i] for i in range(2)]
    variances = [(b[i] + c[i] - (b[i] - c[i]) ** 2 / sizes[i]) / sizes[i] ** 2 for i in range(2)]
    half = 1.959964 * sqrt(sum(variances)) / 2
    assert found.mean == pytest.approx(sum(means) / 2)
    assert found.low == pytest.approx(found.mean - half, abs=0.03 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.03 * half)


def test_a_data_set_without_a_difference_halves_the_interval_of_the_other() -> None:
    """With two seeds each, Student's t has two degrees of freedom: 2,000 draws miss its tails by half a point."""
    runs = [np.stack([outcomes(share, 300, seed) for seed in range(2)]) for share in (0.9, 0.85)]
    other = (counted(runs[0]), counted(runs[1]), SeedSpread(0.02, 2))
    alone = pooled_difference([other])
    found = pooled_difference([other, (other[0], other[0], SeedSpread(0.0, 2))])
    assert found.mean == pytest.approx(alone.mean / 2)
    assert found.low == pytest.approx(alone.low / 2, abs=2e-4)
    assert found.high == pytest.approx(alone.high / 2, abs=2e-4)
    assert found.p == pytest.approx(alone.p, abs=1e-3)


def test_a_tie_is_no_difference() -> None:
    runs = np.stack([outcomes(0.9, 500, seed) for seed in range(2)])
    found = pooled_difference([(counted(runs), counted(runs), None)])
    assert (found.mean, found.p) == (0, 1)
    alike = pooled_difference([(counted(runs[:1]), counted(runs[:1]), None)])
    assert (alike.low, alike.high, alike.p) == (0, 0, 1)


@pytest.mark.parametrize("pairs", [1, 36, 66, 1953])
def test_the_bootstrap_can_find_a_difference_after_correction(pairs: int) -> None:
    smallest = 2 / (resamples_for(pairs) + 1)
    assert holm([smallest] + [1.0] * (pairs - 1))[0] < LEVEL / 2


def test_pareto_front() -> None:
    costs, scores = [1, 2, 3, 3, 1, 4], [0.8, 0.9, 0.85, 0.95, 0.8, 0.95]
    # the fifth equals the first: neither beats the other; the last costs more for as much
    assert pareto_front(costs, scores) == [True, True, False, True, True, False]


@pytest.mark.parametrize(("sets", "shift"), [(4, -1.0), (14, -0.2), (4, 0.0), (14, 0.4), (14, 0.8)])
def test_the_bayesian_signed_rank_test_is_the_one_of_baycomp(sets: int, shift: float) -> None:
    random = np.random.default_rng(sets)
    second = random.uniform(70, 95, sets)
    first = second + random.normal(shift, 0.7, sets)
    found = bayesian_signed_rank(first.tolist(), second.tolist(), rope=0.5)
    # baycomp's left is the probability that its first argument is better
    expected = baycomp.SignedRankTest.probs(first, second, rope=0.5, random_state=1)
    assert [found[outcome] for outcome in ("better", "equivalent", "worse")] == pytest.approx(expected, abs=0.01)
    assert sum(found.values()) == pytest.approx(1)


def test_the_tuning_curve_of_uniform_scores() -> None:
    """The best of k uniform scores has the distribution x^k, so its median is 0.5^(1/k)."""
    true, inside, draws = 0.5 ** (1 / np.arange(1, 7)), 0, 300
    generator = np.random.default_rng(0)
    for _ in range(draws):
        curve = tuning_curve(generator.random(84).tolist(), 6)
        assert (curve.low[:3] <= curve.median[:3]).all()
        inside += bool(((np.nan_to_num(curve.low, nan=0) <= true) & (true <= np.nan_to_num(curve.high, nan=1))).all())
    assert inside / draws >= 0.95  # of the whole band at once
    exact = tuning_curve(np.arange(1, 10_001).tolist(), 3)
    assert exact.median / 10_000 == pytest.approx(true[:3], abs=1e-3)
    few = tuning_curve([0.1, 0.2, 0.3], 2)
    assert few.median.tolist() == [0.2, 0.3]
    assert np.isnan([*few.low[:1], *few.high]).all()  # three trials bound nothing


def test_texts_that_runs_treat_alike_are_found_as_numpy_finds_them() -> None:
    generator = np.random.default_rng(0)
    for columns, largest in ((4, 2), (12, 9), (40, 5)):  # the last are more than 63 bits
        rows = generator.integers(0, largest, (500, columns))
        for found, expected in zip(_distinct(rows), np.unique(rows, axis=0, return_counts=True), strict=True):
            assert np.array_equal(found, expected)


def test_the_band_is_that_of_massart() -> None:
    band = tuning_curve(np.arange(1, 101).tolist(), 1)
    assert (band.low[0], band.high[0]) == (37, 64), "0.5 -+ sqrt(log(2 / 0.05) / 200) = 0.5 -+ 0.1358"
