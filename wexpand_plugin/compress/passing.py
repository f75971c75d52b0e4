"""The statistics of a block's inputs, taken while the pipeline calibrates it.

Most of the method has to see inputs more than once: a router must be fitted before its clusters can
be counted, so a block is replayed (`replay`). One expert of one cluster needs their sum of squares
alone, of all linears of the block before any is pruned, as in llm-compressor's SparseGPT. The
pipeline's own run of the block is enough for that, and no pass is added to it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..errors import WexpandError
from ..method.inputs import InputGroup, Readers, token_rows
from ..method.statistics import GroupStatistics
from .calibration import Known

__all__ = ["PassingStatistics"]


class PassingStatistics:
    """Input groups of a block and their statistics, from the batches that pass through it.

    :param linears: name -> module, all of this block
    :param register_hook: of the modifier: its hooks rest while the pipeline propagates
    :param current: says what is known of the batch that runs now (`calibration`)
    """

    def __init__(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        register_hook: Callable[..., Any],
        current: Callable[[], Known],
        seed: int,
    ):
        self._names = {linear: name for name, linear in linears.items()}
        self._current, self._seed = current, seed
        self._readers, self._seen = Readers(), set[nn.Module]()
        self._members: dict[nn.Module, list[nn.Linear]] = {}
        self._found: dict[nn.Module, GroupStatistics] = {}
        self._hooks = [register_hook(block, self._begin, "forward_pre")]
        for linear in linears.values():
            self._hooks.append(register_hook(linear, self._take, "forward_pre"))

    def _begin(self, _block: nn.Module, _args: tuple) -> None:
        self._seen.clear()

    def _take(self, linear: nn.Linear, args: tuple) -> None:
        if linear in self._seen:
            raise WexpandError(
                f"{self._names[linear]}: called more than once in a forward; add it to `ignore`"
            )
        self._seen.add(linear)
        first = self._readers.first(linear, args[0])
        if not any(linear in members for members in self._members.values()):
            self._members.setdefault(first, []).append(linear)
        if linear not in self._members:
            return  # the one that reads this tensor before it counts
        if linear not in self._found:
            weight = linear.weight
            self._found[linear] = GroupStatistics(
                weight.shape[1], None, seed=self._seed, device=weight.device
            )
        known = self._current()
        rows = token_rows(args[0].detach(), known.counts)
        try:
            self._found[linear].add(rows, known.identity)
        except WexpandError as error:
            raise WexpandError(f"{self._names[linear]}: {error}") from None

    def recorded(self) -> None:
        """All batches have passed: hooks, which would keep the dense linears alive, go."""
        while self._hooks:
            self._hooks.pop().remove()
        self._readers = Readers()

    def groups(self) -> list[InputGroup]:
        """The input groups that were reached, in calling order."""
        return [
            InputGroup(tuple(self._names[m] for m in members), tuple(members))
            for members in self._members.values()
        ]

    def take(self, group: InputGroup) -> GroupStatistics:
        """The statistics of a group, once: they are let go of here."""
        found = self._found.pop(group.linears[0])
        found.flush()
        return found
