"""Whether the hub and other hosts answer."""

import io
import time
from pathlib import Path
from typing import Any

import pytest

from finetuning import hub
from finetuning.config import RunConfig
from finetuning.data import imdb
from tests.common import check_refusal, refusal_of, texts_of
from tests.hub_cache import file_server


def test_unreachable_hosts_are_reported_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(imdb, "STANFORD", hub.Archive("http://127.0.0.1:9/a.tar.gz", ""))
    began = time.monotonic()
    no_imdb = "cannot be reached: give --data_dir PATH, or --offline for packaged reviews and a packaged model$"
    financial = "cannot be reached: give --data_dir PATH$"  # that set is not packaged
    cases = (
        (RunConfig.from_settings(), no_imdb),
        (RunConfig.from_settings(data_source="stanford"), no_imdb),
        (RunConfig.from_settings(dataset="financial_phrasebank"), financial),
    )
    for config, line in cases:
        check_refusal(line, texts_of, config)
    assert time.monotonic() - began < 10


def test_a_host_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(*_args: Any, **_options: Any) -> io.BytesIO:
        time.sleep(1)
        return io.BytesIO()

    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(hub.urllib.request, "urlopen", sleep)
    began = time.monotonic()
    assert "the model x is not on this machine" in refusal_of(hub.require_hub, "the model x", "y")
    assert time.monotonic() - began < 1


def test_hub_switched_off_by_its_own_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with file_server(tmp_path) as address:
        for url in (address, f"{address}/missing"):  # a 404 is an answer
            monkeypatch.setattr(hub.constants, "ENDPOINT", url)
            hub.require_hub("anything", "--offline")
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
        assert "--offline" in refusal_of(hub.require_hub, "anything", "--offline")
