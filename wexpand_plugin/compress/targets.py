"""Which linears a recipe means."""

from compressed_tensors.utils import match_named_modules
from torch import nn

from ..errors import WexpandError

__all__ = ["HEADS", "target_linears"]

HEADS = ("re:.*lm_head", "re:.*embed_out")
"""Language model heads: their neurons are the words of the vocabulary."""


def target_linears(
    model: nn.Module, targets: str | list[str], ignore: str | list[str]
) -> dict[str, nn.Linear]:
    """The linears that `targets` name, themselves or by a module that contains them.

    A target that matches nothing is logged; a typo should be seen although others match.

    :param targets: names, `re:` patterns or class names
    :param ignore: the same, for linears or modules that contain them, to leave out
    :raises WexpandError: there are none
    """
    targets, ignore = ([v] if isinstance(v, str) else v for v in (targets, ignore))
    ignored = {name for name, _ in match_named_modules(model, ignore)}
    found: dict[str, nn.Linear] = {}
    for name, module in match_named_modules(model, targets, ignore, warn_on_fail=True):
        for inner, child in module.named_modules():
            full = f"{name}.{inner}" if inner else name
            out = any(full == i or full.startswith(f"{i}.") for i in ignored)
            if isinstance(child, nn.Linear) and not out:
                found[full] = child
    if not found:
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        example = f"; it has {len(linears)}, for example {linears[0]}" if linears else ""
        raise WexpandError(
            f"targets: {targets} (ignore: {ignore}) match no torch.nn.Linear of "
            f"{type(model).__name__}{example}"
        )
    return found
