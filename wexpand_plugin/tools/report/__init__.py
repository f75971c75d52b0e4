"""The HTML page about a compressed model: what it weighs, where the bytes went, what they bought.

`data` reads a checkpoint's sizes and row maps, `measure` runs the dense model for the distributions
and errors of neurons, `plots` draws, `html` puts the page together. `write` is all a caller needs.
"""

from .html import write

__all__ = ["write"]
