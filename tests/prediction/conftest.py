import pytest


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.prediction.rows.CHUNK_ROWS", 2)
