"""Which linears a recipe means."""

import re
from collections.abc import Mapping

from compressed_tensors.utils import match_named_modules
from loguru import logger
from torch import nn

from ..errors import WexpandError
from ..hf.linear import replaceable
from .expansion import Block, Target

__all__ = ["HEADS", "find_targets", "target_linears"]

HEADS = ("re:.*lm_head", "re:.*embed_out")
"""Language model heads: their neurons are the words of the vocabulary."""


def target_linears(
    model: nn.Module, targets: str | list[str], ignore: str | list[str]
) -> dict[str, nn.Linear]:
    """The linears that `targets` name, themselves or by a module that contains them, but for those
    of one output: gates, which vLLM keeps dense.

    A target that matches nothing is logged; a typo should be seen although others match.

    :param targets: names, `re:` patterns or class names
    :param ignore: the same, for linears or modules that contain them, to leave out
    :raises WexpandError: there are none, or a pattern is no regular expression
    """
    targets, ignore = ([v] if isinstance(v, str) else v for v in (targets, ignore))
    for key, patterns in (("targets", targets), ("ignore", ignore)):
        for pattern in patterns:
            _refuse_pattern(key, pattern)
    ignored = {name for name, _ in match_named_modules(model, ignore)}
    found: dict[str, nn.Linear] = {}
    for name, module in match_named_modules(model, targets, ignore, warn_on_fail=True):
        for inner, child in module.named_modules():
            full = f"{name}.{inner}" if inner else name
            out = any(full == i or full.startswith(f"{i}.") for i in ignored)
            if replaceable(child) and child.out_features > 1 and not out:
                found[full] = child
    if not found:
        others = [n for n, m in model.named_modules() if type(m).__name__ == "Conv1D"]
        if others:
            raise WexpandError(
                f"{others[0]}: is a Conv1D of transformers, as all linears of the blocks of "
                f"{type(model).__name__}, which is not supported; torch.nn.Linear is"
            )
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        example = f"; it has {len(linears)}, for example {linears[0]}" if linears else ""
        raise WexpandError(
            f"targets: {targets} (ignore: {ignore}) match no torch.nn.Linear of "
            f"{type(model).__name__}{example}"
        )
    return found


def _refuse_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
    except re.error as error:
        raise WexpandError(
            f"{key}: {pattern!r} should be a regular expression after re: ({error})"
        ) from None


def find_targets(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    targets: str | list[str],
    ignore: str | list[str],
) -> tuple[dict[str, Block], dict[str, Target]]:
    """The blocks that hold targets, and the targets in them, by name; others stay dense.

    :param blocks: all blocks of the model, in its order
    :raises WexpandError: there are none
    """
    names, held, found = list(blocks), dict[str, Block](), dict[str, Target]()
    for name, linear in target_linears(model, targets, ignore).items():
        owner = next((b for b in names if name == b or name.startswith(f"{b}.")), None)
        if owner is None:
            logger.warning(f"{name} is in none of the blocks {names[:2]}...: it stays dense")
            continue
        place = names.index(owner)
        held[owner] = Block(owner, blocks[owner], place)
        found[name] = Target(linear, owner, depth_weight=1 - place / len(names))
    if not found:
        raise WexpandError(f"targets: {targets} match linears outside the blocks only")
    return held, found
