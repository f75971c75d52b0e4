"""Compiling the CPU kernel: once per machine, user, compiler and source, by the system's compiler.

A wheel would have to carry one binary per instruction set; `-march=native` gives the one that fits,
in a few seconds. The library goes to `$XDG_CACHE_HOME/wexpand` (or `~/.cache/wexpand`), a folder
that only its owner may enter, under a name that holds a hash of all that could change the machine
code: source and headers, compiler, flags, and the CPU's own list of features (a home directory may
be shared between machines). Processes that start together each compile to a name of their own and
rename: whoever comes last replaces a library by an equal one.
"""

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

from ..format.writer import atomic

__all__ = ["DEFAULT_FLAGS", "BuildError", "build"]

DEFAULT_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


class BuildError(RuntimeError):
    """Why there is no compiled kernel: no compiler, a failed build, or an unsafe cache folder."""


def build(source: Path, flags: tuple[str, ...] = DEFAULT_FLAGS) -> Path:
    """The shared library made from the C++ file `source`, compiled now unless cached.

    Its own headers lie beside it and are named after it: `cpu.cpp` may include `cpu_*.h`.
    Raises BuildError with one sentence.
    """
    compiler = _compiler()
    version = _run([*compiler, "--version"], "does not answer --version")
    headers = sorted(source.parent.glob(f"{source.stem}_*.h"))
    texts = [path.read_text() for path in (source, *headers)]
    key = hashlib.sha256()
    call = shlex.join([*compiler, *flags])
    for part in (*texts, version, call, platform.machine(), _cpu_features()):
        data = part.encode()
        key.update(len(data).to_bytes(8, "little") + data)
    folder = _cache_folder()
    library = folder / f"{source.stem}-{key.hexdigest()[:24]}.so"
    if library.exists():
        if library.stat().st_uid != os.getuid():
            raise BuildError(f"{library} belongs to another user; remove it")
        return library
    with atomic(library) as partial:
        command = [*compiler, *flags, str(source), "-o", str(partial)]
        _run(command, f"could not compile {source.name}")
    return library


def _compiler() -> list[str]:
    """The words that call the C++ compiler: $CXX (options allowed) or the first on PATH."""
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    for words in candidates:
        if words and shutil.which(words[0]):
            return words
    wanted = ", ".join(shlex.join(words) for words in candidates)
    raise BuildError(f"no C++ compiler: {wanted} not found on PATH")


def _run(command: list[str], problem: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=300
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} {problem}: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{command[0]} {problem}: {first.strip()}")
    return done.stdout


def _cpu_features() -> str:
    """What `-march=native` looks at, as far as the system tells: Linux has /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    keys = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].strip() in keys}))


def _cache_folder() -> Path:
    """The cache folder, made if needed. Code is loaded from it: nobody else may write there."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "wexpand"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o077:
            folder.chmod(0o700)
    except (OSError, RuntimeError) as error:
        raise BuildError(f"the cache folder {folder} cannot be used: {error}") from error
    if found.st_uid != os.getuid():
        raise BuildError(
            f"the cache folder {folder} belongs to another user; set XDG_CACHE_HOME to your own"
        )
    return folder
