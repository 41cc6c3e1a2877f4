import contextlib
import io
import re
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import finetune_lora
from finetuning.errors import UserError
from finetuning.export import fresh_process
from finetuning.export.command import main
from finetuning.export.plain import write_model
from finetuning.export.proof import run_alone
from finetuning.prediction.predictor import predict
from finetuning.prediction.trained import read_trained
from finetuning.runs.answers import Rule
from finetuning.runs.files import ADAPTER, SETTINGS, read_result, write_result
from finetuning.settings import PACKAGED_BERT
from finetuning.storage import read_json, write_json
from tests.common import ROOT, Capture, Patch, changed_run, flags, predictions_of, refusal_of

# A layer takes seconds to become ONNX. So only tests of what changes the file ask for it: its inputs, and its head.
WITH_ONNX = ["--onnx"] if all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")) else []
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf8")
SNIPPETS = re.findall(r"\n```python\n(.*?)```", GUIDE, flags=re.DOTALL)
ROWS = [(" ".join(f"{j % 9} plot" for j in range(i % 15)) + f" {i}", "so", f"class {i % 2}") for i in range(60)]
TABLE = pd.DataFrame(ROWS, columns=["text", "claim", "label"])  # half of the texts have more than 12 tokens


@pytest.fixture
def in_this_process(monkeypatch: Patch) -> None:
    """The steps of a fresh process, without the seconds that its imports take. One test has real processes."""

    def run_here(words: Sequence[str], folder: Path) -> str:
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as shown:
            if len(words) == 1:  # the card's code
                exec(Path(words[0]).read_text(), {})
            else:
                fresh_process.main(Path(words[1]))
        return shown.getvalue()

    monkeypatch.setattr("finetuning.export.proof.run_alone", run_here)
    monkeypatch.setattr("finetuning.export.card.run_alone", run_here)


@pytest.fixture(scope="module")
def run(bert: Path, review_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose long texts are cut, with a base model of its own."""
    folder = tmp_path_factory.mktemp("export")
    base = first_layer(bert, folder / "base")
    more = "--max_length 16 --epochs 1 --precision bf16 --efficient False"
    return trained(folder, review_folder, base, *more.split())


def first_layer(base: Path, folder: Path) -> Path:
    """A copy of a base model of which only one layer is used, because each layer takes a second to become ONNX."""
    shutil.copytree(base, folder)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"n_layers" if "n_layers" in config else "num_hidden_layers": 1})
    return folder


def trained(folder: Path, data: Path, base: Path, *more: str) -> Path:
    """A finished run in ``folder/run``."""
    assert finetune_lora.main(flags(base, data, folder / "run", "--learning_rate", "1e-2", *more)) == 0
    return folder / "run"


def refusal(capsys: Capture, *words: object, status: int = 2) -> str:
    """The one line of an export that leaves nothing behind."""
    parent = Path(str(words[1])).parent
    before = sorted(parent.iterdir()) if parent.is_dir() else None
    capsys.readouterr()
    assert main([str(word) for word in words]) == status
    errors = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in errors if line and "tokenizing" not in line]
    assert len(lines) == 1, lines
    assert before == (sorted(parent.iterdir()) if parent.is_dir() else None)
    return lines[0]


@pytest.fixture(scope="module")
def reviews_model(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that the run becomes, with real processes, and what the command printed."""
    out = tmp_path_factory.mktemp("exported") / "deep" / "reviews-model"
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert main([str(run), str(out), *WITH_ONNX, "--check_texts", "30"]) == 0
    return out, shown.getvalue()


def test_a_fresh_process_prints_any_name_in_any_locale(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert run_alone(["-c", "print('sch\u00f6n \u65e5\u672c')"], tmp_path) == "sch\u00f6n \u65e5\u672c\n"


@pytest.mark.xdist_group("export")  # in one process: the folder is made once
def test_a_run_becomes_a_folder_that_proves_itself(run: Path, reviews_model: tuple[Path, str]) -> None:
    out, shown = reviews_model
    assert "token ids of a stratified sample of 30 of 80 held-out texts" in shown
    assert "it cuts long texts at their end" in shown
    assert "The run stored its predictions in bf16" in shown
    assert ("onnxruntime's logits" in shown) == bool(WITH_ONNX)
    files = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == files | ({"onnx"} if WITH_ONNX else set())
    assert [path.name for path in out.parent.iterdir()] == ["reviews-model"]
    config = read_json(out / "config.json")
    assert (config["text_column"], config.get("label_separator")) == ("text", None), "predict.py reads tables by these"
    classify = pipeline("text-classification", model=str(out), top_k=None, truncation=True)
    answers: Any = classify(["superb acting, a joy"])
    answer = {entry["label"]: entry["score"] for entry in answers[0]}
    assert set(answer) == {"bad", "good"}
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.eval_results[0].metric_value == pytest.approx(read_result(run)["test"]["accuracy"], abs=1e-4)
    for sentence in shown.splitlines()[1:]:
        assert f"- {sentence.strip()}\n" in card.content, "the card says what the command said"
    assert read_result(run)["command"] in card.content
    assert "\nIt prints:\n\n```\n" in card.content


@pytest.mark.xdist_group("export")
@pytest.mark.parametrize("code", SNIPPETS, ids=["pipeline", "onnxruntime"])
def test_a_snippet_of_the_guide_runs_as_it_is_written(
    reviews_model: tuple[Path, str], code: str, monkeypatch: Patch, capsys: Capture
) -> None:
    if "onnxruntime" in code and not WITH_ONNX:
        pytest.skip("requirements-onnx.txt is not installed")
    monkeypatch.chdir(reviews_model[0].parent)
    exec(code, {})
    shown = capsys.readouterr().out
    assert ("'label': 'good'" in shown) if "pipeline" in code else (shown.count("[") == 3)


@pytest.mark.usefixtures("in_this_process")
def test_an_adapter_proves_itself(run: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "adapter"
    assert main([str(run), str(out), "--adapter", "--check_texts", "20"]) == 0
    assert "differ from the run's" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} >= {"adapter_config.json", ADAPTER, "README.md"}
    assert not (out / "base").exists()
    config = read_json(out / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(run.parent / "base")
    assert ModelCard.load(out / "README.md").data.library_name == "peft"


@pytest.mark.usefixtures("in_this_process")
def test_an_adapter_of_a_classifier_with_other_order_and_kind_of_classes(run: Path, tmp_path: Path) -> None:
    """The base model names the run's classes in another order, and a pipeline would take a sigmoid of its logits."""
    other, data = tmp_path / "other", Path(read_json(run / SETTINGS)["data_dir"])
    assert main([str(run), str(other), "--check_texts", "5"]) == 0
    stored = read_json(other / "config.json")
    names = list(stored["id2label"].values())[::-1]
    more = {"id2label": dict(enumerate(names)), "problem_type": "multi_label_classification"}
    write_json(other / "config.json", stored | more | {"label2id": {name: i for i, name in enumerate(names)}})
    mine = trained(tmp_path, data, other, "--epochs", "1", "--precision", "fp32")
    assert main([str(mine), str(tmp_path / "out"), "--adapter", "--check_texts", "20"]) == 0
    base = tmp_path / "out" / "base"
    assert list(read_json(base / "config.json")["id2label"].values()) == names[::-1]
    printed = re.findall(r"^\S+ (0\.\d+|1\.0)$", (tmp_path / "out" / "README.md").read_text(), flags=re.MULTILINE)
    assert sum(map(float, printed)) == pytest.approx(1, abs=0.002), "softmax"
    again = ["--init_adapter", str(base.parent), "--epochs", "0", "--precision", "fp32"]
    assert finetune_lora.main(flags(base, data, tmp_path / "again", *again)) == 0
    scores = [read_result(folder)["validation"]["loss"] for folder in (mine, tmp_path / "again")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def lora_run(folder: Path, base: Path, *more: str, table: pd.DataFrame = TABLE) -> Path:
    """A finished fp32 run of the table's rows, a third of which are its test."""
    data = folder / "data"
    data.mkdir(parents=True)
    table.iloc[::3].to_csv(data / "test.csv", index=False)
    table.drop(table.index[::3]).to_csv(data / "train.csv", index=False)
    common = "--epochs 2 --precision fp32 --max_length 12 --truncation head"  # as a pipeline cuts
    return trained(folder, data, base, *common.split(), *more)


def exported(run: Path, out: Path, *more: str) -> tuple[str, dict[str, Any]]:
    """The card of an exported run, and the metadata of the card."""
    assert main([str(run), str(out), "--check_texts", "20", *more]) == 0
    card = ModelCard.load(out / "README.md")
    return card.content, card.data.to_dict()


def rows_of_test(run: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """The rows of the run's test, and the logits that it stored for them."""
    stored, logits = predictions_of(run)
    table = pd.read_csv(run.parent / "data" / "test.csv", keep_default_na=False)
    return table.iloc[stored["row"]], logits


def in_pipeline(out: Path, texts: list[Any]) -> tuple[list[str], np.ndarray]:
    """The labels of an exported folder, and what a plain pipeline says about texts."""
    answers: Any = pipeline("text-classification", model=str(out), top_k=None, truncation=True)(texts)
    names = list(read_json(out / "config.json")["id2label"].values())
    found = [{entry["label"]: entry["score"] for entry in answer} for answer in answers]
    return names, np.array([[answer[name] for name in names] for answer in found])


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("model_type", "more"), [("bert", []), ("distilbert", ["--q_lora", "True"]), (PACKAGED_BERT, [])]
)
def test_a_run_on_pairs(tiny_folders: dict[str, Path], tmp_path: Path, model_type: str, more: list[str]) -> None:
    table, columns = TABLE.rename(columns={"text": "premise"}), ["--text_column", "premise"]
    base = first_layer(tiny_folders[model_type], tmp_path / "base") if model_type in tiny_folders else Path(model_type)
    run = lora_run(tmp_path, base, *columns, "--text_pair_column", "claim", *more, table=table)
    out, adapter = tmp_path / "proof", tmp_path / "snippet.py"  # names that the proof and the card's code use as well
    onnx = WITH_ONNX if model_type != PACKAGED_BERT else []
    content, _ = exported(run, out, *onnx)
    assert 'classify([{"text": "A text to classify.", "text_pair": "The second text of the pair."}])' in content
    assert ('"token_type_ids": np.array(' in content) == (bool(onnx) and model_type == "bert"), "DistilBERT has none"
    tested, logits = rows_of_test(run)
    texts = [{"text": row.premise, "text_pair": row.claim} for row in tested.itertuples()]
    _, found = in_pipeline(out, texts)
    expected = torch.from_numpy(logits).softmax(-1).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    swapped = [{"text": pair["text_pair"], "text_pair": pair["text"]} for pair in texts]
    assert np.abs(in_pipeline(out, swapped)[1] - expected).max() > 1e-3
    content, _ = exported(run, adapter, "--adapter")
    assert '"text_pair": "The second text of the pair."' in content
    alone = bool(more) or model_type == PACKAGED_BERT
    assert (adapter / "base").exists() == alone, "no other program has packaged weights, or those of 4 bits"
    for folder in (out, adapter):
        assert not {path.name for path in folder.iterdir()} & {"job.json", "answers.npz"}
    with pytest.raises(UserError, match="was trained on pairs of texts: give --text_pair for each --text"):
        read_trained(out).check_pairs(given=False)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("pairs", [False, True], ids=["single", "pairs"])
def test_a_run_with_windows(bert: Path, tmp_path: Path, pairs: bool) -> None:
    windows = ["--windows", "3", "--window_overlap", "2", "--window_pooling", "max", "--truncation", "head_tail"]
    run = lora_run(tmp_path, bert, *windows, *(["--text_pair_column", "claim"] * pairs))
    content, _ = exported(run, tmp_path / "out")
    assert "up to 3 windows and took the max of their logits. A pipeline reads only one of 12 tokens." in content
    assert "it cuts long texts, and the run read them as windows. That changes" in content
    tested, logits = rows_of_test(run)
    _, found = predict(tmp_path / "out", tested["text"].tolist(), tested["claim"].tolist() if pairs else None)
    rounding = 5e-3  # an exported folder is read in the machine's fastest precision
    np.testing.assert_allclose(found, torch.from_numpy(logits).softmax(-1).numpy(), rtol=0, atol=rounding)
    exported(run, tmp_path / "adapter", "--adapter")


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.skipif(not WITH_ONNX, reason="needs onnx")
@pytest.mark.parametrize(
    ("model_type", "more"), [("bert", []), ("roberta", ["--windows", "3", "--window_pooling", "max"])]
)
def test_a_head_on_the_mean_becomes_onnx_alone(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: Capture, model_type: str, more: list[str]
) -> None:
    pairs = ["--text_pair_column", "claim"]
    base, out = first_layer(tiny_folders[model_type], tmp_path / "base"), tmp_path / "out"
    run = lora_run(tmp_path, base, "--pooling", "mean", *pairs, *more)
    message = refusal(capsys, run, out)
    cannot = f"{run}: has --pooling mean, which Transformers' class for {model_type} models cannot compute: give"
    assert cannot in message
    message = refusal(capsys, run, out, "--adapter")
    assert f"which PEFT cannot compute with this {model_type} model: give --onnx instead of --adapter" in message
    content, data = exported(run, out, "--onnx")
    assert data["library_name"] == "onnx"
    assert "this folder has no weights for Transformers" in content
    assert "pipeline(" not in content
    assert ('"token_type_ids": np.array(' in content) == (model_type == "bert"), "RoBERTa has one type"
    files = {"README.md", "config.json", "tokenizer.json", "tokenizer_config.json", "onnx"}
    assert {path.name for path in out.iterdir()} == files
    with pytest.raises(OSError, match="no file named"):
        AutoModelForSequenceClassification.from_pretrained(out)
    assert "out: has only ONNX, for onnxruntime: give the run's directory" in refusal_of(predict, out, ["a text"])
    tested, logits = rows_of_test(run)
    tokenizer = AutoTokenizer.from_pretrained(out)
    encoded = tokenizer(tested["text"].tolist(), tested["claim"].tolist(), truncation=True)["input_ids"]
    second = np.array([ids.index(tokenizer.sep_token_id) + 1 for ids in encoded])
    ids = [np.array(ids) for ids in encoded]
    found = fresh_process.onnx_logits(out / "onnx" / "model.onnx", ids, tokenizer.pad_token_id, second)
    if more:
        assert "took the max of their logits. The code above reads only one of 12 tokens." in content
        assert "finetune-predict reads texts with the run's directory as the run did" in content
        short = np.array([len(one) < 12 for one in ids])
        assert 0 < short.sum() < len(short)
        found, logits = found[short], logits[short]
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("in_this_process")
def test_a_class_that_reads_the_mean_itself_is_exported_as_usual(
    folder_of: Any, tmp_path: Path, capsys: Capture
) -> None:
    run = lora_run(tmp_path, folder_of("modernbert"), "--pooling", "mean")
    exported(run, tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["classifier_pooling"] == "mean"
    tested, logits = rows_of_test(run)
    _, found = in_pipeline(tmp_path / "out", tested["text"].tolist())
    np.testing.assert_allclose(found, torch.from_numpy(logits).softmax(-1).numpy(), rtol=0, atol=1e-4)
    assert "which PEFT cannot compute" in refusal(capsys, run, tmp_path / "adapter", "--adapter")


@pytest.mark.usefixtures("in_this_process")
def test_a_decoder_whose_base_has_no_padding_token(folder_of: Any, tmp_path: Path) -> None:
    run = lora_run(tmp_path, folder_of("gpt2"))
    exported(run, tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["pad_token_id"] is not None
    exported(run, tmp_path / "adapter", "--adapter")


@pytest.mark.usefixtures("in_this_process")
def test_a_run_without_a_test_is_proved_with_its_validation(bert: Path, tmp_path: Path) -> None:
    run = lora_run(tmp_path, bert, "--test", "False")
    result = read_result(run)
    content, data = exported(run, tmp_path / "out")
    results = data["model-index"][0]["results"][0]
    assert results["dataset"]["split"] == "validation"
    assert results["metrics"][0]["value"] == pytest.approx(result["validation"]["accuracy"], abs=1e-4)
    assert f"of all {result['data']['sizes']['validation']} held-out texts" in content


@pytest.mark.usefixtures("in_this_process")
def test_a_multi_label_run(bert: Path, tmp_path: Path) -> None:
    chosen = [[word for bit, word in enumerate(("funny", "sad", "long")) if i >> bit & 1] for i in range(96)]
    rows = [(f"a {' '.join(words)} film, number {i}", ";".join(words) or "none") for i, words in enumerate(chosen)]
    table = pd.DataFrame(rows, columns=["text", "label"])
    more = ("--label_separator", ";", "--threshold", "0.37")
    run = lora_run(tmp_path, bert, *more, table=table)
    out = tmp_path / "out"
    content, data = exported(run, out)
    config = read_json(out / "config.json")
    assert config["problem_type"] == "multi_label_classification"
    assert config["threshold"] == 0.37
    assert 'function_to_apply="sigmoid"' in content
    assert "A text gets each label whose probability is above 0.37: several labels, one, or none." in content
    assert "| exact match |" in content
    assert "It always gives one of its labels" not in content
    metrics = {entry["type"] for entry in data["model-index"][0]["results"][0]["metrics"]}
    assert metrics == {"exact_match", "f1"}
    tested, logits = rows_of_test(run)
    names, found = in_pipeline(out, tested["text"].tolist())
    assert names == ["funny", "long", "none", "sad"]
    np.testing.assert_allclose(found, torch.from_numpy(logits).sigmoid().numpy(), rtol=0, atol=1e-4)
    content, _ = exported(run, tmp_path / "adapter", "--adapter")
    assert 'function_to_apply="sigmoid"' in content


@pytest.mark.usefixtures("in_this_process")
def test_a_positive_class_and_its_threshold(bert: Path, tmp_path: Path) -> None:
    rows = [(f"a {('funny', 'sad')[i % 2]} film, number {i}", ("spam", "ham")[i % 2]) for i in range(96)]
    table = pd.DataFrame(rows, columns=["text", "label"])
    run = lora_run(tmp_path, bert, "--threshold", "0.37", table=table)
    content, _ = exported(run, tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    assert config["problem_type"] == "single_label_classification"
    assert (config["threshold"], config["positive_label"]) == (0.37, "spam")
    assert "A text gets `spam` if its probability is above 0.37, else `ham`. A pipeline does not know this" in content
    assert "| accuracy |" in content
    assert "It always gives one of its labels" in content
    trained = read_trained(tmp_path / "out")
    assert (trained.rule, trained.rule.multi_label) == (Rule(0.37, 1), False)


@pytest.mark.usefixtures("in_this_process")
def test_a_folder_that_differs_does_not_stay(run: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    def write_damaged(folder: Path, model: Any, dtype: torch.dtype, rule: Rule) -> None:
        model.classifier.bias.data[0] += 0.001
        write_model(folder, model, dtype, rule)
        model.classifier.bias.data[0] -= 0.001

    monkeypatch.setattr("finetuning.export.plain.write_model", write_damaged)
    message = refusal(capsys, run, tmp_path / "out", "--check_texts", "4", status=1)
    assert message.startswith("failed: ")
    assert "differ from the run's by up to 0.001, more than 0.0001: nothing is kept" in message
    assert list(tmp_path.iterdir()) == []


def test_runs_that_cannot_be_exported(run: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    out = tmp_path / "out"
    copies = iter(range(99))

    def changed(**changes: Any) -> Path:
        return changed_run(run, tmp_path / f"copy {next(copies)}", **changes)

    def refused(words: str, directory: Path, *more: str, status: int = 2) -> None:
        message = refusal(capsys, directory, out, *more, status=status)
        assert words in message, message

    refused("must be a finished run, but has no result.json", tmp_path)
    refused("its base model is gone: --model_name", changed(config={"model_name": "/nowhere/base"}))
    result = read_result(run)
    base = result["base_model"]
    other = base | {"sha256": base["sha256"] | {"model.safetensors": "0"}}
    refused("model.safetensors has changed since the run", changed(base_model=other))
    (copy := changed()).joinpath(ADAPTER).unlink()
    refused(f"{ADAPTER} cannot be read", copy)
    (copy := changed()).joinpath("adapter_config.json").write_text("{")
    refused("adapter_config.json was changed after its run wrote it", copy, "--adapter")
    copy = changed()
    tensors = load_file(copy / ADAPTER)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, copy / ADAPTER)
    refused("adapter_model.safetensors was changed after its run wrote it", copy)
    write_result(copy, read_result(copy))
    refused(f"{name} has values that are not finite", copy)
    save_file({name: -10 * tensor for name, tensor in tensors.items()}, copy / ADAPTER)
    write_result(copy, read_result(copy))
    refused("the run's files do not belong together", copy, status=1)
    (few := tmp_path / "few").mkdir()
    for split in ("train", "validation", "test"):
        (few / f"{split}.csv").write_text(f"text,label\n{split} a,good\n{split} b,bad\n")
    refused("the run's data has changed", run, "--data_dir", str(few))
    shutil.copytree(result["config"]["data_dir"], tmp_path / "corrected")
    table = pd.read_csv(tmp_path / "corrected" / "test.csv", keep_default_na=False)
    table.assign(text=table["text"] + " indeed").to_csv(tmp_path / "corrected" / "test.csv", index=False)
    refused("the run's data has changed", run, "--data_dir", str(tmp_path / "corrected"))
    refused("--data_dir", run, "--data_dir", str(tmp_path / "nowhere"))
    lora = dict.fromkeys(name for name in result["config"] if "lora" in name or name == "double_quantization")
    refused("--method lora, but the method is full", changed(config=lora | {"method": "full"}), "--adapter")
    monkeypatch.setattr("finetuning.export.onnx_file.PACKAGES", ("onnx_that_nobody_has",))
    refused("--onnx: onnx_that_nobody_has not installed: pip install onnx_that_nobody_has", run, "--onnx")


@pytest.mark.xdist_group("export")
def test_a_run_with_damaged_settings_is_refused(run: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(run, copy := tmp_path / "run")
    (copy / SETTINGS).write_bytes(b"")
    line = refusal(capsys, copy, tmp_path / "out")
    assert f"{copy / SETTINGS} cannot be read" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--check_texts 0", "--check_texts 0: must be at least 1"),
        ("--dtype int4", "--dtype int4: must be one of fp32, bf16, fp16"),
        ("--onnx --dtype bf16", "leave out --dtype bf16"),
        ("--adapter --dtype bf16", "--dtype bf16: cannot be used with --adapter"),
        ("--adapter --onnx", "--onnx: cannot be used with --adapter"),
    ],
)
def test_flags_that_are_refused(run: Path, tmp_path: Path, capsys: Capture, words: str, message: str) -> None:
    assert message in refusal(capsys, run, tmp_path / "out", *words.split())
    assert "already exists: give a new folder" in refusal(capsys, run, tmp_path)
