"""Commands as steps of a longer job: logged, limited in time, and gone when they are over."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["ROOT", "StepFailed", "failure", "free_port", "process", "run_step"]

ROOT = Path(__file__).resolve().parents[1]


class StepFailed(Exception):
    """A step of the demo did not succeed; the message says which, why, and where its log is."""


def failure(name: str, reason: str, log: Path) -> StepFailed:
    """The error for step `name`, with the end of its log."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    tail = "\n".join(f"    {line}" for line in lines[-25:])
    return StepFailed(f"{tail}\nstep {name} {reason}; the whole log is {log}")


@contextmanager
def process(
    command: Sequence[str], log: Path, settings: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """A running command in a process group of its own; whatever comes, it ends with the block."""
    with log.open("w") as output:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | dict(settings or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield child
        finally:
            end_group(child)


def end_group(child: subprocess.Popen, patience: float = 30) -> None:
    """Ask the leader to end, and then make sure that nothing of its group is left."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def run_step(
    name: str,
    command: Sequence[str],
    log: Path,
    limit: float,
    settings: Mapping[str, str] | None = None,
) -> None:
    """Run one command for at most `limit` seconds. Raises StepFailed with the end of its log."""
    with process(command, log, settings) as child:
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            raise failure(name, f"was not done after {limit:.0f} s", log) from None
    if code != 0:
        raise failure(name, f"failed with exit code {code}", log)


def free_port() -> int:
    """A local TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
