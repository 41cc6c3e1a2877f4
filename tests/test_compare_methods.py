"""Studies that run, are killed and go on; and what is told, chosen and collected of runs that have ended."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import finetune_lora
from benchmarks.slurm_cluster import wait_until
from compare_methods import main
from finetuning.comparison import execution
from finetuning.comparison.execution import CurrentRun, CurrentRuns, Starter, StudyExecution
from finetuning.comparison.packed import read_records
from finetuning.comparison.plan import PlannedRun, read_plan
from finetuning.comparison.study_runs import StudyRuns, TuningUnfinished
from finetuning.flags import from_flags
from finetuning.forking import can_fork
from finetuning.processes import OF_A_TASK, is_helper, srun_tasks
from finetuning.runs.files import ADAPTER, write_result
from finetuning.runs.history import write_predictions
from tests.common import DIVERGED, ROOT, TUNED, contents, leave_run, one_thread, plan, scored, write_study
from tests.scripts import Script, start_with_server

PATIENCE_SECONDS = 240  # for a machine with other work

pytestmark = pytest.mark.usefixtures("project")


def leave_predictions(runs: StudyRuns, run: PlannedRun, logits: np.ndarray, labels: np.ndarray) -> None:
    """Predictions of a validation of three texts, and of a test in another order than its rows'."""
    order = np.random.default_rng(0).permutation(len(labels))
    splits = {
        "validation": (np.arange(3), np.zeros(3, int), np.ones((3, logits.shape[1]))),
        "test": (order, labels[order], logits[order]),
    }
    write_predictions(runs.directory(run), splits)
    write_result(runs.directory(run), runs.result(run))


# --- states


def test_list_tells_state_and_command_of_each_run(capsys: pytest.CaptureFixture[str]) -> None:
    runs = plan("[axes]\nseed = [0, 1, 2, 3, 4, 5]")
    missing, finished, failed, interrupted, killed, running = runs.study.runs
    for run, status in ((finished, "finished"), (failed, "failed"), (interrupted, "interrupted"), (killed, None)):
        leave_run(runs, run, status)
    leave_run(runs, running, None)
    with runs.held(running):
        assert main(["list", "tiny.toml", "--data_dir", "."]) == 0
    lines = capsys.readouterr().out.splitlines()
    states = ["missing", "finished", "failed", "interrupted", "interrupted", "running"]
    assert [line.split()[:3] for line in lines] == [[str(i), s, f"run-seed{i}"] for i, s in enumerate(states)]
    words = lines[missing.seed].split("python ")[1].split()
    assert Path(words[0]).resolve() == ROOT / "finetune_lora.py"
    config = from_flags(words[1:])
    assert (config.run.output_dir, config.data.data_dir) == (Path("runs/tiny/run-seed0"), Path())
    assert config.training.epochs == 1


def test_a_run_of_other_settings_is_neither_taken_for_the_planned_one_nor_overwritten(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = plan("")
    (run,) = runs.study.runs
    leave_run(runs, run)
    runs = plan("lora_r = 2")
    before = (runs.directory(run) / "settings.json").read_bytes()
    assert runs.state(runs.study.runs[0]) == "changed"
    assert main(["run", "tiny.toml", "--data_dir", "."]) == 1
    line = "has other settings (--lora_r 8 -> 2): remove it, rename the row or give another --runs_dir"
    assert line in capsys.readouterr().out
    assert main(["collect", "tiny.toml"]) == 0
    assert "not collected: run-seed0 is changed" in capsys.readouterr().err
    assert (runs.directory(run) / "settings.json").read_bytes() == before


def test_a_run_whose_result_is_damaged_is_not_done_again(capsys: pytest.CaptureFixture[str]) -> None:
    runs = plan("")
    (run,) = runs.study.runs
    leave_run(runs, run)
    result = runs.directory(run) / "result.json"
    result.write_text("half a fi")
    before = sorted(runs.directory(run).iterdir())
    assert main(["run", "tiny.toml", "--data_dir", "."]) == 1
    assert "(result.json cannot be read: " in capsys.readouterr().out
    assert sorted(runs.directory(run).iterdir()) == before
    assert result.read_text() == "half a fi"


def test_what_has_ended_is_not_run_again(capsys: pytest.CaptureFixture[str]) -> None:
    runs = plan("[axes]\nseed = [0, 1]")
    leave_run(runs, runs.study.runs[0])
    leave_run(runs, runs.study.runs[1], "failed", error="no space left")
    assert main(["run", "tiny.toml", "--data_dir", "."]) == 1
    shown = capsys.readouterr().out
    assert "2 runs, 1 failed, 1 finished" in shown
    assert "2/2  run-seed1  failed earlier: no space left (run it again with --retry_failed)" in shown
    assert main(["run", "tiny.toml", "--data_dir", ".", "--index", "0"]) == 0


def test_a_run_that_fails_elsewhere_in_the_meantime_is_not_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    runs = plan("")
    (run,) = runs.study.runs
    leave_run(runs, run, "failed", error="no memory left")
    execution = StudyExecution(runs, Path("finetune_lora.py"), [run], True, CurrentRuns(), 1)
    execution.failed_before = {run.name: runs.result(run)}
    leave_run(runs, run, "failed", error="no space left")
    execution.take_up(run)
    assert execution.ended == {run.name: "failed"}
    assert "failed earlier: no space left" in capsys.readouterr().out


def test_a_run_whose_log_cannot_be_written_is_not_started(capsys: pytest.CaptureFixture[str]) -> None:
    runs = plan("")
    (run,) = runs.study.runs
    runs.log(run).mkdir(parents=True)
    assert main(["run", "tiny.toml", "--data_dir", "."]) == 2
    shown = capsys.readouterr()
    assert "started" not in shown.out
    assert shown.err == f"error: --runs_dir: {runs.log(run)} cannot be written: Is a directory\n"


def test_an_error_of_the_command_stops_its_runs() -> None:
    def command(run: subprocess.Popen[bytes]) -> None:
        with CurrentRuns[CurrentRun]().listening() as current:
            current.add(CurrentRun(child=run, claim=ExitStack()))
            raise OSError("no space left")

    with subprocess.Popen(["sleep", "60"]) as run, pytest.raises(OSError, match="no space left"):
        command(run)
    assert run.returncode == -signal.SIGTERM


def test_a_study_goes_on_from_what_was_collected_on_another_machine(capsys: pytest.CaptureFixture[str]) -> None:
    runs = plan(TUNED)
    scored(runs, "accuracy", 0.7, 0.9, DIVERGED)
    (final,) = runs.study.stage("final")
    leave_run(runs, runs.tuned(final), test={"accuracy": 0.5})
    leave_predictions(runs, final, np.eye(2), np.arange(2))
    assert main(["collect", "tiny.toml"]) == 0
    first = contents(Path("results"))
    shutil.rmtree("runs")
    capsys.readouterr()

    assert main(["run", "tiny.toml", "--data_dir", ".", "--results", "results"]) == 1  # the one that diverged
    shown = capsys.readouterr().out
    assert "4 runs, 1 failed, 3 finished" in shown
    assert "started" not in shown
    assert main(["collect", "tiny.toml"]) == 0
    assert "3 finished and 1 failed of 4 runs" in capsys.readouterr().out
    assert contents(Path("results")) == first
    assert main(["list", "tiny.toml", "--data_dir", "."]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["missing"] * 4


def test_bad_input_is_refused_before_anything_runs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan("[axes]\nseed = [0, 1]")
    for words, line in (
        ("run tiny.toml", "row run: --dataset text: needs --data_dir PATH"),
        ("run tiny.toml --data_dir nowhere", "--data_dir nowhere: no such folder"),
        ("run tiny.toml --data_dir tiny.toml", "--data_dir tiny.toml: a file: must be a folder"),
        ("run tiny.toml --data_dir . --index 2", "--index 2: must be from 0 to 1"),
        ("run tiny.toml --data_dir . --stage tune --index 0", "--index 0: the study has no runs of --stage tune"),
        ("run other.toml", "other.toml cannot be read"),
        ("count tiny.toml --stage first", "--stage first: must be one of "),
        ("run tiny.toml --data_dir . --runs_dir tiny.toml", "--runs_dir: tiny.toml/tiny cannot"),
        ("walk tiny.toml", "COMMAND walk: must be one of "),
        ("collect tiny.toml --runs_dir here", "--runs_dir here: has no folder tiny with runs of this"),
        ("report --results .", "--results .: has no STUDY/runs.json: collect a study there first"),
    ):
        assert main(words.split()) == 2, words
        (shown,) = capsys.readouterr().err.splitlines()
        assert shown.startswith(f"error: {line}")
    assert [path.name for path in project.iterdir()] == ["tiny.toml"]
    plan("data_dir = 'inside'")
    for more, line in (
        ([], "error: --data_dir: the study needs it: row run reads the folder inside inside it"),
        (["--data_dir", "."], "error: row run: --data_dir inside: no such file or folder"),
    ):
        assert main(["list", "tiny.toml", *more]) == 2
        assert capsys.readouterr().err.startswith(line)


# --- tuning


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ((0.7, 0.9, None), "its settings depend on tune-a-0.003, which is missing"),
        ((0.7, "no space left", 0.8), "its settings depend on tune-a-0.002, which is failed"),
        ((DIVERGED, DIVERGED, DIVERGED), "the loss is not finite at any setting of a"),
    ],
)
def test_a_final_run_without_its_tuning_is_not_started(
    scores: tuple[float | str | None, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = plan(f'monitor = "accuracy"\n{TUNED}')
    scored(runs, "accuracy", *scores)
    with pytest.raises(TuningUnfinished, match=reason):
        runs.tuned(runs.study.stage("final")[0])
    assert main(["run", "tiny.toml", "--data_dir", ".", "--stage", "final", "--index", "0"]) == 1
    assert f"1/1  a-seed0  not started: {reason}" in capsys.readouterr().out
    final = runs.study.stage("final")[0]
    assert not runs.directory(final).exists()
    leave_run(runs, final.with_tuned({"learning_rate": 0.002}))
    removed = scores[2] is None  # a part of its tuning, after the run had finished
    assert main(["run", "tiny.toml", "--data_dir", ".", "--stage", "final", "--index", "0"]) == int(not removed)
    assert ("not started" in capsys.readouterr().out) != removed
    leave_run(runs, final.with_tuned({"learning_rate": 0.5}))  # its tuning never tried that
    assert main(["run", "tiny.toml", "--data_dir", ".", "--stage", "final", "--index", "0"]) == 1


# --- collecting


def test_collected_records_are_small_and_the_same_every_time(capsys: pytest.CaptureFixture[str]) -> None:
    runs = plan("[axes]\nlora_r = [2, 4, 8]\nseed = [3]")
    finished, failed, missing = runs.study.runs
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 12_500)  # as in IMDb
    logits = np.eye(2)[np.where(generator.random(25_000) < 0.08, 1 - labels, labels)]
    leave_run(runs, finished, test={"accuracy": 0.92})
    leave_predictions(runs, finished, logits, labels)
    leave_run(runs, failed, "failed", error="no space left")
    assert main(["collect", "tiny.toml"]) == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [f"not collected: {missing.name} is missing"]
    assert "1 finished and 1 failed of 3 runs" in shown.out
    first = contents(Path("results"))
    assert set(first) == {"tiny/runs.json"}
    records, planned = read_records(Path("results/tiny"))
    assert planned == [run.name for run in runs.study.runs]
    assert set(records) == {finished.name, failed.name}
    assert {record.metrics for record in records.values()} == {"step,train_loss\n1,0.5\n"}
    record = dict(records[finished.name].result)
    assert record.pop("study") == {
        "study": "tiny", "question": runs.study.question, "row": "lora_r2", "run": "lora_r2-seed3",
        "stage": "final", "seed": 3, "axes": {"lora_r": 2}, "reported": None,
    }  # fmt: skip
    assert record.pop("texts_sha256") == sha256(b"of train\nof validation").hexdigest()
    command = record.pop("command")
    stated = "--data_dir PATH --batch_tokens 128 --learning_rate 0.001"
    assert command.endswith(stated), "no place of one machine, and what auto and the default chose"
    assert record["config"]["data_dir"] is None
    written = runs.result(finished)
    del written["command"], written["sha256"]
    written["config"] |= {"data_dir": None, "output_dir": None}
    assert set(record.pop("sha256")) == {"result.json", "metrics.csv", "predictions.parquet"}
    assert record == written
    assert len(first["tiny/runs.json"]) < 30_000
    assert records[failed.name].predictions is None
    assert records[finished.name].predictions == {
        "row": list(range(25_000)), "label": labels.tolist(), "predicted": logits.argmax(axis=1).tolist()
    }  # fmt: skip
    assert main(["collect", "tiny.toml"]) == 0
    assert contents(Path("results")) == first

    leave_run(runs, finished, "failed", error="no space left")  # was run again, and failed
    capsys.readouterr()
    assert main(["collect", "tiny.toml"]) == 0
    assert f"kept: {finished.name} failed here, but has finished before" in capsys.readouterr().err
    assert contents(Path("results")) == first

    plan("gradient_clip = 2.0\n[axes]\nlora_r = [2, 4, 8]\nseed = [3]")
    assert main(["collect", "tiny.toml"]) == 0
    name = "results/tiny"
    assert f"kept: {finished.name} of {name}, with other settings: delete its line there" in capsys.readouterr().err
    plan("gradient_clip = 2.0\n[axes]\nlora_r = [4, 8]\nseed = [3]")
    assert main(["collect", "tiny.toml"]) == 0
    assert f"kept: {finished.name} of {name}, no longer in the study: delete the lines" in capsys.readouterr().err
    assert contents(Path("results")) == first


@pytest.mark.parametrize("rows", [TUNED, "test = false"])
def test_of_a_run_that_tuned_or_has_none_no_test_is_collected(rows: str) -> None:
    runs = plan(rows)
    tuned, *_ = runs.study.runs
    leave_run(runs, tuned, validation={"accuracy": 0.9}, test={"accuracy": 0.9})  # taken over
    assert main(["collect", "tiny.toml"]) == 0
    records, _ = read_records(Path("results/tiny"))
    assert "test" not in records[tuned.name].result
    assert records[tuned.name].predictions is None


@pytest.mark.parametrize("date", ["2000-01-01T00:00:00+00:00", "2100-01-01T00:00:00+00:00"])
def test_a_success_on_another_machine_outlives_a_failure_here(date: str, capsys: pytest.CaptureFixture[str]) -> None:
    runs = plan("[axes]\nseed = [0, 1]")
    first, second = runs.study.runs
    for run in (first, second):
        leave_run(runs, run, environment={"date": date})
    assert main(["collect", "tiny.toml"]) == 0  # as the other machine would
    before = Path("results/tiny/runs.json").read_bytes()
    leave_run(runs, first, "failed", error="out of memory")
    (runs.directory(second) / "metrics.csv").write_text("damaged")
    capsys.readouterr()
    assert main(["collect", "tiny.toml"]) == 2
    shown = capsys.readouterr()
    assert "1 finished and 0 failed of 2 runs" in shown.out, "the first one counts, and the second one is named"
    assert "metrics.csv" in shown.err
    assert Path("results/tiny/runs.json").read_bytes() == before


def test_many_classes_keep_their_numbers() -> None:
    runs = plan("")
    (run,) = runs.study.runs
    leave_run(runs, run, test={"accuracy": 1.0})
    leave_predictions(runs, run, np.eye(200), np.arange(200))
    assert main(["collect", "tiny.toml"]) == 0
    expected = {name: list(range(200)) for name in ("row", "label", "predicted")}
    assert read_records(Path("results/tiny"))[0][run.name].predictions == expected


@pytest.mark.parametrize("instead", ["nothing", "a folder", "bytes"])
def test_predictions_that_cannot_be_read_are_not_collected(instead: str, capsys: pytest.CaptureFixture[str]) -> None:
    runs = plan("")
    (run,) = runs.study.runs
    leave_run(runs, run, test={"accuracy": 1.0})
    path = runs.directory(run) / "predictions.parquet"
    if instead == "a folder":
        path.mkdir()
    elif instead == "bytes":
        path.write_bytes(b"PAR1")
        write_result(runs.directory(run), runs.result(run))
    assert main(["collect", "tiny.toml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path} cannot be read (")
    assert not Path("results/tiny/runs.json").exists()


# --- real runs, killed and continued


@contextmanager
def started(*words: str, shared_cores: bool = False) -> Iterator[Script | subprocess.Popen[str]]:
    """The command as a process, with one thread or the share of the cores; nothing of it is left behind."""
    process: Script | subprocess.Popen[str]
    if shared_cores:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "compare_methods.py"), "run", *words], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"},
        )  # fmt: skip
    else:
        process = start_with_server("compare_methods.py", ["run", *words], Path.cwd())
    try:
        yield process
    finally:
        for number in (*descendants(process.pid), process.pid):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.communicate(timeout=PATIENCE_SECONDS)


def descendants(ancestor: int) -> list[int]:
    """The processes that a process or one of its descendants has started; ``ps`` tells them on Linux and macOS."""
    shown = subprocess.run(["ps", "-A", "-o", "ppid=,pid="], capture_output=True, text=True, check=True).stdout
    pairs = [(int(parent), int(child)) for parent, child in (line.split() for line in shown.splitlines())]
    found = [ancestor]
    for number in found:  # which grows
        found += [child for parent, child in pairs if parent == number]
    return found[1:]


def wait_for(text: str, log: Path) -> None:
    wait_until(lambda: log.exists() and text in log.read_text(), f"{text!r} in {log}")


def starts(log: Path) -> int:
    """How often a run began to train: each time it says what is trained."""
    return log.read_text().count("\ntrain   ")


def test_a_study_that_is_killed_goes_on_and_runs_nothing_twice(
    project: Path, distilbert: Path, review_folder: Path
) -> None:
    rows = """
        [[rows]]
        name = "orphan"
        epochs = 6
        [[rows]]
        name = "killed"
        epochs = 6
        checkpoint_steps = 1
        [[rows]]
        name = "diverges"
        method = "full"
        optimizer = "sgd"
        learning_rate = 1e30
        gradient_clip = 0
    """
    write_study(project / "tiny.toml", distilbert, rows)
    words = ("tiny.toml", "--data_dir", str(review_folder), "--retry_failed")
    folder = project / "runs" / "tiny"
    runs = StudyRuns(read_plan(Path("tiny.toml")), folder)
    orphan, killed, diverges = runs.study.runs
    leave_run(runs, killed, "failed", error="no space left")  # to be tried again

    with started(*words) as study:
        wait_for("epoch 1/6", runs.log(orphan))
        study.kill()  # its run goes on
        study.wait()
        with started(*words) as one, started(*words) as two:
            wait_for("epoch 1/6  batch 3", runs.log(killed))
            assert runs.state(killed) == "running"
            run_process = int(json.loads((runs.directory(killed) / ".lock").read_text())["process"])
            (victim,) = (study for study in (one, two) if run_process in descendants(study.pid))
            victim.kill()
            os.kill(run_process, signal.SIGKILL)
            victim.wait()
            survivor = two if victim is one else one
            shown, _ = survivor.communicate(timeout=PATIENCE_SECONDS)
    assert survivor.returncode == 1, shown  # for one has failed
    assert f"2/3  {killed.name}  continued, see" in shown
    assert {run.row: runs.state(run) for run in runs.study.runs} == {
        "orphan": "finished", "killed": "finished", "diverges": "failed",
    }  # fmt: skip
    assert (starts(runs.log(orphan)), starts(runs.log(diverges)), starts(runs.log(killed))) == (1, 1, 2)
    assert DIVERGED.split(" at ")[0] in runs.result(diverges)["error"]

    with one_thread():  # as in the runs: sums in another order would differ in the last bit
        assert finetune_lora.main([*killed.flags(review_folder), "--output_dir", "whole"]) == 0
    assert (runs.directory(killed) / ADAPTER).read_bytes() == (Path("whole") / ADAPTER).read_bytes()


def test_runs_at_once_share_the_cores_wait_for_their_tuning_and_stop_together(
    project: Path, distilbert: Path, review_folder: Path
) -> None:
    rows = """
        [axes]
        seed = [0, 1, 2]
        [tuning]
        epochs = 1
        [[rows]]
        name = "long"
        epochs = 400
        tune = { learning_rate = [0.001, 0.002] }
    """
    write_study(project / "tiny.toml", distilbert, rows)
    runs = StudyRuns(read_plan(Path("tiny.toml")), project / "runs" / "tiny")
    tuning, finals = runs.study.stage("tune"), runs.study.stage("final")
    with started("tiny.toml", "--data_dir", str(review_folder), "--jobs", "2", shared_cores=True) as study:
        for run in finals[:2]:
            wait_for("epoch 1/400  batch 2", runs.log(run))
        study.send_signal(signal.SIGINT)
        shown, _ = study.communicate(timeout=PATIENCE_SECONDS)
    assert study.returncode == 130, shown
    assert "interrupted: run the same command again to continue" in shown
    assert [runs.state(run) for run in tuning] == ["finished"] * 2
    assert [runs.state(runs.tuned(run)) for run in finals] == ["interrupted"] * 2 + ["missing"]
    lines = [line.replace(",", "").split()[1:3] for line in shown.splitlines()]
    places = [lines.index([run.name, word]) for word in ("started", "finished") for run in tuning]
    places += [lines.index([run.name, word]) for word in ("started", "interrupted") for run in finals[:2]]
    assert max(places[:2]) < min(places[2:4])
    assert max(places[2:4]) < min(places[4:6])
    assert max(places[4:6]) < min(places[6:])
    for run in finals[:2]:
        assert runs.result(run)["status"] == "interrupted"
        assert (runs.directory(run) / "last.ckpt").exists()
        environment = runs.result(run)["environment"]
        assert environment["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
        assert environment["alone"] is False, "there was another one"
        assert environment["forked"] is can_fork()


def test_the_command_and_its_runs_are_nobodys_task(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """srun and torchrun may start this command several times, and a run would take their variables for its own."""
    for name in ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "1")
    others = dict(os.environ)
    assert main(["tune", "--space"]) == 0
    assert "learning_rate" in capsys.readouterr().out
    assert not is_helper()
    assert srun_tasks() == 1
    environment = Starter(ROOT / "finetune_lora.py", jobs=1, fork=False).environment
    assert others.keys() - environment.keys() == set(OF_A_TASK) & others.keys()


def test_runs_at_once_take_the_gpu_with_the_fewest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    (script := tmp_path / "run.py").write_text(
        "import os, sys, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(float(sys.argv[1]))"
    )
    monkeypatch.setattr(execution.random, "shuffle", list.reverse)
    starter, log = Starter(script, jobs=3, fork=True), tmp_path / "log"
    monkeypatch.setattr(starter, "_fork", False)  # as can_fork says it where there is a GPU
    lock = os.open(tmp_path, os.O_RDONLY)

    def start(*words: str) -> subprocess.Popen[bytes]:
        child = starter.start([str(script), *words], log, lock, may_fork=True, idle=False)
        assert isinstance(child, subprocess.Popen)
        children.append(child)
        wait_until(lambda: len(log.read_text().splitlines()) == len(children), "a run that says its GPU")
        return child

    children: list[subprocess.Popen[bytes]] = []
    try:
        start("600")
        start("0").wait()
        start("600"), start("600"), start("0", "--device", "1")
    finally:
        for child in children:
            child.kill()
            child.wait()
        os.close(lock)
    assert log.read_text().splitlines() == ["5", "2", "2", "5", "2, 5"]
