"""The one exception a user of this package is meant to read.

Its message names the thing, its value and what would be right. The command line prints it as one
sentence; everything else that escapes is a defect of ours and keeps its traceback.
"""

__all__ = ["WexpandError", "reason"]


class WexpandError(ValueError):
    """An input that cannot be used: a recipe value, a model, a calibration set or a checkpoint.

    :param problem: one sentence; where it is about a tensor, it begins with the tensor's name
    :param tensor: that name in full, for those who know in which file it lies
    """

    def __init__(self, problem: str, tensor: str | None = None):
        super().__init__(problem)
        self.tensor = tensor


def reason(error: Exception) -> str:
    """Another library's error on one line, to stand in one of our sentences."""
    return " ".join(str(error).split())[:300] or type(error).__name__
