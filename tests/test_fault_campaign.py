"""A short form of the fault campaign: a few trials of the faults that need no root and no second process."""

import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.faults import inputs, runs
from benchmarks.faults.campaign import Campaign
from benchmarks.faults.interruptions import moment_of, undisturbed_ranks
from benchmarks.faults.plan import FAULTS
from benchmarks.faults.runs import Broken, Commands, Fault, Outcome, Seen, Signals, Undisturbed, continued, require_same

SHORT = (  # one trial of each
    "SIGKILL", "signals", "memory runs out", "damaged checkpoint", "damaged weights", "damaged result",
    "damaged settings", "command lines", "flags together", "data files",
)  # fmt: skip
HEADLINE = "data    data: 200 train\nrun     runs/first\n"  # the text before training
SEED = 65603  # most of its trials are of LoRA or full fine-tuning in fp32: few undisturbed runs, no kernels to compile

pytestmark = pytest.mark.xdist_group("campaign")  # in one process: the undisturbed runs are made once


@pytest.fixture(scope="module")
def commands(distilbert: Path, review_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Commands:
    return Commands(tmp_path_factory.mktemp("campaign"), distilbert, review_folder)


def done(commands: Commands, folder: Path, times: int, trial: Callable[..., str | Seen]) -> Campaign:
    """A campaign of one fault that a test made up."""
    campaign = Campaign(Commands(folder, commands.model, commands.data), [Fault("a fault", times, "works", trial)])
    campaign.run(lambda _line: None)
    return campaign


def test_every_promise_is_kept(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "CASES", 30)
    chosen = [replace(fault, times=1) for fault in FAULTS if fault.name in SHORT]
    campaign = Campaign(commands, chosen, SEED)
    campaign.run()
    assert not campaign.broken, campaign.report()
    assert sum(len(trials) for trials in campaign.done.values()) == len(SHORT)


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
    lines = ["| a fault | 3 | 2 | nothing is lost | 2 fine |", "| | | | | 1 broken |"]
    assert campaign.report().splitlines()[2:4] == lines
    for seed, retry_broken, again in ((0, False, []), (0, True, [1]), (1, False, [0, 1, 2])):
        calls.clear()
        Campaign(tried, [Fault("a fault", 3, "", trial)], seed, retry_broken).run(shown.append)
        assert calls == [f"a_fault-{number}" for number in again]
    elsewhere = Campaign(tried, [Fault("another", 2, "works", trial, lambda: "needs a moon")])
    elsewhere.run(shown.append)
    assert elsewhere.report().splitlines()[2] == "| another | 0 | 0 | works | needs a moon |"


def test_what_was_disturbed_is_counted(commands: Commands, tmp_path: Path) -> None:
    def trial(_commands: Commands, _generator: object, directory: Path) -> Seen:
        method = "full" if directory.name.endswith("1") else "lora"
        return Seen("fine", {"method": [method], "killed while": ["training", "set-up"]})

    campaign = done(commands, tmp_path, 3, trial)
    lines = campaign.report().splitlines()
    assert lines[2] == "| a fault | 3 | 3 | works | 3 fine |"
    assert lines[4:10] == [
        "| fault | what | which | how often |",
        "|---|---|---|---|",
        "| a fault | method | lora | 2 |",
        "| a fault | method | full | 1 |",
        "| a fault | killed while | training | 3 |",
        "| a fault | killed while | set-up | 3 |",
    ]


@pytest.mark.parametrize(
    ("files", "printed", "moment"),
    [
        ((), "", "set-up"),
        (("cache/tokens",), "", "tokenizing"),
        ((f"run/.best.ckpt.{'0' * 32}.tmp.ckpt", "run/best.ckpt"), HEADLINE, "writing a file"),
        (("run/last.ckpt",), HEADLINE, "building the model"),
        (("run/last.ckpt",), f"{HEADLINE}epoch 1/3  batch 1/25  loss 0.6\n", "training"),
        (("run/adapter_model.safetensors",), HEADLINE, "evaluation and results"),
        (("run/adapter_model.safetensors", "run/result.json"), HEADLINE, "the report"),
    ],
)
def test_the_moment_of_a_kill(files: tuple[str, ...], printed: str, moment: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert moment_of(Outcome(-9, printed), tmp_path / "run", tmp_path / "cache") == moment


def test_a_trial_that_finds_no_result_is_noted_as_broken(commands: Commands, tmp_path: Path) -> None:
    def trial(_commands: Commands, _generator: object, directory: Path) -> str:
        runs.left_by(directory)
        return "fine"

    campaign = done(commands, tmp_path, 2, trial)
    assert [record["seen"].split(":")[0] for record in campaign.broken] == ["FileNotFoundError"] * 2


def test_a_trial_that_disturbed_nothing_is_drawn_again(commands: Commands, tmp_path: Path) -> None:
    drawn: list[float] = []

    def trial(_commands: Commands, generator: random.Random, directory: Path) -> str:
        directory.mkdir()
        drawn.append(generator.random())
        if directory.name.endswith("1") or len(drawn) < 3:
            raise Undisturbed
        return "fine"

    campaign = done(commands, tmp_path, 2, trial)
    assert len(set(drawn)) == 3 + 8
    seen = {number: (record["kept"], record["seen"]) for number, record in campaign.done["a fault"].items()}
    assert seen == {0: (True, "fine"), 1: (False, "nothing was disturbed in 8 draws")}


def printed(*batches: int) -> Outcome:
    """A run that printed these batches."""
    return Outcome(0, "".join(f"epoch {n // 10 + 1}/3  batch {n % 10}/10  loss 0.7\n" for n in batches))


@pytest.mark.parametrize(
    ("kept", "earlier", "later", "seen", "broken"),
    [
        (True, printed(1, 11), printed(3, 12), "", "did batch 3 again after 11 batches"),
        (True, printed(1, 2), printed(1, 2), "", "did batch 1 again after 2 batches"),
        (False, printed(1, 9), printed(1, 2), "", "no checkpoint after 9 batches"),
        (True, printed(1, 11), printed(4, 12), "continued", ""),
        (True, printed(1, 11), printed(), "continued", ""),
        (False, printed(1, 8), printed(1, 2), "started over", ""),
    ],
)
def test_a_run_that_goes_on_uses_its_checkpoint(
    kept: bool, earlier: Outcome, later: Outcome, seen: str, broken: str
) -> None:
    with pytest.raises(Broken, match=broken) if broken else nullcontext():
        assert continued(kept, earlier, lambda: later) == (later, seen)


def test_an_undisturbed_run_of_two_processes_is_made_once(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[str]] = []

    def fresh(_commands: Commands, words: list[str]) -> Outcome:
        made.append(words)
        return Outcome(0, "")

    monkeypatch.setattr(Commands, "fresh", fresh)
    others = Commands(tmp_path, commands.model, commands.data)
    assert undisturbed_ranks(others) == undisturbed_ranks(others) == tmp_path / "whole-ddp"
    assert len(made) == 1


@pytest.mark.parametrize(
    ("outcome", "left"),
    [
        (Outcome(1, "error: --seed x: must be a number\n"), False),
        (Outcome(2, "error: something is wrong -- try again\n"), False),
        (Outcome(2, "a note\nerror: --seed x: must be a number\n"), False),
        (Outcome(2, "error: --seed x: must be a number\n"), True),
    ],
)
def test_a_refusal_that_is_not_clean_is_noticed(outcome: Outcome, left: bool, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    inputs.require_refused(Outcome(2, "error: --seed x: must be a number\n"), ["--seed"], directory, "x")
    if left:
        directory.mkdir()
    with pytest.raises(Broken, match="status"):
        inputs.require_refused(outcome, ["--seed"], directory, "x")


def test_another_bit_in_the_weights_is_a_difference(commands: Commands, tmp_path: Path) -> None:
    whole, _, _ = commands.whole("lora")
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    require_same(tmp_path, whole)
    weights = tmp_path / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(Broken, match=r"weights of .* differ"):
        require_same(tmp_path, whole)
