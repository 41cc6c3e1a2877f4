"""Settings that a study with ``[search]`` draws."""

from finetuning.comparison.drawn import tried_settings


def test_a_draw_lies_in_its_range_although_it_is_rounded() -> None:
    """Three digits would be 0.00123 and 1."""
    tune = {"learning_rate": {"low": 0.0012345, "high": 0.0012349}, "dropout": {"low": 0.996, "high": 0.9999}}
    drawn = tried_settings("any", tune, {"trials": 20})
    assert len(drawn) == 20
    for settings in drawn.values():
        for flag, limits in tune.items():
            assert limits["low"] <= settings[flag] <= limits["high"]
    wide = tried_settings("any", {"learning_rate": {"low": 1e-4, "high": 1e-2}}, {"trials": 20}).values()
    assert all(f"{settings['learning_rate']:.3g}" == f"{settings['learning_rate']:g}" for settings in wide)
    assert len({settings["learning_rate"] for settings in wide}) == 20
