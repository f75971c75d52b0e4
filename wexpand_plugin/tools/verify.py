"""Every check that any reader of a checkpoint makes, all at once: `wexpand verify`.

Readers stop at the first problem; this lists them all, and compares checksums, which loaders leave
to it (unless WEXPAND_VERIFY=1 asks them). The checks themselves are those of the readers, so what
verifies, loads.
"""

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from ..errors import WexpandError
from ..format.model_dir import ModelDir
from ..format.problems import problems

__all__ = ["verify"]


def verify(directory: str | Path, *, quiet: bool = True) -> list[str]:
    """Every problem of a checkpoint, one sentence each; empty for a sound one.

    Config and its digest, index, every tensor's presence, shape, dtype, checksum and content, and
    the fit with the model class that config.json names. Where transformers is not installed, that
    last check is skipped, and a warning is logged.
    """
    return [str(problem) for problem in _problems(ModelDir(directory), quiet)]


def _problems(model: ModelDir, quiet: bool) -> Iterator[WexpandError]:
    try:
        count = len(model.config.linears) + len(model.others())
    except WexpandError as error:
        yield error
        return
    with tqdm(total=count, unit="", disable=quiet, desc="verify") as bar:
        yield from problems(model, lambda name: bar.update())
    if not find_spec("transformers"):
        logging.getLogger(__name__).warning(
            "%s: not checked: whether it fits its model class, as transformers is not installed",
            model.path,
        )
        return
    from ..hf.names import check_fit

    try:
        check_fit(model)
    except WexpandError as error:
        yield error
