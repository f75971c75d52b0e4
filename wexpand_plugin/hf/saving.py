"""Saving a model that has routed linears, all or nothing.

`save_pretrained` of transformers, or of llm-compressor around it, writes the tensors and a
config.json. Ours lets it write into a partial directory, adds what makes that a checkpoint (sizes,
checksums, digest), and only then puts the files in place, config.json last: whatever interrupts a
save, no directory is left that looks like a complete model but is not one.
"""

import os
import re
import shutil
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import WexpandError
from ..format import checkpoint
from ..format.checkpoint import LinearEntry
from ..format.router import narrowest
from .linear import RoutedLinear

__all__ = ["partial_directory", "wrap_save_pretrained"]


def wrap_save_pretrained(model: Any, made_by: Mapping[str, Any]) -> None:
    """Make `model.save_pretrained` write checkpoints of ours.

    Wrap again after another library has wrapped it: the outermost call must be ours. A second call
    only replaces `made_by`. A model without a RoutedLinear saves as before.

    :param made_by: versions and settings for config.json; anything JSON can hold
    """
    model._wexpand_made_by = dict(made_by)
    inner = model.save_pretrained
    function = getattr(inner, "__func__", inner)
    # compared with itself, as wrappers copy the attributes of what they wrap
    if getattr(function, "_wexpand", None) is function:
        return

    def save(self, *args, **kwargs):
        # not bound to `model`, so that a deep copy of it saves itself
        return inner(*args, **kwargs) if function is inner else function(self, *args, **kwargs)

    @wraps(inner)
    def save_pretrained(self, save_directory, *args, **kwargs):
        if not any(isinstance(module, RoutedLinear) for module in self.modules()):
            return save(self, save_directory, *args, **kwargs)
        if kwargs.get("push_to_hub"):
            raise WexpandError(
                "save_pretrained: push_to_hub=True would upload the model before it is complete; "
                "save it to a directory and upload that, or call model.push_to_hub(...)"
            )
        if not kwargs.get("is_main_process", True):
            return save(self, save_directory, *args, **kwargs)
        _separate_routers(self)
        with partial_directory(save_directory) as partial:
            result = save(self, str(partial), *args, **kwargs)
            entries = linear_entries(self, checkpoint.tensor_files(partial))
            checkpoint.finalize(partial, entries, self._wexpand_made_by)
        return result

    save_pretrained._wexpand = save_pretrained  # type: ignore[attr-defined]
    # a bound method, as llm-compressor expects to find when it wraps in its turn
    model.save_pretrained = types.MethodType(save_pretrained, model)


def linear_entries(model: Any, tensors: Mapping[str, Any]) -> dict[str, LinearEntry]:
    """The sizes of each RoutedLinear of `model`, by the name it has in the saved `tensors`.

    A module's attribute `tokens` (tokens per expert) is recorded where there is one.
    """
    routed = {n: m for n, m in model.named_modules() if isinstance(m, RoutedLinear)}
    saved = {name: name for name in routed}
    if not all(f"{name}.weight_mask" in tensors for name in routed):
        from .names import module_tensor_names

        masks = [name for name in tensors if name.endswith(".weight_mask")]
        saved = {
            module.removesuffix(".weight_mask"): name.removesuffix(".weight_mask")
            for name, module in module_tensor_names(model, masks).items()
        }
    entries = {}
    for name, module in routed.items():
        if name not in saved:
            raise WexpandError(f"{name}: its tensors are not among those that were saved")
        tokens = [int(count) for count in getattr(module, "tokens", None) or ()]
        entries[saved[name]] = LinearEntry.of(module.pool, module.bias is not None, tokens)
    return entries


def _separate_routers(model: nn.Module) -> None:
    """Give each RoutedLinear its own router tensors, in the dtypes that a checkpoint should have.

    Those that are offloaded to disk stay in float32, in which they were loaded: right, if larger.
    transformers refuses to save tensors that modules share, and `model.to(dtype)` casts routers.
    """
    seen = set()
    for module in model.modules():
        if not isinstance(module, RoutedLinear) or module.experts == 1:
            continue
        for kind, stored in (("router_weight", narrowest), ("router_bias", torch.Tensor.float)):
            tensor = getattr(module, kind).data
            if tensor.device.type == "meta":  # its values are on disk
                continue
            own = stored(tensor)
            if own.data_ptr() in seen:
                own = own.clone()
            seen.add(own.data_ptr())
            if own is not tensor:
                delattr(module, kind)  # an offloaded one would only be overwritten, dtype and all
                setattr(module, kind, nn.Parameter(own, requires_grad=False))


@contextmanager
def partial_directory(target: str | Path) -> Iterator[Path]:
    """An empty directory whose files become `target`'s when the block ends without an error.

    A new `target` appears by one rename. In an existing one, the old config.json goes first and the
    new one comes last, model weights that the new files do not replace are removed, and all other
    files stay. On an error the partial directory is removed and `target` is as it was.
    """
    target = Path(target).resolve()
    if target.exists():
        if not target.is_dir():
            raise WexpandError(f"{target}: is a file; a model is saved to a directory")
        foreign = [f.name for f in target.glob("*.safetensors") if not _model_weights(f.name)]
        if foreign:
            raise WexpandError(
                f"{target}: holds {foreign[0]}, which would be read as a part of the model; save "
                "to another directory"
            )
        # inside, as the directory may be the only writable one of its file system
        partial = target / f".partial-{os.getpid()}"
    else:
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            _move_into(partial, target)
        else:
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _model_weights(name: str) -> bool:
    """Whether transformers reads a file of this name as the model's weights, or their index."""
    return bool(re.fullmatch(r"model(-\d+-of-\d+)?(\..+)?\.safetensors(\.index\.json)?", name))


def _move_into(partial: Path, target: Path) -> None:
    files = sorted(
        (file.relative_to(partial) for file in partial.rglob("*") if not file.is_dir()),
        key=lambda file: str(file) == "config.json",
    )
    (target / "config.json").unlink(missing_ok=True)
    for old in target.iterdir():
        if old.is_file() and _model_weights(old.name) and Path(old.name) not in files:
            old.unlink()
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / file, target / file)
