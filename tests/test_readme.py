"""Every command, flag and file that README names is real."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from compare_methods import make_parser as make_study_parser
from finetune_lora import DESCRIPTION
from finetuning.comparison.plan import read_plan
from finetuning.comparison.report import make_parser as make_report_parser
from finetuning.flags import from_flags, make_parser
from predict import make_parser as make_predict_parser

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "DistilRoberta/README.md", "docs/best_practices.md")


def commands() -> list[str]:
    """The lines of all shell blocks, without comments."""
    found = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf8")
        for block in re.findall(r"\n *```bash\n(.*?)```", text, flags=re.DOTALL):
            found += [line for line in block.splitlines() if line.strip() and not line.startswith("#")]
    return found


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command: str) -> None:
    words = shlex.split(command, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):  # variables of one command
        words.pop(0)
    if words[0] == "make":
        done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == "sbatch":
        script = next(i for i, word in enumerate(words) if word.endswith(".SBATCH"))
        assert (ROOT / words[script]).is_file()
        if words[script] == "studies/run_study_array.SBATCH":
            check_study_command(["run", *words[script + 1 :]])
        else:
            from_flags(words[script + 1 :])
    elif words[:2] == ["python", "predict.py"]:
        make_predict_parser().parse_args(words[2:])
    elif words[:2] == ["python", "compare_methods.py"]:
        check_study_command(words[2:])
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), command
        if words[-1] == "--help":
            assert "usage" in make_parser(DESCRIPTION).format_help()
        elif words[1].endswith("finetune_lora.py"):
            from_flags(words[2:])
    else:
        assert words == ["source", ".venv/bin/activate"]


def study_help() -> str:
    """The help of the subcommands that take flags."""
    (commands,) = (action.choices for action in make_study_parser()._actions if isinstance(action.choices, dict))
    return "".join(parser.format_help() for parser in commands.values())


def check_study_command(words: list[str]) -> None:
    if words[0] == "report":
        make_report_parser().parse_args(words[1:])
    else:
        assert read_plan(ROOT / make_study_parser().parse_args(words).study).runs


def test_every_flag_that_is_mentioned_exists() -> None:
    shown = [p.format_help() for p in (make_parser(DESCRIPTION), make_predict_parser(), make_report_parser())]
    known = set(re.findall(r"--\w+", "".join([*shown, study_help()])))
    for document in DOCUMENTS:
        mentioned = set(re.findall(r"`(--\w+)", (ROOT / document).read_text(encoding="utf8")))
        assert mentioned <= known, document


def test_the_tree_is_that_of_the_repository() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf8")
    (tree,) = re.findall(r"## The house\n.*?```\n(.*?)```", text, flags=re.DOTALL)
    named = {word for line in tree.splitlines() for word in re.split(r"  +", line)[0].split()}
    for name in named:
        assert list(ROOT.glob(name)), name
    modules = {path.name for path in ROOT.glob("*.py")}
    assert modules <= named
