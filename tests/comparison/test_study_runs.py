"""The state of runs on disk, their locks, and what tuning chooses."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetuning.comparison.changes import files_of, same_texts
from finetuning.comparison.packed import RUNS, Columns, Record, change_records, read_records
from finetuning.comparison.plan import PlannedRun
from finetuning.comparison.study_runs import StudyRuns
from finetuning.flags import from_flags
from finetuning.runs.files import read_settings, write_result, write_settings
from tests.common import DIVERGED, MADE_HERE, TUNED, leave_run, plan, refusal_of, scored

pytestmark = pytest.mark.usefixtures("project")
PREDICTED = {"row": [0, 1], "label": [0, 1], "predicted": [1, 1]}


def leave_record(
    folder: Path, run: PlannedRun, config: dict[str, Any] | None = None, predictions: Columns | None = None, **more: Any
) -> Record:
    """A collected run in the folder of its study."""
    where = {"data_dir": run.settings.get("data_dir"), "output_dir": None}
    settings = from_flags(run.flags(Path("data"))).to_dict() | where | (config or {})
    result = {"status": "finished", "config": settings, "study": {"run": run.name}, "environment": MADE_HERE} | more
    record = Record.made(folder, result, "step,train_loss\n1,0.5\n", predictions)
    change_records(folder, [record])
    return record


def began_at(runs: StudyRuns, run: PlannedRun, seconds: float) -> None:
    os.utime(runs.directory(run) / "settings.json", (seconds, seconds))


def studies(rows: str = "[axes]\nseed = [0]") -> tuple[StudyRuns, StudyRuns]:
    """A study and another one with the same runs, with folders of runs and of what is collected."""
    study = plan(rows).study
    here, other = (
        StudyRuns(study, Path("runs", name), Path("data"), Path("results", name)) for name in ("tiny", "other")
    )
    return here, other


def test_states_are_read_from_what_a_run_leaves() -> None:
    runs = plan("[axes]\nseed = [0, 1, 2, 3, 4]")
    statuses = ("finished", "failed", "interrupted", None)
    for run, status in zip(runs.study.runs, statuses, strict=False):
        leave_run(runs, run, status)
    states = ["finished", "failed", "interrupted", "interrupted", "missing"]
    assert [runs.state(run) for run in runs.study.runs] == states
    directory = runs.directory(runs.study.runs[0])
    write_settings(directory, read_settings(directory) | {"data_dir": "elsewhere", "output_dir": "x"}, {})
    assert runs.state(runs.study.runs[0]) == "finished"  # where things lie is not what was run
    (directory / "settings.json").write_text("half a fi")
    assert runs.state(runs.study.runs[0]) == "changed"


def test_runs_on_several_nodes_are_refused() -> None:
    Path("data").mkdir(exist_ok=True)
    runs, _ = studies('devices = 2\nstrategy = "ddp"')
    runs.check_flags()
    runs, _ = studies('num_nodes = 2\nstrategy = "ddp"')
    assert refusal_of(runs.check_flags) == "row run: its runs are on 2 nodes each: give them to sbatch without a study"


def test_a_run_has_one_holder_at_a_time() -> None:
    runs = plan("")
    (run,) = runs.study.runs
    with runs.held(run) as lock:
        assert lock is not None
        assert runs.state(run) == "running"
        with runs.held(run) as second:
            assert second is None
    assert runs.state(run) == "missing"


def test_a_run_with_the_default_rate_does_not_take_over_another_rate() -> None:
    _, other = studies("learning_rate = 0.02\n[axes]\nseed = [0]")
    leave_run(other, other.study.runs[0])
    runs, _ = studies()
    assert runs.take_over(runs.study.runs[0]) is None


def test_a_run_that_another_study_has_finished_is_taken_over() -> None:
    runs, other = studies("[axes]\nseed = [0, 1, 2, 3]")
    same, failed, other_data, missing = runs.study.runs
    for run in (same, failed, other_data):
        leave_run(other, run, "failed" if run is failed else "finished")
    (other.directory(same) / "last.ckpt").write_bytes(b"large")
    elsewhere = other.directory(other_data)
    write_settings(elsewhere, read_settings(elsewhere) | {"data_dir": "elsewhere"}, {})
    (other.directory(same) / "best.ckpt").write_bytes(b"about to go")
    half = runs.folder / f".{same.name}.half"  # of a copy that was killed
    half.mkdir(parents=True)
    (half / "rest").touch()

    assert [runs.take_over(run) for run in runs.study.runs] == [other.directory(same), None, None, None]
    assert [runs.state(run) for run in runs.study.runs] == ["finished", "missing", "missing", "missing"]
    left = sorted(path.name for path in runs.directory(same).iterdir())
    assert left == ["metrics.csv", "result.json", "settings.json"]
    assert runs.result(same) == other.result(same)
    assert not half.exists()
    changed = StudyRuns(plan("lora_r = 2\n[axes]\nseed = [0]").study, Path("runs/third"), Path("data"))
    assert changed.take_over(changed.study.runs[0]) is None
    assert runs.state(missing) == "missing"


def test_a_run_that_was_tested_stands_for_one_that_only_tunes() -> None:
    runs, other = studies(TUNED)
    first = runs.study.runs[0]
    tested = replace(first, settings={**first.settings, "test": True})
    leave_run(other, first)
    assert runs.take_over(tested) is None  # not the other way round
    leave_run(other, tested)
    assert runs.take_over(first) == other.directory(tested)
    assert runs.state(first) == "finished"


def test_what_was_collected_of_another_study_is_taken_over() -> None:
    runs, _ = studies(f'data_dir = "set"\n{TUNED}')
    (_, first, _, final), planned = runs.study.runs, runs.study.runs[-1].with_tuned({"learning_rate": 0.001})
    sources = [
        leave_record(Path("results/other"), run, predictions=PREDICTED, test={"accuracy": 0.9})
        for run in (replace(first, settings={**first.settings, "test": True}), planned)
    ]
    leave_record(Path("results/tiny"), first, {"epochs": 3})  # a copy that is outdated
    assert [runs.take_over(run) for run in (first, planned)] == [source.path for source in sources]
    assert StudyRuns(runs.study, runs.folder, Path("data")).take_over(first) is None  # only where it is asked for
    assert [runs.state(run) for run in (first, planned)] == ["finished", "finished"]
    assert runs.result(planned)["study"] == runs.place_in_study(planned)
    assert runs.result(planned)["test"] == {"accuracy": 0.9}
    assert runs.result(planned)["study"]["study"] == "tiny"
    assert "test" not in runs.result(first)
    records, _ = read_records(Path("results/tiny"))
    assert set(records) == {first.name, final.name}
    assert {record.metrics for record in records.values()} == {sources[0].metrics}
    assert (records[first.name].predictions, records[final.name].predictions) == (None, PREDICTED)


@pytest.mark.parametrize("elsewhere", [{"cpu": "another"}, {"gpus": [] if MADE_HERE["gpus"] else ["0"]}])
def test_a_run_of_another_machine_is_taken_over_only_if_its_precision_is_given(elsewhere: dict[str, Any]) -> None:
    runs, other = studies('data_dir = "set"\n[axes]\nseed = [0, 1]')
    for change, known in (({"precision": "auto"}, False), ({}, True)):  # they are in fp32
        left, collected = (replace(run, settings=run.settings | change) for run in runs.study.runs)
        leave_run(other, left, environment=MADE_HERE | elsewhere)
        found = {"test": {"accuracy": 0.9}, "environment": MADE_HERE | elsewhere}
        leave_record(Path("results/other"), collected, None, PREDICTED, **found)
        assert [runs.take_over(run) is not None for run in (left, collected)] == [known, known]


def test_a_study_without_a_test_takes_none_over() -> None:
    runs, _ = studies('data_dir = "set"\ntest = false\n[axes]\nseed = [0]')
    (run,) = runs.study.runs
    tested = replace(run, settings={**run.settings, "test": True})
    source = leave_record(Path("results/other"), tested, predictions=PREDICTED, test={"accuracy": 0.9})
    assert runs.take_over(run) == source.path
    record = read_records(Path("results/tiny"))[0][run.name]
    assert ("test" in record.result, record.predictions) == (False, None)


def test_a_run_of_data_that_have_changed_is_not_taken_over(project: Path) -> None:
    runs, other = studies()
    (run,) = runs.study.runs
    data = project / "data"
    data.mkdir()
    (data / "train.csv").write_text("text,label\n")
    leave_run(other, run)
    changed = (data / "train.csv").stat().st_ctime
    began_at(other, run, changed - 1)
    os.utime(data / "train.csv", (0, 0))  # a copy of an older file, as by ``cp -p``
    assert runs.take_over(run) is None
    assert other.older_than_their_files() == [run.name]
    assert runs.older_than_their_files() == [], "it has none here"
    began_at(other, run, time.time() + 1)
    (data / "log.txt").touch()
    os.utime(data / "log.txt", (time.time() + 9,) * 2)  # none of the texts
    assert other.older_than_their_files() == []
    (runs.directory(run) / ".lock").parent.mkdir(parents=True)
    (runs.directory(run) / "notes").touch()
    assert runs.take_over(run) is None  # for these notes are not ours
    (runs.directory(run) / "notes").unlink()
    for name in (".lock", f".settings.json.{32 * '0'}.tmp.json"):  # of a process that was killed early
        (runs.directory(run) / name).touch()
    assert runs.take_over(run) == other.directory(run)
    assert sorted(path.name for path in runs.folder.iterdir()) == [run.name]


def test_a_run_of_a_model_that_has_changed_is_not_taken_over(project: Path) -> None:
    runs, other = studies()  # its model is the folder "model"
    (run,) = runs.study.runs
    (project / "model").mkdir(exist_ok=True)
    (project / "model" / "config.json").touch()
    leave_run(other, run)
    began_at(other, run, (project / "model" / "config.json").stat().st_mtime - 1)
    assert runs.take_over(run) is None
    assert other.older_than_their_files() == [run.name]
    began_at(other, run, time.time() + 1)
    assert runs.take_over(run) == other.directory(run)


def test_a_link_to_other_texts_is_a_change(project: Path) -> None:
    runs, other = studies()
    (run,) = runs.study.runs
    for name in ("one", "two"):
        (project / name).mkdir()
        (project / name / "train.csv").write_text(name)
    (project / "data").symlink_to("one")
    leave_run(other, run)
    began_at(other, run, time.time() + 1)
    assert other.older_than_their_files() == []
    (project / "data").unlink()
    (project / "data").symlink_to("two")
    began_at(other, run, (project / "data").lstat().st_mtime - 0.001)
    assert other.older_than_their_files() == [run.name]


@pytest.mark.parametrize(
    ("dataset", "first", "second", "same"),
    [
        ("text", {"train.csv": "a"}, {"train.csv": "a", "log.txt": "x"}, True),
        ("text", {"train.csv": "a"}, {"train.csv": "a", "test.csv": "x"}, False),
        ("text", {"train.parquet/0": "a"}, {"train.parquet/0": "b"}, False),
        ("text", {"train.parquet/0": "a"}, {"train.parquet/0": "a"}, True),
        ("text", {"train.csv": "a"}, {}, True),  # purged, or not mounted
        ("imdb", {"train/pos/0.txt": "a"}, {"train/pos/0.txt": "a", "README": "x"}, True),
        ("imdb", {"train/pos/0.txt": "a"}, {"train/pos/0.txt": "b"}, False),
        ("imdb", {"train/pos/0.txt": "a"}, {"aclImdb/train/pos/0.txt": "a"}, True),  # cannot be compared
    ],
)
def test_which_folders_hold_the_same_texts(
    dataset: str, first: dict[str, str], second: dict[str, str], same: bool, tmp_path: Path
) -> None:
    for name, files in (("first", first), ("second", second)):
        (tmp_path / name).mkdir()
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
    assert same_texts(tmp_path / "first", tmp_path / "second", dataset) is same
    (tmp_path / "first" / "train.csv").unlink(missing_ok=True)
    (tmp_path / "first" / "train.csv").symlink_to("nothing")
    assert same_texts(tmp_path / "first", tmp_path / "gone", dataset)


def test_what_a_run_reads_of_a_model_and_an_adapter(project: Path) -> None:
    for name in ("model", "adapter"):
        (project / name / "sub").mkdir(parents=True, exist_ok=True)
        for file in ("adapter_model.safetensors", "report.html", "sub/index"):
            (project / name / file).touch()
    names = {path.name for path in files_of(project / "model", "model")}
    assert {"adapter_model.safetensors", "report.html"} <= names
    assert "index" not in names
    assert [path.name for path in files_of(project / "adapter", "adapter")] == ["adapter_model.safetensors"]


def test_a_run_that_read_other_texts_is_not_the_planned_one(project: Path) -> None:
    runs, _ = studies()
    (run,) = runs.study.runs
    for name in ("data", "copy", "others"):
        (project / name).mkdir()
        (project / name / "train.csv").write_text("other" if name == "others" else "same")
    leave_run(runs, run)
    settings = read_settings(runs.directory(run))
    for name, state in (("data", "finished"), ("copy", "finished"), ("others", "changed"), ("gone", "finished")):
        write_settings(runs.directory(run), settings | {"data_dir": name}, {})
        assert runs.state(run) == state, name
    write_settings(runs.directory(run), settings | {"data_dir": "others"}, {})
    assert runs.differences(run) == ["--data_dir others -> data"]


@pytest.mark.parametrize("name", ["predictions.parquet", "metrics.csv"])
def test_a_damaged_run_of_another_study_is_not_taken_over(name: str) -> None:
    runs, other = studies()
    (run,) = runs.study.runs
    leave_run(other, run, test={"accuracy": 0.9})
    directory = other.directory(run)
    (directory / "predictions.parquet").write_bytes(b"predictions")
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    write_result(directory, other.result(run))
    (directory / "adapter_model.safetensors").unlink()  # somebody needed its space
    good = (directory / name).read_bytes()

    (directory / name).write_bytes(b"damaged")
    assert runs.take_over(run) is None
    (directory / name).unlink()
    assert runs.take_over(run) is None
    (directory / name).write_bytes(good)
    assert runs.take_over(run) == directory


def test_damaged_records_of_another_study_are_not_taken_over() -> None:
    runs, _ = studies('data_dir = "set"\n[axes]\nseed = [0]')
    (run,) = runs.study.runs
    record = leave_record(Path("results/other"), run, predictions=PREDICTED, test={"accuracy": 0.9})
    path = record.folder / RUNS
    good = path.read_bytes()
    path.write_bytes(b"damaged")
    assert runs.take_over(run) is None
    path.unlink()
    assert runs.take_over(run) is None
    path.write_bytes(good)
    assert runs.take_over(run) == record.path


def test_a_record_of_texts_that_only_the_command_names_is_not_taken_over() -> None:
    runs, _ = studies()  # the other study may have had another --data_dir
    leave_record(Path("results/other"), runs.study.runs[0])
    assert runs.take_over(runs.study.runs[0]) is None


def test_a_run_from_an_adapter_is_done_whatever_the_adapter_said() -> None:
    runs = plan('init_adapter = "first"\n[axes]\nseed = [0]')
    (run,) = runs.study.runs
    found = {"lora_r": 4, "lora_alpha": 8.0, "lora_scaling": "standard", "lora_variant": "lora", "lora_query": True}
    leave_run(runs, replace(run, settings={**run.settings, **found}))
    assert runs.state(run) == "finished"
    leave_run(runs, replace(run, settings={**run.settings, **found, "epochs": 9}))
    assert runs.state(run) == "changed"


def test_what_tuning_sets_changes_the_defaults_that_follow_from_it() -> None:
    """The optimizer of the tuning has another weight decay than that of the plan without it."""
    rows = '[[rows]]\nname = "a"\ntune = { optimizer = ["sgd", "adamw"] }\n[search]\ntrials = 2'
    runs, _ = studies(rows)
    (final,) = runs.study.stage("final")
    record = leave_record(Path("results/tiny"), final.with_tuned({"optimizer": "sgd"}), seconds=3.0)
    assert runs.result(final) == record.result


def test_a_record_without_its_test_stands_for_no_final_run() -> None:
    runs, _ = studies(f'data_dir = "set"\n{TUNED}')
    first, *_, final = runs.study.runs
    # it tuned, and its test was forgotten
    record = leave_record(Path("results/other"), replace(first, settings={**first.settings, "test": True}))
    assert runs.take_over(final.with_tuned(first.axes)) is None
    assert runs.take_over(first) == record.path


def test_a_run_whose_files_change_while_it_is_copied_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, other = studies()
    (run,) = runs.study.runs
    leave_run(other, run)

    def vanished(_: Path, half: Path, **__: object) -> None:
        half.mkdir()
        raise shutil.Error("a file was removed")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", vanished)
        assert runs.take_over(run) is None
    assert list(runs.folder.glob(".*.half")) == []
    assert runs.take_over(run) == other.directory(run)


def test_a_collected_run_counts_where_none_lies_here() -> None:
    runs, _ = studies("[axes]\nseed = [0, 1, 2, 3]")
    done, other_data, other_settings, here = runs.study.runs
    changes: dict[str, dict[str, Any]] = {
        done.name: {"resume": True},  # it had been interrupted
        other_data.name: {"data_dir": "other"},
        other_settings.name: {"epochs": 3},
    }
    records = [leave_record(Path("results/tiny"), run, changes.get(run.name, {})) for run in runs.study.runs]
    leave_run(runs, here, "interrupted")
    assert [runs.state(run) for run in runs.study.runs] == ["finished", "missing", "missing", "interrupted"]
    assert runs.result(done) == records[0].result
    assert [runs.holds(run) for run in runs.study.runs] == [False, False, False, True]
    assert StudyRuns(runs.study, runs.folder).state(done) == "missing"  # only where it is asked for


def test_a_run_left_to_auto_is_done_whatever_auto_chose_and_takes_over_no_other() -> None:
    runs, other = studies('[[rows]]\nname = "a"\nepochs = "auto"\nbatch_size = "auto"\npatience = "auto"')
    (run,) = runs.study.runs
    chosen = {"epochs": 7, "batch_size": 16, "batch_tokens": 6144, "patience": 2}
    done = replace(run, settings={**run.settings, **chosen})
    leave_run(other, done)
    leave_record(Path("results/other"), done, predictions=PREDICTED, test={"accuracy": 0.9})
    assert runs.take_over(done) == other.directory(done)
    shutil.rmtree(runs.directory(done))
    assert runs.take_over(run) is None
    assert runs.state(run) == "missing"

    leave_record(Path("results/tiny"), done)
    assert runs.state(run) == "finished"
    leave_run(runs, done)
    assert runs.state(run) == "finished"
    leave_run(runs, replace(done, settings={**done.settings, "lora_r": 2}))
    assert runs.differences(run) == ["--lora_r 2 -> 8"]


@pytest.mark.parametrize(
    ("monitor", "scores", "best"),
    [
        ("accuracy", (0.7, 0.9, 0.8), 0.002),
        ("accuracy", (0.8, 0.9, 0.9), 0.002),  # of equals, the smaller
        ("macro_f1", (0.9, 0.9, 0.9), 0.001),
        ("loss", (0.3, 0.4, 0.2), 0.003),
        ("loss", (0.2, 0.4, 0.2), 0.001),
        ("accuracy", (0.6, 0.7, DIVERGED), 0.002),  # too large a rate is an answer, too
    ],
)
def test_a_final_run_takes_the_best_rate_on_validation(
    monitor: str, scores: tuple[float | str, ...], best: float
) -> None:
    runs = plan(f'monitor = "{monitor}"\n{TUNED}')
    scored(runs, monitor, *scores)
    (final,) = runs.study.stage("final")
    assert runs.tuned(final).settings["learning_rate"] == best
    assert runs.tuned(final).settings.get("test") is None
