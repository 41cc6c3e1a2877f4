import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.settings import PACKAGED_BERT
from finetuning.tuning.parameters import DECLARED, PLACEMENTS, Parameter
from finetuning.tuning.space import Facts, Space, make_space, space_table

FACTS = Facts(epochs=6, batch_size=32, lengths=(64, 128, 256), layers=6)


def space_of(facts: Facts = FACTS, search: Path | None = None, models: tuple[str, ...] = (), **given: Any) -> Space:
    return make_space(given, facts, search, models)


def names(space: Space) -> set[str]:
    return {row.name for row in space.parameters}


def values(space: Space, name: str) -> tuple[Any, ...]:
    return next(row.ends for row in space.parameters if row.name == name)


def written(folder: Path, text: str) -> Path:
    path = folder / "space.toml"
    path.write_text(text, encoding="utf-8-sig")  # with the mark of Windows
    return path


def random_value(row: Parameter) -> Any:
    if row.values:
        return random.choice(row.values)
    assert row.low is not None
    assert row.high is not None
    return random.randint(int(row.low), int(row.high)) if row.whole else random.uniform(row.low, row.high)


def test_every_point_of_the_declared_space_is_a_run() -> None:
    space = space_of()
    assert names(space) == {row.name for row in DECLARED}
    random.seed(0)
    for _ in range(50):
        point = space.drawn(random_value)
        assert ("lora_r" in point) == ("placement" in point) == (point["method"] == "lora")
        assert ("trainable_layers" in point) == (point["method"] == "selective")
        config = RunConfig.from_settings(**space.settings(point))
        assert config.method.method == point["method"]
        assert 3 <= config.training.epochs <= 12
        assert config.training.batch_size in (16, 32, 64)


def test_a_rate_is_a_multiple_of_the_default_of_method_and_optimizer() -> None:
    for optimizer, method, default in (("adamw", "lora", 1e-3), ("adamw", "full", 1e-4), ("sgd", "full", 0.1)):
        space = space_of(optimizer=optimizer)
        point = space.drawn(lambda row: method if row.name == "method" else row.ends[0])  # noqa: B023
        assert space.settings(point)["learning_rate"] == pytest.approx(0.3 * default)


def test_the_default_point_is_the_default_run() -> None:
    space = space_of()
    point = space.default_point()
    assert point["placement"] == "all"
    assert point["learning_rate"] == point["epochs"] == point["batch_size"] == 1.0
    made, usual = (RunConfig.from_settings(**s).to_dict() for s in (space.settings(point), {}))
    decided = {"epochs": 6, "batch_size": 32}
    assert made == usual | decided
    assert "placement" not in space_of(lora_mlp=True).default_point()


def test_the_first_points_are_the_defaults_of_all_methods(tmp_path: Path) -> None:
    first = [space_of().settings(point) for point in space_of().first_points()]
    for settings, method in zip(first, ("lora", "full", "selective", "head"), strict=True):
        made, usual = (RunConfig.from_settings(**s).to_dict() for s in (settings, {"method": method}))
        assert made == usual | {"epochs": 6, "batch_size": 32}
    assert [settings["learning_rate"] for settings in first[:2]] == [1e-3, 1e-4]
    text = 'method = ["lora", "full"]\nlearning_rate = { low = 1e-4, high = 1e-2, log = true }\n'
    again = space_of(search=written(tmp_path, text + "epochs = { low = 2, high = 6 }\n"))
    assert [(p["learning_rate"], p["epochs"]) for p in again.first_points()] == [(1e-3, 6), (1e-4, 6)]
    assert space_of(method="full").first_points() == [space_of(method="full").default_point()]
    assert len(space_of(lora_r=4).first_points()) == 1


@pytest.mark.parametrize(
    ("given", "absent"),
    [
        ({"method": "full"}, {"method", "placement", "lora_r", "lora_variant", "trainable_layers"}),
        ({"method": "lora", "lora_r": 4}, {"method", "lora_r", "trainable_layers"}),
        ({"lora_r": 4}, {"method", "lora_r", "trainable_layers"}),
        ({"lora_mlp": True}, {"method", "placement", "trainable_layers"}),
        ({"learning_rate": 1e-3, "epochs": 3}, {"learning_rate", "epochs"}),
    ],
)
def test_given_flags_stay_fixed(given: dict[str, Any], absent: set[str]) -> None:
    space = space_of(**given)
    assert {row.name for row in DECLARED} - names(space) == absent
    assert not space.settings(space.drawn(random_value)).keys() & given.keys()


def test_declared_values_that_the_given_flags_exclude_are_left_out() -> None:
    assert values(space_of(precision="int8"), "method") == ("lora", "selective", "head")
    longer = Facts(5, 16, (128, 256, 512), 6)
    assert values(space_of(longer, batch_tokens=256), "max_length") == (128, 256)


def test_texts_and_model_fit_the_space(tmp_path: Path) -> None:
    def check(run: RunConfig) -> None:
        """As a model of one layer and multi-label texts."""
        if run.training.label_smoothing or run.model.dropout or run.model.pooling or run.method.trainable_layers:
            raise UserError("refused")

    small = Facts(epochs=5, batch_size=16, lengths=(256,), layers=1, check=check)
    assert {row.name for row in DECLARED} - names(space_of(small)) == {
        "max_length", "label_smoothing", "trainable_layers", "pooling", "dropout",
    }  # fmt: skip
    assert values(space_of(small), "method") == ("lora", "full", "head")
    assert values(space_of(Facts(5, 16, (256,), 3)), "trainable_layers") == (1, 2)
    assert "selective" in values(space_of(Facts(5, 16, (256,), 2)), "method")
    fused = space_of(replace(FACTS, fuses=True))
    for point in (fused.drawn(random_value) for _ in range(50)):
        assert ("lora_variant" in point) == (point.get("placement") in ("attention", "all"))
    assert "lora_variant" in names(fused)
    assert values(space_of(replace(FACTS, fuses=True), lora_value=True), "lora_variant") == ("lora", "pissa")
    assert values(space_of(replace(FACTS, fuses=True), lora_variant="dora"), "placement") == ("attention", "all")
    own = written(tmp_path, 'lora_r = [4, 8]\nplacement = ["query_value"]\n')  # a run refuses it
    assert values(space_of(replace(FACTS, fuses=True), own, lora_variant="dora"), "placement") == ("query_value",)
    own = written(tmp_path, 'lora_variant = ["lora", "dora"]\n')
    assert values(space_of(replace(FACTS, fuses=True), own, lora_key=True), "lora_variant") == ("lora", "dora")
    for point in (space_of(replace(FACTS, fuses=True), own).drawn(random_value) for _ in range(50)):
        assert ("lora_variant" in point) == (point.get("placement") in ("attention", "all"))


def test_a_file_narrows_or_replaces(tmp_path: Path) -> None:
    text = 'method = ["lora"]\nlearning_rate = { low = 1e-4, high = 1e-2, log = true }\ndropout = false\n'
    text += 'lora_dropout = { values = [0.0, 0.1], if = { placement = ["all", "attention"] } }\n'
    space = space_of(search=written(tmp_path, text))
    assert names(space) >= {"method", "lora_r", "lora_dropout"}
    assert not names(space) & {"dropout", "trainable_layers"}
    point = space.drawn(lambda row: row.ends[-1])
    assert point["placement"] == "all"
    assert space.settings(point)["learning_rate"] == 1e-2
    assert space.settings(point)["lora_dropout"] == 0.1
    assert "lora_dropout" not in space.drawn(lambda row: row.ends[0])
    modules = space_of(search=written(tmp_path, 'lora_modules = ["query,value", "dense"]\n'))
    assert {row.name for row in DECLARED} - names(modules) == {"placement"}
    longer = written(tmp_path, "max_length = [64, 4096]\n")  # the given flag decides
    assert "max_length" not in names(space_of(search=longer, max_length=64))
    several = written(tmp_path, "epochs = { low = 0.5, high = 2, times_default = true }\n")
    assert "epochs" not in names(space_of(search=several, epochs=5)), "a number, and not how many times the default"
    only = space_of(search=written(tmp_path, "replace = true\nepochs = { low = 2, high = 6 }\n"))
    assert names(only) == {"epochs"}
    assert only.parameters[0].whole
    for row in ("weight_decay = { low = 0, high = 1 }", "epochs = { low = 1, high = 3, times_default = true }"):
        (parameter,) = space_of(search=written(tmp_path, f"replace = true\n{row}\n")).parameters
        assert not parameter.whole, row


def test_models_are_searched_and_the_given_one_is_the_defaults(tmp_path: Path) -> None:
    search = written(tmp_path, 'method = ["lora", "head"]\n')
    space = space_of(search=search, models=("roberta-base", PACKAGED_BERT, "other"), model_name="roberta-base")
    first = [space.settings(point) for point in space.first_points()]
    expected = [("roberta-base", "lora"), (PACKAGED_BERT, "lora"), ("other", "lora"), ("roberta-base", "head")]
    assert [(settings["model_name"], settings["method"]) for settings in first] == expected
    search = written(tmp_path, 'lora_alpha = { values = [8, 16], if = { model_name = "packaged" } }\n')
    other = space_of(search=search, models=(PACKAGED_BERT, "b"), model_name=PACKAGED_BERT, method="lora")
    for point in (other.drawn(random_value) for _ in range(20)):
        assert ("lora_alpha" in point) == (point["model_name"] == PACKAGED_BERT)


def check_rank(run: RunConfig) -> None:
    """As if the model ``small`` were 16 wide, and ``deep`` had no dropout."""
    if run.model.model_name == "small" and run.lora is not None and (run.lora.lora_r or 0) > 16:
        raise UserError(f"--lora_r {run.lora.lora_r}: the layers of small are 16 wide")
    if run.model.model_name == "deep" and run.model.dropout:
        raise UserError("--dropout 0.1: deep has no such dropout")


def test_the_space_of_several_models_is_what_all_of_them_allow(tmp_path: Path) -> None:
    facts, models = replace(FACTS, check=check_rank), ("small", "deep")
    space = space_of(facts, models=models, model_name="small")
    assert values(space, "lora_r") == (4, 8, 16)
    assert "dropout" not in names(space), "0 alone is no choice"
    assert values(space_of(facts, model_name="deep"), "lora_r") == (4, 8, 16, 32)
    with pytest.raises(UserError, match="--search: lora_r: --lora_r 32: the layers of small are 16 wide"):
        space_of(facts, written(tmp_path, "lora_r = [8, 32]\n"), models, model_name="small")
    of_deep = written(tmp_path, 'lora_r = { values = [8, 32], if = { model_name = "deep" } }\n')
    assert values(space_of(facts, of_deep, models, model_name="small"), "lora_r") == (8, 32)


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("method = [", {}, "space.toml: cannot be read: "),
        ("replace = 1", {}, "replace: must be true or false"),
        ("learning_rat = [1]", {}, "learning_rat: cannot be searched"),
        ("data_seed = [1, 2]", {}, "data_seed: cannot be searched"),
        ("seed = [1]", {}, "seed: cannot be searched: give .*init_adapter, model_name, or .*, placement"),
        ('model_name = ["a"]', {}, "model_name: cannot be searched by a file: give --models"),
        ("dropout = 3", {}, "dropout: is neither a list nor a table: allowed are"),
        ("dropout = { lo = 1 }", {}, "dropout: has unknown keys lo: allowed are"),
        ("dropout = { low = 0.1 }", {}, "dropout: needs a list of values, or low and high"),
        ("dropout = []", {}, "dropout: needs a list of values, or low and high"),
        ("dropout = { values = [0.1], log = true }", {}, "dropout: log is for low and high: leave it out"),
        ("dropout = { low = 0.3, high = 0.1 }", {}, "low must be below high"),
        ("dropout = { low = 0, high = 0.1, log = true }", {}, "above 0 with log"),
        ("lora_r = [2.5]", {}, "lora_r: 2.5: must be whole numbers"),
        ("lora_r = [true]", {}, "lora_r: True: must be whole numbers"),
        ('placement = ["some"]', {}, "placement: some: must be query_value, attention, all"),
        ('placement = [["all"]]', {}, "placement: .*all.*: must be query_value, attention, all"),
        ("epochs = { values = [1, inf], times_default = true }", {}, "epochs: inf: must be numbers"),
        ("learning_rate = { low = 1e-4, high = nan }", {}, "learning_rate: nan: must be numbers"),
        ("dropout = [0.1, 2.0]", {}, "--search: dropout: --dropout 2.0: must be"),
        ('method = ["lora"]', {"method": "full"}, "--method full: --search .*space.toml allows lora"),
        ('lora_r = { values = [1, 2], if = { method = "full" } }', {}, "lora_r: --lora_r 1: needs --method lora"),
        ('epochs = { values = [1, 2], if = { method = "lora" } }', {"method": "full"}, "condition: method is lora"),
        ('epochs = { values = [1, 2], if = { metod = "lora" } }', {}, "condition: metod is lora never"),
        ("epochs = { values = [1, 2], if = { method = [] } }", {}, "epochs: if: must be a table"),
        ('method = { low = "full", high = "lora" }', {}, "method: low and high are for numbers: give a list"),
        ('scheduler = { values = [1], times_default = true }', {}, "scheduler: times_default is for numbers"),
        ("lora_query = { values = [1, 2], times_default = true }", {}, "lora_query: times_default is for numbers"),
        ("warmup_fraction = { values = [0.5, 40], times_default = true }", {}, "--warmup_fraction 2.4"),
        ("lora_alpha = [8, 16]", {"method": "full"}, "lora_alpha: impossible condition: method is lora never occurs"),
        (
            'weight_decay = { values = [0, 1], if = { lora_dropout = 0.1 } }\n'
            'lora_dropout = { values = [0, 0.1], if = { weight_decay = 1 } }',
            {}, "--search: lora_dropout, weight_decay: their conditions name each other",
        ),
        (
            'lora_r = { values = [4, 8], if = { lora_r = 8 } }\nepochs = { values = [1, 2], if = { lora_r = 8 } }',
            {}, "--search: lora_r: its condition names itself",
        ),
        ("lora_r = [8, 8]", {}, "--search .*space.toml: lora_r: .8, 8.: must be different values"),
        ("dropout = [0, 0.0]", {}, "--search .*space.toml: dropout: .0, 0.0.: must be different values"),
        (f"lora_alpha = [1, 1{'0' * 400}]", {}, "--search .*space.toml: lora_alpha: 10+: must be numbers"),
        (
            "batch_size = { values = [1, 1e308], times_default = true }",
            {}, "--search: batch_size: times_default: 1e.308 times 32 is too large",
        ),
        ('placement = ["all"]', {"lora_mlp": False}, "placement: lora_mlp says where LoRA is as well: leave out"),
        ('placement = ["all"]\nlora_query = [true]', {}, "placement: lora_query says where LoRA is as well"),
        ("lora_r = [4, 16]", {"init_adapter": Path("a")}, "lora_r: the adapter of --init_adapter decides it: leave it"),
        ("replace = true", {}, "the space is empty"),
        ("replace = true\ndropout = [0.1]", {}, "the space is empty"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(tmp_path: Path, text: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        space_of(search=written(tmp_path, text), **given)


def test_a_flag_of_lora_leaves_the_other_methods_in(tmp_path: Path) -> None:
    text = 'lora_alpha = { values = [8, 16], if = { optimizer = "adamw" } }\nlora_plus_ratio = [1, 4]\n'
    text += 'trainable_layers = { values = [1, 2], if = { pooling = "first" } }\n'
    text += "label_smoothing = { values = [0.2], if = { lora_r = 8 } }\n"
    space = space_of(search=written(tmp_path, text))
    assert values(space, "method") == ("lora", "full", "selective", "head")
    for method in values(space, "method"):
        point = space.drawn(lambda row: method if row.name == "method" else row.ends[0])  # noqa: B023
        assert ("lora_alpha" in point) == ("lora_plus_ratio" in point) == (method == "lora")
        assert ("trainable_layers" in point) == (method == "selective")
        assert "label_smoothing" not in point, "the rank is 4, or there is none"


def test_a_flag_that_says_where_lora_is_takes_the_place_of_the_placement(tmp_path: Path) -> None:
    assert "placement" in {row.name for row in space_of().parameters}
    names = {row.name for row in space_of(search=written(tmp_path, "lora_query = [true, false]")).parameters}
    assert "lora_query" in names
    assert "placement" not in names


@pytest.mark.parametrize("first", [0, 1])
def test_the_order_of_rows_does_not_matter(tmp_path: Path, first: int) -> None:
    rows = [
        "weight_decay = { values = [0.0, 0.1], if = { lora_dropout = 0.1 } }",
        'lora_dropout = { values = [0.0, 0.1], if = { method = "lora" } }',
    ]
    space = space_of(search=written(tmp_path, "\n".join((rows[first], rows[1 - first]))))
    drawn = [row.name for row in space.parameters]
    assert drawn.index("method") < drawn.index("lora_dropout") < drawn.index("weight_decay")


def test_a_condition_may_rest_on_others_and_any_number_has_multiples(tmp_path: Path) -> None:
    text = "weight_decay = { values = [0, 2], times_default = true, if = { trainable_layers = 2 } }\n"
    text += 'lora_dropout = { values = [0.1], if = { lora_variant = "dora" } }\n'
    text += "warmup_fraction = { values = [0.5, 2], times_default = true }\n"
    space = space_of(search=written(tmp_path, text))
    wanted: dict[str, Any] = {"method": "selective", "trainable_layers": 2}
    point = space.drawn(lambda row: wanted.get(row.name, row.ends[-1]))
    assert space.settings(point)["weight_decay"] == pytest.approx(0.02)
    assert space.settings(point)["warmup_fraction"] == pytest.approx(0.12)


def test_a_condition_holds_if_one_of_its_values_does(tmp_path: Path) -> None:
    text = 'weight_decay = { values = [0, 0.1], if = { method = ["selective", "lora"], lora_dropout = 0.1 } }\n'
    text += 'lora_dropout = [0, 0.1]\nmethod = ["lora", "full"]\n'
    text += 'label_smoothing = { values = [0, 0.1], if = { method = ["head", "full"] } }\n'
    space = space_of(search=written(tmp_path, text))
    wanted: dict[str, Any] = {"method": "lora", "lora_dropout": 0.1}
    point = space.drawn(lambda row: wanted.get(row.name, row.ends[-1]))
    assert (point["weight_decay"], "label_smoothing" in point) == (0.1, False)


def test_a_batch_size_keeps_the_usual_limit_in_tokens(tmp_path: Path) -> None:
    """``--batch_size`` alone would lift it, and take more memory than the default does."""
    for row in ("batch_size = [16, 64]", "batch_size = { values = [0.5, 2], times_default = true }"):
        space = space_of(search=written(tmp_path, row))
        point = space.drawn(lambda parameter: parameter.ends[1])
        assert space.settings(point).items() >= {"batch_size": 64, "batch_tokens": 6144}.items()


def test_a_space_is_stored_and_shown() -> None:
    space = space_of(method="lora")
    assert Space.from_dict(space.to_dict(), space.given) == space
    assert set(space_table().column("parameter")) == {row.name for row in DECLARED}
    assert all(space_table().column("values"))
    assert set(PLACEMENTS) == {"query_value", "attention", "all"}


def test_a_multiple_of_a_whole_number_is_at_least_one(tmp_path: Path) -> None:
    """0 epochs would only evaluate."""
    space = space_of(search=written(tmp_path, "epochs = { values = [0.001, 1], times_default = true }"))
    assert space.settings(space.drawn(lambda row: row.ends[0]))["epochs"] == 1
