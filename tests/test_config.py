import dataclasses
import json
import os
from pathlib import Path

import pytest

from finetuning.config import RunConfig, resumed_config
from finetuning.errors import UserError
from finetuning.flags import make_parser
from finetuning.settings import (
    DEFAULT_LEARNING_RATES,
    DEFAULT_MODEL,
    FLAGS,
    PACKAGED,
    PACKAGED_BERT,
    PACKAGED_DISTILBERT,
    PACKAGED_MEANS,
    named_layers,
    parsed_class_weights,
    parsed_layers,
)
from finetuning.storage import cache_dir
from tests.common import check_refusal, config_of_flags, each_once, lora_of_flags, refusal, refusal_of, some

LORA_FLAGS = [flag.name for flag in FLAGS.values() if flag.section == "lora"]
OTHER_METHODS = [method for method in FLAGS["method"].choices if method != "lora"]

NOWHERE = "--lora_query no --lora_key no --lora_value no --lora_projection no --lora_mlp no"


# --- defaults that depend on others


def test_lora_defaults() -> None:
    config, lora = config_of_flags(""), lora_of_flags("")
    assert config == RunConfig.from_settings()
    assert (config.method.method, config.method.trainable_layers) == ("lora", None)
    assert (lora.lora_r, lora.lora_alpha, lora.lora_scaling, lora.lora_dropout) == (8, 16.0, "standard", 0.0)
    assert (lora.q_lora, lora.double_quantization) == (False, None)
    assert (lora.targets, lora.lora_variant) == (("query", "key", "value", "projection", "mlp"), "lora")
    assert lora_of_flags("--q_lora").double_quantization is True
    assert lora_of_flags("--q_lora --double_quantization no").double_quantization is False
    assert lora_of_flags("--lora_key no --lora_projection no").targets == ("query", "value", "mlp")


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_lora_settings_stay_unset_without_lora(method: str) -> None:
    config = config_of_flags(f"--method {method}")
    assert {name: config.to_dict()[name] for name in LORA_FLAGS} == dict.fromkeys(LORA_FLAGS)
    assert config.lora is None
    assert config.method.trainable_layers == (2 if method == "selective" else None)
    assert config_of_flags("--method selective --trainable_layers 0").method.trainable_layers == 0


@pytest.mark.parametrize(
    ("line", "tokens", "texts"),
    [
        ("", 6144, None),  # None: the number of training texts decides
        ("--batch_size auto --batch_tokens auto", 6144, None),
        ("--max_length 512", 6144, None),
        ("--max_length 8000", 8000, None),  # one text must fit
        ("--batch_size 12", 12 * 256, 12),  # with the number of texts alone, the tokens are no bound
        ("--batch_size 12 --max_length 100", 1200, 12),
        ("--batch_size 12 --max_length 100 --windows 3", 3600, 12),
        ("--max_length 3000 --windows 3", 9000, None),
        ("--batch_tokens 1000", 1000, None),
        ("--batch_tokens 1000 --batch_size 500", 1000, 500),
        ("--batch_tokens 256", 256, None),
    ],
)
def test_batch_bounds(line: str, tokens: int, texts: int | None) -> None:
    config = config_of_flags(line)
    assert (config.training.batch_tokens, config.training.batch_size) == (tokens, texts)
    assert config.changed(batch_size=7).training.batch_tokens == tokens  # once the texts are known


@pytest.mark.parametrize(
    ("optimizer", "momentum", "decay"),
    [("adam", None, 0.0), ("adamw", None, 0.01), ("sgd", 0.0, 0.0), ("sgd_nesterov", 0.9, 0.0)],
)
def test_defaults_of_optimizers(optimizer: str, momentum: float | None, decay: float) -> None:
    config = config_of_flags(f"--optimizer {optimizer}")
    assert (config.training.momentum, config.training.weight_decay) == (momentum, decay)
    assert config_of_flags(f"--optimizer {optimizer} --weight_decay 0.5").training.weight_decay == 0.5
    assert config.training.learning_rate == DEFAULT_LEARNING_RATES["lora", optimizer]


def test_given_values_win_over_dependent_defaults() -> None:
    assert config_of_flags("--optimizer sgd --momentum 0.5").training.momentum == 0.5
    assert config_of_flags("--optimizer adamw --weight_decay 0").training.weight_decay == 0.0
    assert config_of_flags("--scheduler onecycle").training.warmup_fraction == 0.3
    assert config_of_flags("--scheduler cosine").training.warmup_fraction == 0.06
    assert config_of_flags("--scheduler onecycle --warmup_fraction 0").training.warmup_fraction == 0.0


def test_defaults_of_data_sets() -> None:
    imdb, financial = config_of_flags(""), config_of_flags("--dataset financial_phrasebank")
    assert (imdb.training.monitor, imdb.data.text_column, imdb.data.agreement) == ("accuracy", "text", None)
    assert (financial.training.monitor, financial.data.text_column) == ("macro_f1", "sentence")
    assert financial.data.agreement == "50"
    changed = config_of_flags("--dataset financial_phrasebank --monitor loss --text_column t --agreement 75")
    assert (changed.training.monitor, changed.data.text_column, changed.data.agreement) == ("loss", "t", "75")
    assert config_of_flags("--dataset text --data_dir d").data.split is None
    columns = [
        (config.data.text_column, config.data.label_column)
        for config in (imdb, financial, config_of_flags("--dataset me/films"))
    ]
    assert columns == [("text", "label"), ("sentence", "label"), ("", "")]  # those of a hub set are found in it
    assert imdb.instead_of_hub().endswith("and --data_dir PATH; or --offline for packaged model and reviews")
    assert config_of_flags("--dataset me/films").instead_of_hub().endswith("and --dataset text --data_dir PATH")


def test_offline_means_the_packaged_model() -> None:
    assert config_of_flags("").model.model_name == DEFAULT_MODEL
    assert config_of_flags("--offline").model.model_name == PACKAGED_MEANS
    assert config_of_flags("--offline --model_name some/folder").model.model_name == "some/folder"
    assert config_of_flags("--offline False").model.model_name == DEFAULT_MODEL


def test_a_tilde_that_no_shell_expanded_is_the_home_folder() -> None:
    assert config_of_flags("--model_name=~/mine").model.model_name == str(Path.home() / "mine")
    assert config_of_flags("--model_name=~nobody-has-this-name/mine").model.model_name == "~nobody-has-this-name/mine"


@pytest.mark.parametrize("means", [PACKAGED_BERT, PACKAGED_DISTILBERT])
def test_packaged_means_one_form_and_a_record_another(means: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.settings.model.PACKAGED_MEANS", means)
    assert [config_of_flags(line).model.model_name for line in ("--model_name packaged", "--offline")] == [means] * 2
    assert config_of_flags(f"--model_name {PACKAGED_BERT} --offline").model.model_name == PACKAGED_BERT
    stored = config_of_flags("").to_dict() | {"model_name": "packaged"}
    assert RunConfig.from_dict(stored).model.model_name == PACKAGED_DISTILBERT, "of an earlier version"
    now = config_of_flags("--model_name packaged --output_dir r").to_dict()
    again = resumed_config(now, {"model_name": "packaged", "output_dir": Path("r")})
    assert again.model.model_name == now["model_name"] == means


# --- refusals


@pytest.mark.parametrize(
    "name", [a.dest for a in make_parser("")._actions if a.choices], ids=lambda name: f"choice-{name}"
)
def test_unknown_choices(name: str) -> None:
    choices = next(a.choices for a in make_parser("")._actions if a.dest == name)
    assert choices
    line = f"--{name} nonsense: must be one of {', '.join(map(str, choices))}"
    assert refusal(f"--{name} nonsense") == line
    assert refusal_of(RunConfig.from_settings, **{name: "nonsense"}) == line


@pytest.mark.parametrize(
    "name", ["imbd", "me/", "/films", "me/films/plain", "me/films:", "-me/films", "./films", "../films"]
)
def test_unknown_data_sets(name: str) -> None:
    allowed = "must be one of imdb, financial_phrasebank, text, or OWNER/NAME[:CONFIG], a data set of the hub"
    assert refusal_of(RunConfig.from_settings, dataset=name) == f"--dataset {name}: {allowed}"


@pytest.mark.parametrize(
    "names", ["a", "train", "train=", "train=a,dev=b", "validation=a", "train=a,train=b", "train=a,test=a", "train=a,,"]
)
def test_names_of_splits_that_make_no_sense(names: str) -> None:
    line = refusal(f"--dataset me/films --split_names {names}")
    assert line.startswith(f"--split_names {names}: must be of the form train=NAME,validation=NAME,test=NAME")


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ("--lora_r eight", "must be a whole number"),
        ("--lora_r 1.5", "must be a whole number"),
        ("--learning_rate fast", "must be a number"),
        ("--limit_train two", "must be a whole number"),
        ("--epochs two", "must be a whole number or auto"),
    ],
)
def test_values_of_another_type(given: str, allowed: str) -> None:
    assert refusal(given) == f"{given}: {allowed}"


OUT_OF_RANGE = [
    *((name, value, "must be at least 1")
      for name in ("lora_r", "accumulate", "batch_size", "devices", "num_nodes", "limit_train",
                   "limit_validation", "limit_test", "windows")
      for value in ("0", "-3")),
    *(("lora_plus_ratio", value, "must be at least 1") for value in ("0", "0.5", "-2", "nan")),
    ("lora_plus_ratio", "inf", "must be finite and at least 1"),
    *((name, "-1", "must be at least 0") for name in ("patience", "device", "weight_decay", "gradient_clip")),
    *((name, "nan", "must be at least 0") for name in ("weight_decay", "gradient_clip")),
    *((name, "inf", "must be finite and at least 0") for name in ("weight_decay", "gradient_clip")),
    *((name, value, "must be at least 0 and below 1")
      for name in ("lora_dropout", "dropout", "attention_dropout", "warmup_fraction", "label_smoothing", "momentum")
      for value in ("1", "1.5", "-0.1", "nan", "inf")),
    *((name, value, "must be at least 0 and at most 4294967295")
      for name in ("seed", "data_seed") for value in ("-1", "4294967296", "9" * 400)),
    *((name, value, "must be finite and above 0")
      for name in ("lora_alpha", "learning_rate") for value in ("nan", "inf", "0", "-1", "-0.5")),
    ("max_length", "7", "must be at least 8"),
    ("max_length", "-7", "must be at least 8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "allowed"), OUT_OF_RANGE)
def test_numbers_out_of_range(name: str, value: str, allowed: str) -> None:
    message = refusal(f"--{name} {value}")
    assert message.startswith(f"--{name} {value}")  # 1 may be shown as 1.0
    assert message.endswith(allowed)


def test_numbers_at_their_bounds_are_taken() -> None:
    config = config_of_flags(
        "--lora_r 1 --max_length 8 --batch_tokens 8 --epochs 0 --patience 0 --device 0 --warmup_fraction 0"
        " --seed 4294967295 --dropout 0.999 --gradient_clip 0 --limit_test 1"
    )
    assert (config.training.seed, config.model.dropout, config.training.batch_tokens) == (2**32 - 1, 0.999, 8)


@pytest.mark.parametrize(("name", "method"), each_once(LORA_FLAGS, OTHER_METHODS))
def test_lora_flags_belong_to_lora(name: str, method: str) -> None:
    flag = FLAGS[name]
    value = flag.choices[0] if flag.choices else {int: "8", float: "0.5"}.get(flag.kind, "False")
    message = refusal(f"--method {method} --{name} {value}")
    assert message == f"--{name} {value}: needs --method lora, but the method is {method}"


@pytest.mark.parametrize(
    ("given", "layers", "named"),
    [("3", (3,), "3"), ("3-5", (3, 4, 5), "3-5"), ("4, 0 ,2-3,2", (0, 2, 3, 4), "0,2-4"), ("11-11,1", (1, 11), "1,11")],
)
def test_layers_by_number_range_and_list(given: str, layers: tuple[int, ...], named: str) -> None:
    assert RunConfig.from_settings(lora_layers=given).lora == dataclasses.replace(lora_of_flags(""), lora_layers=given)
    assert parsed_layers(given) == layers
    assert named_layers(layers) == named
    assert parsed_layers(named) == layers


@pytest.mark.parametrize(
    "given", ["", "a", "5-3", "-1", "1-", "1,,2", "1.5", "1-2-3", "99999", "\N{ARABIC-INDIC DIGIT THREE}"]
)
def test_layers_of_another_form(given: str) -> None:
    message = "must be layers, counted from 0, for example 5, 3-5 or 0,2,4"
    assert refusal_of(RunConfig.from_settings, lora_layers=given) == f"--lora_layers {given}: {message}"


def test_lora_modules_replace_the_parts() -> None:
    config = config_of_flags("--lora_modules a,b --lora_head True")
    assert config.lora is not None
    assert (config.lora.modules, config.lora.targets) == (("a", "b"), ("head",))
    assert config.changed(seed=1).lora == config.lora
    assert lora_of_flags("--lora_r 4").modules == ()


@pytest.mark.parametrize("given", ["", "heavy", "a", "a=1,b", "a=-1", "a=nan", "a=inf", "a=one", "=1", "a=1,a=2"])
def test_class_weights_of_another_form(given: str) -> None:
    with pytest.raises(UserError, match=rf"^--class_weights {given}: must be balanced, none, or NAME=WEIGHT,NAME="):
        RunConfig.from_settings(class_weights=given)


def test_class_weights_by_name() -> None:
    assert parsed_class_weights("a=1,b, or c=2.5,d=0") == {"a": 1.0, "b, or c": 2.5, "d": 0.0}
    for given in ("balanced", "none", "a=3", "a=0"):
        assert config_of_flags(f"--class_weights {given}").training.class_weights == given


def test_an_adapter_decides_rank_scale_and_placement() -> None:
    lora = lora_of_flags("--init_adapter a --lora_dropout 0.1")
    assert (lora.init_adapter, lora.lora_dropout) == (Path("a"), 0.1)
    assert [lora.lora_r, lora.lora_alpha, lora.lora_scaling, lora.lora_variant, lora.lora_layers] == [None] * 5
    assert lora.targets == ()
    again = some(RunConfig.from_dict(config_of_flags("--init_adapter a --lora_r 3 --lora_key True").to_dict()).lora)
    assert (again.lora_r, again.targets) == (3, ("key",))


ONLY_IMDB = "needs --dataset imdb without --data_dir and --offline"
EXCLUDED = [
    (NOWHERE, "no LoRA target: at least one of --lora_query, --lora_key"),
    ("--lora_modules a --lora_query True", "--lora_query True: cannot be used with --lora_modules"),
    ("--lora_modules ,", "--lora_modules ,: needs at least one name"),
    ("--lora_modules a --init_adapter b", "--lora_modules a: the adapter of --init_adapter says where LoRA is"),
    (
        f"--lora_layers 1 {NOWHERE} --lora_head",
        "--lora_layers 1: needs LoRA in the encoder, but only --lora_head is True",
    ),
    ("--trainable_layers 2", "--trainable_layers 2: needs --method selective, but the method is lora"),
    ("--method full --trainable_layers 2", "--trainable_layers 2: needs --method selective, but the method is full"),
    ("--method head --trainable_layers 0", "--trainable_layers 0: needs --method selective, but the method is head"),
    ("--method bitfit --lora_plus_ratio 16", "--lora_plus_ratio 16.0: needs --method lora, but the method is bitfit"),
    ("--method selective --trainable_layers -1", "--trainable_layers -1: must be at least 0"),
    ("--double_quantization True", "--double_quantization True: needs --q_lora True"),
    ("--double_quantization False --q_lora False", "--double_quantization False: needs --q_lora True"),
    ("--batch_tokens 255", "--batch_tokens 255: must be at least --max_length 256"),
    ("--batch_tokens 0", "--batch_tokens 0: must be at least --max_length 256"),
    ("--batch_tokens -5 --batch_size 2", "--batch_tokens -5: must be at least --max_length 256"),
    ("--windows 3 --batch_tokens 767", "--batch_tokens 767: must be at least --max_length 256 x --windows 3"),
    ("--window_overlap 8", "--window_overlap 8: needs --windows of 2 or more"),
    ("--window_pooling max", "--window_pooling max: needs --windows of 2 or more"),
    ("--windows 2 --window_overlap 256", "--window_overlap 256: must be less than --max_length 256"),
    ("--dataset text", "--dataset text: needs --data_dir PATH"),
    ("--text_pair_column b", "--text_pair_column b: imdb has no pairs of texts: use --dataset text"),
    ("--group_column b", "--group_column b: imdb has no groups: use --dataset text"),
    ("--dataset text --data_dir d --group_column label", "--group_column label: must be another column than the label"),
    (
        "--dataset text --data_dir d --text_pair_column text",
        "--text_pair_column text: must be another column than text and label",
    ),
    (
        "--dataset text --data_dir d --text_pair_column label",
        "--text_pair_column label: must be another column than text and label",
    ),
    ("--label_separator ,", "--label_separator ,: imdb is not multi-label"),
    *(
        (f"--threshold {value}", f"--threshold {value}: must be tuned, or above 0 and below 1")
        for value in ("0", "1", "half", "-0.5", "nan")
    ),
    ("--agreement 75", "--agreement 75: needs --dataset financial_phrasebank"),
    ("--dataset me/films --agreement 75", "--agreement 75: needs --dataset financial_phrasebank"),
    ("--dataset me/films --split resplit", "--split resplit: needs --dataset imdb"),
    ("--dataset me/films --data_source hub", "--data_source hub: needs --dataset imdb"),
    ("--dataset me/films --data_dir d", "--data_dir d: needs --dataset text, but --dataset is me/films"),
    ("--split_names train=a", "--split_names train=a: needs --dataset OWNER/NAME"),
    ("--dataset financial_phrasebank --split resplit", "--split resplit: needs --dataset imdb"),
    ("--dataset text --data_dir d --split resplit", "--split resplit: needs --dataset imdb"),
    ("--dataset financial_phrasebank --offline", "--offline True: no package contains financial_phrasebank"),
    ("--data_source stanford --offline", f"--data_source stanford: {ONLY_IMDB}"),
    ("--data_source hub --data_dir d", f"--data_source hub: {ONLY_IMDB}"),
    ("--data_source hub --dataset financial_phrasebank", f"--data_source hub: {ONLY_IMDB}"),
    ("--momentum 0.9", "--momentum 0.9: needs an sgd --optimizer"),
    ("--momentum 0 --optimizer adam", "--momentum 0.0: needs an sgd --optimizer"),
    ("--optimizer sgd_nesterov --momentum 0", "--momentum 0.0: must be above 0 with --optimizer sgd_nesterov"),
    ("--device 0 --accelerator cpu", "--device 0: needs a GPU: leave out --accelerator cpu"),
    ("--device 0 --devices 2", "--device 0: needs --devices 1, but --devices is 2"),
    ("--precision int8 --method full", "--precision int8: cannot be used, because --method full trains all weights"),
    ("--precision int8 --method bitfit", "--precision int8: cannot be used, because --method bitfit trains the biases"),
    ("--precision int8 --q_lora", "--precision int8: cannot be used, because --q_lora True holds the frozen"),
    ("--precision int8 --compile", "--precision int8: cannot be used, because --compile True"),
    ("--resume --overwrite --output_dir d", "--resume True: cannot be used with --overwrite"),
    ("--resume", "--resume True: needs --output_dir"),
    ("--prefetch --offline", "--prefetch True: needs the network: leave out --offline"),
]


@pytest.mark.parametrize(("line", "words"), EXCLUDED)
def test_settings_that_exclude_each_other(line: str, words: str) -> None:
    assert words in refusal(line)


@pytest.mark.parametrize(
    "line",
    [
        "--dataset financial_phrasebank --offline --data_dir d",
        "--dataset me/films:plain --offline",
        "--dataset me/films --split_names train=a,test=b --split stratified",
        "--data_source stanford",
        "--split resplit",
        "--device 1 --accelerator gpu",
        "--resume --output_dir d",
        "--method selective --trainable_layers 0",
        "--method norms --precision int8",
        "--method head --precision int8",
        f"{NOWHERE} --lora_head",
        "--lora_layers 0 --lora_query no --lora_key no --lora_value no --lora_projection no",
        "--lora_layers 0 --lora_modules a",
        "--lora_layers 0 --init_adapter a",
        "--dataset text --data_dir d --text_column a --text_pair_column text",
        "--optimizer sgd --momentum 0",
    ],
)
def test_their_allowed_neighbours(line: str) -> None:
    config_of_flags(line)


@pytest.mark.parametrize("name", ["output_dir", "data_dir", "init_adapter"])
def test_a_name_that_is_no_text_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"--{name} .*: is not valid UTF-8: rename it"):
        RunConfig.from_settings(**{name: Path(os.fsdecode(b"o\xff"))})


def test_an_adapter_is_not_replaced_by_the_run_that_starts_from_it(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "first")
    for output in (tmp_path / "first", link):
        for adapter in (tmp_path / "first", tmp_path / "first" / "folds" / "2"):
            with pytest.raises(UserError, match=r"--init_adapter .*: is a run in --output_dir, whose files"):
                RunConfig.from_settings(init_adapter=adapter, output_dir=output, overwrite=True)
    RunConfig.from_settings(init_adapter=tmp_path / "first", output_dir=tmp_path)


def test_a_run_does_not_go_into_the_folder_of_its_base_model(tmp_path: Path) -> None:
    for name in (str(tmp_path), f"{tmp_path}/../{tmp_path.name}"):
        with pytest.raises(UserError, match=r"^--output_dir .*: would be read as --model_name: give another"):
            RunConfig.from_settings(model_name=name, output_dir=tmp_path)
    with pytest.raises(UserError, match=r"^--output_dir roberta-base: would be read as --model_name"):
        RunConfig.from_settings(model_name="roberta-base", output_dir=Path("roberta-base"))
    RunConfig.from_settings(model_name=PACKAGED, output_dir=Path(PACKAGED))


def test_links_that_lead_in_a_circle_are_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    RunConfig.from_settings(init_adapter=tmp_path / "a", output_dir=tmp_path / "c")  # reading it says why


# --- to JSON and back


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--q_lora --lora_scaling raw --lora_alpha 2 --lora_head",
        "--q_lora --double_quantization False --device 2",
        "--lora_layers 0,2-3 --lora_mlp",
        "--lora_variant dora --q_lora",
        "--lora_variant pissa --q_lora",
        "--lora_plus_ratio 16 --optimizer sgd --init_adapter a",
        "--method full --optimizer sgd_nesterov --learning_rate 0.3 --scheduler onecycle",
        "--method selective --trainable_layers 0 --optimizer sgd --batch_size 12",
        "--method bitfit --optimizer sgd",
        "--dataset financial_phrasebank --agreement all --data_dir some/where --offline --output_dir runs/a",
        "--dataset text --data_dir d --monitor loss --resume --output_dir r --verbose --test no",
        "--offline --limit_train 10 --data_seed 4",
    ],
)
def test_round_trip_through_json(line: str) -> None:
    config = config_of_flags(line)
    stored = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert set(stored) == set(FLAGS)
    again = RunConfig.from_dict(stored)
    assert again == config
    assert again.differences(config.to_dict()) == []
    assert isinstance(again.run.output_dir, type(config.run.output_dir))


def test_differences_name_what_changes_the_run() -> None:
    earlier = config_of_flags("--lora_r 4 --output_dir a")
    later = config_of_flags("--lora_r 16 --seed 1 --output_dir b --resume --verbose")
    assert later.differences(earlier.to_dict()) == ["--lora_r 4 -> 16", "--seed 0 -> 1"]
    assert config_of_flags("--overwrite --verbose --baseline False").differences(config_of_flags("").to_dict()) == []
    method = config_of_flags("--method full").differences(config_of_flags("").to_dict())
    assert "--method lora -> full" in method
    assert "--lora_r 8 -> None" in method


@pytest.mark.parametrize(
    ("tracker", "variables", "refused"),
    [
        ("wandb", {}, True),
        ("wandb", {"WANDB_MODE": "online"}, True),
        ("wandb", {"WANDB_MODE": "offline"}, False),
        ("mlflow", {"MLFLOW_TRACKING_URI": "https://mlflow.example.org"}, True),
        ("tensorboard,mlflow", {"MLFLOW_TRACKING_URI": "databricks"}, True),
        ("mlflow", {"MLFLOW_TRACKING_URI": "file:///home/me/mlruns"}, False),
        ("mlflow", {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}, False),
        ("mlflow", {"MLFLOW_TRACKING_URI": "/home/me/mlruns"}, False),
        ("tensorboard,mlflow", {}, False),
    ],
)
def test_offline_refuses_a_tracker_that_connects(
    tracker: str, variables: dict[str, str], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetuning.settings.run.find_spec", lambda _: object())
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config_of_flags(f"--tracker {tracker}").run.check_trackers()
    run = config_of_flags(f"--offline --tracker {tracker}").run
    if not refused:
        run.check_trackers()
        return
    check_refusal(r"--tracker \w+: connects, but --offline allows no connection: set \w+", run.check_trackers)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig.from_settings().training.epochs = 3  # type: ignore[misc]


def test_cache_dir_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINETUNE_LORA_CACHE", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "finetune_lora"
    monkeypatch.setenv("FINETUNE_LORA_CACHE", "~/elsewhere")  # as a file of variables has it, which no shell reads
    assert cache_dir() == Path.home() / "elsewhere"


def test_a_run_of_several_processes_cannot_have_folds() -> None:
    assert RunConfig.from_settings().takes_kfold
    for more in ({"devices": 2}, {"num_nodes": 2}, {"epochs": 0}, {"kfold": 3}, {"limit_validation": 9}):
        assert not RunConfig.from_settings(**more).takes_kfold


def test_the_last_fold_is_one_and_folds_need_epochs() -> None:
    assert RunConfig.from_settings(kfold=3, fold=3).data.fold == 3
    assert "--fold 4: must be from 1 to 3" in refusal_of(RunConfig.from_settings, kfold=3, fold=4)
    assert "--epochs 0: cannot be used with --kfold" in refusal_of(RunConfig.from_settings, kfold=3, epochs=0)
    assert RunConfig.from_settings(kfold=3, fold=1, epochs=0).training.epochs == 0
