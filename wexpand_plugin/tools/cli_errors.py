"""What the command line says of an error: one sentence for the user's, a traceback for ours."""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import WexpandError, reason

__all__ = ["ErrorGroup", "sentence"]

_EXTRAS = {
    "llmcompressor": "compress",
    "transformers": "compress",
    "huggingface_hub": "compress",
    "tokenizers": "compress",
    "sklearn": "compress",
    "datasets": "report",
    "jinja2": "report",
    "matplotlib": "report",
    "lm_eval": "eval",
}


class ErrorGroup(TyperGroup):
    """Turns the errors that users are meant to read into one sentence and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            text = sentence(error)
            if text is None or ctx.params.get("debug"):
                raise
            typer.echo(f"wexpand: {text}", err=True)
            ctx.exit(1)


def sentence(error: Exception) -> str | None:
    """What to tell the user, or None for a defect of ours."""
    if isinstance(error, WexpandError):
        return " ".join(str(error).split())
    if (problem := _machine(error)) is not None:
        return problem
    # not imported unless something used it
    pydantic = sys.modules.get("pydantic")
    if pydantic is not None and isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        key = ".".join(str(part) for part in (error.title, *first["loc"]))
        return f"{key}: {first.get('input')!r}: {first['msg'].removeprefix('Value error, ')}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    safetensors = sys.modules.get("safetensors")
    if safetensors is not None and isinstance(error, safetensors.SafetensorError):
        return f"safetensors: {reason(error)}"  # a full disk, for one
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        extra = _EXTRAS[error.name]
        how = f"in a clone of wexpand-plugin: pip install -e '.[{extra}]'"
        return f"{error.name} is not installed; {how}"
    return None


def _machine(error: Exception) -> str | None:
    """What to tell of memory that ran out, or of a device that failed."""
    torch = sys.modules.get("torch")
    ended = () if torch is None else (torch.OutOfMemoryError, torch.AcceleratorError)
    if isinstance(error, ended[1:]):
        return f"the device failed ({reason(error)}); see that it works, and run this again"
    allocator = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if allocator or isinstance(error, (MemoryError, *ended)):
        return (
            f"out of memory ({reason(error)}); lower --batch-size, --max-seq-length or --samples, "
            "max_bytes or num_experts of the recipe, or end other programs"
        )
    return None
