"""A dense model and the rows that it is calibrated on, looked at before any work.

Nothing here runs code that a model brings.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WexpandError, reason
from ..format.model_dir import ModelDir
from ..format.rowpool import finite
from ..format.values import FLOATS
from ..hf.complete import refuse_incomplete
from ..hf.hub import resolve
from ..method import ranks
from ..method.settings import refuse_seed
from .data import calibration_rows, check_rows, cut_rows, load_text
from .precision import compute_dtype, own_dtypes, set_dtypes

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

__all__ = ["DTYPES", "Inputs", "load_dense", "load_inputs"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Inputs:
    """What a model is calibrated on."""

    tokenizer: Any
    source: Path
    """directory with the model's files, weights perhaps left out"""
    rows: "Dataset"
    """input_ids, and masks where there are any"""
    length: int
    """tokens of a row, at most"""


def load_inputs(
    model: str,
    dataset: str,
    *,
    samples: int = 128,
    max_seq_length: int = 512,
    dataset_config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    seed: int = 0,
) -> Inputs:
    """Find the model's config and tokenizer, and cut calibration text into rows of tokens.

    Parameters as of `oneshot.compress`.

    :raises WexpandError: a model that is none, is compressed already, is no causal language model
        or has no tokenizer; text that cannot be read or is too short; tokens that the model does
        not know
    """
    from loguru import logger
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    refuse_seed(seed)
    source = resolve(model, weights=False)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # configs and tokenizers of transformers raise what they like
        raise WexpandError(f"model: {model!r}: {reason(error)}") from error
    existing = getattr(config, "quantization_config", None)
    if existing is not None:
        method = existing.get("quant_method") if isinstance(existing, dict) else existing
        raise WexpandError(
            f"model: {model!r} is already compressed (quant_method {method!r}); "
            "compress the dense model instead"
        )
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise WexpandError(
            f"model: {model!r} is of type {config.model_type}, of which transformers has no causal "
            "language model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        raise WexpandError(f"model: {model!r} has no tokenizer ({reason(error)})") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of no files
        raise WexpandError(f"model: {model!r} has no tokenizer files, tokenizer.json for one")
    longest = getattr(config, "max_position_embeddings", None) or max_seq_length
    length = min(max_seq_length, longest)
    rows = calibration_rows(
        load_text(dataset, config=dataset_config, split=split, column=text_column),
        tokenizer, samples=samples, length=length, column=text_column, seed=seed,
    )  # fmt: skip
    if len(rows) > samples:  # tokenised already
        rows = rows.shuffle(seed=seed).select(range(samples))
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    tokens = check_rows(rows, vocabulary, length)
    if tokens < samples * max_seq_length:
        logger.warning(
            f"{tokens} tokens in {len(rows)} rows calibrate, fewer than {samples} rows of "
            f"{max_seq_length}: the text is used up, or the model takes no longer rows"
        )
    return Inputs(tokenizer, source, cut_rows(rows, length), length)


def load_dense(model: str, dtype: str) -> tuple[Any, dict[str, "torch.dtype"]]:
    """The model, in the dtype to compute in, and the dtypes that its parameters are saved in.

    Several ranks have it in memory once, read by the first.

    :param dtype: one of DTYPES; see `precision.compute_dtype`
    :raises WexpandError: a model that cannot be loaded, lacks tensors or has misshapen ones, or
        holds values that are not finite or of a dtype that nothing is stored in
    """
    from compressed_tensors.offload import load_offloaded_model
    from loguru import logger
    from transformers import AutoModelForCausalLM

    try:
        refuse_incomplete(model)
        with load_offloaded_model() if ranks.count() > 1 else nullcontext():
            # where to is not left to transformers, which would count on all memory at once
            where: dict[str, Any] = {}
            if ranks.count() > 1:
                where = {"device_map": "cpu", "max_memory": None}
            dense = AutoModelForCausalLM.from_pretrained(
                model, dtype="auto", trust_remote_code=False, **where
            )
    except WexpandError:
        raise
    except Exception as error:
        if any(Path(model).glob("*.safetensors")):
            list(ModelDir(model).headers)  # names a file that is damaged, as transformers does not
        raise WexpandError(f"model: {model!r} cannot be loaded ({reason(error)})") from error
    _refuse_values(model, dense)
    own, computing = own_dtypes(dense), compute_dtype(dtype, dense.dtype)
    if computing != dense.dtype:
        why = f", as this CPU has no {dense.dtype} instructions" if dtype == "auto" else ""
        logger.info(f"Computing in {computing}{why}; saving in {dense.dtype}, as the model is")
        set_dtypes(dense, {n: computing if d == dense.dtype else d for n, d in own.items()})
    return dense, own


def _refuse_values(model: str, dense: Any) -> None:
    """What could not be saved again, wherever it is: hours later, that would be known too late."""
    from compressed_tensors.offload import disable_onloading

    with disable_onloading():  # on a GPU every weight would be copied there
        parameters = list(dense.named_parameters())
    for name, values in parameters:
        if not values.is_floating_point() or values.is_meta:
            continue
        if values.dtype not in FLOATS.values():
            raise WexpandError(
                f"model: {model!r}: {name} is in {values.dtype}; convert the model to "
                f"{', '.join(FLOATS)} first"
            )
        if not finite(values.detach()):
            raise WexpandError(
                f"model: {model!r}: {name} holds NaN or infinite values; repair the model"
            )
