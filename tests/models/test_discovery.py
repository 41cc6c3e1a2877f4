"""Which models are refused, and how one whose type the table lacks is adapted by --lora_modules."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.models.base_model import check_fits, read_base_model
from finetuning.models.discovery import SEES_PADDING, family_of, in_layers, named_linears
from finetuning.models.families import FAMILIES, ModelFamily
from finetuning.models.lora import lora_modules
from local_model_utilities import adopt_adapter, find_base_model
from tests.common import refusal_of, some
from tests.small_classifiers import build, save
from tests.tiny_models import LAYERS, WIDTH, tiny_model, unlisted_model


def folder_with(path: Path, content: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(content))
    return path


def refused(folder: Path, **settings: object) -> str:
    config = RunConfig.from_settings(model_name=str(folder), max_length=32, **settings)
    return refusal_of(find_base_model, config).replace(str(folder), "FOLDER")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model_type": "t5"}, "is of type 't5', an encoder-decoder: needs an encoder, or a decoder"),
        ({"model_type": "bart"}, "an encoder-decoder"),
        ({"model_type": "vit"}, "is of type 'vit', for which Hugging Face has no text classifier"),
        ({"model_type": "gemma3"}, "which reads images: needs a model of texts alone"),
        ({"model_type": "mixtral"}, "a mixture of experts: needs a model without experts"),
        ({"model_type": "qwen3_moe"}, "a mixture of experts"),
        ({"model_type": "albert", "inner_group_num": 2}, "has 2 layers in each group: needs one"),
        ({"model_type": "new"}, "is of type 'new', which is unknown here"),
        ({"model_type": "squeezebert"}, "whose encoder has no linears that LoRA can adapt: give --method full, sel"),
        (
            {"model_type": "gemma", "use_bidirectional_attention": True},
            "whose answer for a text depends on the padding",
        ),
        (
            {"model_type": "bert", "position_embedding_type": "relative_key_query"},
            "is of type 'bert' with positions 'relative_key_query', which Transformers computes no more",
        ),
        *(({"model_type": kind}, "whose answer for a text depends on the padding, so on the") for kind in SEES_PADDING),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_other_models_are_refused_in_one_line(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    message = refused(folder_with(tmp_path, content))
    assert message.startswith("--model_name FOLDER is of type ")
    assert words in message


def test_settings_that_a_family_lacks_are_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert "--dropout 0.1: FOLDER has no such dropout" in refused(tmp_path, dropout=0.1)
    tiny_model("albert").save_pretrained(tmp_path)
    shared = "has 1 layers, because layers share their weights"
    assert shared in refused(tmp_path, method="selective", trainable_layers=2)
    counted = "--lora_layers 1: FOLDER has 1 layers, counted from 0, because layers share their weights"
    assert refused(tmp_path, lora_layers="1") == counted
    assert "albert models cannot do this" in refused(tmp_path, gradient_checkpointing=True)


# --- --lora_modules


def test_a_type_without_a_row_is_adapted_where_lora_modules_says(tmp_path: Path) -> None:
    unlisted_model("phi", num_key_value_heads=2).save_pretrained(tmp_path)
    message = refused(tmp_path)
    assert "is of type 'phi', for which the placement flags have no names: give --lora_modules" in message
    assert message.endswith("linears: q_proj, k_proj, v_proj, dense, fc1, fc2")
    classifier = build(tmp_path, lora_modules="v_proj, mlp.fc1", lora_head=True)
    family = classifier.family
    assert (family.base, family.layers, family.head, family.last_token) == ("model", "model.layers", ("score",), True)
    adapted = {f"model.layers.{i}.{name}" for i in range(LAYERS) for name in ("self_attn.v_proj", "mlp.fc1")}
    assert {name for name, _ in lora_modules(classifier.model)} == adapted | {"score"}
    ids = torch.randint(5, 300, (3, 9))
    classifier(ids, torch.ones_like(ids)).sum().backward()
    assert all(p.grad is not None for p in classifier.parameters() if p.requires_grad)


def described(folder: Path, model_type: str, **more: Any) -> ModelFamily:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.from_pretrained(folder_with(folder, {"model_type": model_type} | sizes | more))
    return family_of(config, "name")


def test_dropouts_are_probabilities_even_if_the_config_has_a_whole_number(tmp_path: Path) -> None:
    sizes = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    neo = described(tmp_path, "gpt_neo", **sizes, embed_dropout=0, resid_dropout=0, attention_dropout=0)
    assert neo.settings["attention_dropout"] == "attention_dropout"
    assert {"embed_dropout", "resid_dropout"} <= {neo.settings["dropout"], *neo.more_dropouts}
    opt = described(tmp_path, "opt", ffn_dim=64, layerdrop=0.0, dropout=0.0)
    assert "dropout" in opt.settings
    assert "layerdrop" not in {*opt.settings.values(), *opt.more_dropouts}


def test_a_pooler_that_no_classifier_reads_is_no_part_of_the_head(tmp_path: Path) -> None:
    assert described(tmp_path, "big_bird").head == ("classifier.dense", "classifier.out_proj")


def test_a_class_with_sparse_attention_always_attends_to_all_tokens(tmp_path: Path) -> None:
    """With longer texts it would skip some of them, which ones depends on the batch, until the first short batch."""
    tiny = unlisted_model("big_bird", block_size=4)
    assert tiny.config.attention_type == "block_sparse"
    tiny.save_pretrained(tmp_path)
    config: Any = build(tmp_path, lora_modules="query").model.config
    assert config.attention_type == "original_full"


def test_a_class_that_fails_in_16_bits_is_known(tmp_path: Path) -> None:
    assert not described(tmp_path, "deberta").half
    assert described(tmp_path, "big_bird").half


@pytest.mark.parametrize("model_type", ["roberta", "longformer"])
@pytest.mark.parametrize("padding", [1, 3])
def test_positions_after_that_of_the_padding(model_type: str, padding: int) -> None:
    more = {"attention_window": 8} if model_type == "longformer" else {}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model(
        model_type, **sizes, **more, vocab_size=30, pad_token_id=padding, max_position_embeddings=40
    )
    longest = int(family_of(config, "name").longest_input(config))
    assert longest == 40 - padding - 1
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.full((1, longest + 1), 9)
    model(input_ids=ids[:, 1:], attention_mask=torch.ones_like(ids[:, 1:]))
    with pytest.raises((IndexError, RuntimeError), match=r"index|range|size"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("q_lora", [False, True])
def test_a_linear_of_a_types_own_is_stored_as_any_other(tmp_path: Path, q_lora: bool) -> None:
    if q_lora:
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "falcon", vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1,
        eos_token_id=2, pad_token_id=None, bias=True,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    classifier = build(tmp_path, torch.bfloat16, lora_modules="query_key_value", q_lora=q_lora)
    layers = classifier.model.get_submodule(classifier.family.layers)
    frozen = {
        p.dtype for n, p in layers.named_parameters() if not p.requires_grad and n.endswith("weight") and p.ndim > 1
    }
    assert frozen == {torch.uint8 if q_lora else torch.bfloat16}
    ids = torch.randint(3, 300, (2, 9))
    classifier(ids, torch.ones_like(ids)).sum().backward()  # Falcon changes outputs of linears in place


@pytest.mark.parametrize(
    ("content", "longest"),
    [
        ({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}, math.inf),
        ({"model_type": "mpt", "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 40}, 40),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_models_whose_config_has_other_names_for_sizes(tmp_path: Path, content: dict[str, Any], longest: float) -> None:
    folder = folder_with(tmp_path, content)
    assert read_base_model("name", folder).longest_input == longest
    assert "for which the placement flags have no names: give --lora_modules" in refused(folder)
    assert "--lora_r 33: the layers of FOLDER are 32 wide" in refused(folder, lora_r=33)
    if longest == 40:
        with pytest.raises(UserError, match=r"--max_length 41: .* has 40 positions"):
            find_base_model(RunConfig.from_settings(model_name=str(folder), max_length=41))


def test_longrope_ends_where_one_text_would_change_those_of_others(tmp_path: Path) -> None:
    factors = {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0} | factors
    sizes = {"max_position_embeddings": 64, "original_max_position_embeddings": 24}
    folder = folder_with(tmp_path, {"model_type": "phi3", "rope_parameters": rope} | sizes)
    assert read_base_model("name", folder).longest_input == 24
    assert refused(folder) == "--max_length 32: FOLDER has 24 positions"


def test_models_that_cannot_be_described_are_refused(tmp_path: Path) -> None:
    perceiver = refused(folder_with(tmp_path, {"model_type": "perceiver", "num_latents": 4, "d_latents": 32}))
    assert perceiver.endswith("is of type 'perceiver', in which no linear of the head was found")
    xlnet = {"model_type": "xlnet", "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    assert "'xlnet', whose head reads the last place of a batch" in refused(folder_with(tmp_path, xlnet))
    xmod = {"model_type": "xmod", "default_language": None}
    assert "config.json has no default_language: write it there" in refused(folder_with(tmp_path, xmod))
    esm = refused(folder_with(tmp_path, {"model_type": "esm"}))
    assert "is of type 'esm', whose classifier cannot be built: " in esm


def test_other_methods_need_no_names(tmp_path: Path) -> None:
    unlisted_model("megatron-bert", type_vocab_size=2).save_pretrained(tmp_path)
    classifier = build(tmp_path, method="selective", trainable_layers=1)
    trained = {name for name, p in classifier.model.named_parameters() if p.requires_grad}
    begin = (f"bert.encoder.layer.{LAYERS - 1}.", "bert.pooler.", "classifier.")
    assert trained == {name for name, _ in classifier.model.named_parameters() if name.startswith(begin)}
    ids = torch.randint(5, 300, (3, 9))
    assert classifier(ids, torch.ones_like(ids)).shape == (3, 2)


XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": 300, "max_position_embeddings": 64, "pad_index": 0}


def test_layers_that_are_not_in_one_list(tmp_path: Path) -> None:
    linears = "q_lin, k_lin, v_lin, out_lin, lin1, lin2"
    tiny = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("xlm", **XLM))
    tiny.save_pretrained(tmp_path)
    assert refused(tmp_path).endswith(f"linears: {linears}")
    none = "--trainable_layers 1: xlm models have no list of whole layers: give 0, which trains the head alone"
    assert none in refused(tmp_path, method="selective", trainable_layers=1)
    message = "--lora_layers 0: xlm models have no list of whole layers: leave out this flag"
    assert refused(tmp_path, lora_layers="0", lora_modules=linears) == message
    classifier = build(tmp_path, lora_modules=linears)
    adapted = [name for name, _ in lora_modules(classifier.model)]
    assert adapted[-1].endswith("ffns.1.lin2")
    assert len(adapted) == sum(isinstance(m, torch.nn.Linear) for m in tiny.base_model.modules())
    ids = torch.randint(5, 300, (3, 9))
    classifier(ids, torch.ones_like(ids)).sum().backward()
    config = RunConfig.from_settings(model_name=str(tmp_path), lora_modules=linears, max_length=32)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save(adapter, classifier, config)
    decided, _ = adopt_adapter(replace(some(config.lora), init_adapter=adapter), find_base_model(config), moved=False)
    assert decided["lora_layers"] is None
    build(tmp_path, method="selective", trainable_layers=0)


def test_lists_without_linears_are_no_layers(tmp_path: Path) -> None:
    """MarkupLM has longer lists of embeddings."""
    content = {"model_type": "markuplm", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    family = read_base_model("name", folder_with(tmp_path, content)).family
    assert (family.layers, family.settings["layer_count"]) == ("markuplm.encoder.layer", "num_hidden_layers")


def test_ctrl_reads_the_last_token(tmp_path: Path) -> None:
    """Hugging Face's classifier refuses a batch if its config has no padding token."""
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": 64, "vocab_size": 300}
    AutoModelForSequenceClassification.from_config(AutoConfig.for_model("ctrl", **shape)).save_pretrained(tmp_path)
    classifier = build(tmp_path, lora_modules="Wq,Wv")
    ids = torch.randint(5, 300, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    whole, cut = classifier(ids, mask), classifier(ids[1:, :6], mask[1:, :6])
    torch.testing.assert_close(whole[1:], cut)


def test_lora_modules_also_goes_on_whole_fused_linears(folder_of: Any) -> None:
    model = build(folder_of("gpt2"), lora_modules="c_attn", lora_r=2).model
    assert [m.lora.lora_B.shape for _, m in lora_modules(model)] == [(3 * WIDTH, 2)] * LAYERS


def test_names_that_match_no_linear_are_refused(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    has = "its linears are query, key, value, dense"
    line = f"--lora_modules q_proj: FOLDER has no module of this name: {has}"
    assert refused(tmp_path, lora_modules="q_proj") == line
    norm = "bert.embeddings.LayerNorm is no linear of the encoder's"
    assert refused(tmp_path, lora_modules="query,LayerNorm") == f"--lora_modules LayerNorm: {norm}: {has}"


def test_a_row_of_the_table_is_taken_as_it_is() -> None:
    assert family_of(AutoConfig.for_model("mistral"), "name") is FAMILIES["mistral"]


def test_layer_1_is_not_layer_10_and_a_name_is_whole() -> None:
    family = FAMILIES["bert"]
    paths = [f"{family.layers}.{i}.output.dense" for i in range(12)]
    assert in_layers([*paths, "bert.pooler.dense"], family, [1]) == [paths[1], "bert.pooler.dense"]
    model = tiny_model("bert")
    assert named_linears(model, family, ["query"]) != []
    assert named_linears(model, family, ["uery"]) == [], "a name's last letters are no name"


def test_a_rank_may_be_as_large_as_the_model_is_wide(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    base = read_base_model(str(tmp_path), tmp_path)
    check_fits(base, RunConfig.from_settings(max_length=32, lora_r=WIDTH))
    line = refusal_of(check_fits, base, RunConfig.from_settings(max_length=32, lora_r=WIDTH + 1))
    assert f"--lora_r {WIDTH + 1}: the layers of" in line
