# mypy: disable-error-code="union-attr,arg-type,operator"
"""Adapters of PEFT and of earlier runs, as this suite reads them and as PEFT and Transformers do."""

import json
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.models.classifier import Classifier
from finetuning.models.families import FAMILIES
from finetuning.models.lora import ranks_and_alphas
from finetuning.runs.adapters import read_adapter
from finetuning.runs.files import ADAPTER, ADAPTER_CONFIG, write_result, write_settings
from finetuning.runs.loading import other_classes
from finetuning.steps.text_advice import head_advice, other_weights_advice
from local_model_utilities import adopt_adapter, build_classifier, build_from_adapter, find_base_model
from tests.common import CORE, LAYERS, WIDTH, check_refusal, each_once, refusal_of, some
from tests.runs.test_weights import ALL_BUT_HEAD, build, logits, logits_in_peft, trained
from tests.small_classifiers import NAMES, fill, logits_of, save

PEFT_CASES: dict[str, dict[str, Any]] = {
    "standard": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 6, "rank_pattern": {"0.*": 2, "FIRST": 7}, "alpha_pattern": {"FIRST": 3}},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "one_layer": {"r": 3, "lora_alpha": 5, "layers_to_transform": [1]},
}


def made_by_peft(base: Path, folder: Path, model_type: str, **settings: Any) -> torch.Tensor:
    """Writes an adapter with PEFT itself, far from its beginning, and returns the logits of PEFT's model."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32)
    family = FAMILIES[model_type]
    first, second = family.targets["query"][0], family.targets["mlp"][0]
    for pattern in ("rank_pattern", "alpha_pattern"):
        named = {key.replace("FIRST", second): value for key, value in settings.get(pattern, {}).items()}
        settings |= {pattern: named} if named else {}
    head = [name.removeprefix(f"{family.base}.") for name in family.head]
    saved = ["classifier"] if head[0].startswith("classifier.") else head
    settings = {"target_modules": [first, second], "modules_to_save": saved} | settings
    config = LoraConfig(task_type="SEQ_CLS", **settings)
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return logits_of(model.eval())


@pytest.mark.parametrize("name", [ADAPTER, ADAPTER_CONFIG])
def test_an_adapter_that_was_changed_after_its_run_is_refused(tmp_path: Path, name: str) -> None:
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 3)}, tmp_path / ADAPTER)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(settings))
    write_result(tmp_path, {"status": "finished"})
    assert read_adapter(tmp_path).alpha == 4
    save_file({"base_model.model.q.lora_A.weight": torch.zeros(2, 3)}, tmp_path / ADAPTER)
    if name == ADAPTER_CONFIG:
        write_result(tmp_path, {"status": "finished"})
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(settings | {"lora_alpha": 8}))
    assert f"{name} was changed after its run wrote it" in refusal_of(read_adapter, tmp_path)


def adopted(base: Path, folder: Path, **settings: Any) -> tuple[Classifier, RunConfig]:
    """The classifier with which a run of ``--init_adapter`` begins."""
    torch.manual_seed(9)
    config = RunConfig.from_settings(model_name=str(base), max_length=32, init_adapter=folder, **settings)
    found = find_base_model(config)
    decided, adapter = adopt_adapter(some(config.lora), found, moved=False)
    config = config.changed(**decided)
    return build_from_adapter(config, found, NAMES, torch.float32, adapter).eval(), config


@pytest.mark.parametrize(("model_type", "case"), each_once(CORE, PEFT_CASES))
def test_an_adapter_of_peft_goes_round(bases: dict[str, Path], tmp_path: Path, model_type: str, case: str) -> None:
    expected = made_by_peft(bases[model_type], tmp_path / "peft", model_type, **PEFT_CASES[case])
    classifier, config = adopted(bases[model_type], tmp_path / "peft")
    torch.testing.assert_close(logits(classifier), expected, rtol=0, atol=1e-5)
    assert config.lora is not None
    assert config.lora.targets == ("query", "mlp")
    if case == "patterns":
        assert {rank for rank, _ in ranks_and_alphas(classifier.model).values()} == {2, 4, 7}
    if case == "one_layer":
        assert len(ranks_and_alphas(classifier.model)) == 2 < 2 * LAYERS
    assert config.lora.lora_variant == ("dora" if case == "dora" else "lora")
    assert config.lora.lora_layers == ("1" if case == "one_layer" else None)
    # and back: trained on, saved, and read by PEFT again
    fill(classifier)
    (tmp_path / "ours").mkdir()
    save(tmp_path / "ours", classifier, config)
    _, again = logits_in_peft(bases[model_type], tmp_path / "ours")
    torch.testing.assert_close(again, logits(classifier), rtol=0, atol=1e-5)
    assert (again - expected).abs().max() > 0.01


@pytest.mark.parametrize("targets", ["all-linear", ["query", "value", "dense"]])
def test_a_classifier_above_a_pooler_with_lora_stays_trained(
    bert: Path, tmp_path: Path, targets: str | list[str]
) -> None:
    more: dict[str, Any] = {"target_modules": targets, "modules_to_save": None, "r": 4, "lora_alpha": 6}
    expected = made_by_peft(bert, tmp_path / "peft", "bert", **more)
    classifier, config = adopted(bert, tmp_path / "peft")
    torch.testing.assert_close(logits(classifier), expected, rtol=0, atol=1e-5)
    assert not config.lora.lora_head
    head = {
        n.partition("pooler.dense.")[2] or n
        for n, p in classifier.family.head_parameters(classifier.model)
        if p.requires_grad
    }
    assert head == {"lora.lora_A", "lora.lora_B", "classifier.weight", "classifier.bias"}
    fill(classifier)
    (tmp_path / "ours").mkdir()
    save(tmp_path / "ours", classifier, config)
    assert json.loads((tmp_path / "ours" / ADAPTER_CONFIG).read_text())["modules_to_save"] == ["classifier"]
    _, again = logits_in_peft(bert, tmp_path / "ours")
    torch.testing.assert_close(again, logits(classifier), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        ALL_BUT_HEAD,
        {"lora_head": True},
        {"lora_scaling": "raw"},
        {"q_lora": True},
        {"lora_layers": "0,2"},
        {"lora_variant": "dora"},
        {"lora_variant": "pissa", "lora_scaling": "rslora"},
        {"lora_variant": "pissa", "lora_r": WIDTH - 4},  # continued as LoRA of twice the rank
    ],
)
def test_an_adapter_of_an_earlier_run_is_continued(
    bases: dict[str, Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    earlier, config = trained(bases["roberta"], tmp_path, **settings)
    classifier, now = adopted(bases["roberta"], tmp_path, **({"q_lora": True} if "q_lora" in settings else {}))
    torch.testing.assert_close(logits(classifier), logits(earlier), rtol=0, atol=1e-5)
    assert find_base_model(now).config.hidden_size == WIDTH, "its own settings fit the model: it can be continued"
    assert (now.lora.targets, now.lora.lora_layers) == (config.lora.targets, config.lora.lora_layers)
    named = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert named == {name for name, p in earlier.named_parameters() if p.requires_grad}


def test_an_adapter_knows_the_texts_of_all_runs_that_made_it(bases: dict[str, Path], tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        _, config = trained(bases["bert"], folder)
        earlier = str(folders[number - 1]) if number else None
        settings = config.to_dict() | {"data_dir": str(tmp_path / str(number)), "init_adapter": earlier}
        write_result(folder, {"status": "finished", "config": settings})
    known = read_adapter(folders[2])
    for number in range(4):
        data = replace(config.data, data_dir=tmp_path / str(number))
        assert [run.folder for run in known.runs_on(data)] == folders[number : number + 1]
    shutil.rmtree(folders[1])
    assert known.runs_on(replace(config.data, data_dir=tmp_path / "2"))
    assert not known.runs_on(replace(config.data, data_dir=tmp_path / "0")), "nobody can tell any more"


def test_relative_paths_of_an_earlier_run_are_those_of_its_folder(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, earlier in (("first", None), ("second", "first")):
        (folder := tmp_path / name).mkdir()
        _, config = trained(bases["bert"], folder)
        settings = config.to_dict() | {"data_dir": "reviews.csv", "init_adapter": earlier}
        write_settings(folder, settings, {"folder": str(tmp_path)})
        write_result(folder, {"status": "finished", "config": settings})
    (tmp_path / "elsewhere").mkdir()
    for place, data in ((tmp_path, "reviews.csv"), (tmp_path / "elsewhere", "../reviews.csv")):
        monkeypatch.chdir(place)
        adapter = read_adapter(Path(tmp_path / "second"))
        assert len(adapter.runs_on(replace(config.data, data_dir=Path(data)))) == 2
        assert not adapter.runs_on(replace(config.data, data_dir=Path("others.csv")))


@pytest.mark.parametrize("older", [False, True])
def test_a_head_that_peft_did_not_save_comes_from_the_base(bert: Path, tmp_path: Path, older: bool) -> None:
    base = tmp_path / "base"
    shutil.copytree(bert, base)
    expected = made_by_peft(base, tmp_path, "bert", r=2, lora_alpha=4)
    if older:
        torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    tensors = load_file(tmp_path / ADAPTER)
    pooler = {name for name in tensors if "pooler" in name}
    save_file({name: tensor for name, tensor in tensors.items() if name not in pooler}, tmp_path / ADAPTER)
    classifier, _ = adopted(base, tmp_path)
    stored = load_file(bert / "model.safetensors")["bert.pooler.dense.weight"]
    assert torch.equal(classifier.model.get_submodule("bert.pooler.dense").weight, stored)
    assert not torch.allclose(logits(classifier), expected, atol=1e-3)


def test_rows_of_a_head_follow_the_names_of_the_base(distilbert: Path, tmp_path: Path) -> None:
    base = shutil.copytree(distilbert, tmp_path / "base")
    expected = made_by_peft(base, tmp_path / "peft", "distilbert", r=2, lora_alpha=4)
    config = json.loads((base / "config.json").read_text())

    def logits_with(names: list[str]) -> torch.Tensor:
        config["id2label"] = dict(enumerate(names))
        config["label2id"] = {name: i for i, name in enumerate(names)}
        (base / "config.json").write_text(json.dumps(config))
        return logits(adopted(base, tmp_path / "peft")[0])

    assert expected.shape[1] == len(NAMES) == 2
    torch.testing.assert_close(logits_with(NAMES), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_with(NAMES[::-1]), expected.flip(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_with(["other", "names"]), expected, rtol=0, atol=1e-5)


def test_rows_of_a_runs_head_are_in_the_order_of_its_own_classes(bases: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases["distilbert"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"id2label": dict(enumerate(NAMES[::-1])), "label2id": {name: i for i, name in enumerate(NAMES[::-1])}}
    (base / "config.json").write_text(json.dumps(config))
    earlier, _ = trained(base, tmp_path / "run", **ALL_BUT_HEAD)
    write_result(tmp_path / "run", {"data": {"label_names": NAMES}})
    torch.testing.assert_close(logits(adopted(base, tmp_path / "run")[0]), logits(earlier), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [ALL_BUT_HEAD, {"lora_head": True}])
@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (["Bad", "good"], "new: bad; missing: Bad"),
        (["bad", "good", "so-so"], "new: none; missing: so-so"),
        (None, "3 classes, and these texts have 2"),  # PEFT stores no names
    ],
)
@pytest.mark.parametrize("with_head", [False, True])
def test_a_head_of_other_classes_is_drawn_and_lora_stays(
    bases: dict[str, Path],
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    settings: dict[str, Any],
    stored: list[str] | None,
    said: str,
    with_head: bool,
) -> None:
    names, folder = stored or ["a", "b", "c"], (tiny_folders if with_head else bases)["distilbert"]
    config = RunConfig.from_settings(model_name=str(folder), max_length=32, seed=1, **settings)
    base = find_base_model(config)
    earlier = build_classifier(config, base, names, torch.float32)
    fill(earlier)
    save(tmp_path, earlier, config)
    if stored is not None:
        write_result(tmp_path, {"data": {"label_names": stored}})
    assert other_classes(read_adapter(tmp_path), base, NAMES) == said
    classifier, _ = adopted(folder, tmp_path)
    before, after = earlier.saved_parameters(), classifier.saved_parameters()
    last = f"{base.family.head[-1]}."
    if with_head:
        of_base = load_file(folder / "model.safetensors")["classifier.weight"]
        assert not any(torch.equal(after[name], of_base) for name in after if name.startswith(last))
    assert set(before) == set(after)
    assert any(name.startswith(last) for name in after)
    for name, parameter in after.items():
        if name.startswith(last):
            begun = parameter.shape == before[name].shape and torch.equal(parameter, before[name])
            assert not begun or not parameter.any(), name  # a frozen bias is 0 from the start
        else:
            assert torch.equal(parameter, before[name]), name


def test_classes_are_the_same_in_any_order_and_where_nobody_knows_their_names(
    bases: dict[str, Path], distilbert: Path, tmp_path: Path
) -> None:
    earlier, config = build(bases["distilbert"], 0, **ALL_BUT_HEAD)
    save(tmp_path, earlier, config)
    base = find_base_model(config.changed(max_length=32))
    assert other_classes(read_adapter(tmp_path), base, ["other", "names"]) == ""
    write_result(tmp_path, {"data": {"label_names": NAMES[::-1]}})
    assert other_classes(read_adapter(tmp_path), base, NAMES) == ""
    with_head = find_base_model(config.changed(model_name=str(distilbert), max_length=32))
    bare = replace(read_adapter(tmp_path), result={}, shapes={})
    assert other_classes(bare, with_head, ["a", "b", "c"]) == "2 classes, and these texts have 3"  # the base's head
    assert other_classes(bare, base, ["a", "b", "c"]) == "", "a new head"


def test_other_classes_are_told_and_cannot_only_be_evaluated() -> None:
    training = RunConfig.from_settings(epochs=1).training
    assert head_advice("", training) == []
    (sentence,) = head_advice("new: a; missing: b", training)
    assert "other classes (new: a; missing: b): the last linear of the head is drawn at random, LoRA" in sentence
    with pytest.raises(UserError, match=r"^--epochs 0: the adapter of --init_adapter has other classes .new: a; miss"):
        head_advice("new: a; missing: b", RunConfig.from_settings(epochs=0).training)


def test_what_transformers_does_with_the_head_of_such_a_folder(
    bases: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """AutoModel reads adapter_config.json, loads the base it names, and puts LoRA and head of the folder on it."""
    classifier, _ = trained(bases["distilbert"], tmp_path, **ALL_BUT_HEAD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2, dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(model), logits(classifier), rtol=0, atol=1e-5)
    capfd.readouterr()


def test_what_cannot_be_mapped_is_refused_by_name(bases: dict[str, Path], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    made_by_peft(bases["distilbert"], whole, "distilbert", r=4, lora_alpha=6)
    stored = json.loads((whole / ADAPTER_CONFIG).read_text())
    tensors = load_file(whole / ADAPTER)
    first = next(name for name in sorted(tensors) if name.endswith("lora_A.weight"))

    def refused(words: str, config: dict[str, Any] | None = None, weights: Any = None, **settings: Any) -> None:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / ADAPTER_CONFIG).write_text(json.dumps(stored | (config or {})))
        save_file(tensors | (weights or {}), folder / ADAPTER)
        check_refusal(words, adopted, bases["distilbert"], folder, **settings)

    refused("peft_type 'LOHA': supported are LORA", {"peft_type": "LOHA"})
    refused("lacks base_model.model.distilbert.*lora_magnitude_vector, and so does", {"use_dora": True})
    refused("--lora_variant dora: the adapter of --init_adapter has lora: leave out", lora_variant="dora")
    refused("--lora_variant pissa: the adapter of --init_adapter has lora: leave out", lora_variant="pissa")
    refused("lora_bias True", {"lora_bias": True})
    refused("bias 'all': supported are none", {"bias": "all"})
    refused("init_lora_weights 'pissa': supported are", {"init_lora_weights": "pissa"})
    refused("new_method {'a': 1}, which is not supported", {"new_method": {"a": 1}})
    refused("must have the numbers r and lora_alpha", {"r": None})
    refused("must have the numbers r and lora_alpha", {"r": math.inf})
    refused("must have the numbers r and lora_alpha", {"lora_alpha": math.nan})
    refused("must have patterns and numbers", {"alpha_pattern": {"q_lin": math.inf}})
    for pattern in ({"*": 4}, ["a"], {"q_lin": "x"}, {"q_lin": None}, 3):
        for key in ("rank_pattern", "alpha_pattern"):
            refused(f"{key} .*: must have patterns and numbers", {key: pattern})
    refused("base_model_name_or_path 5: must be a text", {"base_model_name_or_path": 5})
    refused(r"lora_A\.weight has shape \(4, 32\), but adapter_config\.json says rank 5", {"rank_pattern": {"q_lin": 5}})
    refused("--lora_layers 1: the adapter of --init_adapter has LoRA in layers 0-2: leave out", lora_layers="1")
    refused(
        "made for the base model roberta-base, but --model_name.*: give --model_name roberta-base",
        {"base_model_name_or_path": "roberta-base"},
    )
    refused(r"lora_A\.weight has shape \(4, 33\), must be \(4, 32\)", weights={first: torch.ones(4, 33)})
    refused("values that are not finite", weights={first: torch.full((4, 32), float("nan"))})
    refused("no place for base_model.model.x.bias", weights={"base_model.model.x.bias": torch.ones(1)})
    other = {"base_model.model.distilbert.embeddings.word_embeddings.lora_A.weight": torch.ones(4, 32)}
    refused("has LoRA on distilbert.embeddings.word_embeddings", weights=other)
    deep = {first.replace("layer.0", f"layer.{LAYERS}"): torch.ones(4, 32)}
    refused(f"layer.{LAYERS}.*the model has only {LAYERS} layers", weights=deep)
    head = {"base_model.model.classifier.weight": torch.ones(2, 33)}
    refused(r"classifier\.weight has shape \(2, 33\), must be \(2, 32\)", weights=head)
    refused("--lora_r 8: the adapter of --init_adapter has 4", lora_r=8)
    refused("--lora_key True: the adapter of --init_adapter has False", lora_key=True)


def test_an_export_that_was_moved_names_the_base_model_beside_it(bases: dict[str, Path], tmp_path: Path) -> None:
    made_by_peft(bases["distilbert"], tmp_path, "distilbert", r=4, lora_alpha=6)
    stored = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(stored | {"base_model_name_or_path": "/gone/base"}))
    (tmp_path / "base").mkdir()
    line = f"made for the base model /gone/base, .*: give --model_name {tmp_path}/base$"
    check_refusal(line, adopted, bases["distilbert"], tmp_path)
    another = shutil.copytree(bases["distilbert"], tmp_path / "other" / "base")
    check_refusal(line, adopted, another, tmp_path)


def test_an_adapter_that_was_trained_next_to_other_weights_is_told(bases: dict[str, Path], tmp_path: Path) -> None:
    made_by_peft(bases["distilbert"], tmp_path, "distilbert", r=4, lora_alpha=6)
    adapter = read_adapter(tmp_path)

    def told(quantized: str, **config: Any) -> list[str]:
        return other_weights_advice(replace(adapter, result={"config": config}), quantized)

    assert told("") == told("4 bits") == told("", precision="bf16") == told("4 bits", q_lora=True) == []
    (sentence,) = told("", q_lora=True)
    assert sentence.startswith(
        "the adapter of --init_adapter was trained next to weights in 4 bits, which this run does"
    )
    assert "in 8 bits, which" in told("4 bits", precision="int8")[0]
    assert told("4 bits", q_lora=True, lora_variant="pissa")
    assert told("", lora_variant="pissa") == []


def test_folders_without_a_safe_adapter_are_refused(tmp_path: Path) -> None:
    def refused(words: str) -> None:
        check_refusal(words, read_adapter, tmp_path)

    refused(r"has no adapter_config\.json")
    (tmp_path / ADAPTER_CONFIG).write_text("{")
    refused(r"adapter_config\.json cannot be read")
    (tmp_path / ADAPTER_CONFIG).write_text("[]")
    refused("it must hold a JSON object")
    (tmp_path / ADAPTER_CONFIG).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    refused(r"adapter_model\.safetensors cannot be read")
    (tmp_path / "adapter_model.bin").write_bytes(b"anything")
    refused(r"adapter_model\.bin is a pickle, which is never loaded")
    torch.save({"a": torch.ones(1)}, tmp_path / ADAPTER)  # a pickle under another name
    refused(r"adapter_model\.safetensors cannot be read")
    save_file({"a": torch.ones(1)}, tmp_path / ADAPTER)
    refused("contains no LoRA matrices")
    save_file({"base_model.model.a.lora_A.weight": torch.tensor(1.0)}, tmp_path / ADAPTER)
    refused(r"has shape \(\), but adapter_config.json says rank 2")
