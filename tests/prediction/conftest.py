import pytest


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read in chunks of two rows, so that each file has several."""
    monkeypatch.setattr("finetuning.prediction.rows.CHUNK_ROWS", 2)
