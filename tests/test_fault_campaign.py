"""A short form of the fault campaign: a few trials of the faults that need no root and no second process."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.fault_campaign import Campaign
from tests.faults import FAULTS
from tests.faults.runs import Broken, Commands, Fault, Signals, left_by, require_same

SHORT = {
    "SIGKILL": 2,
    "signals": 1,
    "memory runs out": 1,
    "damaged checkpoint": 1,
    "damaged weights": 1,
    "damaged result": 1,
    "damaged settings": 1,
    "command lines": 1,
    "flags together": 1,
    "data files": 1,
}


@pytest.fixture(scope="module")
def commands(tiny_folders: dict[str, Path], review_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Commands:
    return Commands(tmp_path_factory.mktemp("campaign"), tiny_folders["distilbert"], review_folder)


def test_every_promise_is_kept(commands: Commands) -> None:
    chosen = [replace(fault, times=SHORT[fault.name]) for fault in FAULTS if fault.name in SHORT]
    campaign = Campaign(commands, chosen)
    campaign.run()
    assert not campaign.broken, campaign.report()
    assert sum(len(trials) for trials in campaign.done.values()) == sum(SHORT.values())


def test_a_run_that_was_killed_after_a_whole_epoch_continues_with_the_same_dropout(
    commands: Commands, tmp_path: Path
) -> None:
    """Only then does torch's loader draw a seed between the checkpoint and the next step."""
    whole, outcome, _ = commands.whole("lora")
    words = [*commands.flags(tmp_path / "run", "lora"), "--checkpoint_steps", "0"]
    assert commands.run(words, Signals(operation=outcome.operations // 2)).status == -9
    assert (tmp_path / "run" / "last.ckpt").exists()
    assert commands.run([*words, "--resume", "auto"]).status == 0
    require_same(tmp_path / "run", whole)


def test_a_broken_promise_is_noticed_and_a_campaign_goes_on_where_it_stopped(
    commands: Commands, tmp_path: Path
) -> None:
    calls: list[str] = []

    def trial(_commands: Commands, _generator: object, directory: Path) -> str:
        calls.append(directory.name)
        if directory.name.endswith("1"):
            raise Broken("it was lost")
        return "fine"

    tried = Commands(tmp_path, commands.model, commands.data)
    shown: list[str] = []
    for times in (2, 3):
        campaign = Campaign(tried, [Fault("a fault", times, "nothing is lost", trial)])
        campaign.run(shown.append)
    assert calls == ["a_fault-0", "a_fault-1", "a_fault-2"]
    assert shown == ["a fault 1: it was lost"]
    assert [record["number"] for record in campaign.broken] == [1]
    assert campaign.report().splitlines()[2] == "| a fault | 3 | 2 | nothing is lost | 2 fine; 1 broken |"
    elsewhere = Campaign(tried, [Fault("another", 2, "works", trial, lambda: "needs a moon")])
    elsewhere.run(shown.append)
    assert elsewhere.report().splitlines()[2] == "| another | 0 | 0 | works | needs a moon |"


def test_a_trial_that_finds_no_result_is_noted_as_broken(commands: Commands, tmp_path: Path) -> None:
    def trial(_commands: Commands, _generator: object, directory: Path) -> str:
        left_by(directory)
        return "fine"

    campaign = Campaign(Commands(tmp_path, commands.model, commands.data), [Fault("a fault", 2, "works", trial)])
    campaign.run(lambda _line: None)
    assert [record["seen"].split(":")[0] for record in campaign.broken] == ["FileNotFoundError"] * 2


def test_another_bit_in_the_weights_is_a_difference(commands: Commands, tmp_path: Path) -> None:
    whole, _, _ = commands.whole("lora")
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    require_same(tmp_path, whole)
    weights = tmp_path / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(Broken, match=r"weights of .* differ"):
        require_same(tmp_path, whole)
