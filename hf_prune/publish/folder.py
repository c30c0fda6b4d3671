"""A folder that is at any moment the old one or the new one, whatever stops the process that writes it."""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2
CONFIG = "config.json"


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """Give an empty folder to write to, and put it in the place of the target when all is written.

    Files and folders that are in the target and are not written anew stay. After an error the target is as it was.

    Where the file system can exchange two folders in one step (Linux), there is no moment at which the target is
    neither; elsewhere files are moved one by one, `config.json` last.

    Raises:
        OSError: If the folder cannot be written; the target is as it was.
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}.new"
    _finish_what_was_interrupted(target, fresh)
    fresh.mkdir()
    try:
        yield fresh
        _sync(fresh)
        if not target.exists():
            fresh.rename(target)
            return
        _link_other_files(target, fresh)
        if _exchange(fresh, target):
            _move_other_folders(fresh, target)
        else:
            _move_files(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _finish_what_was_interrupted(target: Path, fresh: Path) -> None:
    """A process that was stopped after the exchange left the folders it was to move in the old place."""
    if fresh.exists():
        _move_other_folders(fresh, target)
        shutil.rmtree(fresh)


def _sync(folder: Path) -> None:
    """Have the files on the disk before the folder is renamed: names must not arrive before what they name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _link_other_files(target: Path, fresh: Path) -> None:
    for path in target.iterdir():
        if path.is_file() and not (fresh / path.name).exists() and not _is_weights(path.name):
            os.link(path, fresh / path.name)


def _is_weights(name: str) -> bool:
    """Return whether a file is part of the weights: old shards would be taken for new ones."""
    return name.endswith(".safetensors") or name == "model.safetensors.index.json"


def _move_other_folders(old: Path, target: Path) -> None:
    for path in old.iterdir():
        if path.is_dir() and target.is_dir() and not (target / path.name).exists():
            path.rename(target / path.name)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change places in one step; return whether that is possible here."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(
        AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE
    ) == 0  # fmt: skip


def _move_files(fresh: Path, target: Path) -> None:
    """Move what was written one by one, the config last: it says what the weights are."""
    written = {path.name for path in fresh.iterdir()}
    for path in sorted(fresh.iterdir(), key=lambda path: path.name == CONFIG):
        if path.is_dir() and (target / path.name).is_dir():
            shutil.rmtree(target / path.name)
        path.replace(target / path.name)
    for path in target.iterdir():
        if _is_weights(path.name) and path.name not in written:
            path.unlink()
