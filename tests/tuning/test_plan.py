import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from finetuning.config import RunConfig
from finetuning.runs.files import write_result
from finetuning.storage import read_json, write_json
from finetuning.tuning import plan as module
from finetuning.tuning.plan import (
    BUDGET,
    FINAL,
    LAST,
    SEARCH,
    SUMMARY,
    TRIALS,
    Asked,
    Budget,
    Plan,
    begin,
    check_inputs,
    check_new,
    check_same,
    inputs_of,
    resume,
)
from finetuning.tuning.space import Facts, make_space
from finetuning.tuning.trials import END, Place
from tests.common import Patch, check_refusal, refusal_of

FACTS = Facts(6, 32, (256,), 6)
INPUTS: dict[str, Any] = {"texts": "texts", "files": {"--model_name a": {"weights": "1"}}}


def asked(search: Path | None = None, sampler: str = "tpe", **given: Any) -> Asked:
    return Asked(given, sampler, True, None, search)


def started(folder: Path, minutes: float | None = 10.0, trials: int | None = None, **given: Any) -> None:
    begin(folder, asked(**given), make_space(given, FACTS), Budget(time.time(), 0.0, minutes, trials, 3), INPUTS)


@contextmanager
def working(folder: Path) -> Iterator[None]:
    """Somebody has a run of the search, for longer than its folder has been looked at."""
    with Place(folder / TRIALS / "007").claim() as lock:
        assert lock is not None
        yield


def test_a_search_is_read_as_it_was_asked_for(tmp_path: Path) -> None:
    started(tmp_path, dataset="text", data_dir=tmp_path, monitor="loss", seed=3)
    plan = Plan.read(tmp_path)
    assert plan.given == {"dataset": "text", "data_dir": tmp_path, "monitor": "loss", "seed": 3}
    assert (plan.monitor, plan.minimize, plan.seed, plan.sampler, plan.prune) == ("loss", True, 3, "tpe", True)
    assert plan.space.defaults == {"epochs": 6, "batch_size": 32}
    check_same(tmp_path, asked(dataset="text", data_dir=tmp_path, monitor="loss", seed=3))


def test_another_search_is_refused(tmp_path: Path) -> None:
    folder, file = tmp_path / "search", tmp_path / "space.toml"
    file.write_text("dropout = [0, 0.1]")
    started(folder, method="lora")
    before = (folder / SEARCH).read_bytes()
    for other, what in (
        (asked(method="full"), "its --method is lora, yours is full"),
        (asked(), "its --method is lora, yours is not given"),
        (asked(method="lora", seed=1), "its --seed is not given, yours is 1"),
        (asked(method="lora", sampler="random"), "its --sampler is tpe, yours is random"),
        (asked(method="lora", search=file), "another file"),
        (asked(method="lora", epochs=None), "its --epochs is not given, yours is auto"),
    ):
        assert f"--output_dir {folder}: holds another search ({what}" in refusal_of(check_same, folder, other)
    assert "holds another search" in refusal_of(started, folder, method="full")
    check_refusal(f"--search {tmp_path}: cannot be read", check_same, folder, asked(method="lora", search=tmp_path))
    assert (folder / SEARCH).read_bytes() == before


def test_a_search_goes_on_with_its_own_texts_models_and_adapter(tmp_path: Path) -> None:
    started(tmp_path)
    check_inputs(tmp_path, INPUTS)
    for changed, what in (
        ({"texts": "others"}, "texts or labels"),
        ({"files": {"--model_name a": {"weights": "2"}}}, "--model_name a"),
        ({"files": INPUTS["files"] | {"--init_adapter": {}}}, "--init_adapter"),
    ):
        refusal = refusal_of(check_inputs, tmp_path, INPUTS | changed)
        assert f"{what} have changed since this search began" in refusal
    stored = read_json(tmp_path / SEARCH)
    write_json(tmp_path / SEARCH, {name: value for name, value in stored.items() if name != "files"})
    check_inputs(tmp_path, INPUTS | {"files": {}})  # of an earlier version


def test_inputs_are_the_files_of_all_models(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("a", "b")]
    for name in names:
        Path(name).mkdir()
        (Path(name) / "model.safetensors").write_bytes(name[-1:].encode())
    found = inputs_of(RunConfig.from_settings(model_name=names[0]), names, "texts")
    hashes = {f"--model_name {name}": {"model.safetensors": sha256(name[-1:].encode()).hexdigest()} for name in names}
    assert found == {"texts": "texts", "files": hashes}


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    check_new(tmp_path / "new")
    check_new(tmp_path)
    (tmp_path / "result.json").touch()
    assert "contains result.json, but no search: give a new directory" in refusal_of(check_new, tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / SEARCH).write_text("{")
    assert "search.json cannot be read" in refusal_of(Plan.read, tmp_path / "new")
    (tmp_path / "new" / SEARCH).write_text('{"study": "a"}')
    assert "search.json cannot be read: it lacks given" in refusal_of(Plan.read, tmp_path / "new")


def test_time_runs_on_and_stands_still_while_nobody_works(tmp_path: Path, monkeypatch: Patch) -> None:
    started(tmp_path, minutes=10)
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 120)
    assert Budget.read(tmp_path).left == pytest.approx(480, abs=5)
    with working(tmp_path):
        resume(tmp_path, None, None, None)
    assert Budget.read(tmp_path).left == pytest.approx(480, abs=5)
    resume(tmp_path, None, None, None)  # the last sign of life is from the start
    assert Budget.read(tmp_path).left == pytest.approx(600, abs=5)


def test_minutes_and_trials_are_added_and_the_last_runs_are_chosen_again(tmp_path: Path, monkeypatch: Patch) -> None:
    started(tmp_path, minutes=10, trials=5)
    for name in (FINAL, SUMMARY):
        (tmp_path / name).write_text(json.dumps({}))
    resume(tmp_path, None, None, None)
    assert (tmp_path / SUMMARY).exists()
    resume(tmp_path, 5, 3, None)
    budget = Budget.read(tmp_path)
    assert budget.minutes == pytest.approx(5, abs=0.1), "what the search had left when it ended does not come back"
    assert budget.trials == 3
    resume(tmp_path, 5, 3, None)
    budget = Budget.read(tmp_path)
    assert budget.minutes == pytest.approx(10, abs=0.1), "the last runs have not been chosen yet"
    assert budget.trials == 6
    assert not (tmp_path / FINAL).exists()
    assert not (tmp_path / SUMMARY).exists()
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 3600)  # beyond its minutes
    for name, status in (("001-1", "failed"), ("000-1", "finished")):
        (tmp_path / LAST / name).mkdir(parents=True)
        write_result(tmp_path / LAST / name, {"status": status})
    for number, state in enumerate(("failed", "failed")):
        (tmp_path / TRIALS / f"{number:03d}").mkdir(parents=True)
        write_json(tmp_path / TRIALS / f"{number:03d}" / END, {"state": state, "history": {}})
    with working(tmp_path):
        resume(tmp_path, 5, None, None)
    assert [path.parent.name for path in tmp_path.glob(f"{TRIALS}/*/{END}")] == ["001"], "the default is tried again"
    budget = Budget.read(tmp_path)
    assert budget.left == pytest.approx(300, abs=5)
    assert 60 * (budget.minutes or 0) - budget.since == pytest.approx(300, abs=5), "of which the last runs have a part"
    left = [path.parent.name for path in (tmp_path / LAST).glob("*/result.json")]
    assert left == ["000-1"], "what made a last run fail may be mended"


def test_a_worker_that_comes_second_leaves_the_clock_alone(tmp_path: Path) -> None:
    started(tmp_path, minutes=10)
    first = (tmp_path / BUDGET).read_bytes()
    started(tmp_path, minutes=99)
    assert (tmp_path / BUDGET).read_bytes() == first
    text_instead = json.dumps(json.loads(first) | {"began": "x"})
    for damaged, what in (('{"began": 1}', "used is missing"), ('{"sta', ""), (text_instead, "began is x")):
        (tmp_path / BUDGET).write_text(damaged)
        assert f"budget.json cannot be read: {what}" in refusal_of(Budget.read, tmp_path)


def test_nothing_changes_if_a_trial_is_damaged(tmp_path: Path) -> None:
    started(tmp_path, trials=1)
    (tmp_path / TRIALS / "000").mkdir(parents=True)
    for name in (FINAL, SUMMARY):
        write_json(tmp_path / name, {})
    before = (tmp_path / BUDGET).read_bytes()
    (tmp_path / TRIALS / "000" / END).write_text('{"sta')
    assert "000/end.json: cannot be read" in refusal_of(resume, tmp_path, None, 5, None)
    assert (tmp_path / BUDGET).read_bytes() == before
    assert (tmp_path / FINAL).exists()
    assert (tmp_path / SUMMARY).exists()


def test_a_database_is_the_same_from_another_directory(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    for given, stored in (
        ("sqlite:///a.db", f"sqlite:///{tmp_path}/a.db"), ("sqlite:////b.db", "sqlite:////b.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"), ("mysql://host/x", "mysql://host/x"),
    ):  # fmt: skip
        assert Asked({}, "tpe", True, given, None).to_dict()["storage"] == stored


def test_what_is_added_limits_the_search(tmp_path: Path) -> None:
    started(tmp_path, minutes=10)
    for number in range(7):
        (tmp_path / TRIALS / f"{number:03d}").mkdir(parents=True)
    resume(tmp_path, None, 3, None)
    assert (Budget.read(tmp_path).minutes, Budget.read(tmp_path).trials) == (None, 10), "three more than there are"
    resume(tmp_path, 5, None, None)
    assert Budget.read(tmp_path).minutes == pytest.approx(5, abs=0.1)
    assert Budget.read(tmp_path).trials is None
    (tmp_path / FINAL).write_text(json.dumps({}))
    resume(tmp_path, None, 1, 7)
    assert (Budget.read(tmp_path).trials, Budget.read(tmp_path).seeds) == (8, 7)
    assert not (tmp_path / FINAL).exists(), "more seeds are trained"


def test_a_search_goes_on_from_another_directory(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "packaged").mkdir()
    monkeypatch.chdir(tmp_path)
    started(tmp_path / "third", model_name="packaged")
    assert Plan.read(tmp_path / "third").given == {"model_name": "packaged"}, "a folder of this name is another model"
    started(tmp_path / "first", model_name="models/mine", data_dir=Path("models"))
    started(tmp_path / "second", model_name="distilbert-base-uncased")
    first, second = Plan.read(tmp_path / "first"), Plan.read(tmp_path / "second")
    assert first.given == {"model_name": str(tmp_path / "models" / "mine"), "data_dir": tmp_path / "models"}
    assert second.given == {"model_name": "distilbert-base-uncased"}
    assert first.study.startswith("first-")
    assert first.study[6:] != second.study[7:], "one database can hold searches in folders of one name"


def test_time_before_several_pauses_adds_up(tmp_path: Path, monkeypatch: Patch) -> None:
    started(tmp_path, minutes=10)
    now = time.time()
    os.utime(tmp_path / BUDGET, (now + 60, now + 60))  # the last sign of life
    for later in (300, 600):
        monkeypatch.setattr(module.time, "time", lambda later=later: now + later)
        resume(tmp_path, None, None, None)
    assert Budget.read(tmp_path).left == pytest.approx(540, abs=5), "the first minute was used"
