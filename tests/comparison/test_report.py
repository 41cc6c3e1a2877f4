import json
from pathlib import Path

import pytest

from finetuning.comparison.report import (
    PAGES,
    README,
    RESULTS,
    build,
    learning_rates,
    main,
    with_table,
)
from finetuning.errors import UserError
from tests.synthetic_runs import outcomes, write_run

MARKED = """top
<!-- s:begin -->
old
<!-- s:end -->
<!-- default_learning_rates:begin -->
<!-- default_learning_rates:end -->
end
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two studies: one with seeds, a tie, a failure and tuning, one that README does not show."""
    folder = tmp_path / "results"
    for seed in range(2):
        for row in ("lora", "qlora"):
            write_run(folder, "s", row, seed=seed, correct=outcomes(0.9 + 0.01 * seed, 300, seed), curve=[0.8, 0.9])
    write_run(folder, "s", "broken", status="failed")
    for rate in (1e-3, 1e-2):
        write_run(folder, "s", "lora", stage="tune", axes={"learning_rate": rate})
    write_run(folder, "learning_rates", "adam", correct=outcomes(0.8, 300, 9))
    (tmp_path / "README.md").write_text(MARKED)
    return folder


def report(results: Path) -> int:
    return main(["--results", str(results), "--pages", str(results.parent / "README.md")])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_committed_report_is_that_of_the_committed_runs() -> None:
    """Plots and the page that holds them are of the matplotlib that drew them, so only texts are compared."""
    for path, content in build(RESULTS, PAGES).items():
        if path.suffix in (".md", ".csv", ".json"):
            assert path.read_bytes() == content, "run: make tables"
        else:
            assert path.is_file() == (content is not None), "run: make tables"


def test_readme_has_its_markers() -> None:
    for name in (
        "earlier_work",
        "imdb_official",
        "default_learning_rates",
        "peers",
        "headline",
        "plain_path",
        "roofline",
    ):
        assert f"<!-- {name}:begin -->" in README.read_text(encoding="utf8")


def test_rebuilding_gives_the_same_bytes(results: Path) -> None:
    assert report(results) == 0
    first = contents(results.parent)
    assert {"results/summary.json", "results/report.html", "results/s/table.md", "results/s/table.csv"} <= set(first)
    assert report(results) == 0
    assert contents(results.parent) == first


def test_what_the_report_says(results: Path) -> None:
    report(results)
    readme = (results.parent / "README.md").read_text()
    assert "| lora | 90.50 ± 0.71 | 2 | 300 | 90.00 | 1,234 | 100 | 1.00 |" in readme
    assert "| broken | failed |" in readme
    assert "Highest of the 2 compared: lora. Not distinguishable from it: qlora." in readme  # a tie
    assert readme.startswith("top\n")
    assert readme.endswith("end\n")
    assert "old" not in readme
    table = (results / "s" / "table.md").read_text()
    for said in (
        "## Every pair of rows compared (1)",
        "not distinguishable",
        "## Learning rates tried",
        "](learning_rates.png)",
    ):
        assert said in table
    rows = json.loads((results / "summary.json").read_text())
    assert [(row["study"], row["row"], row["seeds"]) for row in rows] == [
        ("learning_rates", "adam", 1), ("s", "lora", 2), ("s", "qlora", 2), ("s", "broken", 0),
    ]  # fmt: skip
    assert [row["accuracy_mean"] for row in rows] == pytest.approx([0.8, 0.905, 0.905, None])


def test_readme_shows_the_default_rates(results: Path) -> None:
    report(results)
    assert f"\n{learning_rates()}\n<!-- default_learning_rates:end -->" in (results.parent / "README.md").read_text()


def test_a_plot_goes_with_its_data(results: Path) -> None:
    report(results)
    assert (results / "s" / "learning_curves.png").is_file()
    for path in (results / "s").glob("*/metrics.csv"):
        path.unlink()
    report(results)
    assert not (results / "s" / "learning_curves.png").exists()
    assert (results / "s" / "accuracy_parameters.png").is_file()


def test_refused_input_writes_nothing(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "s" / "broken-final-seed0" / "result.json").write_text("{")
    before = contents(results.parent)
    assert report(results) == 2
    assert main(["--results", str(results / "nowhere")]) == 2
    assert main(["--results", str(results), "--pages", str(results)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [error.split()[0] for error in errors] == ["error:"] * 3
    assert "--results" in errors[1]
    assert "--pages" in errors[2]
    assert contents(results.parent) == before


def test_other_results_renew_no_page_of_the_suite(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = results.parent / "README.md"
    monkeypatch.setattr("finetuning.comparison.report.PAGES", (page,))
    assert main(["--results", str(results)]) == 0
    assert page.read_text() == MARKED
    monkeypatch.setattr("finetuning.comparison.report.RESULTS", results)
    assert main(["--results", str(results)]) == 0
    assert page.read_text() != MARKED
    assert main(["--result", str(results)], "compare_methods.py report") == 2
    assert capsys.readouterr().err == f"error: unrecognized arguments: --result {results}; did you mean --results?\n"


def test_markers_come_in_pairs_or_not_at_all() -> None:
    assert with_table("text", "study", "table") == "text"
    for text in ("<!-- study:begin -->", "<!-- study:end -->", "<!-- study:end --> <!-- study:begin -->"):
        with pytest.raises(UserError, match="--pages"):
            with_table(text, "study", "table")
