"""Mask structures: which weights of a linear may be pruned together."""

import re
from dataclasses import dataclass

from ..errors import WexpandError

__all__ = ["MaskStructure"]


@dataclass(frozen=True)
class MaskStructure:
    """Which weights may be pruned together.

    `unstructured`: one threshold per column block over all rows of a linear, as upstream;
    `row`: every row keeps the same number of weights, wherever they are worth most;
    `n:m`: n of every m consecutive columns are pruned (2:4 keeps 2 of 4).
    """

    kind: str
    n: int = 0
    m: int = 0

    @classmethod
    def parse(cls, value: str | int) -> "MaskStructure":
        """From a recipe value: "unstructured" (or "0:0", as in llm-compressor), "row", or "N:M".

        YAML reads an unquoted 2:4 as the base-60 integer 124, so integers are read back as
        minutes:seconds.
        """
        text = f"{value // 60}:{value % 60}" if isinstance(value, int) else str(value).strip()
        if text in ("unstructured", "0:0"):
            return cls("unstructured")
        if text == "row":
            return cls("row")
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if not found or not 0 < int(found[1]) < int(found[2]):
            raise WexpandError(
                f'mask_structure: {value!r} should be "unstructured", "row" or '
                '"N:M" with 0 < N < M, for example "2:4"'
            )
        return cls("n:m", int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.kind == "n:m" else self.kind
