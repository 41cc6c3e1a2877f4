"""What a TOML becomes, and what is refused; nothing runs here."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from finetuning.comparison.plan import PlannedRun, StudyPlan, read_plan, stated_command
from finetuning.config import RunConfig
from finetuning.flags import from_flags
from finetuning.settings import PACKAGED_DISTILBERT
from tests.common import ROOT, refusal_of

STUDIES = sorted((ROOT / "studies").glob("*.toml"))
TUNED = """
[axes]
seed = [0, 1]
[tuning]
limit_train = 50
[[rows]]
name = "a"
tune = { learning_rate = [1e-3, 2e-3] }
[[rows]]
name = "b"
method = "full"
tune = { learning_rate = [1e-4, 0.02] }
"""


def study_of(folder: Path, text: str) -> StudyPlan:
    path = folder / "study.toml"
    path.write_text(f'question = "why"\n{text}')
    return read_plan(path)


def names(runs: list[PlannedRun]) -> list[str]:
    return [run.name for run in runs]


def setting(run: PlannedRun, flag: str) -> str | None:
    words = run.flags()
    return words[words.index(f"--{flag}") + 1] if f"--{flag}" in words else None


# --- what a TOML becomes


def test_axes_make_a_grid_of_rows_that_differ_in_more_than_the_seed(tmp_path: Path) -> None:
    study = study_of(tmp_path, '[axes]\nlora_r = [2, 4]\noptimizer = ["sgd", "adam"]\nseed = [5, 6]')
    assert names(list(study.runs)) == [
        f"lora_r{r}-optimizer-{optimizer}-seed{seed}"
        for seed in (5, 6)
        for r in (2, 4)
        for optimizer in ("sgd", "adam")
    ]
    run = study.runs[0]
    assert (run.row, run.stage, run.seed) == ("lora_r2-optimizer-sgd", "final", 5)
    assert run.axes == {"lora_r": 2, "optimizer": "sgd"}
    assert (setting(run, "lora_r"), setting(run, "optimizer"), setting(run, "seed")) == ("2", "sgd", "5")


def test_rows_override_defaults_and_narrow_or_replace_axes(tmp_path: Path) -> None:
    study = study_of(
        tmp_path,
        """
        [defaults]
        epochs = 3
        [axes]
        seed = [0, 1]
        lora_r = [2, 4]
        [[rows]]
        name = "narrow"
        lora_r = 8
        epochs = 1
        [[rows]]
        name = "replaced"
        axes = { seed = [7], lora_r = [1], lora_alpha = [1, 2] }
        """,
    )
    assert names(list(study.runs)) == [
        "narrow-seed0", "replaced-lora_r1-lora_alpha1-seed7", "replaced-lora_r1-lora_alpha2-seed7", "narrow-seed1",
    ]  # fmt: skip
    assert [setting(run, "epochs") for run in study.runs] == ["1", "3", "3", "1"]
    assert setting(study.runs[0], "lora_r") == "8"


def test_a_sample_is_the_same_every_time_and_keeps_all_seeds(tmp_path: Path) -> None:
    text = "[axes]\nlora_r = [1, 2, 3, 4, 5, 6, 7, 8]\nseed = [0, 1]\n[sample]\ncount = 3\nseed = "
    first, again, other = (names(list(study_of(tmp_path, text + seed).runs)) for seed in ("1", "1", "2"))
    assert first == again
    assert len(set(first)) == 6
    assert set(first) != set(other)
    assert [name.replace("seed0", "seed1") for name in first[:3]] == first[3:]
    whole = names(list(study_of(tmp_path, text.replace("count = 3", "count = 8") + "1").runs))
    assert first[:3] == [name for name in whole if name in first[:3]]  # in the grid's order


def test_tuning_comes_first_with_its_overrides_and_never_reads_the_test(tmp_path: Path) -> None:
    study = study_of(tmp_path, TUNED)
    assert names(study.stage("tune")) == ["tune-a-0.001", "tune-a-0.002", "tune-b-0.0001", "tune-b-0.02"]
    assert names(study.stage("final")) == ["a-seed0", "b-seed0", "a-seed1", "b-seed1"]
    assert study.stage("all") == [*study.stage("tune"), *study.stage("final")]
    for run in study.stage("tune"):
        assert (setting(run, "limit_train"), setting(run, "test"), setting(run, "seed")) == ("50", "False", "0")
        assert run.axes == {"learning_rate": float(run.name.rsplit("-", 1)[1])}
        assert not run.tuned_by
    for run in study.stage("final"):
        assert (setting(run, "limit_train"), setting(run, "test"), setting(run, "learning_rate")) == (None, None, None)
        assert run.tuned_by == tuple(name for name in names(study.stage("tune")) if name.startswith(f"tune-{run.row}-"))
        assert setting(run.with_tuned({"learning_rate": 0.02}), "learning_rate") == "0.02"


SEARCHED = """
[search]
trials = 4
seed = 3
[axes]
seed = [0, 1]
[[data]]
name = "one"
data_dir = "one"
max_length = 64
[[data]]
name = "two"
data_dir = "two"
[[rows]]
name = "lora"
tune = { learning_rate = { low = 1e-4, high = 1e-2 }, epochs = [3, 5], lora_r = { low = 2, high = 64 } }
[[rows]]
name = "full"
data = ["two"]
method = "full"
tune = { learning_rate = { low = 1e-5, high = 1e-4 } }
"""
ROWS_OF_SEARCHED = ("one-lora", "two-lora", "two-full")


def test_every_row_runs_on_every_data_set_that_it_names(tmp_path: Path) -> None:
    study = study_of(tmp_path, SEARCHED)
    assert names(study.stage("final")) == [f"{row}-seed{seed}" for seed in (0, 1) for row in ROWS_OF_SEARCHED]
    lengths = {run.row: setting(run, "max_length") for run in study.runs}
    assert lengths == {"one-lora": "64", "two-lora": None, "two-full": None}
    assert {run.settings["data_dir"] for run in study.runs if run.row.startswith("two")} == {"two"}


def test_whole_ends_make_whole_numbers_only_of_flags_that_take_these(tmp_path: Path) -> None:
    changed = SEARCHED.replace("{ low = 1e-5, high = 1e-4 }", "{ low = 1, high = 3 }")
    rates = {setting(run, "learning_rate") for run in study_of(tmp_path, changed).runs if run.row == "two-full"}
    assert any("." in str(rate) for rate in rates)


def test_a_search_tries_the_same_random_settings_everywhere(tmp_path: Path) -> None:
    study, again = study_of(tmp_path, SEARCHED), study_of(tmp_path, SEARCHED)
    assert study == again
    tuning = study.stage("tune")
    assert names(tuning) == [f"tune-{row}-trial{i}" for row in ROWS_OF_SEARCHED for i in range(4)]
    for run in tuning:
        assert setting(run, "test") == "False"
        low, high = (1e-5, 1e-4) if run.row == "two-full" else (1e-4, 1e-2)
        assert low <= run.axes["learning_rate"] <= high
        if run.row != "two-full":
            assert run.axes["epochs"] in (3, 5)
            assert run.axes["lora_r"] in range(2, 65)
    rates = [run.axes["learning_rate"] for run in tuning]
    assert len(set(rates)) == len(rates), "rows draw independently"
    other = study_of(tmp_path, SEARCHED.replace("seed = 3", "seed = 4"))
    assert other.stage("tune") != tuning
    final = study.find("one-lora-seed1")
    assert final.waits_for == ["learning_rate", "epochs", "lora_r"]
    chosen = final.with_tuned(tuning[0].axes)
    assert chosen.waits_for == []
    assert setting(chosen, "lora_r") == str(tuning[0].axes["lora_r"])


def test_data_lie_below_the_folder_of_this_machine(tmp_path: Path) -> None:
    study = study_of(
        tmp_path,
        """
        [[rows]]
        name = "hub"
        [[rows]]
        name = "below"
        data_dir = "imdb"
        [[rows]]
        name = "packaged"
        offline = true
        [[rows]]
        name = "financial"
        offline = true
        dataset = "financial_phrasebank"
        [[rows]]
        name = "stanford"
        data_source = "stanford"
        """,
    )
    here = {run.row: from_flags(run.flags(Path("/data"))).data.data_dir for run in study.runs}
    data = Path("/data")
    assert here == {"hub": data, "below": data / "imdb", "packaged": None, "financial": data, "stanford": None}
    assert all("--data_dir" not in run.flags() for run in study.runs)
    from_the_hub = replace(study.runs[0], settings={"dataset": "me/films"})
    assert from_the_hub.flags(Path("/data")) == ["--dataset", "me/films"]


# --- what is refused


REFUSED = [
    ("[defaults]\nlorar = 8", "[defaults] lorar: finetune_lora.py has no flag of this name"),
    ("[defaults]\nlora_r = 0", "row run: lora_r 0: must be at least 1"),
    ('[defaults]\nlora_r = "x"', "[defaults] lora_r 'x': must be a number, without quotes"),
    ('[axes]\nlearning_rate = ["1e-3"]', "axes: learning_rate '1e-3': must be a number, without quotes"),
    ('[[rows]]\nname = "a"\ntune = { epochs = ["3"] }\n[search]\ntrials = 2', "tune: epochs '3': must be a number"),
    ("[defaults]\nepochs = [1, 2]", "[defaults] epochs [1, 2]: must be one value (several names: 'a,b')"),
    ('[[rows]]\nname = "a"\ntext_column = ["x", "y"]', "row a: text_column ['x', 'y']: must be one value (several"),
    ('[axes]\nmodel_name = [["a", "b"], "c"]', "axes: model_name [['a', 'b'], 'c']: must be one value"),
    ('[defaults]\noutput_dir = "x"', "[defaults] output_dir: not allowed, the study sets it itself"),
    ("[axes]\nkfold = [5, 10]", "axes: kfold: not allowed, the runs of a study have a validation split"),
    ('[defaults]\ndata_dir = "/data/imdb"', "data_dir /data/imdb: must be a folder inside"),
    (
        '[defaults]\ndataset = "me/films"\ndata_dir = "films"',
        "row run: data_dir films: needs --dataset text, but --dataset is me/films",
    ),
    ('[defaults]\ndata_dir = "../imdb"', "data_dir ../imdb: must be a folder inside"),
    ("[axes]\nseed = 1", "axes: seed 1: must be a list of different values"),
    ("[axes]\nseed = [1, 1]", "axes: seed [1, 1]: must be a list of different values"),
    ("[axes]\nrank = [1]", "axes: rank: finetune_lora.py has no flag"),
    ("[axis]\nseed = [1]", "axis: unknown key, allowed are question, defaults"),
    ("rows = 3", "rows: must be tables"),
    ("defaults = 3", "defaults: must be a table"),
    ("[[rows]]\nlora_r = 2", "row 1: has no name, but lora_r"),
    ('[[rows]]\nname = "a/b"', "row 1: name 'a/b'"),
    ('[[rows]]\nname = "tune-a"', "row 1: name 'tune-a'"),
    ('[[rows]]\nname = "a"\n[[rows]]\nname = "a"', "row a: two runs would be named a-seed0"),
    (
        '[[rows]]\nname = "a"\nlora_r = 2\n[[rows]]\nname = "a"\nlora_r = 4\naxes = { seed = [1] }',
        "row a: two rows with other settings have this name",
    ),
    (
        '[[rows]]\nname = "a"\ntune = { learning_rate = [1e-3, 1.0000001e-3] }',
        "row a: tune: learning_rate: must be numbers that differ in their first six digits",
    ),
    (
        '[[rows]]\nname = "a"\ntune = { batch_size = { low = 1, high = inf } }\n[search]\ntrials = 2',
        "row a: tune: batch_size: must be { low = X, high = Y } with 0 < X < Y",
    ),
    (
        '[[rows]]\nname = "a"\ntune = { epochs = { low = 0.4, high = 2 } }\n[search]\ntrials = 2',
        "row a: tune: epochs: low and high must be whole numbers",
    ),
    (
        f'[[rows]]\nname = "a"\ntune = {{ learning_rate = [1{"0" * 400}] }}',
        "row a: tune: learning_rate: must be numbers",
    ),
    ('[[rows]]\nname = "a"\nmodel_name = "a\\u0000b"', "must not contain the character NUL"),
    ('[[rows]]\nname = "a"\noptimizer = "lion"', "row a: optimizer lion: must be one of adam, adamw, "),
    (
        '[[rows]]\nname = "a"\nmethod = "full"\nlora_r = 2',
        "row a: lora_r 2: needs --method lora, but the method is full",
    ),
    ('[[rows]]\nname = "a"\nlora_r = 2\naxes = { lora_r = [2] }', "row a: lora_r: given as a flag and as an axis"),
    ('[[rows]]\nname = "a"\naxes = 3', "row a: axes: must be a table of lists"),
    ('[[rows]]\nname = "a"\ntune = { lora_r = [1] }', "row a: tune: must be { learning_rate = [...] }"),
    ('[[rows]]\nname = "a"\ntune = { learning_rate = [true] }', "row a: tune: learning_rate: must be numbers"),
    ('[[rows]]\nname = "a"\ntune = { learning_rate = [-1.0] }', "row a: learning_rate -1.0: must be finite"),
    (
        '[[rows]]\nname = "a"\nlearning_rate = 1\ntune = { learning_rate = [1] }',
        "learning_rate: must not be given as well",
    ),
    ("[defaults]\nlearning_rate = 1e-3" + TUNED, "row a: tune: learning_rate: must not be given as well"),
    ('[[rows]]\nname = "a"\naxes = { lora_r = [1, 2] }\ntune = { learning_rate = [1] }', "axes other than seed"),
    (TUNED.replace("[1e-4, 0.02]", "[1e-4]"), "tune: every row needs the same number of settings to try"),
    (TUNED + '[[rows]]\nname = "c"', "have: a 2, b 2, c 0"),
    (SEARCHED.replace("trials = 4", ""), "[search] trials 0: must be a whole number of at least 1"),
    (SEARCHED.replace("trials = 4", "trials = 1.5"), "[search] trials 1.5: must be a whole number"),
    (SEARCHED.replace("trials = 4", "count = 4"), "[search] must be a table with trials and seed"),
    (SEARCHED.replace("low = 2", "low = 0"), "row one-lora: tune: lora_r: must be { low = X, high = Y } with 0"),
    (SEARCHED.replace("low = 2", "from = 2"), "row one-lora: tune: lora_r: must be { low = X, high = Y } with 0"),
    (SEARCHED.replace("[3, 5]", "3"), "row one-lora: tune: epochs: must be a list of values, or { low = X"),
    (
        SEARCHED.replace("epochs", "epoch"),
        "row one-lora: tune: epoch: finetune_lora.py has no flag of this name; did you mean epochs?",
    ),
    *(
        (SEARCHED.replace("epochs", flag), f"row one-lora: tune: {flag}: cannot be tuned: give a flag of method")
        for flag in ("test", "data_seed", "limit_validation", "monitor", "seed", "output_dir", "model_name")
    ),
    (SEARCHED.replace("max_length = 64", "epochs = 2"), "row one-lora: tune: epochs: must not be given as well"),
    (SEARCHED.replace("max_length", "max"), "row one-lora: max: finetune_lora.py has no flag of this name"),
    (SEARCHED.replace('data = ["two"]', 'data = ["three"]'), "row full: data ['three']: must be a list of names"),
    (SEARCHED.replace('data = ["two"]', "data = []"), "row full: data []: must be a list of names"),
    (SEARCHED.replace('name = "one"', ""), "data: each [[data]] and each [[rows]] needs a name"),
    ("data = 3", "data: must be tables, [[data]]"),
    (SEARCHED.replace('data_dir = "two"', 'data_dir = "2"'), "data two: must have the name of its folder"),
    (
        '[defaults]\ndataset = "text"' + SEARCHED.replace('data_dir = "two"', ""),
        'data two: needs data_dir = "two", its',
    ),
    ('[[rows]]\nname = "a"\ndata = ["two"]', "row a: data: needs [[data]], the sets that it names"),
    ("[tuning]\nepochs = 1", "[tuning] no row has anything to tune"),
    ("[search]\ntrials = 2", "[search] no row has anything to tune"),
    (TUNED.replace("limit_train", "test"), "[tuning] test: must be false"),
    (TUNED.replace("limit_train", "learning_rate"), "[tuning] learning_rate: not allowed, because it is what is tuned"),
    (TUNED.replace("limit_train", "limit"), "[tuning] limit: finetune_lora.py has no flag"),
    ("[axes]\nseed = [1]\n[sample]\ncount = 2", "[sample] count 2: must be from 1 to 1"),
    ("[axes]\nseed = [1]\n[sample]\nsize = 2", "[sample] size: unknown key"),
    ("[axes]\nseed = [1]\n[sample]\ncount = true", "[sample] count True: must be from 1 to 1"),
    ("[axes]\nseed = [1]\n[sample]\ncount = 1\nseed = true", "[sample] seed True: must be a whole number"),
    (f'[[rows]]\nname = "{"a" * 200}"', f"row {'a' * 200}: {'a' * 200}-seed0: is no name of a folder: at most 200"),
    ('[[rows]]\nname = "a"\nreported = "89 %"', "row a: reported '89 %': must be an accuracy in %"),
    ('[[rows]]\nname = "a"\nreported = 101', "row a: reported 101: must be an accuracy in %, from 0 to 100"),
    ('[[rows]]\nname = "a"\nprecision = "fast"', "row a: precision fast: is another one on other machines"),
    ("question = 3", "cannot be read"),  # a second one
]


@pytest.mark.parametrize(("text", "line"), REFUSED)
def test_a_refused_study_is_named_with_row_and_key_in_one_line(tmp_path: Path, text: str, line: str) -> None:
    found = refusal_of(study_of, tmp_path, text)
    assert found.startswith(f"{tmp_path / 'study.toml'}")
    assert line in found


@pytest.mark.parametrize("content", ["", "question = ' '", "question = 3"])
def test_a_study_says_what_it_asks(tmp_path: Path, content: str) -> None:
    (tmp_path / "study.toml").write_text(content)
    assert "question: must be a text" in refusal_of(read_plan, tmp_path / "study.toml")


def test_a_file_without_a_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "...toml").write_text('question = "why"\n[[rows]]\nname = "a"\n')
    assert "...toml: must have a name before .toml" in refusal_of(read_plan, tmp_path / "...toml")


def test_a_file_may_begin_with_the_mark_of_windows(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text('question = "why"\n[[rows]]\nname = "a"\n', encoding="utf-8-sig")
    assert read_plan(tmp_path / "study.toml").question == "why"


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    assert "nowhere.toml cannot be read" in refusal_of(read_plan, tmp_path / "nowhere.toml")


# --- the studies of the suite


def test_a_stated_command_has_the_numbers_that_auto_chose() -> None:
    config = RunConfig.from_settings(epochs=5, batch_size=32, patience=0).to_dict()
    command = "python finetune_lora.py --epochs auto --data_dir 'a b' --patience 0"
    stated = stated_command(command, config)
    assert stated == f"{command} --epochs 5 --batch_tokens 8192 --batch_size 32 --learning_rate 0.001"
    assert stated_command(stated, config) == stated
    assert from_flags(shlex.split(stated)[2:]).training == RunConfig.from_dict(config).training
    packaged = RunConfig.from_settings(model_name="packaged").to_dict() | config | {"model_name": "packaged"}
    for given in ("--offline", "--model_name packaged", "--model_name=packaged"):
        stated = stated_command(f"python finetune_lora.py {given}", packaged)
        assert from_flags(shlex.split(stated)[2:]).model.model_name == PACKAGED_DISTILBERT
        assert "packaged " not in stated
    other = "notebook.py --kernel x"  # a program that called the suite's main
    assert stated_command(other, config) == other


AUTO = ("-auto", *(f"-auto-data_seed{draw}" for draw in range(5)))  # rows that ask what auto gives


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_suite_can_be_planned_and_holds_no_place_of_one_machine(path: Path) -> None:
    study = read_plan(path)
    assert study.question.endswith("?")
    assert not [run.name for run in study.runs if "/" in str(run.settings.get("model_name", ""))]
    runs = [] if path.stem == "own_texts" else study.runs  # it is to be copied
    stated = [run for run in runs if not run.row.endswith(AUTO) and not run.waits_for]
    trainings = [from_flags(run.flags(Path())).training for run in stated]
    assert not [t for t in trainings if None in (t.epochs, t.batch_size, t.patience)], "what auto chooses may change"


def test_the_earlier_list_has_its_rows_and_seeds() -> None:
    final = read_plan(ROOT / "studies" / "earlier_work.toml").stage("final")
    rows = ["lora", "selective", "full", "qlora", "adam", "sgd", "sgd_nesterov", "linear", "onecycle"]
    assert list(dict.fromkeys(run.row for run in final)) == rows
    assert {row: sum(run.row == row for run in final) for row in rows} == {
        row: 3 if row in ("lora", "full", "qlora") else 1 for row in rows
    }
    configs = [from_flags(run.flags(Path())) for run in final]
    assert all(
        config.lora.targets == ("query", "key", "value", "projection", "mlp")
        for config in configs
        if config.lora is not None
    )
    assert all((config.lora.lora_r, config.lora.lora_alpha) == (8, 16) for config in configs if config.lora is not None)
    assert {config.data.limit_test for config in configs} == {None}


def test_each_run_has_its_seed(tmp_path: Path) -> None:
    final = study_of(tmp_path, TUNED).stage("final")
    assert [(setting(run, "seed"), run.name[-1]) for run in final] == [(seed, seed) for seed in ("0", "0", "1", "1")]
