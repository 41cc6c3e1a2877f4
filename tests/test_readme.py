"""Every command, flag, file and link that the documents name is real, and every line is short enough to read."""

import functools
import re
import shlex
import subprocess
from importlib.util import find_spec

import pytest

from finetune_lora import DESCRIPTION
from finetuning.comparison.plan import read_plan
from finetuning.export.command import make_parser as make_export_parser
from finetuning.flags import from_flags, make_parser
from finetuning.prediction.command import make_parser as make_predict_parser
from finetuning.tuning.command import make_parser as make_study_parser
from tests.common import ROOT

DOCUMENTS = (
    "README.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
    "DistilRoberta/README.md",
)
SLURM_FLAGS = {"--array", "--dependency", "--gres", "--partition", "--time", "--parsable"}
WIDEST_LINE = 160  # characters
MOST_LINES = 200  # of the README


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf8")


def commands() -> list[str]:
    """The lines of all shell blocks, without comments."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"\n *```bash\n(.*?)```", read(document), flags=re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()  # a command may go on in the next line
            found += [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return found


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command: str) -> None:
    words = shlex.split(command.partition(" > ")[0], comments=True)  # without the file that the output goes to
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
        elif words[script] == "studies/run_tune_array.SBATCH":
            check_study_command(["tune", *words[script + 1 :]])
        else:
            from_flags([word.replace("%a", "0") for word in words[script + 1 :]])
    elif words[:2] == ["python", "predict.py"]:
        make_predict_parser().parse_args(words[2:])
    elif words[:2] == ["python", "export_model.py"]:
        make_export_parser().parse_args(words[2:])
    elif words[:2] == ["python", "compare_methods.py"]:
        check_study_command(words[2:])
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]), command
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), command
        if words[-1] == "--help":
            assert "usage" in make_parser(DESCRIPTION).format_help()
        elif words[1].endswith("finetune_lora.py"):
            from_flags(words[2:])
    else:
        assert words == ["source", ".venv/bin/activate"]


def check_study_command(words: list[str]) -> None:
    options = make_study_parser().parse_args(words)
    if words[0] not in ("report", "tune"):
        assert read_plan(ROOT / options.study).runs


@functools.cache
def benchmark_flags() -> set[str]:
    """Flags that files of benchmarks and campaign name, and fields of their classes: ``benchmarks.measure``'s flags."""
    files = sorted((ROOT / "benchmarks").rglob("*.py"))
    text = "".join(path.read_text(encoding="utf8") for path in files)
    return set(re.findall(r"--[a-z_]+", text)) | {f"--{name}" for name in re.findall(r"\n    ([a-z_]+): ", text)}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_that_is_mentioned_exists(document: str) -> None:
    (studies,) = (action.choices for action in make_study_parser()._actions if isinstance(action.choices, dict))
    parsers = [make_parser(DESCRIPTION), make_predict_parser(), make_export_parser(), *studies.values()]
    known = set(re.findall(r"--\w+", "".join(parser.format_help() for parser in parsers))) | SLURM_FLAGS
    text = re.sub(r"```.*?```", "", read(document), flags=re.DOTALL)  # commands have a test of their own
    for span in re.findall(r"`([^`\n]+)`", text):
        mentioned = set(re.findall(r"(?<![\w-])--[a-z_]+", span))
        allowed = known if span.startswith("--") else known | benchmark_flags()
        assert mentioned <= allowed, span


def tree() -> dict[str, bool]:
    """The names in the README's tree, relative to the root -> whether they are entries of the root."""
    (block,) = re.findall(r"## Layout\n.*?```\n(.*?)```", read("README.md"), flags=re.DOTALL)
    names: dict[str, bool] = {}
    folder = ""
    for line in block.splitlines():
        words = re.split(r"  +", line.strip())[0].split()
        inside = line.startswith(" ")
        if not inside:
            folder = words[0] if words[0].endswith("/") else ""
        names |= {(folder if inside else "") + word: not inside for word in words}
    return names


def test_every_name_in_the_tree_exists() -> None:
    for name in tree():
        assert list(ROOT.glob(name)), name


def test_the_tree_names_every_entry_of_the_root() -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this copy is not a git checkout")
    entries = {line.split("/")[0] for line in done.stdout.splitlines() if not line.startswith(".")}
    named = {path.name for name, at_root in tree().items() if at_root for path in ROOT.glob(name)}
    assert entries <= named


def test_packages_and_modules_are_in_the_tree() -> None:
    packages = {f"finetuning/{path.parent.name}/" for path in (ROOT / "finetuning").glob("*/__init__.py")}
    modules = {f"finetuning/{path.name}" for path in (ROOT / "finetuning").glob("[a-z]*.py")}
    assert packages | modules <= set(tree())


def anchors(text: str) -> set[str]:
    """The headings of a page, as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    for link in re.findall(r"(?<!!)\[[^]]*\]\(([^)\s]+)\)", read(document)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / document).parent / name if name else ROOT / document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf8")), link


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_line_is_too_wide(document: str) -> None:
    text = read(document)
    assert [line for line in text.splitlines() if len(line) > WIDEST_LINE] == []
