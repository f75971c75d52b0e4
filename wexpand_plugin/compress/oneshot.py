"""`wexpand compress`: llm-compressor's `oneshot` with the mistakes caught before work starts.

The recipe is parsed and the model, the calibration text and the output directory are looked at
first. Calibration text is joined and cut into rows of equal length, so that no padding enters the
statistics. Everything is written beside the output directory and moved there when it is complete.
"""

from pathlib import Path

from ..errors import WexpandError
from .recipes import check_recipe
from .recipes import recipe as find_recipe

__all__ = ["calibration_rows", "compress", "load_text"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def load_text(
    dataset: str, *, config: str | None = None, split: str = "train", column: str = "text"
):
    """A dataset with a text column: a local file or directory, or the id of a hub dataset."""
    import datasets

    path = Path(dataset)
    if path.is_dir() and (path / "dataset_info.json").exists():
        loaded = datasets.load_from_disk(str(path))
    elif path.is_file():
        if path.suffix not in FORMATS:
            raise WexpandError(f"{path}: ends in {path.suffix!r}, not in {', '.join(FORMATS)}")
        kind = FORMATS[path.suffix]
        options = {"sample_by": "document"} if kind == "text" else {}
        loaded = datasets.load_dataset(kind, data_files=str(path), split="train", **options)
    else:
        try:
            loaded = datasets.load_dataset(dataset, config, split=split)
        except (FileNotFoundError, ConnectionError, ValueError, OSError) as error:
            problem = (
                "a directory that holds no saved data set, and no files that make one"
                if path.is_dir()
                else "no local file, and the hub did not give it"
            )
            raise WexpandError(f"dataset: {dataset!r} is {problem} ({_reason(error)})") from None
    if isinstance(loaded, dict):
        loaded = loaded[split]
    if not {column, "input_ids"} & set(loaded.column_names):
        raise WexpandError(
            f"dataset: {dataset!r} has no column {column!r}, only {', '.join(loaded.column_names)}"
        )
    return loaded


def calibration_rows(data, tokenizer, *, samples: int, length: int, column: str, seed: int):
    """`samples` rows of `length` tokens each, from the texts in random order, without padding.

    :return: a `datasets.Dataset` with `input_ids` and `attention_mask`
    :raises WexpandError: the texts are too short for a single row
    """
    from datasets import Dataset

    if "input_ids" in data.column_names:
        return data
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids: list[int] = []
    for text in data.shuffle(seed=seed)[column]:
        ids += begin + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= samples * length:
            break
    rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)][:samples]
    if not rows:
        raise WexpandError(
            f"dataset: {len(ids)} tokens do not fill one row of {length}; use more text or a "
            "smaller --max-seq-length"
        )
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length] * len(rows)})


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
    dtype: str = "auto",
    seed: int = 0,
) -> Path:
    """Apply `recipe` to `model`, calibrated on `dataset`, and save to the new directory `output`.

    :param model: model directory or hub id
    :param recipe: YAML file of llm-compressor modifiers, ours among them or not, or the bare name
        of a recipe of this package
    :param dataset: text file, .jsonl, .json, .csv, .parquet, saved dataset, or hub id
    :param samples, max_seq_length: rows of calibration tokens and their length
    :param dtype: "float32", "bfloat16", "float16", or "auto", which keeps the checkpoint's
    :param seed: which texts are taken, and the order of the rows
    :return: the output directory

    Runs no code that the model brings.
    """
    import torch
    from llmcompressor import oneshot
    from loguru import logger
    from transformers import AutoConfig, AutoTokenizer

    from ..hf.saving import partial_directory

    if dtype not in DTYPES:
        raise WexpandError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise WexpandError(f"output: {output} exists and is not empty; choose a new directory")
    recipe = find_recipe(recipe)
    check_recipe(recipe)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # configs and tokenizers of transformers raise what they like
        raise WexpandError(f"model: {model!r}: {_reason(error)}") from error
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
        raise WexpandError(f"model: {model!r} has no tokenizer ({_reason(error)})") from error
    longest = getattr(config, "max_position_embeddings", None) or max_seq_length
    length = min(max_seq_length, longest)
    data = calibration_rows(
        load_text(dataset, config=dataset_config, split=split, column=text_column),
        tokenizer, samples=samples, length=length, column=text_column, seed=seed,
    )  # fmt: skip
    used = data["input_ids"][:samples]
    tokens = sum(min(len(ids), length) for ids in used)
    if tokens < samples * max_seq_length:
        logger.warning(
            f"{tokens} tokens in {len(used)} rows calibrate, fewer than {samples} rows of "
            f"{max_seq_length}: the text is used up, or the model takes no longer rows"
        )
    torch.manual_seed(seed)
    with partial_directory(output) as partial:
        oneshot(
            model=model, tokenizer=tokenizer, dataset=data, recipe=recipe, precision=dtype,
            trust_remote_code_model=False,
            num_calibration_samples=min(samples, len(data)), max_seq_length=length,
            output_dir=str(partial),
        )  # fmt: skip
    return output
