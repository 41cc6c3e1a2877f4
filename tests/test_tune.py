"""``compare_methods.py tune`` as users call it: whole searches with a tiny model, and workers that are killed."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import predict
from benchmarks.slurm_cluster import PATIENCE_SECONDS, wait_until
from compare_methods import main
from finetuning.comparison import execution
from finetuning.comparison.page import Plot
from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.materials import find_materials
from finetuning.runs.files import read_result, write_result
from finetuning.storage import read_json, sha256_of, write_json
from finetuning.tuning import command
from finetuning.tuning.facts import read_facts, useful_lengths
from finetuning.tuning.plan import BUDGET, Asked, Budget, Plan, begin, inputs_of
from finetuning.tuning.report import finish, gain_text, make_page, summary_lines
from finetuning.tuning.space import Facts, make_space
from finetuning.tuning.trials import Trials
from tests.common import Capture, Patch, some, write_splits
from tests.scripts import SharedServer, start_with_server
from tests.tiny_models import POSITIONS

TRIED = 5  # the defaults of four methods, and a drawn one


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("texts"), train=60, validation=50, test=40)


@pytest.fixture
def one_server(monkeypatch: Patch) -> None:
    """Searches in this process start no server of their own."""
    monkeypatch.setattr(execution, "ForkServer", SharedServer)


@pytest.fixture
def flags(texts: Path, distilbert: Path, monkeypatch: Patch) -> list[str]:
    """What all searches here have: a tiny model, and two epochs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    line = "--dataset text --accelerator cpu --precision fp32 --max_length 32 --batch_size 8 --epochs 2"
    return [*line.split(), "--data_dir", str(texts), "--model_name", str(distilbert)]


def trials_of(folder: Path) -> list[dict[str, Any]]:
    """Trial and end of each trial, without times."""
    found = []
    for path in sorted((folder / "trials").glob("*/")):
        trial, end = read_json(path / "trial.json"), read_json(path / "end.json")
        found.append(trial | {name: end[name] for name in ("state", "value", "history", "error")})
    return found


def weights_of(folder: Path) -> list[str]:
    paths = sorted((*(folder / "best").glob("*.safetensors"), *(folder / "last").glob("*/*.safetensors")))
    assert paths
    return [sha256_of(path) for path in paths]


@pytest.mark.usefixtures("one_server")
def test_a_search_ends_with_a_run_and_a_report_and_can_be_repeated_and_continued(
    flags: list[str], tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    words = ["tune", *flags, "--trials", str(TRIED), "--seeds", "2", "--patience", "auto"]
    assert main([*words, "--output_dir", str(first)]) == 0
    out = capsys.readouterr().out
    assert "data: 60 train, 50 validation, 40 test texts; one text is 2.00 points on validation, 2.50 points" in out
    assert f"trial 0 is the default; its progress: {first}/trials/000.log\n" in out
    assert "trial 0, the default, complete accuracy" in out
    assert "again with 2 new seeds\n" in out
    assert f"; {TRIED} ended of {TRIED}" in out
    assert f"best run    {first / 'best'}" in out

    check_what_a_search_leaves(first)
    monkeypatch.setattr(Plot, "png", b"")  # drawing takes seconds for each of the pages that follow
    assert main([*words, "--seeds", "1", "--output_dir", str(second), "--jobs", "1"]) == 0
    assert trials_of(first) == trials_of(second)
    assert set(weights_of(second)) < set(weights_of(first)), "those of the other seed are missing"

    before = trials_of(first)
    assert main([*words, "--output_dir", str(first)]) == 0
    said = capsys.readouterr().out
    assert "has finished: --resume with --minutes or --trials adds to it" in said
    assert "keeps its own limits" not in said
    assert main([*words, "--output_dir", str(first), "--seeds", "7", "--minutes", "5"]) == 0
    own = f"the search in {first} keeps its own limits, --trials {TRIED}, --seeds 2: --resume adds minutes or trials to"
    assert own in capsys.readouterr().out
    assert main(["tune", "--resume", "--output_dir", str(first), "--trials", "1"]) == 0
    assert trials_of(first)[:TRIED] == before
    assert len(trials_of(first)) == TRIED + 1
    assert a_failure_loses(first)
    assert the_defaults_first_run_wins_a_short_search(first)
    check_that_resume_takes_no_flags(first, capsys)


def check_what_a_search_leaves(folder: Path) -> None:
    """Its numbers, its page and its best run."""
    assert Plan.read(folder).given["patience"] is None, "what is given as auto stays so"
    summary = read_json(folder / "tune.json")
    winner = summary["winner"]
    assert sum(summary["trials"].values()) == TRIED
    assert winner["seeds"] == [1, 2]
    results = [read_result(folder / run) for run in winner["runs"]]
    assert winner["test"]["accuracy"] == pytest.approx(sum(r["test"]["accuracy"] for r in results) / 2)
    assert summary["default"]["seeds"] == [1, 2]
    finalists = [summary["default"], summary["candidate"]]
    assert winner == max(finalists, key=lambda record: record["validation"]["accuracy"]), "of equal ones the default"
    gain = winner["test"]["accuracy"] - summary["default"]["test"]["accuracy"]
    assert summary["gain"]["mean"] == pytest.approx(gain, abs=1e-6)
    gain = summary["candidate"]["test"]["accuracy"] - summary["default"]["test"]["accuracy"]
    assert summary["candidate_gain"]["mean"] == pytest.approx(gain, abs=1e-6)
    assert all("baseline" in result for result in results)
    assert summary["gain"]["ci95"][0] <= summary["gain"]["mean"] <= summary["gain"]["ci95"][1]
    tested = [path.name for path in sorted((folder / "trials").glob("*/")) if "test" in read_result(path)]
    assert tested == ["000"]  # the default, with which the report compares
    assert not list(folder.glob("trials/*/*.ckpt"))
    page = (folder / "tune.html").read_text(encoding="utf8")
    assert page.count("<figure>") >= 2
    assert str(folder.parent) not in page
    plan = Plan.read(folder)
    lost = summary | {"default": summary["default"] | {"runs": [], "error": "killed"}}
    page = make_page("first", plan, Trials(folder / "trials", plan.monitor).all(), lost)
    assert "The default failed (killed), so nothing is compared with it" in page
    assert predict.main([str(folder / "best"), "--text", "a joy"]) == 0
    assert (folder / "best" / "report.html").exists()
    assert [export_flags(folder, summary, pooling) for pooling in ("mean", "first")] == [" --onnx", ""]


def check_that_resume_takes_no_flags(folder: Path, capsys: Capture) -> None:
    assert main(["tune", "--resume", "--output_dir", str(folder), "--seeds", "5"]) == 2
    assert "--seeds 5: with --resume, give --minutes or --trials as well" in capsys.readouterr().err
    for flag in ("--sampler", "random"), ("--prune",), ("--storage", "sqlite:///x"):
        assert main(["tune", "--resume", "--output_dir", str(folder), *flag]) == 2
        assert f"{flag[0]} " in (err := capsys.readouterr().err)
        assert "--resume takes the flags that the search has" in err


def test_a_search_goes_on_with_its_own_texts_and_the_time_that_is_left(
    distilbert: Path, tmp_path: Path, capsys: Capture
) -> None:
    texts, folder = write_splits(tmp_path / "texts", train=60, validation=50, test=40), tmp_path / "search"
    given = {"dataset": "text", "data_dir": texts, "model_name": str(distilbert)}
    config, an_hour_ago = RunConfig.from_settings(**given), time.time() - 3600
    before = inputs_of(config, (), find_materials(config).texts.sha256)
    asked, facts = Asked(given, "tpe", True, None, None), Facts(5, 16, (256,), 2)
    begin(folder, asked, make_space(given, facts), Budget(an_hour_ago, 0.0, 10.0, None, 3), before)
    os.utime(folder / BUDGET, (an_hour_ago, an_hour_ago))  # since then nobody works
    command.join(folder)
    assert Budget.read(folder).left == pytest.approx(600, abs=30)

    write_splits(texts, train=80, validation=50, test=40)
    words = ["--dataset", "text", "--data_dir", str(texts), "--model_name", given["model_name"], "--minutes", "10"]
    for more in (words, ["--resume", "--trials", "1"]):
        assert main(["tune", "--output_dir", str(folder), *more]) == 2
        assert "texts or labels have changed since this search began" in capsys.readouterr().err


def test_a_storage_that_is_refused_leaves_no_search(flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "search"
    words = ["tune", *flags, "--trials", "1", "--storage", "sqlite:////nowhere/x.db", "--output_dir", str(folder)]
    assert main(words) == 2
    assert "error: --storage sqlite:////nowhere/x.db: cannot be used: " in capsys.readouterr().err
    assert not folder.exists()
    (search := tmp_path / "s.toml").write_text("dropout = [7]")
    words[words.index("--storage") + 1] = f"sqlite:///{tmp_path}/x.db"
    assert main([*words, "--search", str(search)]) == 2
    assert not (tmp_path / "x.db").exists(), "a refused space makes no database"
    assert main(["tune", *flags, "--trials", "1", "--output_dir", ""]) == 2
    assert "error: --output_dir : must be a path, or left out" in capsys.readouterr().err


def a_failure_loses(folder: Path) -> bool:
    """Whether the default wins if the best trial has as good a run, but another one failed; and the summary says so."""
    final = {"trials": [1, 0], "seeds": [1, 2]}
    for seed in final["seeds"]:
        shutil.rmtree(folder / "last" / f"001-{seed}", ignore_errors=True)
    shutil.copytree(folder / "last" / "000-1", folder / "last" / "001-1")  # with the second seed it has failed
    (folder / "tune.json").unlink()
    write_json(folder / "final.json", final | {"trials": [0]})
    assert finish(folder, Plan.read(folder), final) is None, "another worker has decided otherwise"
    write_json(folder / "final.json", final)
    summary = some(finish(folder, Plan.read(folder), final))
    compared = sum(len(trial["history"]) for trial in trials_of(folder)) + 3 * 2  # three last runs of two epochs
    assert read_result(folder / "best")["checkpoints_compared"] == compared
    said = "\n".join(summary_lines(folder, summary))
    return summary["winner"]["trial"] == 0 and "1 new seed failed" in said and "failed with some of the new" in said


def export_flags(folder: Path, summary: dict[str, Any], pooling: str) -> str:
    """What follows the folder in the command that exports a winner with this ``--pooling``."""
    *_, line = summary_lines(folder, summary | {"winner": summary["winner"] | {"pooling": pooling}})
    _, command, flags = line.partition(f"{folder / 'best'} FOLDER")
    assert command
    return flags


def the_defaults_first_run_wins_a_short_search(folder: Path) -> bool:
    """Whether it does if the best trial, which alone was trained again, is worse."""
    run = folder / "last" / "001-1"
    result = read_result(run)
    write_result(run, result | {"validation": result["validation"] | {"accuracy": 0.0}})
    (folder / "tune.json").unlink()
    final = {"trials": [1], "seeds": [1]}
    write_json(folder / "final.json", final)
    summary = some(finish(folder, Plan.read(folder), final))
    assert summary["winner"]["runs"] == ["trials/000"]
    assert predict.main([str(folder / "best"), "--text", "a joy"]) == 0
    for compared in (summary["default"], summary["winner"]):
        compared["test"].pop("accuracy", None)  # as AUROC, if test has one class
    said = "\n".join(summary_lines(folder, summary))
    return "in its first run" in said and "none: trial 1 is not better on validation" in said


def worker(flags: list[str], folder: Path, *more: str) -> Any:
    return start_with_server("compare_methods.py", ["tune", *flags, "--output_dir", str(folder), *more])


def test_workers_that_are_killed_lose_no_trial(flags: list[str], tmp_path: Path) -> None:
    folder, limits = tmp_path / "search", ("--trials", "3", "--seeds", "1", "--prune", "False")
    first = worker(flags, folder, *limits)
    wait_until(lambda: (folder / "trials" / "001" / "settings.json").exists(), "the second trial")
    lock = json.loads((folder / "trials" / "001.lock").read_text() or "{}")
    first.kill()  # its run goes on
    first.communicate(PATIENCE_SECONDS)
    assert lock["process"] == first.pid
    others = [worker(flags, folder, *limits) for _ in range(2)]
    wait_until(lambda: (folder / "trials" / "002" / "settings.json").exists(), "the third trial")
    others[0].send_signal(signal.SIGTERM)
    shown, _ = others[0].communicate(PATIENCE_SECONDS)
    assert re.search(
        r"interrupted; continue with: (\S*python\S* \S*compare_methods.py|\S*finetune-compare) tune --resume", shown
    )
    assert others[0].returncode == 130
    out, _ = others[1].communicate(PATIENCE_SECONDS)
    assert others[1].returncode == 0, out
    assert [trial["state"] for trial in trials_of(folder)] == ["complete"] * 3
    assert [len(trial["history"]) for trial in trials_of(folder)] == [2] * 3
    assert (folder / "tune.html").exists()
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.usefixtures("one_server")
def test_a_search_without_time_for_more_has_a_default_and_last_runs(
    flags: list[str], tmp_path: Path, capfd: Capture
) -> None:
    folder = tmp_path / "search"
    assert main(["tune", *flags, "--minutes", "0.02", "--jobs", "2", "--output_dir", str(folder)]) == 0
    summary = read_json(folder / "tune.json")
    assert summary["trials"]["complete"] >= 1
    assert summary["winner"]["seeds"]  # at least one, however short the time
    forecast = r"this worker has time for about 0 more trials: a search needs about 20 runs, so --minutes (\d+) or more"
    (minutes,) = re.findall(forecast, capfd.readouterr().out)
    assert int(minutes) >= 1


@pytest.mark.usefixtures("one_server")
def test_base_models_are_searched(
    flags: list[str], tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.chdir(tiny_folders["bert"].parent)
    used_here = tiny_folders["bert"].name  # from this directory
    models = ["--models", str(tiny_folders["distilbert"]), used_here, used_here]  # each once
    search, folder = tmp_path / "space.toml", tmp_path / "search"
    words = ["tune", *flags[:-2], "--trials", "2", "--seeds", "1"]
    assert main([*words, *models, "--output_dir", str(folder)]) == 0
    used = [read_result(path)["config"]["model_name"] for path in sorted((folder / "trials").glob("*/"))]
    assert used == [str(tiny_folders[name]) for name in ("distilbert", "bert")], "the first one is the default's"
    assert read_json(folder / "tune.json")["trials"] == {"complete": 2}
    assert main([*words, *models, "--output_dir", str(folder)]) == 0
    assert "has finished" in capsys.readouterr().out
    assert main([*words, "--models", "packaged", "--output_dir", str(folder)]) == 2
    assert "holds another search (its --models is" in capsys.readouterr().err
    assert main(["tune", "--resume", "--models", "packaged", "--output_dir", str(folder)]) == 2
    assert "--models packaged: --resume takes the flags that the search has" in capsys.readouterr().err
    assert "Flags that all trials have: <code>--model_name" not in (folder / "tune.html").read_text(encoding="utf8")
    condition = f'if = {{ model_name = "{tiny_folders["bert"].name}" }}'
    search.write_text(f"lora_alpha = {{ values = [8, 16], {condition} }}\n", encoding="utf8")
    limits = ("--limit_train", "50", "--max_length", "16", "--method", "lora")
    named = ("--search", str(search), "--model_name", tiny_folders["bert"].name)
    given = (*words, *limits, *named, "--output_dir", str(tmp_path / "one"))
    assert main([*given, "--trials", "1"]) == 0, "a condition may name the given model"
    assert main([*words, *models, "nowhere/to-be-found", "--output_dir", str(tmp_path / "other"), "--offline"]) == 2
    assert "--models nowhere/to-be-found" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", "tune: needs --minutes X or --trials N"),
        ("--minutes 0", "--minutes 0.0: must be above 0"),
        ("--minutes nan", "--minutes nan: must be above 0"),
        ("--trials 0", "--trials 0: must be at least 1"),
        ("--trials 1 --jobs 0", "--jobs 0: must be at least 1"),
        ("--trials 1 --seeds 0", "--seeds 0: must be at least 1"),
        ("--trials x", "--trials x: must be a whole number"),
        ("--trials 1 --sampler grid", "--sampler grid: must be one of tpe, random"),
        ("--trials 1 --search no.toml", "--search no.toml: no such file"),
        ("--trials 1 --models a b --model_name a", "--model_name a: with --models, the first of them is the default's"),
        ("--trials 1 --lora_rank 8", "unrecognized arguments: --lora_rank 8"),
        ("--trials 1 --seed 4294967295", "--seed 4294967295: must be at most 4284967295: the last runs take"),
        ("--trials 1 --epochs 0", "--epochs 0: trains nothing, so there is nothing to search"),
        ("--trials 1 --kfold 5", "--kfold 5: a search has no cross-validation"),
        ("--trials 1 --devices 2", "--devices 2: must be 1, as a trial is one process"),
        ("--trials 1 --monitor micro_f1", "--monitor micro_f1: for a single-label task it must be one of accuracy"),
        ("--trials 1 --limit_validation 49", "tune: validation has 49 texts, and a search needs 50"),
        ("--trials 1 --data_dir nowhere", "--data_dir nowhere: no such file or folder"),
        ("--resume", "there is no search in it"),
        ("--trials 1 --output_dir FILE", "cannot be written"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    flags: list[str], tmp_path: Path, capsys: Capture, more: str, message: str
) -> None:
    (tmp_path / "file").touch()
    words = more.replace("FILE", str(tmp_path / "file" / "below")).split()
    assert main(["tune", *flags, "--output_dir", str(tmp_path / "search"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert [line for line in error.splitlines() if line.startswith("error: ")] == error.splitlines()[-1:]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_folder_and_optuna_are_needed(monkeypatch: Patch, capsys: Capture) -> None:
    assert main(["tune", "--trials", "1"]) == 2
    assert "tune: needs --output_dir DIR" in capsys.readouterr().err
    monkeypatch.setattr(command, "find_spec", lambda _: None)
    assert main(["tune", "--trials", "1", "--output_dir", "x"]) == 2
    assert "tune: needs Optuna: pip install -r requirements-tune.txt, or pip install optuna" in capsys.readouterr().err


def test_the_declared_space_is_shown(capsys: Capture) -> None:
    assert main(["tune", "--space"]) == 0
    assert "| learning_rate | 0.3 to 3, log-uniform times the default |" in capsys.readouterr().out


def test_texts_are_measured_uncut_and_the_models_limit_is_tried(bert: Path, tmp_path: Path) -> None:
    for split, texts in (("train", 60), ("validation", 50), ("test", 10)):
        rows = [f"{split} {'long ' * 600}{i},{'ab'[i % 2]}" for i in range(texts)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label", *rows]))
    given = {"dataset": "text", "data_dir": tmp_path, "accelerator": "cpu", "max_length": 32}
    given["model_name"] = str(bert)
    facts = read_facts(RunConfig.from_settings(**given))
    assert facts.lengths == (32, POSITIONS)
    search = tmp_path / "space.toml"
    for row, reason in (
        ("lora_r = [8, 512]", "--lora_r 512: the layers of .* are .* wide"),
        ("max_length = [32, 4096]", "--max_length 4096: .* has .* positions"),
        ("trainable_layers = { low = 1, high = 9 }", "--trainable_layers 9: .* has . layers"),
        ('lora_modules = ["query", "nonsense"]', "--lora_modules nonsense"),
        ('lora_layers = ["0-1", "0-9"]', "--lora_layers 0-9: .* has . layers"),
        ("batch_tokens = [16, 2048]", "--batch_tokens 16"),
    ):
        search.write_text(row)
        with pytest.raises(UserError, match=f"--search: {row.partition(' ')[0]}: {reason}"):
            make_space({name: value for name, value in given.items() if name != "max_length"}, facts, search)


def test_only_lengths_that_cut_texts_are_searched() -> None:
    assert useful_lengths(np.full(100, 20), 256, 512) == (256,)
    lengths = np.r_[np.full(600, 60), np.full(399, 90), 400]
    assert useful_lengths(lengths, 256, 512) == (64, 256), "96 tokens cut one text of a thousand"
    assert useful_lengths(np.arange(1, 401), 256, 512) == (224, 256, 320, 384, 416), "the last one cuts no text"
    assert useful_lengths(np.full(100, 900), 256, 512) == (256, 512)
    assert useful_lengths(np.full(100, 900), 512, 512) == (512,)


@pytest.mark.parametrize(
    ("winner", "candidate", "said"),
    [
        (2, 2, "+1.00 points (95 % interval -1.00 to +3.00) of test accuracy over the default, which may be chance"),
        (0, 2, "none: trial 2 is not better on validation with new seeds. It has +1.00 points (95 % interval -1.00"),
        (0, 0, "none, no trial was better than the first run of the default"),
    ],
)
def test_the_gain_says_what_a_trial_has_that_does_not_win(winner: int, candidate: int, said: str) -> None:
    gain = {"measure": "accuracy", "mean": 0.01, "ci95": [-0.01, 0.03], "p": 0.5}
    found = {"trial": candidate, "failed": 0}
    summary = {"winner": {"trial": winner}, "candidate": found, "candidate_gain": gain}
    assert gain_text(summary).startswith(said)
    if winner == candidate == 2:
        gain["ci95"] = [0.001, 0.03]
        assert gain_text(summary).endswith("to +3.00) of test accuracy over the default")
    if winner != candidate:
        found["failed"] = 1
        assert gain_text(summary).startswith("none: trial 2 has failed with some of the new seeds. It has +1.00")
        assert gain_text(summary | {"candidate_gain": None}) == "none: trial 2 has failed with new seeds"
