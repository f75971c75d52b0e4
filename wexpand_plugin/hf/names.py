"""The transformers half: how a checkpoint of ours and a model of transformers fit together.

`AutoModelForCausalLM.from_pretrained` on a checkpoint of ours works once `register` was called,
which importing `wexpand_plugin` does; `hf_quantizer` is what transformers then calls. Here is what
it needs, and the checkpoint tools too: which tensor belongs to which module, replacing linears by
routed ones on a model without memory (the meta device), and comparing files with a model.

A checkpoint may name its tensors differently than the model names its modules (transformers keeps
a table of such renamings for older checkpoints); `module_tensor_names` follows that table.

Nothing of transformers is imported with this module: it may be imported while transformers is.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import WexpandError, reason
from ..format.config import CheckpointConfig
from ..format.model_dir import ModelDir
from .linear import RoutedLinear, replaceable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "check_fit",
    "check_headers",
    "empty_model",
    "install_linears",
    "linear_tensors",
    "merged_tensors",
    "missing_tensors",
    "module_tensor_names",
    "saved_names",
    "skeleton",
    "unserved",
]

REARRANGED = {"bloom", "falcon"}
"""model types whose fused qkv vLLM rearranges by rows"""


def module_tensor_names(model: "PreTrainedModel", names: Iterable[str]) -> dict[str, str]:
    """Tensor name in a checkpoint -> its name in `model`, for the tensors that the model takes as
    they are.

    Tensors that the model does not have, or would merge with others while loading, are left out.
    """
    return {name: target for name, target, merged in _renamed(model, names) if not merged}


def _renamed(model: "PreTrainedModel", names: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """(checkpoint name, name in the model, whether it is merged with others) of known tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    for name in names:
        for arguments in ((renamings, converters), ([], [])):
            target, merged = rename_source_key(name, *arguments, model.base_model_prefix, known)
            if target in known:
                yield name, target, merged is not None
                break


def install_linears(model: "PreTrainedModel", config: CheckpointConfig) -> None:
    """Replace each linear of ours in a model on the meta device by an empty RoutedLinear.

    Raises WexpandError for a name that is no linear of the model, or one of another size.
    """
    renamed = module_tensor_names(model, [f"{name}.weight" for name in config.linears])
    for group in config.groups:
        key = next(iter(group.linears))
        for name, entry in group.linears.items():
            target = renamed.get(f"{name}.weight", "").removesuffix(".weight")
            old = model.get_submodule(target) if target else None
            if not replaceable(old):
                found = f"a {type(old).__name__}" if old is not None else "nothing"
                raise WexpandError(
                    f"config.json: quantization_config.groups: {name} should be a linear of "
                    f"{type(model).__name__}, which has {found} by that name"
                )
            sizes = (old.in_features, old.out_features, old.bias is not None)
            if sizes != (entry.in_features, entry.out_features, entry.bias):
                raise WexpandError(
                    f"config.json: quantization_config.groups: {name}: in_features, out_features "
                    f"and bias {(entry.in_features, entry.out_features, entry.bias)} should be "
                    f"{sizes}, as in {type(model).__name__}"
                )
            new = RoutedLinear(entry, key, group.tokens, dtype=old.weight.dtype, device="meta")
            new.train(old.training)
            model.set_submodule(target, new)


def check_headers(model: "PreTrainedModel", directory: ModelDir) -> None:
    """Compare the headers of a directory's tensors with those of `model`; raises WexpandError.

    Shapes must be equal. A tensor that only the model has would start with random values: that is
    refused for the class that config.json names, others may add a head of their own.
    """
    headers = directory.headers
    names, known = module_tensor_names(model, headers), model.state_dict()
    for name, target in names.items():
        right = tuple(known[target].shape)
        if headers[name].shape != right:
            raise WexpandError(
                f"{headers[name].file}: {name}: shape {list(headers[name].shape)} should be "
                f"{list(right)}, as {type(model).__name__} has it by config.json",
                name,
            )
    if type(model).__name__ not in (model.config.architectures or ()):
        return
    if missing := missing_tensors(model, headers):
        raise WexpandError(
            f"{missing[0]}: missing; {type(model).__name__} has it by config.json", missing[0]
        )


def merged_tensors(model: "PreTrainedModel", names: Iterable[str]) -> set[str]:
    """Those of a checkpoint's tensors that `model` merges with others while loading: experts."""
    return {name for name, _, merged in _renamed(model, names) if merged}


def missing_tensors(model: "PreTrainedModel", names: Iterable[str]) -> list[str]:
    """The tensors of `model` that a checkpoint with these tensor names would leave out."""
    found = {target for _, target, _ in _renamed(model, names)}
    found |= {t for t, source in model.all_tied_weights_keys.items() if source in found}
    optional = model._keys_to_ignore_on_load_missing or ()
    return [
        name
        for name in model.state_dict()
        if name not in found and not any(re.search(pattern, name) for pattern in optional)
    ]


def saved_names(model: "PreTrainedModel") -> list[str]:
    """The tensor names that transformers writes when it saves `model` as it is now."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    return list(revert_weight_conversion(model, tensors))


def check_fit(directory: ModelDir) -> None:
    """Raise WexpandError unless a checkpoint of ours has exactly the tensors of the model class
    that its config.json names."""
    model = skeleton(directory.path)
    install_linears(model, directory.config)
    check_headers(model, directory)


def skeleton(directory: str | Path) -> "PreTrainedModel":
    """The dense model that a directory's config.json describes, on the meta device: no memory.

    Runs no code from the directory. Raises WexpandError where transformers has no class for it.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        name = (config.architectures or ["none named"])[0]
        class_ = getattr(transformers, name, None)
        if not (isinstance(class_, type) and issubclass(class_, transformers.PreTrainedModel)):
            raise WexpandError(
                f"{directory}: config.json: architectures: {name} is no model class of "
                f"transformers {transformers.__version__}, so its linears are not known"
            )
        return empty_model(class_, config)
    except WexpandError:
        raise
    except Exception as error:  # configs and models of transformers raise what they like
        raise WexpandError(
            f"{directory}: transformers cannot build this model: {reason(error)}"
        ) from error


def empty_model(class_: type["PreTrainedModel"], config: Any) -> "PreTrainedModel":
    """The dense model of that class and configuration, which is changed, on the meta device."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with torch.device("meta"):
        return class_._from_config(config)


def unserved(model: Any, linears: Iterable[str]) -> list[str]:
    """Those of `linears` that vLLM would refuse to load packed: fused qkv whose rows it rearranges
    while it loads them, as those of a dense matrix."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    return [name for name in linears if name.endswith("query_key_value") and kind in REARRANGED]


def linear_tensors(model: "PreTrainedModel", names: Iterable[str]) -> dict[str, str]:
    """Tensor of a dense checkpoint -> linear, both by checkpoint names, for the linears of `model`
    that can be packed: all but the output embedding (and those that share its weight), and those
    of one output, gates, which vLLM keeps dense. In the model's order.
    """
    head = model.get_output_embeddings()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    found = {}
    order = {name: place for place, name in enumerate(model.state_dict())}
    targets = module_tensor_names(model, names)
    for name, target in sorted(targets.items(), key=lambda pair: order[pair[1]]):
        module_name, _, kind = target.rpartition(".")
        module = model.get_submodule(module_name)
        if kind == "weight" and replaceable(module) and module is not head:
            if target not in tied and module.out_features > 1:
                found[name] = name.removesuffix(".weight")
    return found
