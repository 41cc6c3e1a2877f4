import csv
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from safetensors.numpy import load_file

from finetune_lora import main
from finetuning.comparison.baselines import baseline_logits
from finetuning.flags import given_flags
from finetuning.materials import find_materials
from finetuning.processor import VARIABLE, instructions
from finetuning.runs.checkpoints import write_checkpoint
from finetuning.runs.directory import settings_to_run
from finetuning.runs.files import ADAPTER, read_result
from finetuning.runs.messages import called
from finetuning.steps import claim_directory, read_inputs
from finetuning.training import trackers
from finetuning.training.callbacks import GracefulStop
from finetuning.training.module import FineTuning
from tests.common import (
    ROOT,
    Capture,
    Patch,
    contents,
    flags,
    needs_int8,
    one_thread,
    predictions_of,
    write_reviews,
    write_splits,
)
from tests.scripts import finish, start

# --- a run from end to end


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("distilbert", ["--lora_mlp", "True"]),
        ("distilbert", ["--q_lora", "True"]),
        pytest.param("distilbert", ["--precision", "int8", "--lora_mlp", "True"], marks=needs_int8),
        pytest.param("bert", ["--precision", "fast", "--method", "selective"], marks=needs_int8),
        ("bert", ["--method", "full"]),
        ("roberta", ["--method", "selective", "--trainable_layers", "2", "--monitor", "loss"]),
        ("roberta", ["--lora_head", "True", "--efficient", "False"]),
    ],
    ids=["lora", "qlora", "int8", "fast", "full", "selective", "lora_head"],
)
def test_a_run_leaves_what_the_design_lists(
    tiny_folders: dict[str, Path], review_folder: Path, tmp_path: Path, family: str, more: list[str], capsys: Capture
) -> None:
    output = tmp_path / "run"
    more = [*more, "--epochs", "2", "--learning_rate", "0.01", "--report", "True"]
    assert main(flags(tiny_folders[family], review_folder, output, *more)) == 0
    result = read_result(output)
    assert result["status"] == "finished"
    asked = more[more.index("--precision") + 1] if "--precision" in more else "auto"
    assert result["config"]["precision"] in (("int8", "bf16", "fp32") if asked == "fast" else (asked,))
    assert result["data"]["sizes"] == {"train": 120, "validation": 40, "test": 40}
    assert result["data"]["label_names"] == ["bad", "good"]
    assert result["train"]["steps"] == 2 * 15
    assert result["train"]["seconds"] > 0
    assert result["train"]["processor_seconds"] > 0
    assert result["memory"]["peak_bytes"] > 0
    assert result["test"]["examples"] == 40
    if family == "distilbert":
        assert result["test"]["accuracy"] > 0.8  # the reviews say it in so many words
    low, high = result["test"]["accuracy_ci95"]
    assert low < result["test"]["accuracy"] <= high
    stored, logits = predictions_of(output)
    assert stored["row"].tolist() == list(range(40))
    assert (logits.argmax(axis=1) == stored["label"]).mean() == pytest.approx(result["test"]["accuracy"])
    adapter = {"adapter_model.safetensors", "adapter_config.json"}
    weights = {"trained_weights.safetensors"} if "--method" in more else adapter
    expected = {"result.json", "settings.json", "predictions.parquet", "metrics.csv", "learning_curve.png", "last.ckpt"}
    expected.add("report.html")
    assert {path.name for path in output.iterdir()} == expected | weights
    shown = capsys.readouterr().out
    assert "\n        2 labels: bad, good\n" in shown
    assert "total" in shown
    assert "test        accuracy" in shown
    epochs, monitor = result["config"]["epochs"], result["config"]["monitor"]
    assert f"\nkept        epoch {result['validation']['epoch']} of {epochs}, by {monitor} on validation\n" in shown


def test_a_run_in_8_bits_on_a_processor_with_avx2_vnni(
    distilbert: Path, review_folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    if "avx_vnni" not in instructions():
        pytest.skip("the processor has no AVX2-VNNI")
    monkeypatch.setenv(VARIABLE, "avx2_vnni")
    more = ("--precision", "fast", "--lora_mlp", "True", "--epochs", "2", "--learning_rate", "0.01")
    words = flags(distilbert, review_folder, tmp_path / "run", *more)
    done = subprocess.run(
        [sys.executable, str(ROOT / "finetune_lora.py"), *words], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "compiled for AVX2-VNNI" in done.stdout
    result = read_result(tmp_path / "run")
    assert result["status"] == "finished"
    assert result["config"]["precision"] == "int8"
    assert result["test"]["accuracy"] > 0.8


def test_a_run_on_classes_of_unequal_size_records_each_class_and_advises(
    bert: Path, tmp_path: Path, capsys: Capture
) -> None:
    for name in ("train", "validation", "test"):
        write_reviews(tmp_path / f"{name}.csv", 80, seed=len(name))
        rows = (tmp_path / f"{name}.csv").read_text(encoding="utf8").splitlines()
        kept = [row for i, row in enumerate(rows[1:]) if i % 2 or i % 8 == 0]  # bad is every eighth, good every second
        (tmp_path / f"{name}.csv").write_text("\n".join([rows[0], *kept]), encoding="utf8")
    words = flags(bert, tmp_path, tmp_path / "run", "--epochs", "1", "--learning_rate", "0.05")
    assert main([*words, "--class_weights", "bad=0.01", "--label_smoothing", "0.1"]) == 0  # it learns to say good
    result = read_result(tmp_path / "run")
    weights = result["task"]["class_weights"]
    assert weights["bad"] == pytest.approx(0.01 * weights["good"])
    for split in ("validation", "test"):
        scores = result[split]
        assert {name: row["support"] for name, row in scores["per_class"].items()} == {"bad": 10, "good": 40}
        assert np.sum(scores["confusion_matrix"], axis=1).tolist() == [10, 40]
        assert (scores["accuracy"], scores["mcc"]) == pytest.approx((0.8, 0))
        assert 0 <= scores["auroc"] <= 1
    before, few, after, compared = result["advice"]  # the mean of the tokens was tried with other models only
    assert few.startswith("validation has 50 texts, so the epoch that it chooses depends on chance: --kfold 5 needs")
    assert compared.startswith("TF-IDF + logistic regression is better on 50 validation texts: accuracy 9")
    assert before.startswith("class 'good' has 4.0 times the training texts of 'bad', so --monitor accuracy may")
    always = "the chosen checkpoint answers 'good' for every validation text: consider --monitor macro_f1"
    assert after.startswith(always)
    shown = capsys.readouterr().out
    assert f"advice  {before}" in shown.partition("parameters")[0]  # before training
    assert after in shown


def test_a_run_is_compared_with_a_baseline_unless_asked_not_to(
    bert: Path, review_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    more = ("--epochs", "1", "--learning_rate", "1e-9", "--offline", "--lora_mlp", "False", "--report", "True")
    words = flags(bert, review_folder, tmp_path / "run", *more)
    assert main(words) == 0
    result, shown = read_result(tmp_path / "run"), capsys.readouterr().out
    baseline = result["baseline"]
    assert (baseline["name"], baseline["texts"]) == ("TF-IDF + logistic regression", 120)
    assert baseline["seconds"] > 0
    for split in ("validation", "test"):
        assert (baseline[split]["accuracy"], baseline[split]["examples"]) == (1.0, 40)  # the reviews say it in words
        assert baseline[split].keys() == {"accuracy", "macro_f1", "mcc", "auroc", "loss", "examples"}
    line = (
        "baseline    TF-IDF + logistic regression\n            validation  accuracy 100.00%   macro F1 100.00%   loss"
    )
    assert line in shown
    assert "\n            test        accuracy 100.00%   macro F1 100.00%   loss" in shown
    sentence = result["advice"][-1]
    accuracy = f"{result['validation']['accuracy']:.2%}"
    assert f"accuracy 100.00% against {accuracy} of this classifier: consider more --epochs, LoRA" in sentence
    assert sentence in shown
    assert ">test, TF-IDF + logistic regression</th>" in (tmp_path / "run" / "report.html").read_text("utf8")
    assert main([*words, "--overwrite", "--baseline", "False", "--test", "False"]) == 0
    assert "baseline" not in read_result(tmp_path / "run")
    assert "TF-IDF" not in capsys.readouterr().out
    assert main([*words, "--overwrite", "--test", "False"]) == 0
    assert read_result(tmp_path / "run")["baseline"].keys() == {"name", "texts", "seconds", "validation"}
    assert line in capsys.readouterr().out


def test_a_run_whose_texts_have_no_words_has_no_baseline(bert: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = [f"{'!' * (i + 1)},{'good' if i % 2 else 'bad'}" for i in range(60)]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *rows]), encoding="utf8")
    assert main(flags(bert, tmp_path, tmp_path / "run", "--epochs", "0")) == 0
    assert "baseline" not in read_result(tmp_path / "run")
    assert "\nno baseline: empty vocabulary" in capsys.readouterr().out


def test_a_signal_ends_a_run_while_the_baseline_is_computed(
    bert: Path, review_folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    def signalled(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return baseline_logits(*arguments)

    words = flags(bert, review_folder, tmp_path / "run", "--epochs", "1")
    with monkeypatch.context() as patch:
        patch.setattr("finetuning.comparison.baselines.baseline_logits", signalled)
        assert main(words) == 130
    result = read_result(tmp_path / "run")
    assert result["status"] == "interrupted"
    assert "baseline" not in result
    assert main(["--resume", "--output_dir", str(tmp_path / "run")]) == 0
    assert read_result(tmp_path / "run")["baseline"]["test"]["accuracy"] == 1.0


def test_a_run_is_repeatable_and_its_seed_matters(distilbert: Path, review_folder: Path, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        more = ("--epochs", "1", "--limit_train", "48", "--seed", seed)
        words = flags(distilbert, review_folder, tmp_path / name, *more)
        assert main([*words, "--test", "False"]) == 0
        weights.append((tmp_path / name / ADAPTER).read_bytes())
        assert "test" not in read_result(tmp_path / name)
    assert weights[0] == weights[1] != weights[2]


def test_an_adapter_is_evaluated_and_trained_on(
    bert: Path, review_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    def words(name: str, epochs: int) -> list[str]:
        return [*flags(bert, review_folder, tmp_path / name), "--epochs", str(epochs)]

    assert main([*words("first", 1), "--lora_key", "False", "--lora_r", "3"]) == 0
    again = ["--init_adapter", str(tmp_path / "first"), "--seed", "7"]
    assert main([*words("only", 0), *again]) == 0
    first, only = read_result(tmp_path / "first"), read_result(tmp_path / "only")
    assert only["status"] == "finished"
    assert only["train"]["steps"] == 0
    for split in ("validation", "test"):
        assert only[split]["loss"] == pytest.approx(first[split]["loss"], abs=1e-6)
    assert only["config"]["lora_r"] == 3
    assert only["config"]["lora_mlp"] is True
    assert only["config"]["lora_key"] is False
    assert not list((tmp_path / "only").glob("*.ckpt"))
    assert main([*words("more", 1), *again]) == 0
    more = read_result(tmp_path / "more")
    assert more["test"]["loss"] < first["test"]["loss"]
    assert [result.get("checkpoints_compared") for result in (first, only, more)] == [None, 1, 2]
    assert main([*words("mixed", 0), *again, "--split", "stratified"]) == 0
    mixed, known = read_result(tmp_path / "mixed"), "it may know texts of validation"
    assert [known in " ".join(result["advice"]) for result in (more, mixed)] == [False, True]
    assert not any("learn" in sentence for sentence in only["advice"]), "it has not trained"
    capsys.readouterr()
    for refused, message in (
        ([*again, "--lora_r", "4"], "--lora_r 4"),
        (["--init_adapter", "nowhere"], "nowhere"),
        ([*again, "--kfold", "3"], "--kfold 3: the adapter of --init_adapter was trained on texts of the same data"),
    ):
        assert main([*words("refused", 1), *refused]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "refused").exists()


def test_patience_is_not_forgotten_by_a_continued_run(distilbert: Path, review_folder: Path, tmp_path: Path) -> None:
    run, more = tmp_path / "run", "--epochs 20 --patience 1 --precision fp32 --learning_rate 1e-12 --limit_train 16"
    words = flags(distilbert, review_folder, run, *more.split())
    assert main(words) == 0
    first = read_result(run)
    last = torch.load(run / "last.ckpt", weights_only=True)
    assert last["global_step"] == first["train"]["steps"], "an epoch that is not the best has a checkpoint as well"
    (state,) = (state for name, state in last["callbacks"].items() if name.startswith("BestCheckpoint"))
    assert Path(state["best_model_path"]).name == "best.ckpt"
    (run / "result.json").unlink()  # as if it had been killed before it could write
    shutil.copy(run / "last.ckpt", run / "best.ckpt")
    assert main([*words, "--resume"]) == 0
    assert read_result(run)["train"]["epochs"] == first["train"]["epochs"] == 2
    assert read_result(run)["validation"]["loss"] == first["validation"]["loss"]


def test_processes_that_torchrun_starts_need_to_be_told_where(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["--offline", "--accelerator", "cpu", "--limit_train", "8", "--epochs", "1"]) == 2
        assert "error: --output_dir: must be given if torchrun" in capsys.readouterr().err


# --- what shows a run: the report and the trackers


def test_the_report_has_the_held_out_texts_escaped_unless_they_are_private(
    distilbert: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    for name in ("tensorboard", "wandb", "mlflow"):  # no tracker, no import
        monkeypatch.setitem(sys.modules, name, None)
    data = write_splits(tmp_path / "data", train=60, validation=20, test=20)
    with (data / "test.csv").open("a", encoding="utf8") as file:
        file.write("a wonderful <script>alert('x')</script> & <b>moving film,bad\n")  # a label that the text denies
    more = ("--epochs", "2", "--learning_rate", "0.01", "--report", "True")
    words = flags(distilbert, data, tmp_path / "run", *more)
    assert main(words) == 0
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf8")
    assert "a wonderful &lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &lt;b&gt;moving film" in report
    assert "<script" not in report
    assert f"test accuracy {100 * read_result(tmp_path / 'run')['test']['accuracy']:.2f} %" in report
    assert main([*words, "--overwrite", "--report_texts", "False", "--epochs", "0"]) == 0
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf8")
    assert "wonderful" not in report
    assert "--report_texts False" in report
    assert main([*words, "--overwrite", "--report", "False", "--epochs", "0"]) == 0
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_lost_report_is_written_again_unless_the_texts_have_changed(
    distilbert: Path, review_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    data = Path(shutil.copytree(review_folder, tmp_path / "data"))
    words = flags(distilbert, data, tmp_path / "run", "--epochs", "0", "--report", "True")
    assert main(words) == 0
    report = tmp_path / "run" / "report.html"
    for changed in (False, True):
        report.unlink()
        if changed:
            write_reviews(data / "test.csv", 40, seed=999)
        capsys.readouterr()
        assert main([*words, "--resume", "auto"]) == 0
        assert report.exists() != changed
        warning = "warning: report.html was not written: --resume: test of the data is not the one with which"
        assert (warning in capsys.readouterr().err) == changed


def test_a_requeued_job_whose_run_has_finished_does_nothing(
    distilbert: Path, review_folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # otherwise Lightning takes this process for one of srun
    words = [*flags(distilbert, review_folder, tmp_path / "run", "--epochs", "0"), "--overwrite"]
    assert main(words) == 0
    before = (tmp_path / "run" / "result.json").read_bytes()
    assert main([*words, "--resume", "auto"]) == 0
    assert "has finished: nothing to do" in capsys.readouterr().out
    assert (tmp_path / "run" / "result.json").read_bytes() == before
    weights = tmp_path / "run" / ADAPTER
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert main([*words, "--resume", "auto"]) == 2
    assert "adapter_model.safetensors was changed after its run wrote it" in capsys.readouterr().err


def test_ctrl_c_behind_a_pipe_whose_reader_it_ends_first(distilbert: Path, review_folder: Path, tmp_path: Path) -> None:
    """As in ``python finetune_lora.py | tee log``: the run still ends with its checkpoint."""
    words = flags(distilbert, review_folder, tmp_path / "run", "--epochs", "200")
    process = start(words)
    assert process.stdout is not None
    assert process.stderr is not None
    while not process.stdout.readline().startswith("epoch 1/200  batch 5/"):
        assert process.poll() is None
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    result = read_result(tmp_path / "run")
    assert result["status"] == "interrupted"
    last = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert last["global_step"] == result["train"]["steps"] > 0


def test_a_run_that_only_evaluates_needs_no_memory_for_training(
    distilbert: Path, review_folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("finetuning.training.memory.free_memory", lambda: 1)
    words = flags(distilbert, review_folder, tmp_path / "run")
    assert main([*words, "--epochs", "1"]) == 1
    assert main([*words, "--epochs", "0", "--overwrite"]) == 0


def test_a_tracker_or_report_that_fails_does_not_end_the_run(
    distilbert: Path, review_folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    class Failing(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            logged.append(step)
            if len(logged) == 3:
                raise OSError(28, "No space left on device")

    logged: list[int | None] = []
    monkeypatch.setitem(trackers.OPEN, "tensorboard", lambda *_: Failing())
    monkeypatch.setattr("finetuning.settings.run.find_spec", lambda _: object())
    monkeypatch.setattr("finetuning.report.page.read_answers", lambda *_: 1 / 0)
    words = flags(distilbert, review_folder, tmp_path / "run", "--epochs", "1", "--report", "True")
    assert main([*words, "--tracker", "tensorboard"]) == 0
    assert logged == [1, 2, 3]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert warnings == [
        "warning: --tracker tensorboard failed and is not used any more: No space left on device",
        "warning: report.html was not written: division by zero",
    ]
    assert read_result(tmp_path / "run")["status"] == "finished"


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr("finetuning.settings.run.find_spec", lambda _: None)
    assert main(["--offline", "--tracker", "wandb", "--output_dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "error: --tracker wandb: is not installed: pip install wandb\n"
    assert not (tmp_path / "run").exists()


# --- interrupted, continued, failed


def test_a_run_with_one_step_an_epoch_stops_before_the_next_one(
    distilbert: Path, review_folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """The last step of an epoch writes no checkpoint, because the validation after it does."""
    words = ["--epochs", "4", "--limit_train", "8", "--checkpoint_steps", "1", "--test", "False"]
    words = flags(distilbert, review_folder, tmp_path / "whole", *words)
    assert main(words) == 0
    real = GracefulStop.on_train_batch_end

    def signalled(self: GracefulStop, trainer: Any, *more: Any) -> None:
        if trainer.current_epoch == 1:
            signal.raise_signal(signal.SIGTERM)
        real(self, trainer, *more)

    with monkeypatch.context() as patch:
        patch.setattr(GracefulStop, "on_train_batch_end", signalled)
        assert main([*words, "--output_dir", str(tmp_path / "stopped")]) == 130
    assert read_result(tmp_path / "stopped")["train"]["steps"] == 2
    assert main(["--resume", "--output_dir", str(tmp_path / "stopped")]) == 0
    assert (tmp_path / "stopped" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    rows = csv.DictReader((tmp_path / "whole" / "metrics.csv").read_text().splitlines())
    rates = [float(row["learning_rate"]) for row in rows if row["learning_rate"]]
    assert rates == pytest.approx([0.0, 0.003, 0.002, 0.001]), "those with which the steps were made"


def test_an_average_is_evaluated_and_saved(bert: Path, review_folder: Path, tmp_path: Path) -> None:
    run, more = tmp_path / "run", "--epochs 1 --average swa --learning_rate 0.01"
    assert main(flags(bert, review_folder, run, *more.split())) == 0
    saved, last = load_file(run / ADAPTER), torch.load(run / "last.ckpt", weights_only=True)
    averages = {name: weights for name, weights in last["average"]["weights"].items() if "lora_B" in name}
    assert averages
    for name, average in averages.items():
        (of_adapter,) = (
            key for key in saved if name.split(".model.", 1)[1].split(".lora.")[0] in key and "lora_B" in key
        )
        assert np.array_equal(saved[of_adapter], average.numpy()), name
        assert not torch.equal(average, last["state_dict"][name]), name
    again = [*more.split(), "--epochs", "0", "--average", "none", "--init_adapter", str(run)]
    assert main(flags(bert, review_folder, tmp_path / "again", *again)) == 0
    for split in ("validation", "test"):
        found, expected = (read_result(tmp_path / name)[split]["loss"] for name in ("again", "run"))
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("batch", "more"),
    [
        (4, "--dropout 0.1 --precision fp32"),
        (9, "--lora_layers 1-2 --lora_plus_ratio 4 --optimizer sgd_nesterov --scheduler onecycle --average ema"),
        (9, "--lora_variant dora"),
        (9, "--lora_variant pissa"),
        (9, "--method bitfit"),
        (9, "--method norms"),
    ],
    ids=["in the first epoch", "lora_plus in some layers", "dora", "pissa", "bitfit", "norms"],
)
def test_an_interrupted_run_continues_to_the_same_weights(
    bert: Path, review_folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture, batch: int, more: str
) -> None:
    """Of two epochs with six batches; the second one reads the outputs of frozen layers that the first has kept."""
    monkeypatch.chdir(tmp_path)
    whole, broken, done = tmp_path / "whole", Path("data:broken"), []  # a checkpoint below data: looks like a protocol
    step = FineTuning.training_step

    def signalled(module: FineTuning, texts: Any) -> Any:
        done.append(module)
        if len(done) == batch:
            signal.raise_signal(signal.SIGTERM)
        return step(module, texts)

    def command(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["finetune_lora.py", *words])
        return main()

    more += " --limit_train 48"
    assert command(*flags(bert, review_folder, whole, *more.split())) == 0
    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "training_step", signalled)
        assert command(*flags(bert, review_folder, broken, *more.split())) == 130
    errors = capsys.readouterr().err.splitlines()
    (told,) = (line for line in errors if line.startswith("interrupted; continue with: "))
    assert told.endswith(f"{called('lora', '--resume')} --output_dir {broken}"), "the run knows its other settings"
    assert read_result(broken)["status"] == "interrupted"
    assert read_result(broken)["train"]["steps"] == batch
    if batch > 6:  # an epoch has ended
        best, last = (torch.load(broken / f"{name}.ckpt", weights_only=True) for name in ("best", "last"))
        assert "optimizer_states" not in best, "nobody reads it, and of all weights it would be two thirds of the file"
        assert last["optimizer_states"]
    moved = broken.rename(tmp_path / "moved")  # as if the disk had been mounted elsewhere
    assert command(*shlex.split(told.partition("finetune_lora.py ")[2].replace(str(broken), str(moved)))) == 0
    expected, result = read_result(whole), read_result(moved)
    assert all(result[part]["loss"] == expected[part]["loss"] for part in ("validation", "test"))
    assert result["train"]["steps"] == expected["train"]["steps"] == 12
    assert "--resume" not in result["command"], "it is the one that repeats the run"
    assert more in result["command"]
    assert result["seconds"] > result["train"]["seconds"], "both are those of both sessions"
    (saved,) = whole.glob("*.safetensors")
    assert saved.read_bytes() == (moved / saved.name).read_bytes()
    last, continued = (torch.load(run / "last.ckpt", weights_only=True) for run in (whole, moved))
    if "--lora_layers" in more:
        assert result["config"]["lora_plus_ratio"] == 4
        assert {name.split(".layer.")[1][0] for name in last["state_dict"] if "lora_B" in name} == {"1", "2"}
        of_A, of_B, *_ = (group["lr"] for group in continued["optimizer_states"][0]["param_groups"])
        assert of_B == pytest.approx(4 * of_A)
    assert last["state_dict"].keys() == continued["state_dict"].keys()
    for name, weights in last["state_dict"].items():
        assert torch.equal(weights, continued["state_dict"][name]), name
        if "average" in last:
            assert torch.equal(last["average"]["weights"][name], continued["average"]["weights"][name]), name


def test_a_process_that_is_signalled_says_how_another_one_continues(distilbert: Path, tmp_path: Path) -> None:
    write_splits(tmp_path, train=600, validation=40, test=40)
    words = [*flags(distilbert, tmp_path, tmp_path / "broken", "--epochs", "2"), "--report", "False"]
    broken = start(words)
    assert broken.stdout is not None
    seen = ""
    while "epoch 1/2  batch 18/" not in seen:  # somewhere in the first epoch
        piece = broken.stdout.read(1)
        assert piece, seen
        seen += piece
    broken.send_signal(signal.SIGTERM)
    _, rest = broken.communicate(timeout=60)
    assert broken.returncode == 130, seen + rest
    (told,) = (line for line in rest.splitlines() if line.startswith("interrupted; continue with: "))
    finish(start(shlex.split(told.partition("finetune_lora.py ")[2])))
    with one_thread():
        assert main([*words, "--output_dir", str(tmp_path / "whole")]) == 0
    assert (tmp_path / "broken" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_a_run_without_a_checkpoint_starts_over_with_its_own_settings(
    distilbert: Path, review_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    more = ("--epochs", "1", "--limit_train", "16", "--lora_r", "3")
    assert main(flags(distilbert, review_folder, run, *more)) == 0
    weights = (run / ADAPTER).read_bytes()
    for path in run.iterdir():
        if path.name != "settings.json":  # as if it had been killed in the first epoch
            path.unlink()
    resume = ["--resume", "--output_dir", str(run)]
    assert main([*resume, "--lora_r", "4"]) == 2
    assert "--lora_r 4: the run in" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["settings.json"]
    assert main(resume) == 0
    assert "has no checkpoint yet: starting over" in capsys.readouterr().out
    assert (run / ADAPTER).read_bytes() == weights


@pytest.mark.parametrize(("changed", "said"), [("train.csv", "train of the data"), ("config.json", "base model")])
def test_resume_with_other_texts_or_weights_is_refused(
    distilbert: Path, review_folder: Path, tmp_path: Path, changed: str, said: str, capsys: Capture
) -> None:
    inputs = shutil.copytree(review_folder, tmp_path / "inputs")
    shutil.copytree(distilbert, inputs, dirs_exist_ok=True)
    run = tmp_path / "run"
    config = settings_to_run(given_flags(flags(inputs, inputs, run)), {})
    assert config is not None
    claim = claim_directory(run, read_inputs(config, find_materials(config)))
    with claim.lock:  # as if it had been killed after the first checkpoint
        write_checkpoint(run / "last.ckpt", lambda file: file.write(b"weights\0\0"))
    before = contents(run)
    text = (inputs / changed).read_text(encoding="utf8")
    (inputs / changed).write_text(text.replace("film", "movie").replace('"dropout"', ' "dropout"'), encoding="utf8")
    capsys.readouterr()
    assert main(["--resume", "--output_dir", str(run)]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert said in line
    assert contents(run) == before


def test_a_loss_that_is_not_finite_fails_the_run_and_keeps_the_last_good_checkpoint(
    distilbert: Path, review_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = flags(distilbert, review_folder, tmp_path / "run", "--method", "full", "--epochs", "3")
    more = ["--learning_rate", "1e30", "--optimizer", "sgd", "--gradient_clip", "0", "--warmup_fraction", "0.5"]
    assert main([*words, *more]) == 1
    result = read_result(tmp_path / "run")
    assert result["status"] == "failed"
    assert "the loss is not finite at batch" in result["error"]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed:")]
    assert errors == [f"failed: {result['error']}"]
    assert not (tmp_path / "run" / "trained_weights.safetensors").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small file system")
def test_a_full_disk_fails_the_run(distilbert: Path, review_folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        words = flags(distilbert, review_folder, disk / "run", "--method", "full", "--epochs", "1")
        run = start(words)
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 1, errors
        lines = [line for line in errors.splitlines() if line.startswith("failed:")]
        assert len(lines) == 1
        assert "space" in lines[0]
        if (disk / "run" / "result.json").exists():
            assert read_result(disk / "run")["status"] == "failed"
        assert not list((disk / "run").glob(".*tmp*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- bad input: one line, status 2, nothing left behind


def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    distilbert: Path, review_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    model, output = distilbert, tmp_path / "deep" / "run"
    one_class = tmp_path / "one_class"
    one_class.mkdir()
    (one_class / "train.csv").write_text("text,label\na,x\nb,x\nc,x\n")
    a_file = tmp_path / "file"
    a_file.write_text("")
    gpt = tmp_path / "gpt2"
    gpt.mkdir()
    (gpt / "config.json").write_text('{"model_type": "gpt2"}')
    base = flags(model, review_folder, output)
    cases: list[tuple[list[str], str]] = [
        (["--lora_r", "1000"], "--lora_r 1000"),
        (["--method", "selective", "--trainable_layers", "9"], "--trainable_layers 9"),
        (["--max_length", "1000"], "--max_length 1000"),
        (["--accumulate", "1000"], "--accumulate"),
        (["--limit_test", "1000"], "--limit_test 1000"),
        (["--split", "resplit"], "--split resplit"),
        (["--text_column", "body"], "--text_column"),
        (["--label_column", "stars"], "--label_column"),
        (["--data_dir", str(tmp_path / "nowhere")], "--data_dir"),
        (["--data_dir", str(one_class)], "must have at least two labels, but all are 'x'"),
        (["--model_name", str(gpt)], "gpt2"),
        (["--output_dir", str(a_file)], "is a file"),
        (["--output_dir", str(a_file / "below")], "--output_dir"),
        (["--output_dir", "/proc/run"], "--output_dir"),
        (["--resume"], "--resume"),
        (["--device", "64"], "--device 64"),
        (["--class_weights", "ugly=2"], "--class_weights ugly=2: class 'ugly' must be one of bad, good"),
        (["--threshold", "tuned", "--positive_label", "ugly"], "--positive_label ugly: must be bad or good"),
        (["--tracker", "tensorboard,neptune"], "--tracker tensorboard,neptune: must be one or more of tensorboard"),
    ]
    for more, words in cases:
        assert main([*base, *more]) == 2, more
        shown = capsys.readouterr()
        lines = [line for line in shown.err.replace("\r", "\n").splitlines() if line and "tokenizing" not in line]
        assert len(lines) == 1, (more, lines)
        assert lines[0].startswith("error: ")
        assert words in lines[0], (more, lines)
        assert not output.parent.exists(), more


def test_a_run_is_not_overwritten_unless_asked(
    distilbert: Path, review_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = flags(distilbert, review_folder, tmp_path / "run", "--epochs", "0", "--test", "False")
    assert main(words) == 0
    first = (tmp_path / "run" / "result.json").read_bytes()
    assert main(words) == 2
    assert "already contains a run" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 2
    assert "has finished" in capsys.readouterr().err
    assert (tmp_path / "run" / "result.json").read_bytes() == first
    assert main([*words, "--overwrite", "--lora_r", "2"]) == 0
    assert read_result(tmp_path / "run")["config"]["lora_r"] == 2


def test_without_a_hub_the_command_says_what_to_do() -> None:
    """Only where there is none: with a network the command would download and train."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "finetune_lora.py"), "--model_name", "nobody/none", "--output_dir", "never"],
        capture_output=True, text=True, timeout=60,
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "/nonexistent"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert all(flag in line for flag in ("--offline", "--model_name PATH", "--data_dir PATH"))
    assert not Path("never").exists()
