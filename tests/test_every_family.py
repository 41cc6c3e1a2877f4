# mypy: disable-error-code="arg-type"
"""Every row of the table of families: a tiny random model of Hugging Face's class, in PEFT and through the commands.

``SHAPES`` of tests/tiny_models.py has a shape for each row.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import TRAINING_FLAGS
from finetune_lora import main
from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.models.classifier import Classifier
from finetuning.models.encoder import classify
from finetuning.models.families import FAMILIES
from finetuning.models.fused import split_linears, split_widths
from finetuning.models.int8 import Int8Linear
from finetuning.models.lora import LinearWithLoRA, lora_modules, merge_lora, ranks_and_alphas
from finetuning.models.quantization import dense_weight, is_quantized
from finetuning.prediction.predictor import predict
from finetuning.runs.files import read_result
from finetuning.runs.weights import load_trained, peft_name, separate_parts
from finetuning.settings import LORA_TARGETS
from local_model_utilities import find_base_model, load_classifier
from tests.common import BAD, GOOD, needs_int8, predictions_of, refusal_of
from tests.models.conftest import assert_same, relative_error
from tests.runs.test_adapters import adopted
from tests.small_classifiers import build, built_and_filled, fill, in_peft, save
from tests.tiny_models import (
    HEADS,
    INNER,
    LAYERS,
    SHAPES,
    VOCABULARY,
    WIDTH,
    save_tokenizer,
    tiny_model,
    unlisted_model,
)

EVERY_FAMILY = pytest.mark.parametrize("model_type", FAMILIES)
RANK = 3
ALL = dict.fromkeys(LORA_TARGETS, True)
TARGETS = [name.removeprefix("lora_") for name in LORA_TARGETS]  # the head is the last one
LABELS = torch.tensor([0, 1, 1, 0])


def batch(model_type: str) -> dict[str, Tensor]:
    """Four texts, two of them with padding."""
    ids = torch.randint(5, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[3, 11:] = 0
    padding = SHAPES[model_type].get("pad_token_id") or 0
    return {"input_ids": torch.where(mask == 1, ids, padding), "attention_mask": mask}


def lora_gradients(logits: Tensor, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(F.cross_entropy(logits, LABELS), list(matrices.values()))
    return dict(zip(matrices, found, strict=True))


# --- LoRA


def shapes(model_type: str, target: str) -> list[tuple[int, int]]:
    """In and out widths of the linears that a placement flag selects in each layer, from the sizes alone."""
    shape = SHAPES[model_type]
    head_width = shape.get("head_dim", WIDTH // HEADS)
    queries, keys = HEADS * head_width, shape.get("num_key_value_heads", HEADS) * head_width
    mlp = [(WIDTH, INNER), (INNER, WIDTH)]
    if "num_key_value_heads" in shape:  # gated
        mlp = [(WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)]
    if model_type == "modernbert":  # gate and values in one linear
        mlp = [(WIDTH, 2 * INNER), (INNER, WIDTH)]
    if model_type == "gpt2":
        mlp = [(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
    of_target = {
        "query": [(WIDTH, queries)], "key": [(WIDTH, keys)], "value": [(WIDTH, keys)],
        "projection": [(queries, WIDTH)], "mlp": mlp,
    }  # fmt: skip
    return of_target[target]


def closed_form(model_type: str, target: str) -> int:
    """Parameters of LoRA on this target."""
    if target == "head":
        linears = [(WIDTH, 2)] if FAMILIES[model_type].last_token else [(WIDTH, WIDTH), (WIDTH, 2)]
        return RANK * sum(map(sum, linears))
    layers = 1 if model_type == "albert" else LAYERS  # its layers share their weights
    return layers * RANK * sum(map(sum, shapes(model_type, target)))


@EVERY_FAMILY
def test_each_placement_flag_selects_as_many_parameters_as_the_closed_form(model_type: str) -> None:
    family, model = FAMILIES[model_type], tiny_model(model_type)
    split_linears(model, family)
    for target in TARGETS:
        names = family.linear_names(target, family.setting(model, "layer_count"))
        linears: list[Any] = [model.get_submodule(name) for name in names]
        count = sum(RANK * (linear.in_features + linear.out_features) for linear in linears)
        assert count == closed_form(model_type, target)


@pytest.mark.parametrize(
    ("model_type", "target"),
    [
        *((model_type, target) for model_type in FAMILIES for target in ("head", "all")),
        *((model_type, target) for model_type in ("bert", "gpt2", "modernbert") for target in TARGETS[:-1]),
    ],
)
def test_lora_equals_that_of_peft_with_the_adapter_that_is_written(
    folder_of: Any, tmp_path: Path, model_type: str, target: str
) -> None:
    switches = {f"lora_{name}": target in ("all", name) for name in TARGETS}
    scaling = {"gpt2": "standard", "modernbert": "rslora"}.get(model_type, "raw") if target == "all" else "standard"
    settings = {"lora_r": RANK, "lora_alpha": 5.0, "lora_scaling": scaling}
    matrices = assert_equals_peft(folder_of(model_type), tmp_path, model_type, switches | settings)
    asked = [name for name in TARGETS if switches[f"lora_{name}"]]
    assert sum(p.numel() for p in matrices.values()) == sum(closed_form(model_type, name) for name in asked)


def assert_equals_peft(folder: Path, adapter: Path, model_type: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Compares logits, gradients and merged weights with those of PEFT, which reads the adapter that is written.

    Returns:
        LoRA's matrices by name.
    """
    given, ours = batch(model_type), built_and_filled(folder, **settings)
    save(adapter, ours, RunConfig.from_settings(**settings))
    theirs = in_peft(folder, adapter)
    logits, reference = ours(**given), theirs(**given).logits
    assert relative_error(logits, reference) < 1e-5
    matrices: dict[str, Tensor] = {name: p for name, p in ours.model.named_parameters() if ".lora.lora_" in name}
    widths = split_widths(ours.model)
    found = lora_gradients(reference, {name: p for name, p in theirs.named_parameters() if "lora_" in name})
    short = {name.replace(".default", "").replace("vector.weight", "vector"): g for name, g in found.items()}
    joined = {name: short[peft_name(name, lora=True)] for name in (joined_name(n, widths) for n in matrices)}
    assert len(joined) == len(found)
    expected = separate_parts(joined, ours.saved_parameters(), widths)
    assert_same(lora_gradients(logits, matrices), {name: expected[name] for name in matrices})
    merged = theirs.merge_and_unload().state_dict()
    names = [name for name, _ in lora_modules(ours.model)]
    assert names
    merge_lora(ours.model)
    for name in names:
        owner, _, part = name.rpartition(".")
        weight = merged[f"{owner if owner in widths else name}.weight"]
        weight = weight.t() if ours.family.conv1d and name not in ours.family.head else weight
        if owner in widths:
            weight = weight.split(list(widths[owner].values()))[list(widths[owner]).index(part)]
        assert relative_error(ours.model.get_submodule(name).weight, weight) < 1e-5
    return matrices


@EVERY_FAMILY
def test_lora_in_the_last_layer_equals_that_of_peft(folder_of: Any, tmp_path: Path, model_type: str) -> None:
    layer = 0 if model_type == "albert" else LAYERS - 1
    switches = {name: name != "lora_head" for name in LORA_TARGETS} | {"lora_r": RANK, "lora_layers": str(layer)}
    matrices = assert_equals_peft(folder_of(model_type), tmp_path, model_type, switches)
    assert all(name.startswith(f"{FAMILIES[model_type].layers}.{layer}.") for name in matrices)


def joined_name(name: str, widths: dict[str, dict[str, int]]) -> str:
    """``X.Wqkv.query.lora.lora_A`` -> ``X.Wqkv.lora.lora_A``."""
    linear, _, matrix = name.partition(".lora.")
    owner = linear.rpartition(".")[0]
    return f"{owner}.lora.{matrix}" if owner in widths else name


@pytest.mark.parametrize(
    ("model_type", "more"), [*((model_type, ALL) for model_type in FAMILIES), ("bert", ALL | {"lora_variant": "dora"})]
)
def test_four_bits_equal_lora_on_the_dequantized_weights(
    folder_of: Any, model_type: str, more: dict[str, object]
) -> None:
    folder, given = folder_of(model_type), batch(model_type)
    packed, dense = (build(folder, lora_r=RANK, q_lora=q_lora, **more) for q_lora in (True, False))
    count = 0
    for name, module in packed.model.named_modules():
        if hasattr(module, "weight") and is_quantized(module):
            dense.model.get_submodule(name).weight.data.copy_(dense_weight(module))  # type: ignore[operator]
            count += 1
    assert count == sum(isinstance(m, LinearWithLoRA) for m in packed.model.modules()) - len(packed.family.head)
    for _, layer in lora_modules(dense.model):
        layer.start_magnitude()
    found = []
    for classifier in (packed, dense):
        fill(classifier)
        logits = classifier(**given)
        matrices = {name: p for name, p in classifier.named_parameters() if ".lora.lora_" in name}
        found.append((logits, lora_gradients(logits, matrices)))
    (logits, gradients), (reference, expected) = found
    assert relative_error(logits, reference) < 1e-5
    assert_same(gradients, expected)


@needs_int8
@EVERY_FAMILY
def test_in_8_bits_the_logits_stay_close(folder_of: Any, model_type: str) -> None:
    folder, given = folder_of(model_type), batch(model_type)
    packed, dense = (
        built_and_filled(folder, lora_r=RANK, precision=precision, **ALL) for precision in ("int8", "fp32")
    )
    count = sum(isinstance(module, Int8Linear) for module in packed.model.modules())
    assert count == sum(isinstance(m, LinearWithLoRA) for m in packed.model.modules()) - len(packed.family.head)
    logits, reference = packed(**given), dense(**given)
    assert 0 < (logits - reference).norm() < 0.05 * reference.norm()


FUSED = pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.fused])


@FUSED
@pytest.mark.parametrize("more", [{}, {"lora_query": False, "lora_scaling": "rslora"}, ALL | {"lora_scaling": "raw"}])
def test_an_adapter_on_parts_of_fused_linears_is_continued(
    folder_of: Any, tmp_path: Path, model_type: str, more: dict[str, Any]
) -> None:
    folder, (first, second) = folder_of(model_type), (tmp_path / "first", tmp_path / "second")
    earlier = built_and_filled(folder, lora_r=RANK, **more)
    first.mkdir()
    save(first, earlier, RunConfig.from_settings(model_name=str(folder), lora_r=RANK, **more))
    classifier, config = adopted(folder, first)
    assert ranks_and_alphas(classifier.model).keys() == ranks_and_alphas(earlier.model).keys()
    expected = earlier(**batch(model_type))
    torch.testing.assert_close(classifier(**batch(model_type)), expected, rtol=0, atol=1e-5)
    fill(classifier)  # trained on, saved, and loaded again
    second.mkdir()
    save(second, classifier, config)
    again = load_classifier(second, config, find_base_model(config), ["bad", "good"], torch.float32)
    assert torch.equal(again(**batch(model_type)), classifier(**batch(model_type)))


@FUSED
def test_an_adapter_on_whole_fused_linears_is_not_continued(folder_of: Any, tmp_path: Path, model_type: str) -> None:
    folder, (fused,) = folder_of(model_type), FAMILIES[model_type].fused
    settings = {"lora_modules": fused, "lora_r": RANK}
    classifier = built_and_filled(folder, **settings)
    save(tmp_path, classifier, RunConfig.from_settings(model_name=str(folder), **settings))
    assert f"{fused} as a whole, and not on its parts query, key, value: only" in refusal_of(adopted, folder, tmp_path)


# --- all methods


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.efficient])
def test_the_steps_for_a_gpu_give_the_same_logits(model_type: str) -> None:
    model, given = tiny_model(model_type), batch(model_type)
    ours = classify(model, FAMILIES[model_type], **given, dtype=torch.float32, on_cpu=False)
    plain = Classifier(model, FAMILIES[model_type], torch.float32, efficient=False)
    torch.testing.assert_close(ours, plain(**given))


METHODS: dict[str, dict[str, object]] = {
    "lora_head": {"lora_head": True, "lora_key": True},
    "selective": {"method": "selective", "trainable_layers": 1},
    "full": {"method": "full"},
    "bitfit": {"method": "bitfit"},
    "norms": {"method": "norms"},
}
NO_BIASES = ("modernbert", "llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text")


@pytest.mark.parametrize("method", METHODS)
@EVERY_FAMILY
def test_saved_weights_make_the_same_classifier_again(
    folder_of: Any, tmp_path: Path, model_type: str, method: str
) -> None:
    folder, given = folder_of(model_type), batch(model_type)
    if method == "bitfit" and model_type in NO_BIASES:
        line = f"--method bitfit: the encoder of .*, of type '{model_type}', has no biases"
        with pytest.raises(UserError, match=line):
            build(folder, method="bitfit")
        return
    trained, config = build(folder, **METHODS[method]), RunConfig.from_settings(**METHODS[method])
    for parameter in (p for _, p in trained.family.head_parameters(trained.model)):
        parameter.data += 1  # a new head is no base model's
    fill(trained)
    logits = trained(**given)
    F.cross_entropy(logits, LABELS).backward()
    assert not [name for name, p in trained.model.named_parameters() if p.requires_grad and p.grad is None]
    save(tmp_path, trained, config)
    fresh = build(folder, seed=1, **METHODS[method])
    assert not torch.allclose(fresh(**given), logits, atol=0.01)
    load_trained(tmp_path, fresh, config.lora is not None)
    assert torch.equal(fresh(**given), logits)


@EVERY_FAMILY
def test_bf16_with_checkpointing_is_close(folder_of: Any, model_type: str) -> None:
    folder, given = folder_of(model_type), batch(model_type)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        checkpointing = FAMILIES[model_type].checkpointing and dtype == torch.bfloat16
        classifier = build(folder, dtype, lora_r=RANK, gradient_checkpointing=checkpointing, **ALL).train()
        fill(classifier)
        logits = classifier(**given)
        matrices = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
        found.append((logits, torch.cat([g.flatten() for g in lora_gradients(logits, matrices).values()])))
    (logits, gradients), (rounded, close) = found
    assert rounded.dtype == torch.float32
    assert (rounded - logits).norm() < 0.05 * logits.norm()
    assert (close - gradients).norm() < 0.1 * gradients.norm()


# --- the commands


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, count in (("train", 12), ("validation", 6), ("test", 6)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf8") as file:
            rows = [(f"{(GOOD if i % 2 else BAD)[i % 4]} {name} {i}", "good" if i % 2 else "bad") for i in range(count)]
            csv.writer(file).writerows([("text", "label"), *rows])
    return folder


@EVERY_FAMILY
def test_a_run_and_its_predictions(folder_of: Any, data: Path, tmp_path: Path, model_type: str) -> None:
    check_run(folder_of(model_type), data, tmp_path / "run", "--lora_query True --lora_value True")


def test_a_run_of_a_type_without_a_row(data: Path, tmp_path: Path) -> None:
    unlisted_model("phi", num_key_value_heads=2).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, decoder=True)
    check_run(tmp_path, data, tmp_path / "run", "--lora_modules q_proj,fc2")
    check_run(tmp_path, data, tmp_path / "more", f"--init_adapter {tmp_path / 'run'}")
    assert read_result(tmp_path / "more")["parameters"] == read_result(tmp_path / "run")["parameters"]


def check_run(model: Path, data: Path, run: Path, placement: str) -> None:
    """Trains, and predicts the test split again."""
    words = f"--dataset text --data_dir {data} --model_name {model} --output_dir {run} --epochs 1 --max_length 32"
    words += f" {TRAINING_FLAGS} --precision fp32 --accelerator cpu --report False {placement}"
    assert main(words.split()) == 0
    _, logits = predictions_of(run)
    names, probabilities = predict(run, pd.read_csv(data / "test.csv")["text"].tolist())
    assert names == ["bad", "good"]
    torch.testing.assert_close(torch.tensor(probabilities), torch.tensor(logits).softmax(-1), rtol=1e-4, atol=1e-6)
