"""A data set in the hub's own cache layout, so that tests need no network."""

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def card(*configs: str, names: tuple[str, ...] = ("bad", "good"), labels: str = "label") -> str:
    """A dataset card: for each config, the splits of its folder, and class names of the column ``labels``."""
    entries, infos = [], []
    for config in configs:
        entries.append(
            f"- config_name: {config}\n  data_files:\n"
            + "".join(
                f"  - {{split: {split}, path: {config}/{split}.parquet}}\n" for split in ("train", "validation", "test")
            )
        )
        classes = ", ".join(f"'{i}': {name}" for i, name in enumerate(names))
        infos.append(
            f"- config_name: {config}\n  features:\n  - {{name: text, dtype: string}}\n"
            f"  - name: {labels}\n    dtype: {{class_label: {{names: {{{classes}}}}}}}\n"
        )
    return f"---\nconfigs:\n{''.join(entries)}dataset_info:\n{''.join(infos)}---\n"


def parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def write_hub_cache(cache: Path, repository: str, files: Mapping[str, bytes | str]) -> Path:
    """Writes a repository as ``snapshot_download`` leaves it: blobs, and a snapshot of links to them.

    Args:
        cache: the folder ``hub`` in ``HF_HOME``.
        repository: OWNER/NAME.
        files: content of each file, by its path in the repository.

    Returns:
        The snapshot's folder.
    """
    folder = cache / f"datasets--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for name in ("blobs", "refs"):
        (folder / name).mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        blob = folder / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot
