"""Who reads which tensor: input groups, and the inputs that they read.

Linears that are called with the same tensor (q/k/v, gate/up) form an input group. Both groups and
inputs are found by forward hooks of torch while somebody runs the model, or a part of it: a
`forward` here is a function without arguments that runs one batch. Where only some linears are
wanted, a forward ends as soon as the last of them has been reached.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import WexpandError
from . import ranks

__all__ = [
    "InputGroup",
    "Reached",
    "Readers",
    "agreed",
    "find_groups",
    "record_inputs",
    "same_tensor",
    "token_rows",
]

Forward = Callable[[], object]


@dataclass(frozen=True)
class InputGroup:
    """The linears that read the same tensor, in the order they are called."""

    names: tuple[str, ...]
    linears: tuple[nn.Linear, ...]

    @property
    def label(self) -> str:
        """Short name for logs, like "model.layers.0.mlp: gate_proj + up_proj"."""
        parents = {name.rpartition(".")[0] for name in self.names}
        if len(parents) > 1:
            return " + ".join(self.names)
        return f"{parents.pop()}: {' + '.join(n.rpartition('.')[2] for n in self.names)}"


class Reached(Exception):
    """Ends a forward early: what it was run for has been seen."""


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors that are both alive are the same values in the same memory."""
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )


@dataclass
class Readers:
    """Says, call by call, which linear was the first to read the tensor of a call.

    The last tensor of each first reader is held, so that its memory cannot have been given to
    another tensor by the time it is compared.
    """

    last: dict[nn.Module, Tensor] = field(default_factory=dict)

    def first(self, module: nn.Module, x: Tensor) -> nn.Module:
        """The linear that read `x` first: another one whose last input is `x`, or `module`, which
        stays a first reader from then on."""
        if module not in self.last:
            for other, read in self.last.items():
                if same_tensor(x, read):
                    return other
        self.last[module] = x
        return module


def find_groups(linears: Mapping[str, nn.Linear], forwards: Iterable[Forward]) -> list[InputGroup]:
    """The input groups among `linears` (name -> module), in calling order.

    Runs as many of `forwards` as it takes to see every linear. One that none of them reaches (an
    expert of a mixture that gets no token) is left out.

    :raises WexpandError: a linear is called more than once in a forward
    """
    names = {module: name for name, module in linears.items()}
    found: dict[nn.Module, list[nn.Linear]] = {}
    forwards = iter(forwards)
    while missing := names.keys() - {m for group in found.values() for m in group}:
        forward = next(forwards, None)
        if forward is None:
            break
        readers, seen = Readers(), set[nn.Module]()
        fresh: dict[nn.Module, list[nn.Linear]] = {}

        def note(module: nn.Linear, args: tuple, readers=readers, seen=seen, fresh=fresh) -> None:
            if module in seen:
                raise WexpandError(
                    f"{names[module]}: called more than once in a forward; add it to `ignore`"
                )
            seen.add(module)
            fresh.setdefault(readers.first(module, args[0]), []).append(module)

        with _hooks(missing, note):
            forward()
        found |= fresh
    return [InputGroup(tuple(names[m] for m in g), tuple(g)) for g in found.values()]


def agreed(groups: list[InputGroup]) -> list[InputGroup]:
    """`groups`, which all ranks have found: they are solved together.

    :raises WexpandError: some ranks have found others
    """
    first, *others = ranks.gathered({name for group in groups for name in group.names})
    for other in others:
        if apart := first ^ other:
            raise WexpandError(
                f"{min(apart)}: is reached by the calibration tokens of some processes only; use "
                "more tokens, or leave it out with ignore"
            )
    return groups


def record_inputs(
    modules: Sequence[nn.Module], forwards: Iterable[Forward]
) -> Iterator[dict[nn.Module, Tensor]]:
    """What reaches each of `modules` in each of `forwards`: inputs [..., in] as they are.

    A module that a forward does not reach is missing from its dict. Each forward ends when the
    last of the modules has been reached.
    """
    seen: dict[nn.Module, Tensor] = {}

    def take(module: nn.Module, args: tuple) -> None:
        seen[module] = args[0].detach()
        if len(seen) == len(modules):
            raise Reached

    for forward in forwards:
        # hooked only while a forward runs: whoever asks for inputs may run the model in between
        with _hooks(modules, take):
            try:
                forward()
            except Reached:
                pass
        yield dict(seen)
        seen.clear()


def token_rows(x: Tensor, counts: Tensor | None) -> Tensor:
    """[..., in] -> [tokens, in], without the tokens that do not count (padding, for example).

    :param counts: booleans [...], one for each token of the batch; None: all count
    :raises WexpandError: `x` holds other tokens than `counts` speaks of
    """
    rows = x.reshape(-1, x.shape[-1])
    if counts is None or bool(counts.all()):
        return rows
    if counts.numel() != len(rows):
        raise WexpandError(
            f"inputs {list(x.shape)}: not one row for each token of the batch "
            f"{list(counts.shape)}, so padding cannot be told; use rows without padding"
        )
    return rows[counts.flatten().to(rows.device)]


@contextmanager
def _hooks(modules: Iterable[nn.Module], hook: Callable[[Any, Any], None]) -> Iterator[None]:
    """`hook(module, args)` before each forward of `modules`."""
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
