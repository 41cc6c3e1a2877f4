"""Whether the files that a run reads were changed after it began. Nothing here imports torch, or reads a text."""

import filecmp
from pathlib import Path

from finetuning.comparison.plan import PlannedRun
from finetuning.datasets import SPLITS
from finetuning.flags import parse_path
from finetuning.runs.files import ADAPTER, ADAPTER_CONFIG

Place = tuple[Path, str]  # a file or folder, and what it holds: a value of --dataset, "model" or "adapter"


def places_of(run: PlannedRun, data_dir: Path | None) -> list[Place]:
    """What a run reads from this machine: its texts, and the folders of its model and its first adapter.

    Args:
        run: one of a study's runs.
        data_dir: the folder with the data folders that the study names.
    """
    model, adapter = run.settings.get("model_name"), run.settings.get("init_adapter")
    named = [
        (run.data_folder(data_dir), run.dataset),
        (model and Path(str(model)), "model"),
        (adapter and parse_path(str(adapter)), "adapter"),
    ]
    return [(path, kind) for path, kind in named if path and path.exists()]


def last_change(place: Path, kind: str) -> float:
    """When a file there was changed, copied or linked last, in seconds since the epoch; 0 if there is none.

    A copy may keep the time of the change in its original, so the time of its own entry counts as well.
    """
    files = files_of(place, kind)
    found = [path.lstat() for path in (*files, place, *place.parents) if path.is_symlink()]
    found += [path.stat() for path in files]
    return max((max(file.st_mtime, file.st_ctime) for file in found), default=0.0)


def files_of(place: Path, kind: str) -> list[Path]:
    """The files that a run may read there. What else lies in the user's own folder is left out."""
    if place.is_file():
        return [place]
    if kind in ("model", "adapter"):
        names = ("*",) if kind == "model" else (ADAPTER, ADAPTER_CONFIG)
        return [path for name in names for path in place.glob(name) if path.is_file()]
    top = [place]
    if kind == "text":  # a table may be a folder of parts
        top = [path for path in place.glob("*.*") if path.name.split(".")[0].lower() in SPLITS]
    return [path for each in top for path in (each, *each.rglob("*")) if path.is_file()]


def same_texts(read: Path, planned: Path, dataset: str) -> bool:
    """Whether two places hold the same texts. What cannot be compared, because one of them is gone, counts as moved.

    Named data sets may lie there with other files beside them, so only files of the same name are compared.
    """
    if read == planned:
        return True
    try:
        first, second = ({path.relative_to(top): path for path in files_of(top, dataset)} for top in (read, planned))
        if dataset == "text" and first and second and first.keys() != second.keys():
            return False
        both = first.keys() & second.keys()
        return all(filecmp.cmp(first[name], second[name], shallow=False) for name in both)
    except OSError:  # it is somebody else's folder
        return True
