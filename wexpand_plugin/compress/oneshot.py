"""`wexpand compress`: llm-compressor's `oneshot` with the mistakes caught before work starts.

The recipe is parsed and the model, the calibration text and the output directory are looked at
first. Calibration text is joined and cut into rows of equal length, so that no padding enters the
statistics. Everything is written beside the output directory and moved there when it is complete.
"""

from pathlib import Path

from ..errors import WexpandError, reason
from ..format.writer import copy_others, partial_directory, require_empty
from ..hf.hub import resolve
from .data import calibration_rows, check_rows, load_text
from .precision import compute_dtype, own_dtypes, set_dtypes
from .recipes import check_recipe
from .recipes import recipe as find_recipe

__all__ = ["compress"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


def compress(
    model: str,
    recipe: str | Path,
    dataset: str,
    output: str | Path,
    *,
    samples: int = 128,
    max_seq_length: int = 512,
    dataset_config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    batch_size: int = 1,
    dtype: str = "auto",
    seed: int = 0,
) -> Path:
    """Apply `recipe` to `model`, calibrated on `dataset`, and save to the new directory `output`.

    :param model: model directory or hub id
    :param recipe: YAML file of llm-compressor modifiers, ours among them or not, or the bare name
        of a recipe of this package
    :param dataset: text file, .jsonl, .json, .csv, .parquet, saved dataset, or hub id; texts,
        chats, or rows of input_ids with or without masks
    :param samples, max_seq_length: rows of calibration tokens and their length
    :param batch_size: rows at a time; a few make calibration faster
    :param dtype: what is computed in: "float32", "bfloat16", "float16", or "auto": the model's own
        where the machine is fast with it, else float32. The model is saved in its own
    :param seed: which texts or rows are taken, and their order
    :return: the output directory

    Runs no code that the model brings.
    """
    import torch
    from llmcompressor import oneshot
    from llmcompressor.core import create_session
    from loguru import logger
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise WexpandError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    require_empty(output)
    recipe = find_recipe(recipe)
    check_recipe(recipe)
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
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        raise WexpandError(f"model: {model!r} has no tokenizer ({reason(error)})") from error
    source = resolve(model, weights=False)
    longest = getattr(config, "max_position_embeddings", None) or max_seq_length
    length = min(max_seq_length, longest)
    data = calibration_rows(
        load_text(dataset, config=dataset_config, split=split, column=text_column),
        tokenizer, samples=samples, length=length, column=text_column, seed=seed,
    )  # fmt: skip
    if len(data) > samples:  # tokenised already
        data = data.shuffle(seed=seed).select(range(samples))
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    tokens = check_rows(data, vocabulary, length)
    if tokens < samples * max_seq_length:
        logger.warning(
            f"{tokens} tokens in {len(data)} rows calibrate, fewer than {samples} rows of "
            f"{max_seq_length}: the text is used up, or the model takes no longer rows"
        )
    torch.manual_seed(seed)
    # a session of its own: a run that fails leaves nothing for the next one to clear up
    with create_session(), partial_directory(output) as partial:
        try:
            dense = AutoModelForCausalLM.from_pretrained(
                model, dtype="auto", trust_remote_code=False
            )
        except Exception as error:
            raise WexpandError(f"model: {model!r} cannot be loaded ({reason(error)})") from error
        own, computing = own_dtypes(dense), compute_dtype(dtype, dense.dtype)
        if computing != dense.dtype:
            why = f", as this CPU has no {dense.dtype} instructions" if dtype == "auto" else ""
            logger.info(f"Computing in {computing}{why}; saving in {dense.dtype}, as the model is")
            set_dtypes(dense, {n: computing if d == dense.dtype else d for n, d in own.items()})
        oneshot(
            model=dense, tokenizer=tokenizer, dataset=data, recipe=recipe,
            num_calibration_samples=len(data), max_seq_length=length, batch_size=batch_size,
            data_collator="padding",
        )  # fmt: skip
        set_dtypes(dense, own)
        dense.save_pretrained(str(partial))
        if left_out := copy_others(source, partial):
            for file in left_out:  # llm-compressor copies what lies beside config.json
                (partial / file).unlink(missing_ok=True)
            logger.warning(f"not copied, as loading them runs code: {', '.join(left_out)}")
    return Path(output)
