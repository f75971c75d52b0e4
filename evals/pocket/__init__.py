"""The embedded default: a small Llama of the project's own, and the text it was trained on."""

from pathlib import Path

__all__ = ["MODEL"]

MODEL = Path(__file__).parent / "model"
