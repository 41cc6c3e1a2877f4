"""The Python code of the guide runs as it is written, on a folder that export wrote."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from finetuning.export.onnx_file import ONNX_FILE, PACKAGES, write_onnx
from finetuning.export.plain import plain_model, write_model, write_tokenizer
from finetuning.models.base_model import load_tokenizer, read_base_model
from tests.runs.test_weights import build
from tests.small_classifiers import fill

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "guide.md"
SNIPPETS = re.findall(r"\n```python\n(.*?)```", GUIDE.read_text(encoding="utf8"), flags=re.DOTALL)


@pytest.mark.parametrize("code", SNIPPETS, ids=["pipeline", "onnxruntime"])
def test_a_snippet_of_the_guide_runs(
    code: str,
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "reviews-model"
    classifier, config = build(bases["distilbert"], 0)
    fill(classifier)
    model = plain_model(classifier, 0)
    write_model(folder, model, next(model.parameters()).dtype)
    write_tokenizer(folder, load_tokenizer(read_base_model("tiny", bases["distilbert"])), config.data.max_length)
    if "onnxruntime" in code:
        if not all(find_spec(name) for name in PACKAGES):
            pytest.skip("requirements-onnx.txt is not installed")
        write_onnx(folder / ONNX_FILE, model)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})
    shown = capsys.readouterr().out
    assert ("'label': 'good'" in shown) if "pipeline" in code else (shown.count("[") == 3)
