"""What stored things weigh, for tests of the method: two bytes a weight, and easy numbers."""

from torch import Tensor

__all__ = ["Weigh"]


class Weigh:
    def row(self, kept: Tensor, in_features: int) -> Tensor:
        return 2 * kept + in_features // 8

    def fixed(self, out_features: int, in_features: int, experts: int) -> int:
        return experts * (out_features + in_features)

    def dense(self, out_features: int, in_features: int) -> int:
        return 2 * out_features * in_features
