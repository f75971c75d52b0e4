"""Neuron scores on disk: one file for programs, one for people.

    neuron_scores.safetensors   LINEAR.wd, .mean, .std, .skew, .kurtosis, .md, .md_null:
                                float32 [out] each
    neuron_scores.json          per linear: top neurons, quantiles, correlations (scores_summary.py)

The safetensors file stands alone. Its metadata says which model was scored, down to a fingerprint
of every weight, so that scores of another model are refused instead of used. Beside a model both
lie in a folder of their own, `MODEL/neuron_scores/`: vLLM takes every `*.safetensors` file next to
a checkpoint without an index for weights, and stops at the first name it does not know.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import WexpandError
from ..format.writer import atomic
from ..method.neuron_summary import summary
from ..method.neurons import NeuronScores

__all__ = [
    "FOLDER",
    "ModelScores",
    "ScoredLinear",
    "fingerprint",
    "load_scores",
    "save_scores",
]

FOLDER = "neuron_scores"
SCORES_FILE = "neuron_scores.safetensors"
SUMMARY_FILE = "neuron_scores.json"
FORMAT_VERSION = 1

_SAMPLED_WEIGHTS = 65_536


class ScoredLinear(NamedTuple):
    """The scores of one linear, and what identifies the weight they were computed from."""

    scores: NeuronScores
    shape: tuple[int, int]
    """[out, in] of the weight."""
    fingerprint: str
    """`fingerprint(weight)` at the time of scoring."""
    tokens: int
    """Calibration tokens the scores rest on."""


class ModelScores(NamedTuple):
    """The scores of a model's linears, by their names in the model."""

    model: str
    """Name or path the model was loaded from."""
    architecture: str
    """Its class, `LlamaForCausalLM` for example."""
    settings: dict[str, Any]
    """How it was scored: `percent`, `sample_tokens`, `pairs`, `seed`."""
    linears: dict[str, ScoredLinear]
    skipped: dict[str, str]
    """Targeted linears without scores, and why."""

    def of(self, name: str) -> NeuronScores:
        """The scores of linear `name`; WexpandError if it was not scored."""
        if name not in self.linears:
            reason = self.skipped.get(name, f"{len(self.linears)} others were")
            raise WexpandError(f"{name}: has no neuron scores ({reason}); score the model again")
        return self.linears[name].scores

    def check(self, model: torch.nn.Module) -> "ModelScores":
        """Refuse scores of another model; return self.

        Every scored linear must exist in `model` with the very weights that were scored. Raises
        WexpandError naming the first linear that does not fit.
        """
        for name, scored in self.linears.items():
            problem = _mismatch(model, name, scored)
            if problem:
                raise WexpandError(
                    f"neuron scores of {self.model} ({self.architecture}) do not belong to this "
                    f"{type(model).__name__}: {name} {problem}; score this model"
                )
        return self


def fingerprint(weight: Tensor) -> str:
    """Sixteen hex digits of a weight's shape and values, the same in every dtype that holds them.

    Hashes up to 65,536 values spread evenly, so that a large model costs no more than a small one.
    """
    flat = weight.detach().flatten()
    picked = torch.linspace(
        0, flat.numel() - 1, min(flat.numel(), _SAMPLED_WEIGHTS), dtype=torch.float64
    ).long()
    values = flat[picked.to(flat.device)].to("cpu", torch.float32).numpy()
    digest = hashlib.sha256(str(list(weight.shape)).encode())
    digest.update(values.astype("<f4").tobytes())
    return digest.hexdigest()[:16]


def save_scores(scores: ModelScores, directory: str | os.PathLike) -> None:
    """Write both files into `directory` (made if missing), each complete or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{field}": values.to("cpu", torch.float32).contiguous()
        for name, scored in scores.linears.items()
        for field, values in scored.scores._asdict().items()
        if values is not None
    }
    metadata = {"wexpand_neuron_scores": json.dumps(_header(scores))}
    with atomic(directory / SCORES_FILE) as path:
        save_file(tensors, path, metadata=metadata)
    shown = _header(scores)
    percent = scores.settings.get("percent", 3.0)
    for name, scored in scores.linears.items():
        shown["linears"][name] |= summary(scored.scores, percent)
    text = json.dumps(shown, indent=1, allow_nan=False)
    with atomic(directory / SUMMARY_FILE) as path:
        path.write_text(text + "\n", encoding="utf-8")


def load_scores(path: str | os.PathLike, model: torch.nn.Module | None = None) -> ModelScores:
    """Read scores from a model directory, from the folder with the two files, or from the file.

    With `model`, scores of another model are refused (`ModelScores.check`). Note that the folder
    beside a pruned model holds the scores of the weights before pruning.

    Raises WexpandError naming the file, and the tensor, that is missing or damaged.
    """
    file = _find(Path(path))
    try:
        with safe_open(file, framework="pt") as opened:
            header = (opened.metadata() or {}).get("wexpand_neuron_scores")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise WexpandError(f"{file}: cannot be read as safetensors ({error})") from error
    if header is None:
        raise WexpandError(f"{file}: has no wexpand_neuron_scores metadata; not neuron scores")
    try:
        scores = _parse(json.loads(header), tensors, file)
    except WexpandError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WexpandError(f"{file}: its metadata is damaged ({error!r}); score again") from error
    return scores if model is None else scores.check(model)


def _header(scores: ModelScores) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "model": scores.model,
        "architecture": scores.architecture,
        "settings": scores.settings,
        "linears": {
            name: {"shape": list(s.shape), "fingerprint": s.fingerprint, "tokens": s.tokens}
            for name, s in scores.linears.items()
        },
        "skipped": scores.skipped,
    }


def _parse(header: dict[str, Any], tensors: dict[str, Tensor], file: Path) -> ModelScores:
    version = header["format_version"]
    if version != FORMAT_VERSION:
        raise WexpandError(
            f"{file}: format_version {version} is unknown; this wexpand reads {FORMAT_VERSION}"
        )
    linears = {}
    for name, about in header["linears"].items():
        out_features, in_features = about["shape"]
        values = {}
        for field in NeuronScores._fields:
            tensor = tensors.get(f"{name}.{field}")
            if tensor is None and field in NeuronScores._field_defaults:
                continue
            if tensor is None:
                raise WexpandError(f"{file}: tensor {name}.{field} is missing; score again")
            if tensor.dtype != torch.float32 or list(tensor.shape) != [out_features]:
                raise WexpandError(
                    f"{file}: tensor {name}.{field} is {tensor.dtype} {list(tensor.shape)}, "
                    f"it should be torch.float32 [{out_features}]"
                )
            undefined = tensor.isnan() & (field.startswith(("md", "cluster_")))
            if not (tensor.isfinite() | undefined).all():
                raise WexpandError(f"{file}: tensor {name}.{field} holds NaN or infinite values")
            values[field] = tensor
        linears[name] = ScoredLinear(
            NeuronScores(**values),
            (out_features, in_features),
            str(about["fingerprint"]),
            int(about["tokens"]),
        )
    return ModelScores(
        str(header["model"]),
        str(header["architecture"]),
        dict(header["settings"]),
        linears,
        dict(header["skipped"]),
    )


def _mismatch(model: torch.nn.Module, name: str, scored: ScoredLinear) -> str | None:
    """Why linear `name` of the model is not the one that was scored; None if it is."""
    try:
        weight = model.get_submodule(name).weight
    except AttributeError:
        return "does not exist in it"
    if not isinstance(weight, Tensor):
        return "has no weight"
    if tuple(weight.shape) != scored.shape:
        return f"has shape {list(weight.shape)}, scored was {list(scored.shape)}"
    if fingerprint(weight) != scored.fingerprint:
        return "has other weights than the ones scored"
    return None


def _find(path: Path) -> Path:
    for file in (path, path / SCORES_FILE, path / FOLDER / SCORES_FILE):
        if file.is_file():
            return file
    raise WexpandError(
        f"{path}: holds no neuron scores; expected {SCORES_FILE} there or in {FOLDER}/ below it"
    )
