import contextlib
import csv
import gzip
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import finetune_lora
from finetuning.models.int8_products import refused
from finetuning.prediction.command import main
from finetuning.prediction.predictor import predict
from finetuning.runs.files import ADAPTER, TRAINED_WEIGHTS, read_result, write_result
from tests.common import Capture, Patch, changed_run, flags, needs_int8, predictions_of
from tests.prediction.test_progress import Terminal
from tests.scripts import start_script

pytestmark = pytest.mark.xdist_group("predict")  # in one process: the runs are made once
METHODS = {
    "lora": "--lora_mlp True",
    "dora": "--lora_variant dora --lora_mlp True --precision bf16",
    "pissa": "--lora_variant pissa --lora_mlp True --precision bf16",
    "pissa_q_lora": "--lora_variant pissa --q_lora True",
    "lora_head": "--lora_head True",
    "q_lora": "--q_lora True",
    "full": "--method full",
    "selective": "--method selective --trainable_layers 1",
    "bitfit": "--method bitfit --precision bf16",
    "windows": "--windows 3 --window_overlap 2 --max_length 12",
}
if refused() is None:
    METHODS["int8"] = "--lora_mlp True --precision int8"


@pytest.fixture(scope="session")
def runs(distilbert: Path, review_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One finished run of each method on the small reviews."""
    folder = tmp_path_factory.mktemp("runs")
    for method, line in METHODS.items():
        more = f"--epochs 1 --learning_rate 1e-2 --precision fp32 {line}"
        words = flags(distilbert, review_folder, folder / method, *more.split())
        assert finetune_lora.main(words) == 0, method
    return {method: folder / method for method in METHODS}


@pytest.fixture(scope="session")
def test_reviews(review_folder: Path) -> list[str]:
    return pd.read_csv(review_folder / "test.csv")["text"].tolist()


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def refusal(capsys: Capture, *words: object) -> str:
    """The one line on stderr with which the command refuses."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert len(shown.err.splitlines()) == 1
    return shown.err


# --- the same answers as the run's own


@pytest.mark.parametrize("method", METHODS)
def test_predictions_are_those_of_the_run(runs: dict[str, Path], test_reviews: list[str], method: str) -> None:
    stored, logits = predictions_of(runs[method])
    assert stored["row"].tolist() == list(range(len(test_reviews)))
    names, found = predict(runs[method], test_reviews)
    assert names == ["bad", "good"]
    expected = torch.from_numpy(logits).softmax(-1).numpy()
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=1e-6)
    assert (np.argmax(found, axis=1) == logits.argmax(axis=1)).all()
    assert np.ptp(expected[:, 0]) > 0.01  # the texts are told apart
    accuracy = (np.argmax(found, axis=1) == stored["label"]).mean()
    assert accuracy == pytest.approx(read_result(runs[method])["test"]["accuracy"])


def test_a_run_has_learned(runs: dict[str, Path]) -> None:
    assert read_result(runs["full"])["test"]["accuracy"] > 0.9


def test_the_answer_does_not_depend_on_the_other_texts(runs: dict[str, Path], test_reviews: list[str]) -> None:
    together = predict(runs["full"], test_reviews[:6])[1]
    backwards = predict(runs["full"], test_reviews[5::-1])[1]
    alone = [predict(runs["full"], [text])[1][0] for text in test_reviews[:2]]
    np.testing.assert_allclose(together, backwards[::-1], atol=1e-6)
    np.testing.assert_allclose(together[:2], alone, atol=1e-6)


def test_long_texts_are_cut_as_in_the_run(runs: dict[str, Path]) -> None:
    # head_tail of 32 tokens: 7 of the beginning, 23 of the end, what stands between is never seen
    begin, end = "superb " * 7, " waste" * 23
    short, long = (predict(runs["full"], [begin + middle + end])[1] for middle in ("", "plot " * 300))
    assert short == long
    assert predict(runs["full"], [begin + end[: len(end) // 2]])[1] != short


def test_reviews_of_imdb_lose_their_line_breaks_as_in_training(runs: dict[str, Path], tmp_path: Path) -> None:
    texts = ["superb<br /><br />plot", "superb  plot"]
    raw = predict(runs["full"], texts)[1]
    assert abs(raw[0][0] - raw[1][0]) > 1e-4  # other texts keep what they hold
    # nor is anything compiled for a few texts
    run = changed_run(runs["full"], tmp_path / "imdb", config={"dataset": "imdb", "compile": True})
    first, second = predict(run, texts)[1]
    assert first == pytest.approx(second, abs=1e-6)
    assert first == pytest.approx(raw[1], abs=1e-6)


# --- the command


def test_several_texts(runs: dict[str, Path], test_reviews: list[str], capsys: Capture) -> None:
    texts = [test_reviews[1], test_reviews[0], 'boring, "stupid"\nand cold', test_reviews[3]]
    words = [word for text in texts for word in ("--text", text)]
    assert main([str(runs["full"]), *words]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    rows = table(shown.out)
    assert [row["text"] for row in rows] == texts
    assert [row["label"] for row in rows[:2]] == ["good", "bad"]
    assert list(rows[0]) == ["text", "label", "probability_bad", "probability_good"]
    probabilities = predict(runs["full"], texts)[1]
    for row, (bad, good) in zip(rows, probabilities, strict=True):
        assert float(row["probability_bad"]) == pytest.approx(bad, abs=5.1e-5)
        assert float(row["probability_good"]) == pytest.approx(good, abs=5.1e-5)
        assert row["label"] == ("good" if good > bad else "bad")


def test_files(runs: dict[str, Path], test_reviews: list[str], tmp_path: Path, capsys: Capture) -> None:
    texts = [*test_reviews[:3], "naïve, but charmant"]
    lines = "\n".join([texts[0], "", *texts[1:], "  ", ""])
    (tmp_path / "a.txt").write_text(lines, encoding="utf8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(lines.encode()))
    whole = pd.DataFrame({"text": texts, "other": range(4)})
    whole.to_csv(tmp_path / "a.csv", index=False)
    whole.to_csv(tmp_path / "from_excel.csv", index=False, encoding="utf-8-sig")
    whole.rename(columns={"text": "review"}).to_csv(tmp_path / "b.CSV", index=False)
    halves = pd.DataFrame([text.partition(" ")[::2] for text in texts], columns=["first", "rest"])
    halves.to_parquet(tmp_path / "a.parquet")
    halves.to_json(tmp_path / "a.JSONL.gz", orient="records", lines=True)
    columns = {"b.CSV": "review", "a.parquet": "first,rest", "a.JSONL.gz": "first, rest"}
    shown = set()
    for path in tmp_path.iterdir():
        more = ["--text_column", columns[path.name]] if path.name in columns else []
        assert main([str(runs["lora"]), "--file", str(path), *more]) == 0
        shown.add(capsys.readouterr().out)
    (printed,) = shown
    assert [row["text"] for row in table(printed)] == texts


def test_the_command_as_a_process(runs: dict[str, Path], tmp_path: Path) -> None:
    process = start_script("predict.py", [str(runs["q_lora"]), "--file", "-"], tmp_path, given="superb acting\n")
    shown, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")  # no note of a library, no bar
    assert [row["text"] for row in table(shown)] == ["superb acting"]


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, True), (60.0, False)])
def test_a_terminal_sees_how_far_a_long_prediction_is(
    runs: dict[str, Path], monkeypatch: Patch, seconds: float, shown: bool
) -> None:
    monkeypatch.setattr("finetuning.prediction.progress.BAR_AFTER", seconds)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert main([str(runs["lora"]), "--text", "superb acting", "--text", "dull"]) == 0
    assert ("predict: 100%" in terminal.getvalue()) is shown
    assert ("2/2" in terminal.getvalue()) is shown


# --- files of answers


def given(folder: Path, texts: list[str]) -> Path:
    """A table with one empty text and columns of its own."""
    rows = pd.DataFrame({"id": range(100, 100 + len(texts)), "text": texts, "label": "?"})
    rows.loc[3, "text"] = None
    rows.to_json(folder / "in.jsonl", orient="records", lines=True)
    return folder / "in.jsonl"


def test_a_file_of_answers(
    runs: dict[str, Path], test_reviews: list[str], tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    out = tmp_path / "out.parquet"
    names, expected = predict(runs["full"], test_reviews)
    monkeypatch.setattr("finetuning.prediction.rows.CHUNK_ROWS", 7)
    words = [str(runs["full"]), "--file", str(given(tmp_path, test_reviews)), "--output", str(out)]
    assert main([*words, "--skip_bad_rows"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"{out}: 40 rows\n1 of 40 rows have no text and got an empty label\n"
    found = pd.read_parquet(out)
    ours = ["predicted_label", "predicted_probability_bad", "predicted_probability_good"]
    assert list(found.columns) == ["id", "text", "label", *ours]
    assert found["id"].tolist() == list(range(100, 140))
    assert found.loc[3, ["text", *ours]].isna().all()
    kept = [i for i in range(40) if i != 3]
    np.testing.assert_allclose(found[ours[1:]].loc[kept], np.array(expected)[kept], atol=2e-6)
    assert found[ours[0]][kept].tolist() == [names[int(np.argmax(expected[i]))] for i in kept]
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", out.name}


def test_chunks_print_what_one_table_prints(
    runs: dict[str, Path], test_reviews: list[str], tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    words = [str(runs["full"]), "--file", str(given(tmp_path, test_reviews)), "--skip_bad_rows"]
    shown = []
    for size in (1000, 7):
        monkeypatch.setattr("finetuning.prediction.rows.CHUNK_ROWS", size)
        assert main([*words, "--top_k", "1"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    rows = table(shown[0])
    assert list(rows[0]) == ["text", "label", "label_1", "probability_1"]
    assert rows[3] == dict.fromkeys(rows[0], "")
    assert all(row["label"] == row["label_1"] for row in rows)
    assert all(float(row["probability_1"]) >= 0.5 for i, row in enumerate(rows) if i != 3)


def test_nothing_is_left_of_what_is_refused_or_interrupted(
    runs: dict[str, Path], test_reviews: list[str], tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    out, source = tmp_path / "out.csv", given(tmp_path, test_reviews)
    words = [runs["lora"], "--file", source, "--output", out]
    assert "row 3 (the first one is row 0) is None, no text: remove or correct it, or give --skip_bad_rows" in refusal(
        capsys, *words
    )
    assert "already exists" in refusal(capsys, *words[:-1], source)
    assert "--top_k 0: must be at least 1" in refusal(capsys, *words, "--top_k", 0)
    assert "--threshold 1: must be above 0 and below 1" in refusal(capsys, *words, "--threshold", 1)
    monkeypatch.setenv("FINETUNE_LORA_PROCESSOR", "avx")
    assert "FINETUNE_LORA_PROCESSOR=avx: must be one of" in refusal(capsys, *words)
    monkeypatch.delenv("FINETUNE_LORA_PROCESSOR")

    def stopped(*_: object) -> None:
        assert [path.suffix for path in tmp_path.iterdir() if path != source] == [".csv"], "it is being written"
        raise KeyboardInterrupt

    monkeypatch.setattr("finetuning.prediction.outputs._plain", stopped)
    assert main([*map(str, words), "--skip_bad_rows"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert list(tmp_path.iterdir()) == [source]


# --- exported folders


@pytest.mark.parametrize("model_type", ["distilbert", "bert", "roberta"])
def test_an_exported_folder_predicts_as_its_model(
    tiny_folders: dict[str, Path], model_type: str, monkeypatch: Patch
) -> None:
    folder = tiny_folders[model_type]
    monkeypatch.setenv("FINETUNE_LORA_PROCESSOR", "avx512")  # computes in fp32
    texts = ["superb acting", "dull " * 200, "a wonderful and moving film"]
    names, found = predict(folder, texts)
    assert names == ["LABEL_0", "LABEL_1"]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, row in zip(texts, found, strict=True):
        inputs = tokenizer(text, truncation=True, max_length=64, padding=False, return_tensors="pt")
        with torch.no_grad():
            expected = model(inputs["input_ids"]).logits.softmax(-1)[0]
        np.testing.assert_allclose(row, expected, atol=1e-5)
    assert np.ptp(np.array(found)[:, 0]) > 1e-3


def test_exported_folders_that_are_refused(bert: Path, bases: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    assert "no trained classifier: its safetensors lack" in refusal(capsys, bases["bert"], "--text", "a film")
    copy = shutil.copytree(bert, tmp_path / "copy")
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-100])
    message = refusal(capsys, copy, "--text", "a film")
    assert message.startswith(f"error: {copy} cannot be loaded: ")
    (copy / "model.safetensors").write_bytes(weights)
    tensors = load_file(copy / "model.safetensors")
    tensors["classifier.weight"][0, 0] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert "gives no number for a text: a weight is not finite" in refusal(capsys, copy, "--text", "a film")
    (copy / "model.safetensors").write_bytes(weights)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b", "2": "c"}}))
    assert "its safetensors lack classifier.weight (3, 32)" in refusal(capsys, copy, "--text", "a film")


# --- refusals


def test_weights_of_another_run(runs: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    text = ("--text", "a film")
    run = shutil.copytree(runs["lora"], tmp_path / "run")
    shutil.copy(runs["full"] / TRAINED_WEIGHTS, run / ADAPTER)
    assert f"{ADAPTER} was changed after its run wrote it: restore the file, or train" in refusal(capsys, run, *text)
    write_result(run, read_result(run))
    assert "does not contain the weights of this run" in refusal(capsys, run, *text)


def test_texts_that_have_no_label(runs: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    run = runs["lora"]
    for empty in ("", "  ", "\n"):
        assert "--text: text 2 is empty" in refusal(capsys, run, "--text", "a film", "--text", empty)
    assert "--text: text 1 is not UTF-8" in refusal(capsys, run, "--text", "\udcff")
    for path in (tmp_path / "none", tmp_path):
        assert f"--file {path}: cannot be read" in refusal(capsys, run, "--file", path)


def test_wrong_flags(runs: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    run = runs["lora"]
    assert "give --text TEXT or --file FILE" in refusal(capsys, run)
    assert "did you mean --file?" in refusal(capsys, run, "--files", "a")
    text = "long " * 2_000
    assert "unrecognized arguments: long" in refusal(capsys, run, text)
    assert refusal(capsys, text.replace(" ", ""), "--text", "a").startswith("error: File name too long: long")
    for words in (["--text", "a"], ["--file", tmp_path / "lines.txt"]):
        message = refusal(capsys, run, *words, "--text_column", "review")
        assert "--text_column review: needs --file with a table, for example .csv, because text has no" in message
    assert "not allowed with" in refusal(capsys, run, "--text", "a", "--file", tmp_path)
    assert "run" in refusal(capsys, "--text", "a")
    assert "--topk" in refusal(capsys, run, "--text", "a", "--topk", 3)


# --- another machine


def test_a_run_of_another_machine_predicts_on_this_one(
    runs: dict[str, Path], tmp_path: Path, test_reviews: list[str]
) -> None:
    run = changed_run(runs["lora"], tmp_path, config={"accelerator": "gpu", "devices": 8, "num_nodes": 2})
    here, there = (predict(directory, test_reviews[:5])[1] for directory in (runs["lora"], run))
    np.testing.assert_allclose(there, here, atol=1e-4)


@needs_int8
def test_a_run_in_8_bits_predicts_on_a_processor_without_them(
    runs: dict[str, Path], test_reviews: list[str], monkeypatch: Patch
) -> None:
    here = predict(runs["int8"], test_reviews)[1]
    monkeypatch.setattr("finetuning.models.int8_products.refused", lambda: "the processor has no AVX512-VNNI")
    there = predict(runs["int8"], test_reviews)[1]
    assert here != there, "the products were the same"
    np.testing.assert_allclose(here, there, atol=0.02)


def test_the_column_is_that_of_the_run_unless_another_is_named(
    runs: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    run = changed_run(runs["lora"], tmp_path / "run", config={"text_column": "review"})
    pd.DataFrame({"review": ["a dull film", "superb"], "other": ["x", "y"]}).to_csv(tmp_path / "a.csv", index=False)
    shown = []
    for more in ([], ["--text_column", "review"], ["--text_column", "other"]):
        assert main([str(run), "--file", str(tmp_path / "a.csv"), *more]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]


def test_pairs_are_predicted_as_in_the_run(runs: dict[str, Path], bert: Path, tmp_path: Path, capsys: Capture) -> None:
    for name, count in (("train", 40), ("test", 12)):
        rows = [(f"the plot is number {i}", f"no, it is {i + i % 2}", f"class {i % 2}") for i in range(count)]
        pd.DataFrame(rows, columns=["premise", "claim", "label"]).to_csv(tmp_path / f"{name}.csv", index=False)
    columns = ["--text_column", "premise", "--text_pair_column", "claim"]
    run = tmp_path / "run"
    words = flags(bert, tmp_path, run, *columns, "--epochs", "1", "--method", "full")
    assert finetune_lora.main([*words, "--split", "stratified", "--precision", "fp32"]) == 0
    assert '--text "..." --text_pair "..."' in capsys.readouterr().out
    stored, logits = predictions_of(run)
    everything = pd.concat([pd.read_csv(tmp_path / f"{name}.csv") for name in ("train", "test")], ignore_index=True)
    new = everything.iloc[stored["row"]]
    expected = torch.from_numpy(logits).softmax(-1).numpy()
    _, found = predict(run, new["premise"].tolist(), new["claim"].tolist())
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=1e-6)
    swapped = predict(run, new["claim"].tolist(), new["premise"].tolist())[1]
    assert np.abs(np.array(swapped) - expected).max() > 1e-4

    new.to_csv(tmp_path / "new.csv", index=False)
    assert main([str(run), "--file", str(tmp_path / "new.csv")]) == 0
    shown = table(capsys.readouterr().out)
    assert [row["text_pair"] for row in shown] == new["claim"].tolist()
    assert [float(row["probability_class 0"]) for row in shown] == pytest.approx(expected[:, 0], abs=1e-4)
    assert main([str(run), "--text", "a", "--text_pair", "b"]) == 0
    assert table(capsys.readouterr().out)[0]["text_pair"] == "b"

    (lines := tmp_path / "lines.txt").write_text("a\nb\n")
    one, pair = ["--text", "a"], ["--text_pair", "b"]
    for directory, more, message in (
        (run, one, "was trained on pairs of texts: give --text_pair"),
        (run, [*one, *pair, *pair], "--text_pair: must be given once for each --text, so 1 times"),
        (run, ["--file", lines], "the run was trained on pairs, so it must be a table"),
        (run, ["--file", tmp_path / "new.csv", "--text_pair_column", "x"], "--text_pair_column x: must be a column of"),
        (runs["lora"], [*one, *pair], "was trained on single texts: leave out --text_pair"),
        (run, [*one, "--text_pair", " "], "--text_pair: text 1 is empty: remove it"),
        (run, ["--file", tmp_path / "new.csv", "--text_pair", "x"], "with --file give --text_pair_column"),
    ):
        assert message in refusal(capsys, directory, *more)


def test_several_labels_are_predicted_as_in_the_run(distilbert: Path, tmp_path: Path, capsys: Capture) -> None:
    words = {"superb": "good", "boring": "bad", "camera": "technical"}
    for name, count in (("train", 240), ("validation", 40), ("test", 40)):
        chosen = [[word for bit, word in enumerate(words) if i >> bit & 1] for i in range(count)]
        texts = [f"{' '.join(row)} film, number {name} {i}" for i, row in enumerate(chosen)]
        labels = [";".join(words[word] for word in row) or "none" for row in chosen]
        pd.DataFrame({"text": texts, "label": labels}).to_csv(tmp_path / f"{name}.csv", index=False)
    run = tmp_path / "run"
    more = ["--epochs", "3", "--method", "full", "--label_separator", ";", "--threshold", "tuned"]
    line = flags(distilbert, tmp_path, run, *more, "--monitor", "micro_f1", "--precision", "fp32")
    assert finetune_lora.main(line) == 0
    shown = capsys.readouterr().out
    assert "exact match" in shown
    assert "micro F1" in shown
    result = read_result(run)
    threshold = result["task"]["threshold"]
    assert result["test"]["micro_f1"] > 0.9
    assert result["test"]["accuracy"] == pytest.approx(result["test"]["exact_match"])
    stored, logits = predictions_of(run)
    names, found = predict(run, pd.read_csv(tmp_path / "test.csv")["text"].tolist())
    assert names == ["bad", "good", "none", "technical"]
    expected = torch.from_numpy(logits).sigmoid().numpy()
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=1e-6)
    truth = np.array([[i in row for i in range(4)] for row in stored["label"]])
    assert ((expected > threshold) == truth).all(1).mean() == pytest.approx(result["test"]["exact_match"])

    assert main([str(run), "--text", "superb boring film, number 3", "--text", "superb boring camera"]) == 0
    rows = table(capsys.readouterr().out)
    for row in rows:
        above = [name for name in names if float(row[f"probability_{name}"]) > threshold]
        assert row["label"].split(";") == above
    assert rows[0]["label"] == "bad;good", "as the table of training separates them"
    given_labels = []
    for other in ("0.01", "0.99"):
        assert main([str(run), "--text", "superb film, number 3", "--threshold", other]) == 0
        given_labels.append(table(capsys.readouterr().out)[0]["label"])
    assert given_labels[0].count(";") > given_labels[1].count(";")
    out = tmp_path / "out.parquet"
    assert main([str(run), "--text", "superb boring film, number 3", "--output", str(out), "--top_k", "2"]) == 0
    (answer,) = pd.read_parquet(out).to_dict("records")
    assert list(answer["label"]) == ["bad", "good"]
    assert {answer["label_1"], answer["label_2"]} == {"bad", "good"}
    assert answer["probability_1"] >= answer["probability_2"] > threshold
    assert main([str(run), "--file", str(tmp_path / "test.csv"), "--label_column", "label"]) == 0
    score, test = capsys.readouterr().err, result["test"]
    assert f"exact match {test['exact_match']:.2%}, 95 % interval " in score
    assert f"; micro F1 {test['micro_f1']:.2%}; macro F1 {test['macro_f1']:.2%}; 40 labelled and answered" in score
    wrong = "--label_separator ',': goes with --label_column"
    assert wrong in refusal(capsys, run, "--text", "a", "--label_separator", ",")
    wrong = "--text_column: must be the name of a column, or left out"
    assert wrong in refusal(capsys, run, "--file", str(tmp_path / "test.csv"), "--text_column", "")


@pytest.fixture(scope="module")
def positive_run(distilbert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with a positive class, in a folder with its texts, and what it printed."""
    folder = tmp_path_factory.mktemp("positive")
    words = {"superb": "good", "boring": "bad"}
    for name, count in (("train", 160), ("validation", 120), ("test", 40)):
        texts = [f"{list(words)[i % 2]} film, number {name} {i}" for i in range(count)]
        table_of = {"text": texts, "label": [list(words.values())[i % 2] for i in range(count)]}
        pd.DataFrame(table_of).to_csv(folder / f"{name}.csv", index=False)
    more = ["--epochs", "3", "--method", "full", "--threshold", "tuned", "--positive_label", "bad", "--precision"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert finetune_lora.main(flags(distilbert, folder, folder / "run", *more, "fp32")) == 0
    return folder / "run", shown.getvalue()


def test_two_classes_and_a_positive_one(positive_run: tuple[Path, str], capsys: Capture) -> None:
    run, shown = positive_run
    task = read_result(run)["task"]
    assert task["positive_label"] == "bad"
    assert f"threshold   {task['threshold']:g} for the positive label 'bad', tuned on validation" in shown
    file = ["--file", str(run.parent / "test.csv")]
    assert main([str(run), *file]) == 0
    rows = table(capsys.readouterr().out)
    assert [row["label"] for row in rows] == [
        "bad" if float(row["probability_bad"]) > task["threshold"] else "good" for row in rows
    ]
    assert main([str(run), *file, "--threshold", "0.999999"]) == 0
    assert {row["label"] for row in table(capsys.readouterr().out)} == {"good"}


def test_texts_without_an_answer(positive_run: tuple[Path, str], capsys: Capture) -> None:
    run, _ = positive_run
    file = ["--file", str(run.parent / "test.csv")]
    assert main([str(run), *file, "--abstain_risk", "0.1"]) == 0
    said = capsys.readouterr()
    assert "of 120 validation texts" in said.err
    assert "With 95 % confidence, at most 10 % of all answers are wrong" in said.err
    least = float(said.err.split("--abstain ")[1].split()[0])
    rows = table(said.out)
    assert all((row["label"] != "") == (float(row["confidence"]) >= least) for row in rows)
    confidence = sorted(float(row["confidence"]) for row in rows)
    assert said.err.splitlines()[-1] == (
        f"{sum(row['label'] != '' for row in rows)} of 40 texts answered;"
        f" confidence {confidence[0]:.2f} to {confidence[-1]:.2f}"
    )
    line = refusal(capsys, run, *file, "--abstain_risk", 0.001)
    assert line.startswith("error: --abstain_risk 0.001: the 120 validation texts cannot show it, but ")
    assert line.endswith(": give that or --abstain X, or label more texts\n")
    for words_given, line in (
        (("--abstain", 1), "--abstain 1: must be above 0 and below 1"),
        (("--abstain_risk", 0), "--abstain_risk 0: must be above 0 and below 1"),
        (("--most_uncertain", 0), "--most_uncertain 0: must be at least 1"),
        (("--abstain", 0.5, "--most_uncertain", 2), "not allowed with argument"),
    ):
        assert line in refusal(capsys, run, *file, *words_given)


def test_a_labelled_file_is_scored(positive_run: tuple[Path, str], tmp_path: Path, capsys: Capture) -> None:
    run, _ = positive_run
    file = ["--file", str(run.parent / "test.csv")]
    assert main([str(run), *file, "--label_column", "label", "--output", str(tmp_path / "checked.csv")]) == 0
    checked = pd.read_csv(tmp_path / "checked.csv")
    accuracy = (checked["label"] == checked["predicted_label"]).mean()
    said = capsys.readouterr().err
    assert f"accuracy {accuracy:.2%}, 95 % interval " in said
    assert "warning" not in said
    assert main([str(run), "--file", str(run.parent / "train.csv"), "--label_column", "label"]) == 0
    assert "warning: this file is in the run's --data_dir: if its texts trained the run" in capsys.readouterr().err
    line = refusal(capsys, run, *file, "--label_column", "text")
    assert "--label_column text: 'superb film, number test 0' is none of the classifier's labels: bad, good" in line
    line = refusal(capsys, run, "--text", "a", "--label_column", "label")
    assert "--label_column label: needs --file with a table" in line


def test_labels_of_objects_that_need_not_have_one(runs: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    objects = [{"text": f"a film {i}"} | ({"label": "good"} if i < 5 else {}) for i in range(30)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(each) + "\n" for each in objects))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetuning.prediction.rows.CHUNK_ROWS", 7)
        words = ["--file", str(tmp_path / "some.jsonl"), "--label_column", "label"]
        assert main([str(runs["full"]), *words]) == 0
    assert "; 5 labelled and answered texts" in capsys.readouterr().err


def test_the_texts_to_label_next(positive_run: tuple[Path, str], tmp_path: Path, capsys: Capture) -> None:
    run, _ = positive_run
    file = ["--file", str(run.parent / "test.csv")]
    assert main([str(run), *file, "--most_uncertain", "3"]) == 0
    rows = table(capsys.readouterr().out)
    found = [float(row["confidence"]) for row in rows]
    assert len(found) == 3
    assert found == sorted(found)
    assert "predicted_label" in rows[0]
    assert "label" not in rows[0], "a guess would be taken for a label"
    assert main([str(run), *file, "--most_uncertain", "3", "--output", str(tmp_path / "next.csv")]) == 0
    assert f"{tmp_path / 'next.csv'}: 3 rows" in capsys.readouterr().err
    some = given(tmp_path, [f"film {i}" for i in range(9)])
    assert main([str(run), "--file", str(some), "--most_uncertain", "9", "--skip_bad_rows"]) == 0
    shown = capsys.readouterr()
    assert len(table(shown.out)) == 8
    assert "1 of 9 rows have no text and were left out" in shown.err


def test_an_exported_folder_has_no_validation(distilbert: Path, capsys: Capture) -> None:
    folder = distilbert
    for flag in ("--abstain", "--abstain_risk"):
        assert f"{flag} 0.5: needs a run directory: {folder} has no validation" in refusal(
            capsys, folder, "--text", "a", flag, 0.5
        )
    assert main([str(folder), "--text", "a", "--text", "b", "--most_uncertain", "1"]) == 0
    said = capsys.readouterr()
    assert "confidence is as trained" in said.err
    assert len(table(said.out)) == 1
