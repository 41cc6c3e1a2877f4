"""The tables of the benchmark of searches, from records; its searches are those of tests/test_tune.py."""

from benchmarks.tune import gain_table, kills_table, samplers_table, speed_table


def test_gains_have_their_mean_over_data_sets() -> None:
    records = [
        {"set": name, "seed": seed, "trials": {"complete": 5, "pruned": 3}, "minutes": 14.5, "gain": gain}
        for name, mean in (("a", 0.01), ("b", 0.03))
        for seed in (0, 1)
        for gain in [{"mean": mean, "ci95": [mean - 0.01, mean + 0.01]}]
    ]
    lines = gain_table(records).splitlines()
    assert "| a | 0 | 8 | 14.5 | +1.00 (+0.00 to +2.00) |" in lines
    assert lines[-1] == "| mean of sets |  |  |  | +2.00 (-10.71 to +14.71) |"
    assert "mean of sets" not in gain_table(records[:2])


def test_samplers_have_the_mean_over_seeds_where_all_have_a_score() -> None:
    records = [
        {"set": "a", "kind": "TPE", "seed": seed, "trials": 10, "best": {"5": best, "10": 0.9}}
        for seed, best in ((0, 0.8), (1, None))
    ]
    assert samplers_table(records).splitlines()[-1] == "| a | TPE | 10 |  | 90.00 |"


def test_speed_and_kills_have_one_row() -> None:
    speed = {"trials": 10, "seconds_with_two_jobs": 100.0, "seconds_one_by_one": 250.0}
    assert speed_table([speed]).endswith("| 360 | 144 | 2.50 |")
    kills = {"workers": 8, "kills": 50, "planned": 60, "trials": 60, "complete": 60, "statuses": [0] * 8}
    assert kills_table([kills]).endswith("| 8 | 50 | 60 | 60 | 60 |")
