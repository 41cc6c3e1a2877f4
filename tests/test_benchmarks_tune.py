"""The tables of the benchmark of searches, from records; its searches are those of tests/test_tune.py."""

from benchmarks.tune import gain_table, kills_table, merged, repeat_table, samplers_plot, samplers_table, speed_table
from tests.synthetic_runs import ENVIRONMENT

MADE = {"environment": ENVIRONMENT}


def row_of(table: str) -> str:
    """The last row of a table."""
    return [line for line in table.splitlines() if line.startswith("|")][-1]


def test_gains_have_their_mean_over_data_sets() -> None:
    records = [
        {"set": name, "seed": seed, "trials": {"complete": 5, "pruned": 3}, "minutes": 14.5, "gain": gain}
        | {"winner": 3, "new_seeds": 2}
        | MADE
        for seed in (0, 1)
        for name, mean in (("trec6", 0.01), ("emotion", 0.03))
        for gain in [{"mean": mean, "ci95": [mean - 0.01, mean + 0.01]}]
    ]
    table = gain_table(records)
    assert table.startswith("4 of 12 searches are there.\n")
    assert "| trec6 | 0 | 8 | 14.5 | trial 3 | 2 | +1.00 (+0.00 to +2.00) |\n| trec6 | 1 |" in table
    assert row_of(table) == "| mean of 2 sets |  |  |  |  |  | +2.00 (-10.71 to +14.71) |"
    unchanged = {"winner": 0, "gain": {"mean": 0.0, "ci95": [0.0, 0.0]}}
    assert row_of(gain_table([records[0] | unchanged])) == "| trec6 | 0 | 8 | 14.5 | the default | 2 | 0 |"
    assert "mean of" not in gain_table([record for record in records if record["set"] == "trec6"])


def test_a_part_of_the_searches_stands_next_to_the_earlier_ones() -> None:
    earlier = [{"set": name, "seed": 0, "gain": 1} for name in ("a", "b")]
    new = [{"set": "b", "seed": seed, "gain": 2} for seed in (0, 1)]
    assert merged(earlier, new) == [earlier[0], *new]
    assert merged([{"kills": 1}], [{"kills": 2}]) == [{"kills": 2}], "these parts have one record"


def test_samplers_have_the_mean_over_seeds_where_all_have_a_score() -> None:
    records = [
        {"set": "a", "kind": "TPE", "seed": seed, "trials": 10, "best": {"5": best, "10": 0.9}, "ends": ends} | MADE
        for seed, best, ends in ((0, 0.8, [(2.0, 0.8), (6.0, 0.9)]), (1, None, [(7.0, 0.9)]))
    ]
    assert row_of(samplers_table(records)) == "| a | TPE | 2 | 10 |  | 90.00 |"
    other = records[0] | {"kind": "random", "best": {"2": 0.7}}
    assert row_of(samplers_table([*records, other])) == "| a | random | 1 | 10 |  |  | 70.00 |"
    assert samplers_plot(records).startswith(b"\x89PNG")
    assert samplers_plot(records) != samplers_plot(records[:1])


def test_speed_kills_and_repetition_have_one_row() -> None:
    speed = {"trials": 10, "seconds_with_two_jobs": 100.0, "seconds_one_by_one": 250.0}
    assert row_of(speed_table([speed | MADE])) == "| 10 | 360 | 144 | 2.50 |"
    kills = {"workers": 8, "kills": 50, "planned": 60, "trials": 60, "complete": 60, "statuses": [0] * 8}
    assert row_of(kills_table([kills | MADE])) == "| 8 | 50 | 60 | 60 | 60 |"
    same = {"trials": 12, "same_trials": True, "same_weights": False}
    assert row_of(repeat_table([same | MADE])) == "| 12 | yes | no |"
