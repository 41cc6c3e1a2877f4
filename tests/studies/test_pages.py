"""What the repository adds to the report of its studies, and what another one gets."""

from pathlib import Path

from compare_methods import REPOSITORY
from finetuning.comparison.collected import read_study
from finetuning.comparison.page import Plot
from finetuning.tuning import command
from studies.pages import README_PLOT, README_STUDY, page_plots, page_tables, readme_plot
from tests.common import Patch, some
from tests.synthetic_runs import outcomes, two_studies, write_run


def test_the_plot_of_readme_has_only_the_rows_asked_for(tmp_path: Path) -> None:
    for k, name in enumerate(["lora", "full", "adam"]):
        write_run(tmp_path, README_STUDY, name, correct=outcomes(0.9, 100, k))
    study = read_study(README_STUDY, tmp_path)
    plot = some(readme_plot(study, ("lora", "full")))
    assert plot.file == README_PLOT
    assert plot.png != getattr(readme_plot(study, ("lora", "full", "adam")), "png", None)
    assert readme_plot(study, ("lora",)) is None
    assert page_plots([study]) == {README_PLOT: plot}
    assert page_plots([]) == {README_PLOT: None}


def test_every_table_of_the_pages_has_its_markers() -> None:
    text = "".join(page.read_text(encoding="utf8") for page in REPOSITORY.pages)
    tables = page_tables([], {}, [".."])[".."]
    assert len(tables) == 5
    for name in tables:
        assert f"<!-- {name}:begin -->" in text, name


def test_the_installed_command_adds_nothing_to_the_studies_of_others(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Plot, "png", b"")  # drawing takes long
    results, page = tmp_path / "results", tmp_path / "README.md"
    two_studies(results)
    (results / README_PLOT).write_bytes(b"mine")
    names = ("a", "a_rows", "a_short", "a_sets", "studies", *page_tables([], {}, [".."])[".."])
    page.write_text("".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in names))
    assert command.main(["report", "--results", str(results), "--pages", str(page)]) == 0
    text = page.read_text()
    filled = [name for name in names if f"<!-- {name}:begin -->\n<!--" not in text]
    assert filled == ["a", "a_rows", "a_short", "a_sets", "studies"]
    assert "[a](results/a/table.md)" in text
    assert (results / README_PLOT).read_bytes() == b"mine"
