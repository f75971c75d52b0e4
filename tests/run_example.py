"""Runs a script of `examples/` with other constants at its top."""

import re
import subprocess
import sys
from pathlib import Path

__all__ = ["run"]


def run(source: Path, folder: Path, **constants) -> str:
    """Run an example in `folder` with other constants; returns what it printed."""
    text = source.read_text()
    for name, value in constants.items():
        text, found = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", text, flags=re.MULTILINE)
        assert found == 1, name
    script = folder / source.name
    script.write_text(text)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"[-9000:]
    return done.stdout
