"""Directories that appear whole or not at all.

Whatever interrupts a writer, no directory is left that looks complete but is not. What is written
for a while lies beside the target or in it (`working_path`), and counts as nothing.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import WexpandError
from .model_dir import CONFIG

__all__ = ["made_parents", "partial_directory", "require_empty", "sync", "working_path"]

# as `working_path` names them, in a directory
_TEMPORARY = re.compile(r"\.partial-\d+|\.unfinished")


def require_empty(output: str | Path) -> None:
    """Refuse an output that exists, unless it is an empty directory. Raises WexpandError.

    What writers of ours put there for a while, and leave when they are killed, does not count.
    """
    path = Path(output)
    if path.is_dir() and any(not _TEMPORARY.fullmatch(file.name) for file in path.iterdir()):
        raise WexpandError(f"{output}: is not empty; name a directory that does not exist")
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise WexpandError(f"{place}: is a file; name a directory that does not exist")


@contextmanager
def partial_directory(target: str | Path) -> Iterator[Path]:
    """An empty directory whose files become `target`'s when the block ends without an error.

    A new `target` appears by one rename. In an existing one, the old config.json goes first and the
    new one comes last, model weights that the new files do not replace are removed, and all other
    files stay. On an error the partial directory is removed and `target` is as it was, with the
    folders above it. What a process that was killed left is removed by the next one of that target.
    """
    target = Path(target).resolve()
    if target.exists():
        if not target.is_dir():
            raise WexpandError(f"{target}: is a file; a model is saved to a directory")
        foreign = [f.name for f in target.glob("*.safetensors") if not _model_weights(f.name)]
        if foreign:
            raise WexpandError(
                f"{target}: holds {foreign[0]}, which would be read as a part of the model; save "
                "to another directory"
            )
    stem = working_path(target, "partial")
    partial = stem.with_name(f"{stem.name}-{os.getpid()}")
    with made_parents(partial.parent):
        try:
            _remove_abandoned(stem)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            if target.exists():
                _move_into(partial, target)
            else:
                os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def working_path(target: Path, kind: str) -> Path:
    """Where something lies that is to become a part of `target`: beside it, and in it where it
    exists, as it may be the only directory of its file system that can be written to."""
    if target.exists():
        return target / f".{kind}"
    return target.parent / f".{target.name}.{kind}"


@contextmanager
def made_parents(folder: Path) -> Iterator[None]:
    """`folder` and those above it are there; in the end those that it made and nobody filled go."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for parent in missing:
            with suppress(OSError):  # something is in it, or it could not be made
                parent.rmdir()


def sync(directory: str | Path) -> None:
    """All that is in `directory` is on the disk when this returns, and so are its names."""
    for path in (*Path(directory).rglob("*"), Path(directory), Path(directory).resolve().parent):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_abandoned(stem: Path) -> None:
    """Remove the partial directories of processes of this machine that do not run any more."""
    for left in stem.parent.glob(f"{stem.name}-*"):
        number = left.name.removeprefix(f"{stem.name}-")
        if number.isdigit() and left.is_dir() and not _alive(int(number)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's, or the name of no process of ours
        return True
    return True


def _model_weights(name: str) -> bool:
    """Whether transformers reads a file of this name as the model's weights, or their index."""
    return bool(re.fullmatch(r"model(-\d+-of-\d+)?(\..+)?\.safetensors(\.index\.json)?", name))


def _move_into(partial: Path, target: Path) -> None:
    with _turns(target):
        _move(partial, target)


def _move(partial: Path, target: Path) -> None:
    files = sorted(
        (file.relative_to(partial) for file in partial.rglob("*") if not file.is_dir()),
        key=lambda file: str(file) == CONFIG,
    )
    (target / CONFIG).unlink(missing_ok=True)
    for old in target.iterdir():
        if old.is_file() and _model_weights(old.name) and Path(old.name) not in files:
            old.unlink()
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / file, target / file)


@contextmanager
def _turns(folder: Path) -> Iterator[None]:
    """One process after another, so that files of two models are never mixed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
