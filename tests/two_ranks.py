"""Work done by several real processes of torch.distributed, on the CPU."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["together"]


def together(work: Callable[[int], Any], ranks: int = 2) -> list[Any]:
    """What `work(rank)` gives in each of so many processes: an error, too; None if killed.

    They are forked, so that they need not import anything again.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_one, args=(work, Path(folder), rank, ranks))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        files = [Path(folder) / str(rank) for rank in range(ranks)]
        return [torch.load(f, weights_only=False) if f.exists() else None for f in files]


def _one(work: Callable[[int], Any], folder: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)  # others do not survive a fork
    address = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    try:
        found = work(rank)
    except Exception as error:
        traceback.print_exc()
        found = error
    torch.save(found, folder / str(rank))
