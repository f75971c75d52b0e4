"""Whether the files of a dense model hold all that its class needs, known before it is loaded.

transformers gives random values to what is missing and says so in a report that is easily
overlooked; a model compressed from it would be silently bad.
"""

from pathlib import Path
from typing import Any

from ..errors import WexpandError

__all__ = ["refuse_incomplete"]


def refuse_incomplete(model: str | Path) -> None:
    """Compare a model's files with the causal LM that transformers would load, without memory.

    :param model: directory or hub id, whose weights are downloaded
    :raises WexpandError: a tensor that is missing, or is of another shape than config.json says
    """
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", device_map="meta", trust_remote_code=False,
        output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    kind, about = type(found[0]).__name__, found[1]
    for name, shape, right in sorted(about["mismatched_keys"]):
        raise WexpandError(
            f"model: {str(model)!r}: {name}: shape {list(shape)} should be {list(right)}, as "
            f"{kind} has it by config.json"
        )
    for name in sorted(about["missing_keys"]):
        raise WexpandError(
            f"model: {str(model)!r}: {name} is missing from its files; {kind} has it by config.json"
        )
