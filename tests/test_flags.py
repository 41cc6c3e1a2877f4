"""Flags: how values are read, what is refused in one line, and that help shows every one."""

import argparse
import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from finetuning.flags import (
    OneLineParser,
    flag_words,
    from_flags,
    given_flags,
    make_parser,
    parse_bool,
    parse_path,
)
from finetuning.runs.directory import settings_to_run
from finetuning.settings import COMMANDS, FLAGS, LORA_TARGETS, SECTIONS
from tests.common import ROOT, config_of_flags, lora_of_flags, refusal, refusal_of, some

# --- parsing


@pytest.mark.parametrize("flag", ["q_lora", *LORA_TARGETS, "verbose", "offline", "test", "efficient"])
def test_booleans(flag: str) -> None:
    def read(line: str) -> object:
        return config_of_flags(line).to_dict()[flag]

    others = "" if flag == "lora_mlp" else "--lora_mlp "  # so that some module carries LoRA
    for word in ("True", "true", "TRUE", "yes", "Yes", "YES", "1"):
        assert read(f"{others}--{flag} {word}") is True
        assert read(f"{others}--{flag}={word}") is True
    for word in ("False", "false", "FALSE", "no", "No", "NO", "0"):
        assert read(f"{others}--{flag} {word}") is False
    assert read(f"{others}--{flag}") is True
    assert read(f"--{flag} --seed 3 {others}") is True
    assert refusal(f"--{flag} maybe") == f"--{flag} maybe: must be True, yes, 1, False, no or 0"


@pytest.mark.parametrize("flag", ["dataset", "lora_r", "lora_modules", "method", "unknown"])
def test_a_refusal_is_one_line_whatever_was_given(flag: str) -> None:
    line_break, terminal = "a\nb\r\u2028c", "\x1b[31m\udc80"
    assert refusal_of(from_flags, [f"--{flag}={line_break}{terminal}", "--epochs", "-1"]).isprintable()


def test_an_empty_path_is_not_the_current_folder() -> None:
    for flag in ("output_dir", "data_dir", "init_adapter"):
        assert refusal(f"--{flag}=") == f"--{flag} : must be a path, or left out"
    assert given_flags(["--output_dir", "."]) == {"output_dir": Path()}
    parser = OneLineParser()
    parser.add_argument("run", type=parse_path)
    assert refusal_of(parser.parse_args, [""]) == "run : must be a path"


def test_the_home_folder_is_found_where_shells_leave_its_sign() -> None:
    words = ["--output_dir=~/runs/x", "--data_dir=~nobody-has-this-name/x"]
    assert given_flags(words) == {"output_dir": Path.home() / "runs/x", "data_dir": Path("~nobody-has-this-name/x")}


def test_resume_also_takes_auto() -> None:
    words = {"--resume": True, "--resume auto": "auto", "--resume AUTO": "auto", "--resume no": False}
    assert {line: given_flags(line.split())["resume"] for line in words} == words
    assert refusal("--resume later") == "--resume later: must be True, yes, 1, False, no, 0 or auto"


@pytest.mark.parametrize("flag", ["epochs", "batch_size", "batch_tokens", "patience"])
def test_numbers_that_also_take_auto(flag: str) -> None:
    for word in ("auto", "AUTO", "Auto"):
        assert given_flags([f"--{flag}", word]) == {flag: None}
        assert config_of_flags(f"--{flag} {word}") == config_of_flags("")
    assert given_flags([f"--{flag}", "300"]) == {flag: 300}
    for word in ("x", "1.5", "automatic", ""):
        assert refusal(f"--{flag}={word}") == f"--{flag} {word}: must be a whole number or auto"
    assert refusal("--lora_r auto") == "--lora_r auto: must be a whole number"


def test_parse_bool_takes_nothing_else() -> None:
    for word in ("", "2", "t", "on", "None", " true"):
        with pytest.raises(ValueError, match="neither"):
            parse_bool(word)


def test_flags_have_their_names_and_types() -> None:
    line = (
        "--q_lora True --lora_r 4 --lora_alpha 3 --lora_query False --lora_key True --lora_value False"
        " --lora_projection True --lora_mlp True --lora_head True --device 1 --verbose True --learning_rate 1e-3"
        " --output_dir a/b --data_dir c --dataset financial_phrasebank --agreement all --limit_train 7 --strategy ddp"
    )
    config, lora = config_of_flags(line), lora_of_flags(line)
    assert (lora.q_lora, lora.lora_r, lora.lora_alpha) == (True, 4, 3.0)
    assert isinstance(lora.lora_alpha, float)
    assert lora.targets == ("key", "projection", "mlp", "head")
    assert (config.hardware.device, config.run.verbose) == (1, True)
    assert (config.training.learning_rate, config.data.limit_train) == (1e-3, 7)
    assert (config.run.output_dir, config.data.data_dir) == (Path("a/b"), Path("c"))
    assert (config.data.agreement, config.hardware.strategy) == ("all", "ddp")


def test_defaults_of_a_thin_entry_give_way_to_flags() -> None:
    entry = {"dataset": "financial_phrasebank", "epochs": 4, "method": "full"}
    config = some(settings_to_run(given_flags(["--epochs", "1"], "", entry), entry))
    assert (config.data.dataset, config.training.epochs, config.method.method, config.training.monitor) == (
        "financial_phrasebank", 1, "full", "macro_f1",
    )  # fmt: skip
    shown = some(next(a.help for a in make_parser("", entry)._actions if "--epochs" in a.option_strings))
    assert shown.endswith("(default: 4)")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--count", "eight"], "--count eight: must be a whole number"),
        (["--count", "it's"], "--count it's: must be a whole number"),
        (["--count", ""], "--count : must be a whole number"),
        (["--rate", "fast"], "--rate fast: must be a number"),
        (["--rate=1,5"], "--rate 1,5: must be a number"),
        (["--color", "blue"], "--color blue: must be one of red, green"),
        (["--color", "it's blue"], "--color it's blue: must be one of red, green"),
        (["--folder", "a"], "--folder: a: not empty"),  # a type that explains itself
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_what_is_allowed(words: list[str], line: str) -> None:
    def folder(text: str) -> str:
        raise argparse.ArgumentTypeError(f"{text}: not empty")

    parser = OneLineParser()
    parser.add_argument("--count", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--color", choices=("red", "green"))
    parser.add_argument("--folder", type=folder)
    assert refusal_of(parser.parse_args, words) == line


def test_unknown_flags_and_unfinished_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--lora_rank 8" in refusal("--lora_rank 8")
    assert "--lora_que" in refusal("--lora_que True")  # no abbreviations: a new flag could change their meaning
    assert "run.toml" in refusal("run.toml")
    assert "--lora_r" in refusal("--lora_r")
    assert refusal("--learning_rat 1").endswith("; did you mean --learning_rate?")
    assert refusal("--optimiser adam").endswith("; did you mean --optimizer?")
    assert refusal("--limit-train 3").endswith("; did you mean --limit_train?")
    assert "did you mean" not in refusal("--nonsense 1")
    monkeypatch.chdir(tmp_path)
    assert refusal("mine.csv --seed 1") == "unrecognized arguments: mine.csv"
    (tmp_path / "mine.csv").touch()
    assert refusal("mine.csv --seed 1") == "unrecognized arguments: mine.csv; did you mean --data_dir mine.csv?"


# --- help, and what is loaded


def test_help_shows_every_flag_once_in_its_group_with_a_default() -> None:
    shown = io.StringIO()
    with redirect_stdout(shown), pytest.raises(SystemExit) as ended:
        given_flags(["--help"], "What this does.")
    assert ended.value.code == 0
    assert "What this does." in shown.getvalue()
    sections: dict[str, str] = {}
    for line in shown.getvalue().splitlines():
        if line.endswith(":") and not line.startswith(" "):
            title = line.removesuffix(":")
            sections[title] = ""
        elif sections:
            sections[title] += f"{line}\n"
    assert set(sections) == {*SECTIONS, "command", "options"}
    for flag in (FLAGS | COMMANDS).values():
        found = {title: body.count(f"\n  --{flag.name} ") for title, body in sections.items()}
        assert {title: count for title, count in found.items() if count} == {flag.section: 1}, flag.name
        entry = sections[flag.section].split(f"\n  --{flag.name} ")[1].split("\n  --")[0]
        assert flag.shown != "None", flag.name
        assert " ".join(entry.split()).endswith(f"(default: {flag.shown})")
    assert all(str(kind.__doc__) in sections[name] for name, kind in SECTIONS.items())


CALL = """
import json, sys
sys.path.insert(0, sys.argv[1])
from finetune_lora import main
statuses = [main(words) for words in json.loads(sys.argv[2])]
print([name for name in ("torch", "lightning", "transformers", "numpy") if name in sys.modules], *statuses)
"""


def called(commands: list[list[str]], folder: Path) -> tuple[str, list[str]]:
    """What a new process in a folder prints: the libraries loaded by all commands and their statuses; their errors."""
    words = [sys.executable, "-c", CALL, str(ROOT), json.dumps(commands)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    return done.stdout, done.stderr.splitlines()


def test_a_wrong_flag_is_refused_in_one_line_and_loads_no_torch(tmp_path: Path) -> None:
    commands = ["--lora_r 0", "--nonsense", "--method full --lora_mlp", "--data_dir no/where"]
    shown, errors = called([words.split() for words in commands], tmp_path)
    assert shown == "[] 2 2 2 2\n"
    assert len(errors) == len(commands)
    assert errors[0] == "error: --lora_r 0: must be at least 1"
    assert list(tmp_path.iterdir()) == []


def test_what_files_alone_can_tell_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    cases = [
        ("train.csv --text_column review", "--text_column review: "),
        ("train.csv --text_column review --estimate", "--text_column review: "),
        ("train.csv --text_column review --prefetch", "--text_column review: "),
        ("train.parquet", "train.parquet cannot be read"),
        ("train.csv --model_name .", "--model_name .: no usable config.json in it"),
    ]
    files = {"train.csv", "train.parquet"}  # the second one is unreadable
    for file in files:
        (tmp_path / file).write_text("text,label\nfine,good\ndull,bad\n", encoding="utf8")
    commands = [f"--dataset text --model_name packaged --data_dir {words}".split() for words, _ in cases]
    shown, errors = called(commands, tmp_path)
    assert shown == "['numpy'] 2 2 2 2 2\n"
    assert all(said in line for (_, said), line in zip(cases, errors, strict=True)), errors
    assert {path.name for path in tmp_path.iterdir()} == files


def test_settings_become_words_that_are_read_as_the_same_settings() -> None:
    settings = {"class_weights": "-1=2,0=3", "learning_rate": 1e-3, "lora_mlp": True, "epochs": None}
    words = flag_words(settings)
    assert words == ["--class_weights=-1=2,0=3", "--learning_rate", "0.001", "--lora_mlp", "True", "--epochs", "auto"]
    assert given_flags(words) == settings
