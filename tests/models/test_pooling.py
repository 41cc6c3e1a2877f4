# mypy: disable-error-code="union-attr,arg-type"
"""``--pooling mean``: the head reads the mean of a text's real tokens."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

import finetune_lora
from finetuning.errors import UserError
from finetuning.models.classifier import Classifier
from finetuning.prediction.predictor import predict
from finetuning.runs.files import read_result
from tests.common import CORE, predictions_of
from tests.models.conftest import assert_same
from tests.small_classifiers import build

LABELS = torch.tensor([0, 1, 1, 0])


def mean_and_head(classifier: Classifier, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits from Hugging Face's encoder, a plain mean, and the modules of the head."""
    model, family = classifier.model, classifier.family
    hidden = model.get_submodule(family.base)(input_ids=ids, attention_mask=mask).last_hidden_state
    means = torch.stack([tokens[real.bool()].mean(0) for tokens, real in zip(hidden, mask, strict=True)])
    inner, outer = (model.get_submodule(name) for name in family.head)
    return outer((F.relu if family.model_type == "distilbert" else torch.tanh)(inner(means)))


@pytest.mark.parametrize("efficient", [True, False])
@pytest.mark.parametrize("model_type", CORE)
def test_logits_and_gradients_are_those_of_the_mean(
    tiny_folders: dict[str, Path], model_type: str, efficient: bool
) -> None:
    ids = torch.randint(1000, 30000, (4, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 7:], mask[3, 1:] = 0, 0
    ids = torch.where(mask == 1, ids, 1 if model_type == "roberta" else 0)
    gradients = []
    for forward in (lambda model: model(ids, mask), lambda model: mean_and_head(model, ids, mask)):
        classifier = build(tiny_folders[model_type], method="full", pooling="mean", efficient=efficient)
        logits = forward(classifier)
        F.cross_entropy(logits, LABELS).backward()
        gradients.append(
            {n: p.grad for n, p in classifier.named_parameters() if p.grad is not None} | {"": logits.detach()}
        )
    assert_same(gradients[0], gradients[1], floor=1e-8)
    first, own = (
        build(tiny_folders[model_type], method="full", **more)(ids, mask) for more in ({"pooling": "first"}, {})
    )
    assert torch.equal(first, own)
    assert (first - gradients[0][""]).abs().max() > 1e-3


def test_an_entry_that_the_models_class_ignores_is_ignored(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"classifier_pooling": "mean"}))
    ids = torch.randint(1000, 30000, (4, 12), generator=torch.Generator().manual_seed(3))
    logits = [build(source)(ids, torch.ones_like(ids)) for source in (folder, bert)]
    assert torch.equal(*logits)


def test_a_decoder_is_refused(folder_of: Any) -> None:
    with pytest.raises(UserError, match=r"^--pooling mean: the head of .* reads the last token: leave out this flag$"):
        build(folder_of("gpt2"), pooling="mean")


@pytest.mark.parametrize("method", ["head", "lora"])
def test_a_run_predicts_the_same_again(
    bert: Path, review_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    run, base = tmp_path / "run", bert
    line = f"--dataset text --data_dir {review_folder} --model_name {base} --output_dir {run} --pooling mean"
    line += f" --method {method} --max_length 32 --epochs 2 --precision fp32 --accelerator cpu --report False"
    assert finetune_lora.main(line.split()) == 0
    stored, logits = predictions_of(run)
    texts = pd.read_csv(review_folder / "test.csv").iloc[stored["row"]]["text"].tolist()
    np.testing.assert_allclose(predict(run, texts)[1], torch.tensor(logits).softmax(-1), rtol=0, atol=1e-5)
    if method == "lora":
        with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['pooling'\]"):
            LoraConfig.from_pretrained(str(run))
        again = tmp_path / "again"
        line = line.replace(" --pooling mean", "").replace(str(run), str(again)) + f" --init_adapter {run} --epochs 0"
        assert finetune_lora.main(line.split()) == 0
        assert read_result(again)["config"]["pooling"] == "mean"
        np.testing.assert_allclose(predictions_of(again)[1], logits, atol=1e-5)
        capsys.readouterr()
        assert finetune_lora.main([*line.split(), "--overwrite", "--pooling", "first"]) == 2
        assert capsys.readouterr().err.endswith(
            "--pooling first: the adapter of --init_adapter has mean: leave out this flag\n"
        )
