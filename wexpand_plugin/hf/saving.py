"""Saving a model that has routed linears: whole or not at all.

`save_pretrained` of transformers, or of llm-compressor around it, writes the tensors and a
config.json. Ours lets it write into a partial directory, adds what makes that a checkpoint (input
groups, checksums, digest) and the model card, reads all of it back, and only then puts the files in
place, config.json last.
"""

import types
from collections.abc import Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import WexpandError
from ..format.config import GroupEntry
from ..format.directories import partial_directory
from ..format.model_dir import ModelDir
from ..format.problems import problems
from ..format.router import narrowest
from ..format.writer import seal
from .card import write_card
from .linear import WIDENED, RoutedLinear
from .names import check_fit, module_tensor_names

__all__ = ["add_made_by", "wrap_save_pretrained"]


def add_made_by(model: Any, **more: Any) -> None:
    """Record `more` of how a model was made, if it is one whose `save_pretrained` is wrapped."""
    if hasattr(model, "_wexpand_made_by"):
        model._wexpand_made_by |= more


def wrap_save_pretrained(
    model: Any, made_by: Mapping[str, Any], *, writes: bool = True
) -> None:
    """Make `model.save_pretrained` write checkpoints of ours.

    Wrap again after another library has wrapped it: the outermost call must be ours. A second call
    only replaces `made_by`. A model without a RoutedLinear saves as before.

    :param made_by: versions and settings for config.json; anything JSON can hold
    :param writes: whether this process does; where several have one model, all of them call it, as
        llm-compressor's own takes all of them, and the first writes
    """
    model._wexpand_made_by, model._wexpand_writes = dict(made_by), writes
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
        _restore_tensors(self)
        if not self._wexpand_writes:
            return save(self, save_directory, *args, **kwargs)
        with partial_directory(save_directory) as partial:
            result = save(self, str(partial), *args, **kwargs)
            names = ModelDir(partial, partial.glob("*.safetensors")).headers
            seal(partial, group_entries(self, names), self._wexpand_made_by)
            made_by = self._wexpand_made_by
            loaded = getattr(self, "name_or_path", "")
            sources = [str(name) for name in (loaded, made_by.get("model")) if name]
            write_card(partial, save_directory, made_by, sources)
            _read_back(self, partial, save_directory)
        return result

    save_pretrained._wexpand = save_pretrained  # type: ignore[attr-defined]
    # a bound method, as llm-compressor expects to find when it wraps in its turn
    model.save_pretrained = types.MethodType(save_pretrained, model)


def _read_back(model: Any, written: Path, target: str | Path) -> None:
    """Refuse to call `target` done if `wexpand verify` would find a problem in what was written."""
    import transformers

    directory = ModelDir(written)
    try:
        for problem in problems(directory):
            raise problem
        # what a class that transformers does not have looks like, only its own code knows
        if getattr(transformers, type(model).__name__, None) is type(model):
            check_fit(directory)
    except WexpandError as error:
        raise WexpandError(
            f"{target}: not saved, as it could not be loaded again: {error}", error.tensor
        ) from None


def group_entries(model: Any, tensors: Iterable[str]) -> list[GroupEntry]:
    """The input groups of `model`'s routed linears, by the names they have in saved `tensors`."""
    names = set(tensors)
    routed = {n: m for n, m in model.named_modules() if isinstance(m, RoutedLinear)}
    saved = {name: name for name in routed}
    if not all(f"{name}.weight" in names for name in routed):
        weights = [name for name in names if name.endswith(".weight")]
        saved = {
            module.removesuffix(".weight"): name.removesuffix(".weight")
            for name, module in module_tensor_names(model, weights).items()
        }
    groups: dict[str, list[str]] = {}
    for name, module in routed.items():
        if name not in saved:
            raise WexpandError(f"{name}: its tensors are not among those that were saved")
        groups.setdefault(module.group or name, []).append(name)
    entries = []
    for members in groups.values():
        linears = {saved[name]: routed[name].stored.entry(routed[name].dtype) for name in members}
        entries.append(GroupEntry.of(linears, routed[members[0]].tokens))
    return entries


def _restore_tensors(model: nn.Module) -> None:
    """Give each RoutedLinear its own router tensors and scales, in the dtypes of a checkpoint.

    Those that are offloaded to disk stay in float32, in which they were loaded: right, if larger.
    transformers refuses to save tensors that modules share, and `model.to(dtype)` casts them.
    """
    stored = {
        "router_weight": narrowest,
        "router_bias": torch.Tensor.float,
        "weight_scale": torch.Tensor.half,
        "cluster_bias_scale": torch.Tensor.half,
    }
    assert set(stored) == set(WIDENED)
    seen = set()
    for module in model.modules():
        if not isinstance(module, RoutedLinear):
            continue
        for kind, narrow in stored.items():
            parameter = getattr(module, kind)
            if parameter is None or parameter.device.type == "meta":  # its values are on disk
                continue
            tensor = parameter.data
            own = narrow(tensor)
            if own.data_ptr() in seen:
                own = own.clone()
            seen.add(own.data_ptr())
            if own is not tensor:
                delattr(module, kind)  # an offloaded one would only be overwritten, dtype and all
                setattr(module, kind, nn.Parameter(own, requires_grad=False))
