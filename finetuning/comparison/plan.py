"""A study: one TOML file -> the list of its runs, each one checked. Nothing here imports torch.

.. code-block:: toml

    question = "what the study asks"      # required
    [defaults]                            # flags of finetune_lora.py, for every run
    [axes]                                # lists of values: the study runs all combinations
    seed = [0, 1, 2]
    [sample]                              # run only some of the combinations, drawn at random with a seed
    count = 20
    seed = 0
    [[rows]]                              # what is compared: a name, and flags for this row only
    name = "lora"
    axes = { seed = [0] }                 # replaces axes of the same name; a plain flag narrows an axis to one value
    tune = { learning_rate = [1e-3] }     # tried on validation first; every row needs the same number of values
    reported = 89.71                      # accuracy in % that others reported; shown in a column of its own
    [tuning]                              # flags of the runs that tune, for example less data or fewer epochs
    [search]                              # rows try random settings instead, each row equally many:
    trials = 6                            #   tune = { learning_rate = { low = 1e-4, high = 3e-3 }, epochs = [3, 5, 8] }
    seed = 0
    [[data]]                              # data sets: a name, and flags. Every row runs on each of them, as SET-ROW
    name = "trec6"                        # a row with data = ["trec6"] runs only on these
    data_dir = "trec6"

A *row* is what the report compares: its runs differ only in their seed. Axes other than the seed make one row of each
combination. ``data_dir`` is a folder inside the one that ``compare_methods.py --data_dir`` names, because data is
somewhere else on each machine.
"""

import itertools
import random
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from finetuning.comparison.drawn import RATE, check_numbers, check_search, check_tuned, tried_settings
from finetuning.datasets import hub_name
from finetuning.errors import UserError, as_user_error, listed
from finetuning.flags import flag_words, from_flags, given_flags, no_flag
from finetuning.settings import FLAGS, MINILM_FORMS, PACKAGED, recorded_name

TABLES = ("question", "defaults", "axes", "sample", "data", "rows", "tuning", "search")
KEYS_OF_A_ROW = ("name", "axes", "tune", "reported", "data")  # what a row may hold besides flags
ALONE = ("kfold", "fold")  # a study compares runs that have one validation split
MANAGED = ("output_dir", "resume", "overwrite", "prefetch", "verbose")  # the study sets these itself
NOT_SHOWN = ("--output_dir", "--overwrite", "--resume", "--data_dir")  # they depend on the machine
LONGEST_NAME = 200  # bytes of a run's name: its log and lock have longer ones, and a file system allows 255
STAGES = ("tune", "final", "all")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    name: str  # the run's directory, unique in the study
    row: str  # what the report compares; runs that differ only in their seed have the same row
    stage: str  # ``tune`` or ``final``
    settings: dict[str, Any]  # flags of ``finetune_lora.py``, as the TOML gives them; ``data_dir`` is relative
    # its values on the axes of the study, without the seed; of a run that tunes, what it tries
    axes: dict[str, Any] = field(default_factory=dict)
    tuned_by: tuple[str, ...] = ()  # names of the runs that tune it; empty if it has all settings of its own
    reported: float | None = None  # test accuracy in % that others have reported for the row
    tuned: tuple[str, ...] = ()  # the flags that its tuning sets
    data: str | None = None  # the name of its data set in ``[[data]]``

    @property
    def waits_for(self) -> list[str]:
        """The flags that its tuning has not set yet."""
        return [flag for flag in self.tuned if flag not in self.settings]

    @property
    def seed(self) -> int:
        return int(self.settings.get("seed", 0))

    @property
    def reads_test(self) -> bool:
        """Whether its test score counts: not that of a run that tunes, nor one that the study leaves out."""
        return self.stage == "final" and bool(self.settings.get("test", True))

    def with_tuned(self, settings: Mapping[str, Any]) -> "PlannedRun":
        """The same run with the settings that its tuning chose."""
        return replace(self, settings={**self.settings, **settings})

    def flags(self, data_dir: Path | None = None) -> list[str]:
        """The run as words of a command line; its data is inside ``data_dir`` if one is given."""
        settings = {name: value for name, value in self.settings.items() if name != "data_dir"}
        folder = self.data_folder(data_dir)
        return flag_words(settings if folder is None else settings | {"data_dir": folder})

    @property
    def dataset(self) -> str:
        return str(self.settings.get("dataset", "imdb"))

    def data_folder(self, data_dir: Path | None) -> Path | None:
        """Where its texts are inside ``data_dir``; ``None`` if none is given, or if they are elsewhere."""
        below = self.settings.get("data_dir")
        packaged = self.settings.get("offline") and self.dataset == "imdb" and below is None
        elsewhere = packaged or hub_name(self.dataset) is not None or "data_source" in self.settings
        if data_dir is None or (below is None and elsewhere):  # both at once is refused
            return None
        return data_dir / (below or "")


Cell = tuple[list[PlannedRun], list[PlannedRun]]  # one combination of the axes: runs that tune, final runs


@dataclass(frozen=True)
class StudyPlan:
    """A study's name, its question, and its runs: first the ones that tune, then all others seed by seed."""

    name: str
    question: str
    runs: tuple[PlannedRun, ...]

    def stage(self, stage: str) -> list[PlannedRun]:
        """The runs that tune, the final ones, or all of them."""
        return [run for run in self.runs if stage in ("all", run.stage)]

    def find(self, name: str) -> PlannedRun:
        return next(run for run in self.runs if run.name == name)


def stated_command(command: str, config: Mapping[str, Any]) -> str:
    """A command with what its run chose by itself.

    So it repeats the run if ``auto``, ``packaged``, or the default of the learning rate changes.

    Args:
        command: as the run has recorded it.
        config: every setting of the run.
    """
    words = shlex.split(command)
    flags = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    try:
        given = {name for name, value in given_flags(words[flags:]).items() if value is not None}
    except UserError:  # the words of another program, which called the suite's main
        return command
    missing = [name for name, flag in FLAGS.items() if flag.or_auto and flag.kind is int and name not in given]
    missing += [RATE] if RATE not in given else []
    model = recorded_name(config["model_name"])
    values = {name: str(config[name]) for name in missing}
    if "model_name" not in given and model in MINILM_FORMS:  # of --offline
        values["model_name"] = model
    command = shlex.join([*words, *(word for name, value in values.items() for word in (f"--{name}", value))])
    return re.sub(rf"(--model_name[ =]){PACKAGED}(?!\S)", rf"\g<1>{model}", command)


@cache
def shown_command(command: str) -> str:
    """A command without the paths of one machine; the value of ``--data_dir`` becomes ``PATH``."""
    words, kept = shlex.split(command), []
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag not in NOT_SHOWN:
            script = word.endswith(".py") and word.startswith("/")  # a search gives its whole path
            kept.append(shlex.quote(Path(word).name if script else word))
            continue
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        kept += [flag, "PATH"] if flag == "--data_dir" and value else []
    return " ".join(kept)


def read_plan(path: Path) -> StudyPlan:
    """The study in a TOML file.

    Raises:
        UserError: the file cannot be read, or a key or value is not allowed. The message names file, row and key.
    """
    with as_user_error(f"{path} cannot be read", OSError, ValueError):  # ValueError: no TOML, or not UTF-8
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    with as_user_error(str(path), UserError):
        if not path.stem.strip("."):  # runs lie in a folder of this name
            raise UserError("must have a name before .toml")
        return _plan(path.stem, content)


def _plan(name: str, content: dict[str, Any]) -> StudyPlan:
    _check_keys(content, TABLES, "")
    question = content.get("question")
    if not isinstance(question, str) or not question.strip():
        raise UserError("question: must be a text that says what the study asks")
    content = {"defaults": {}, "axes": {}, "tuning": {}} | content
    for table in ("defaults", "axes", "sample", "tuning"):
        if not isinstance(content.get(table, {}), dict):
            raise UserError(f"{table}: must be a table, [{table}]")
    for table in ("rows", "data"):
        parts = content.get(table, [{}])
        if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
            raise UserError(f"{table}: must be tables, [[{table}]], at least one")
    check_search(content.get("search"))
    rows = _on_data_sets(content, content.get("rows", [{}]))
    _check_rows(content, rows)
    _check_tuning(content, rows)
    cells = _sampled([cell for row in rows for cell in _expand(content, row)], content.get("sample"))
    tuning = [run for tune, _ in cells for run in tune]
    # the first seed of every row comes before any second seed, so that a study that is stopped early can be compared
    rounds = itertools.zip_longest(*(final for _, final in cells))
    runs = (*tuning, *(run for each in rounds for run in each if run is not None))
    _check_runs(runs)
    return StudyPlan(name, question.strip(), runs)


def _on_data_sets(content: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of each data set of ``[[data]]``, with its flags; the rows themselves if there is none."""
    sets = content.get("data")
    if sets is None:
        named = [row for row in rows if "data" in row]
        if named:
            raise UserError(f"row {named[0].get('name')}: data: needs [[data]], the sets that it names")
        return rows
    if not all(isinstance(each.get("name"), str) for each in (*sets, *rows)):
        raise UserError("data: each [[data]] and each [[rows]] needs a name")
    for each in sets:
        own_texts = (content["defaults"] | each).get("dataset") == "text"
        if own_texts and "data_dir" not in each:  # all sets would read the same texts
            raise UserError(
                f'data {each["name"]}: needs data_dir = "{each["name"]}", its folder in the one of --data_dir'
            )
        folder = str(each.get("data_dir", each["name"]))
        if Path(folder).name != each["name"]:
            raise UserError(f"data {each['name']}: must have the name of its folder, data_dir {folder}")
    names, found = [each["name"] for each in sets], []
    for row in rows:
        wanted = row.get("data", names)
        if not isinstance(wanted, list) or not wanted or not all(name in names for name in wanted):
            raise UserError(f"row {row['name']}: data {wanted}: must be a list of names of [[data]]: {listed(names)}")
        on = [each | row | {"name": f"{each['name']}-{row['name']}", "data": each["name"]} for each in sets]
        found += [each for each in on if each["data"] in wanted]
    return found


def _expand(content: dict[str, Any], row: dict[str, Any]) -> list[Cell]:
    """All combinations of the axes of one ``[[rows]]``, without the seed."""
    where = f"row {row['name']}: " if "name" in row else ""
    settings, axes = _settings_and_axes(content, row, where)
    seeds, data = axes.pop("seed", [settings.get("seed", 0)]), row.get("data")
    if row.get("tune") and any(len(values) > 1 for values in axes.values()):
        raise UserError(f"{where}tune: not allowed with axes other than seed: make a row of each combination")
    cells = []
    for values in itertools.product(*axes.values()):
        cell = dict(zip(axes, values, strict=True))
        name = "-".join([*([row["name"]] if "name" in row else []), *itertools.starmap(_part, cell.items())]) or "run"
        given = settings | cell | {"seed": seeds[0]}
        overrides = content["tuning"] | {"test": False}
        tune = [
            PlannedRun(f"tune-{name}-{trial}", name, "tune", given | overrides | tried, tried, data=data)
            for trial, tried in tried_settings(name, row.get("tune", {}), content.get("search")).items()
        ]
        tuned_by = tuple(run.name for run in tune)
        final = [
            PlannedRun(
                f"{name}-seed{seed}",
                name,
                "final",
                given | {"seed": seed},
                cell,
                tuned_by,
                row.get("reported"),
                tuned=tuple(row.get("tune", ())),
                data=data,
            )
            for seed in seeds
        ]
        cells.append((tune, final))
    return cells


def _part(key: str, value: Any) -> str:
    """An axis and its value as part of a file name, for example ``lora_r8`` or ``precision-bf16``."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    text = f"{key}{value if isinstance(value, int) else f'{value:g}'}" if number else f"{key}-{value}"
    return re.sub(r"[^A-Za-z0-9_.+=-]+", "_", text)


def _settings_and_axes(
    content: dict[str, Any], row: dict[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Flags and axes of a row; what the row says overrides what the study says."""
    own = {key: value for key, value in row.items() if key not in KEYS_OF_A_ROW}
    row_axes = row.get("axes", {})
    axes = {k: v for k, v in (content["axes"] | row_axes).items() if k in row_axes or k not in own}
    twice = sorted(set(own) & set(row_axes))
    if twice:
        raise UserError(f"{where}{twice[0]}: given as a flag and as an axis")
    parts = [("[defaults] ", content["defaults"]), ("[tuning] ", content["tuning"])]
    for place, values in [*parts, (where, own), (f"{where}axes: ", axes)]:
        for key, value in values.items():
            if key not in FLAGS:
                raise UserError(f"{place}{no_flag(key)}")
            if key in MANAGED:
                raise UserError(f"{place}{key}: not allowed, the study sets it itself")
            if key in ALONE:
                raise UserError(f"{place}{key}: not allowed, the runs of a study have a validation split")
            several = value if values is axes and isinstance(value, list) else [value]
            if not all(isinstance(one, str | int | float) for one in several):
                raise UserError(f"{place}{key} {value}: must be one value (several names: 'a,b')")
            check_numbers(f"{place}{key}", key, several)
    for key, values in axes.items():
        if not isinstance(values, list) or not values or len({str(value) for value in values}) < len(values):
            raise UserError(f"{where}axes: {key} {values}: must be a list of different values, at least one")
    return content["defaults"] | own, axes


def _sampled(cells: list[Cell], sample: dict[str, Any] | None) -> list[Cell]:
    """Some combinations, drawn at random with a seed, in their order; all of them if ``sample`` is ``None``."""
    if sample is None:
        return cells
    _check_keys(sample, ("count", "seed"), "[sample] ")
    count, seed = sample.get("count"), sample.get("seed", 0)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(cells):
        raise UserError(f"[sample] count {count}: must be from 1 to {len(cells)}, the number of combinations")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"[sample] seed {seed}: must be a whole number")
    return [cells[i] for i in sorted(random.Random(seed).sample(range(len(cells)), count))]


# --- checks


def _check_keys(table: dict[str, Any], allowed: tuple[str, ...], where: str) -> None:
    unknown = [key for key in table if key not in allowed]
    if unknown:
        raise UserError(f"{where}{unknown[0]}: unknown key, allowed are {', '.join(allowed)}")


def _check_rows(content: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    for number, row in enumerate(rows, start=1):
        name = row.get("name", "" if "rows" in content else "run")
        if not isinstance(name, str) or not NAME.fullmatch(name) or name.startswith("tune-"):
            rule = "must consist of letters, digits and _ . + = -, and must not begin with tune-"
            raise UserError(
                f"row {number}: " + (f"name {name!r}: {rule}" if name else f"has no name, but {listed(row)}")
            )
        for table in ("axes", "tune"):
            if not isinstance(row.get(table, {}), dict):
                raise UserError(f"row {name}: {table}: must be a table of lists")
        reported = row.get("reported", 0)
        if isinstance(reported, bool) or not isinstance(reported, int | float) or not 0 <= reported <= 100:
            raise UserError(f"row {name}: reported {reported!r}: must be an accuracy in %, from 0 to 100")


def _check_tuning(content: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Every row must try equally many settings, because more tries alone give a better score."""
    search, tuning = content.get("search"), content["tuning"]
    for row in rows:
        if "tune" not in row:
            continue
        where = f"row {row.get('name')}: tune: "
        check_tuned(where, row["tune"], search)
        for flag in row["tune"]:
            if any(flag in place for place in (row, row.get("axes", {}), content["axes"], content["defaults"])):
                raise UserError(f"{where}{flag}: must not be given as well")
            if flag in tuning:
                raise UserError(f"[tuning] {flag}: not allowed, because it is what is tuned: give it to the rows")
    budgets = {row.get("name", ""): len(tried_settings("", row.get("tune", {}), search)) for row in rows}
    if len(set(budgets.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in budgets.items())
        raise UserError(f"tune: every row needs the same number of settings to try, but they have: {shown}")
    if (tuning or search) and not any(budgets.values()):
        table = "search" if search else "tuning"
        raise UserError(f"[{table}] no row has anything to tune: give each row tune = {{ {RATE} = ... }}")
    if tuning.get("test", False) is not False:
        raise UserError("[tuning] test: must be false, because settings are chosen on validation")


def _check_runs(runs: tuple[PlannedRun, ...]) -> None:
    """Every run must pass the checks of finetune_lora.py, and no two runs or rows may have one name."""
    seen: set[str] = set()
    rows: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run.name in seen:
            raise UserError(f"row {run.row}: two runs would be named {run.name}")
        seen.add(run.name)
        if len(run.name.encode()) > LONGEST_NAME:
            raise UserError(f"row {run.row}: {run.name}: is no name of a folder: at most {LONGEST_NAME} bytes")
        settings = {key: value for key, value in run.settings.items() if key != "seed"}
        if run.stage == "final" and rows.setdefault(run.row, settings) != settings:
            raise UserError(f"row {run.row}: two rows with other settings have this name")
        folder = run.settings.get("data_dir", "")
        if not isinstance(folder, str) or Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise UserError(f"row {run.row}: data_dir {folder}: must be a folder inside the one of --data_dir")
        if run.settings.get("precision") == "fast":
            raise UserError(
                f"row {run.row}: precision fast: is another one on other machines, and a study needs the same one: give"
                " int8, bf16 or fp32"
            )
        try:
            from_flags(run.flags(Path()))
        except UserError as error:
            raise UserError(f"row {run.row}: {str(error).removeprefix('--')}") from None
