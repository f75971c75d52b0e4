"""What stored things weigh, for tests of the method: two bytes a weight, and easy numbers."""

from torch import Tensor

__all__ = ["Weigh"]


class Weigh:
    def row(self, kept: Tensor, in_features: int) -> Tensor:
        return 2 * kept + in_features // 8

    def fixed(
        self,
        out_features: int,
        in_features: int,
        experts: int,
        clusters: int = 0,
        parents: int = 0,
        biased: bool = False,
    ) -> int:
        clusters = clusters or experts
        biases = clusters * out_features if biased else 0
        return experts * out_features + (clusters + parents) * in_features + biases

    def read(
        self,
        out_features: int,
        in_features: int,
        experts: int,
        clusters: int,
        parents: int = 0,
        biased: bool = False,
    ) -> int:
        return out_features * (1 + biased) + (clusters + parents) * in_features

    def dense(self, out_features: int, in_features: int) -> int:
        return 2 * out_features * in_features
