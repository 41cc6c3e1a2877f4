from itertools import product
from math import comb, sqrt

import numpy as np
import pytest
from synthetic_runs import outcomes

from study_statistics import (
    LEVEL,
    bootstrap_difference,
    holm,
    mcnemar,
    mean_and_deviation,
    pareto_front,
    resamples_for,
)


def paired(only_first: int, only_second: int, both: int = 5, neither: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Two runs' outcomes with these numbers of texts that one, both or none got right."""
    first = [True] * only_first + [False] * only_second + [True] * both + [False] * neither
    second = [False] * only_first + [True] * only_second + [True] * both + [False] * neither
    return np.array(first), np.array(second)


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
    found = bootstrap_difference(first[None], second[None], resamples=20_000)
    half = 1.959964 * sqrt(b + c - (b - c) ** 2 / n) / n
    assert found.mean == pytest.approx(0.01)
    assert found.low == pytest.approx(0.01 - half, abs=0.03 * half)
    assert found.high == pytest.approx(0.01 + half, abs=0.03 * half)
    assert found.p == pytest.approx(0.000156, abs=0.00025)  # z = 100 / sqrt(699)


def test_bootstrap_over_seeds_has_the_variance_of_their_mean() -> None:
    """Texts on which runs do not differ but by their seed: only the spread of three seeds is left, s^2 / 3 each."""
    accuracies = [0.80, 0.83, 0.87]
    n = 100_000
    runs = np.stack([outcomes(accuracy, n, seed=0) for accuracy in accuracies])
    perfect = np.ones((1, n), bool)
    found = bootstrap_difference(perfect, runs, resamples=20_000)
    variance = np.var(accuracies, ddof=1) / 3
    # Drawing 2 of 3 seeds gives each pair's mean: brute force over all nine draws has the same variance.
    draws = [np.mean(pair) for pair in product(accuracies, repeat=2)]
    assert np.var(draws) == pytest.approx(variance)
    assert (found.low, found.high) == pytest.approx((1 - 0.87, 1 - 0.80), abs=0.004)


def test_bootstrap_of_methods_against_brute_force() -> None:
    """Resampling texts and seeds one by one, as the method is written, gives the same distribution."""
    generator = np.random.default_rng(5)
    n, resamples = 400, 4000
    difficulty = generator.normal(size=n)
    first = np.stack([outcomes(a, n, seed, difficulty) for seed, a in enumerate([0.86, 0.88, 0.89])])
    second = np.stack([outcomes(a, n, seed + 9, difficulty) for seed, a in enumerate([0.84, 0.87])])
    differences = []
    for _ in range(resamples):
        texts = generator.integers(n, size=n)
        a, b = (runs[generator.integers(len(runs), size=len(runs) - 1)][:, texts].mean() for runs in (first, second))
        differences.append(a - b)
    found = bootstrap_difference(first, second, resamples=resamples)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])), abs=0.004)
    assert found.p == pytest.approx(2 * np.mean(np.array(differences) <= 0), abs=0.04)


def test_bootstrap_is_the_same_twice_and_symmetric() -> None:
    first, second = (np.stack([outcomes(0.9 - 0.01 * k, 500, seed + 10 * k) for seed in range(3)]) for k in range(2))
    found, again = (bootstrap_difference(first, second) for _ in range(2))
    assert found == again
    mirrored = bootstrap_difference(second, first, resamples=20_000)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=0.003)


def test_a_tie_is_no_difference() -> None:
    runs = np.stack([outcomes(0.9, 500, seed) for seed in range(2)])
    found = bootstrap_difference(runs, runs)
    assert (found.mean, found.p) == (0, 1)
    alike = bootstrap_difference(runs[:1], runs[:1])
    assert (alike.low, alike.high, alike.p) == (0, 0, 1)


@pytest.mark.parametrize("pairs", [1, 36, 66, 1953])
def test_the_bootstrap_can_find_a_difference_after_correction(pairs: int) -> None:
    smallest = 2 / (resamples_for(pairs) + 1)
    assert holm([smallest] + [1.0] * (pairs - 1))[0] < LEVEL / 2


def test_pareto_front() -> None:
    costs, scores = [1, 2, 3, 3, 1, 4], [0.8, 0.9, 0.85, 0.95, 0.8, 0.95]
    # the fifth equals the first: neither beats the other; the last costs more for as much
    assert pareto_front(costs, scores) == [True, True, False, True, True, False]
