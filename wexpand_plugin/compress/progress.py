"""What survives a run that is killed: the working directory of a compression, and who may use it.

Inside `resumable` every modifier of ours keeps what it has found in a directory beside the output,
block by block, each as soon as it is finished (`records`). A later run of the same output goes on
there: blocks that are finished are put back where they would have been solved, and everything else
happens again. So inputs of the first unfinished block come from the passes that the pipeline makes
in any case, through the same modules in the same order, to the same bits; two passes of a block
cost little beside solving it, and no hidden states have to be stored.

    run-CRC             what `compress` was called with
    0-run-CRC           what the first modifier was given: keys, model, weights, data, versions
    0-plan-CRC          the settings that it chose, where the recipe leaves them open
    0-block-00007-CRC   what became of the linears of the model's eighth block

A second process at the same output is refused. The directory goes when the output is complete.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from loguru import logger

from ..errors import WexpandError
from ..format.directories import made_parents, sync, working_path
from ..format.model_dir import CHECKSUMS, CONFIG
from ..method import ranks
from .records import find_records, read_record, write_record

__all__ = ["Part", "Progress", "in_place", "options_of", "refuse_complete", "resumable",
           "unfinished"]  # fmt: skip

_KIND = "unfinished"
_current: ContextVar["Progress | None"] = ContextVar("progress", default=None)


def unfinished(output: str | Path) -> Path:
    """The working directory of `output`, be it there or not."""
    target = Path(output).resolve()
    beside = target.parent / f".{target.name}.{_KIND}"
    return beside if beside.exists() else working_path(target, _KIND)


def in_place(output: str | Path) -> bool:
    """Whether an unfinished run of `output` lies in it, as it was there before."""
    return unfinished(output).parent == Path(output).resolve() and bool(options_of(output))


def options_of(output: str | Path) -> dict[str, Any]:
    """What the unfinished run of `output` was called with; empty where there is none."""
    for name, file, whole in find_records(unfinished(output)):
        if name == "run" and whole:
            return read_record(file)
    return {}


def refuse_complete(output: str | Path) -> None:
    """Raise WexpandError if a run of `output` has ended: there is nothing to resume."""
    if all((Path(output) / name).is_file() for name in (CHECKSUMS, CONFIG)):
        raise WexpandError(f"{output}: is complete; there is nothing to resume")


@contextmanager
def resumable(
    output: str | Path, *, resume: bool = False, options: Mapping[str, Any] | None = None
) -> Iterator["Progress"]:
    """While it lasts, runs of our modifiers keep what they find; with `resume` they go on from it.

    For Python: `with resumable("OUT", resume=True): oneshot(..., output_dir="OUT")`, with the same
    seed (`torch.manual_seed`) each time, as llm-compressor shuffles the data.

    :param output: that the run will write; the working directory lies beside it, or in it if it
        exists
    :param resume: go on with an unfinished run, or begin one
    :param options: what else tells one run from another
    :raises WexpandError: another process is at work on `output`; an unfinished run is there and
        `resume` is not set, or is another run
    """
    if ranks.count() > 1:
        raise WexpandError(
            f"resume: {ranks.count()} processes (torchrun) keep no finished blocks of {output}; "
            "run it in one, or without"
        )
    folder = unfinished(output)
    with made_parents(folder.parent), _locked(folder, output):
        progress = Progress(folder, output)
        token = _current.set(progress)
        try:
            progress.begin(resume, options or {})
            yield progress
        except BaseException:
            if kept := progress.kept():
                logger.warning(
                    f"{kept} kept in {folder}; to go on: wexpand compress --resume {output}"
                )
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        else:
            if Path(output).is_dir():
                sync(output)
            shutil.rmtree(folder)
        finally:
            _current.reset(token)


@contextmanager
def _locked(folder: Path, output: str | Path) -> Iterator[None]:
    """`folder`, made if it is not there, for this process alone."""
    while True:
        folder.mkdir(exist_ok=True)
        lock = folder / "lock"
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise WexpandError(
                f"{output}: another process is writing it; wait until that ends, or name another "
                "directory"
            ) from None
        except OSError:
            pass  # a file system without locks
        # the one who held it may have removed the directory since it was opened
        if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
            break
        os.close(handle)
    try:
        yield
    finally:
        os.close(handle)


class Progress:
    """The working directory of a run, which this process has for itself.

    :param output: what the run will write, for messages
    """

    def __init__(self, folder: Path, output: str | Path):
        self.folder, self.output = folder, output
        self._files: dict[str, Path] = {}
        self.parts = 0
        """modifiers that have begun"""

    def kept(self) -> str:
        """What there is to go on from, of all parts, in words; empty if there is nothing."""
        # what the disk says: whoever interrupts may do so just after a record was written
        plans, blocks = (
            len(list(self.folder.glob(f"*-{kind}-????????.safetensors")))
            for kind in ("plan", "block-*")
        )
        if blocks:
            return f"{blocks} finished block{'s' if blocks > 1 else ''}"
        return "its plan" if plans else ""

    def begin(self, resume: bool, options: Mapping[str, Any]) -> None:
        """Look at what is there, and keep or check what the run was called with."""
        for name, file, whole in find_records(self.folder):
            if whole:
                self._files[name] = file
                continue
            logger.warning(f"{file}: is damaged, so {name} is done again")
            file.unlink()
        kept = self.kept()
        if kept and not resume:
            raise WexpandError(
                f"{self.output}: an earlier run ended early and left {kept} in {self.folder}; go "
                f"on with it (--resume {self.output}, in Python resume=True), or remove that "
                "directory"
            )
        if kept:
            logger.info(f"Going on with {self.output}, from {kept}")
        else:
            for file in self._files.values():
                file.unlink()
            self._files.clear()
        self.same_run("run", options)

    def same_run(self, name: str, about: Mapping[str, Any]) -> None:
        """Keep what a run is known by, or refuse to go on with another one."""
        about = json.loads(json.dumps(about))
        known = self.read(name)
        if known is None:
            self.write(name, about)
        elif (found := _difference(known, about)) is not None:
            key, was, now = found
            raise WexpandError(
                f"{self.output}: cannot be resumed: {key} was {_short(was)} and is {_short(now)} "
                f"now; run it as it was, or remove {self.folder} to begin anew"
            )

    def read(self, name: str) -> Any:
        """The record of this name, None where there is none."""
        return None if name not in self._files else read_record(self._files[name])

    def write(self, name: str, value: Any) -> None:
        """Keep a value for good."""
        self._files[name] = write_record(self.folder, name, value)

    def file(self, name: str) -> Path:
        """The file of a record that is there."""
        return self._files[name]

    def __contains__(self, name: str) -> bool:
        return name in self._files


class Part:
    """What one modifier keeps of a run, and finds again; without `progress` nothing.

    :param name: that its records begin with
    """

    def __init__(self, progress: Progress | None = None, name: str = ""):
        self._progress, self._name = progress, name

    @classmethod
    def begin(cls) -> "Part":
        """That of the modifier that begins now; they begin in the order of the recipe."""
        progress = _current.get()
        if progress is None:
            return cls()
        progress.parts += 1
        return cls(progress, str(progress.parts - 1))

    @property
    def kept(self) -> bool:
        """Whether anything is kept."""
        return self._progress is not None

    def same_run(self, about: Mapping[str, Any]) -> None:
        """See `Progress.same_run`."""
        if self._progress is not None:
            self._progress.same_run(f"{self._name}-run", about)

    def has(self, name: str) -> bool:
        """Whether there is such a record."""
        return self._progress is not None and f"{self._name}-{name}" in self._progress

    def read(self, name: str) -> Any:
        """The record of this name, None where there is none."""
        return None if self._progress is None else self._progress.read(f"{self._name}-{name}")

    def write(self, name: str, value: Any) -> None:
        """Keep a value for good."""
        if self._progress is not None:
            self._progress.write(f"{self._name}-{name}", value)

    def file(self, name: str) -> Path:
        """The file of a record that is there."""
        assert self._progress is not None
        return self._progress.file(f"{self._name}-{name}")


def _difference(was: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """(key, was, now) of the first difference between two JSON values."""
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        was, now = dict(enumerate(was)), dict(enumerate(now))
    if isinstance(was, dict) and isinstance(now, dict):
        for name in was | now:
            below = f"{key}.{name}" if key else name
            found = _difference(was.get(name), now.get(name), below)
            if found is not None:
                return found
        return None
    return None if was == now else (key, was, now)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
