import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from compare_methods import BEST_PRACTICES, EVIDENCE, GUIDE, README, REPOSITORY, RESULTS, SPEED, main
from finetuning.comparison.collected import read_study
from finetuning.comparison.packed import RUNS, Record, change_records, read_records
from finetuning.comparison.page import Plot
from finetuning.comparison.pairs import method_of
from finetuning.comparison.report import Report, build_report, part_done
from studies.pages import README_PLOT, default_rates_table
from tests.common import Capture, Patch, contents, some
from tests.synthetic_runs import outcomes, write_run

MARKED = """top
<!-- s:begin -->
old
<!-- s:end -->
<!-- s_short:begin -->
<!-- s_short:end -->
<!-- s_rows:begin -->
<!-- s_rows:end -->
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
    return main(["report", "--results", str(results), "--pages", str(results.parent / "README.md")])


@pytest.fixture(scope="module")
def committed() -> Report:
    """What the committed runs give."""
    return build_report(REPOSITORY)


@pytest.mark.xdist_group("committed")  # in one process: the report is built once
def test_the_committed_report_is_that_of_the_committed_runs(committed: Report) -> None:
    """Plots depend on the version of matplotlib, and most are not committed: they are not compared."""
    for path, content in committed.texts.items():
        assert path.read_bytes() == content.encode(), "run: make tables"
    plot = some(committed.plots[RESULTS / README_PLOT])
    assert (RESULTS / README_PLOT).is_file()
    assert plot.png.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("page", "names"),
    [
        (README, ("earlier_work_short", "speed_short")),
        (GUIDE, ("default_learning_rates",)),
        (BEST_PRACTICES, ("default_settings",)),
        (EVIDENCE, ("default_learning_rates",)),
        (SPEED, ("peers", "headline", "plain_path", "roofline")),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_every_table_has_a_place_on_its_page(page: Path, names: tuple[str, ...]) -> None:
    text = page.read_text(encoding="utf8")
    for name in names:
        (shown,) = re.findall(f"<!-- {name}:begin -->\n(.*?)\n<!-- {name}:end -->", text, flags=re.DOTALL)
        assert shown.strip(), name


@pytest.mark.xdist_group("committed")
def test_the_short_table_of_earlier_work_fits_on_a_screen(committed: Report) -> None:
    readme = committed.texts[README]
    (text,) = re.findall("(<!-- earlier_work_short:begin -->\n.*?<!-- earlier_work_short:end -->)", readme, re.DOTALL)
    lines = text.splitlines()
    assert lines[1] == "| row | reported by others, % | test accuracy, % | trainable parameters |"
    assert len(lines[3:-3]) == 9
    assert lines[-3] == ""
    assert lines[-2].startswith("*Measured: ")
    assert max(map(len, lines)) <= 160
    assert "finetune_lora" not in text


def test_a_part_of_a_study_says_how_much_is_there(tmp_path: Path) -> None:
    write_run(tmp_path, "s", "lora", correct=outcomes(0.9, 10, 0))
    write_run(tmp_path, "s", "lora", stage="tune", axes={"learning_rate": 0.1})
    assert part_done(read_study("s", tmp_path)) == ""
    change_records(tmp_path / "s", [], ["lora-final-seed0", "lora-final-seed1", "lora-final-seed2"])
    assert part_done(read_study("s", tmp_path)) == "1 of 3 runs are there. Trials that chose their settings: 1 of 1."
    write_run(tmp_path, "s", "full", status="failed")
    assert part_done(read_study("s", tmp_path)).endswith(": 1 of 1. Failed, so in no mean: full-final-seed0.")
    draws = [f"{method}{draw}" for method in ("lora-all", "full") for draw in ("", "-data_seed1")]
    sets = [f"{name}-{draw}-seed0" for name in "ab" for draw in draws]
    change_records(tmp_path / "s", [], ["lora-final-seed0", *sets, "c-full-seed0"])
    said = part_done(read_study("s", tmp_path), on_sets=True)
    assert "of 6. Data sets on which runs are missing: lora-all 2 of 2, full 3 of 3. Failed" in said
    write_run(tmp_path, "s", "my-set-lora-all", data_set="my-set")
    study = read_study("s", tmp_path)
    assert [method_of(study, f"{name}-lora-all") for name in ("a", "my-set")] == ["lora-all"] * 2


@contextmanager
def undrawn() -> Iterator[None]:
    """Drawing takes seconds; test_plots.py compares the bytes of pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plot, "png", b"drawn")
        yield


def test_what_the_report_says(results: Path) -> None:
    with undrawn():
        assert report(results) == 0
    first = contents(results.parent)
    assert {"results/summary.json", "results/report.html", "results/s/table.md"} <= set(first)
    readme = (results.parent / "README.md").read_text()
    assert "| lora | 90.50 ± 0.71 | 2 | 300 | 90.00 | 1,234 | 100 | 1.00 |" in readme
    assert "<!-- s_short:begin -->\n| row | test accuracy, % | trainable parameters |\n" in readme
    assert "\n| lora | 90.50 | 1,234 |\n" in readme
    rows = readme[readme.index("<!-- s_rows:begin -->") : readme.index("<!-- s_rows:end -->")]
    assert "| lora | 90.50 ± 0.71 | 2 |" in rows
    assert "finetune_lora" not in rows
    assert "| broken | failed |" in readme
    assert "Best: lora (90.50 %; the same: qlora). No significant difference: qlora." in readme  # a tie
    assert readme.startswith("top\n")
    assert readme.endswith("end\n")
    assert "old" not in readme
    assert f"\n{default_rates_table()}\n<!-- default_learning_rates:end -->" in readme
    assert not (results / README_PLOT).exists()
    table = (results / "s" / "table.md").read_text()
    for said in (
        "## All pairs of rows (1)",
        "no significant difference",
        "## Settings tried",
        "\n- `learning_rates.png`: Validation accuracy by peak learning rate.",
    ):
        assert said in table
    rows = json.loads((results / "summary.json").read_text())
    assert [(row["study"], row["row"], row["seeds"]) for row in rows] == [
        ("learning_rates", "adam", 1), ("s", "lora", 2), ("s", "qlora", 2), ("s", "broken", 0),
    ]  # fmt: skip
    assert [row["accuracy_mean"] for row in rows] == pytest.approx([0.8, 0.905, 0.905, None])

    with undrawn():
        assert report(results) == 0
    assert contents(results.parent) == first, "the same runs give the same bytes"
    assert (results / "s" / "learning_curves.png").is_file()
    records = read_records(results / "s")[0].values()
    change_records(results / "s", [Record.made(r.folder, r.result, None, r.predictions) for r in records])
    for k, row in enumerate(("lora", "full")):
        write_run(results, "earlier_work", row, correct=outcomes(0.9, 300, k))
    assert report(results) == 0
    assert not (results / "s" / "learning_curves.png").exists(), "a plot goes with its data"
    assert (results / "s" / "accuracy_parameters.png").read_bytes().startswith(b"\x89PNG")
    assert (results / README_PLOT).read_bytes().startswith(b"\x89PNG")


def test_refused_input_writes_nothing(results: Path, capsys: Capture) -> None:
    (results / "s" / RUNS).write_text("{")
    before = contents(results.parent)
    assert report(results) == 2
    assert main(["report", "--results", str(results / "nowhere")]) == 2
    assert main(["report", "--results", str(results), "--pages", str(results)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [error.split()[0] for error in errors] == ["error:"] * 3
    assert "--results" in errors[1]
    assert "--pages" in errors[2]
    assert contents(results.parent) == before


def test_other_results_renew_no_page_of_the_suite(results: Path, monkeypatch: Patch, capsys: Capture) -> None:
    page = results.parent / "README.md"
    monkeypatch.setattr(Plot, "png", b"")  # drawing takes long
    monkeypatch.setattr("compare_methods.REPOSITORY", replace(REPOSITORY, pages=(page,)))
    assert main(["report", "--results", str(results)]) == 0
    assert page.read_text() == MARKED
    monkeypatch.setattr("compare_methods.REPOSITORY", replace(REPOSITORY, results=results, pages=(page,)))
    assert main(["report", "--results", str(results)]) == 0
    assert page.read_text() != MARKED
    assert main(["report", "--result", str(results)]) == 2
    assert capsys.readouterr().err == f"error: unrecognized arguments: --result {results}; did you mean --results?\n"
