"""`wexpand compress`: llm-compressor's `oneshot` with the mistakes caught before work starts.

The recipe is parsed and the model, the calibration text and the output directory are looked at
first. Calibration text is joined and cut into rows of equal length, so that no padding enters the
statistics. Everything is written beside the output directory and moved there when it is complete;
blocks that are finished are kept there meanwhile, so that a run that ends early can go on
(`progress`).

Under torchrun each process takes its share of the rows (`method.ranks`), and the first one writes.
"""

from contextlib import nullcontext
from pathlib import Path

from ..errors import WexpandError
from ..format.directories import partial_directory, require_empty
from ..format.model_dir import ModelDir
from ..format.writer import copy_others
from ..hf.saving import add_made_by
from ..method import ranks
from .data import padded
from .loading import DTYPES, load_dense, load_inputs
from .precision import set_dtypes
from .progress import in_place, refuse_complete, resumable
from .recipes import check_recipe, refuse_sizes, with_budgets
from .recipes import recipe as find_recipe
from .saved import check_saved

__all__ = ["compress"]


@ranks.together()
def compress(
    model: str,
    recipe: str | Path | None,
    dataset: str,
    output: str | Path,
    *,
    size: float | None = None,
    read: float | None = None,
    samples: int = 128,
    max_seq_length: int = 512,
    dataset_config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    batch_size: int = 1,
    dtype: str = "auto",
    seed: int = 0,
    resume: bool = False,
) -> Path:
    """Apply `recipe` to `model`, calibrated on `dataset`, and save to the new directory `output`.

    :param model: model directory or hub id
    :param recipe: YAML file of llm-compressor modifiers, ours among them or not, or the bare name
        of a recipe of this package; None: "dial", which needs `size` or `read`
    :param dataset: text file, .jsonl, .json, .csv, .parquet, saved dataset, or hub id; texts,
        chats, or rows of input_ids with or without masks
    :param size: bytes of the compressed linears over their dense bytes, in place of the recipe's
        size_budget
    :param read: those of them that a token reads, over the same, in place of its read_budget
    :param samples, max_seq_length: rows of calibration tokens and their length
    :param batch_size: rows at a time; a few make calibration faster
    :param dtype: what is computed in: "float32", "bfloat16", "float16", or "auto": the model's own
        where the machine is fast with it, else float32. The model is saved in its own
    :param seed: which texts or rows are taken, and their order
    :param resume: go on with an earlier run of `output` that ended early, at its first unfinished
        block, to the same bytes; everything else must be as it was. Begins one where there is none
    :return: the output directory

    Runs no code that the model brings. Every process of a torchrun calls it alike.
    """
    import torch
    import yaml
    from llmcompressor import oneshot
    from llmcompressor.core import create_session
    from loguru import logger

    if dtype not in DTYPES:
        raise WexpandError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    ranks.start()
    several, first = ranks.count(), ranks.rank() == 0
    if resume and several > 1:
        raise WexpandError(f"resume: True is for one process, and torchrun started {several}")
    if resume:
        refuse_complete(output)
    if not (resume and in_place(output)):  # whose own files may be in it already
        require_empty(output)
    options = {
        "model": model, "recipe": None if recipe is None else str(recipe), "dataset": dataset,
        "size": size, "read": read, "samples": samples, "max_seq_length": max_seq_length,
        "dataset_config": dataset_config, "split": split, "text_column": text_column,
        "batch_size": batch_size, "dtype": dtype, "seed": seed,
    }  # fmt: skip
    if recipe is None and size is None and read is None:
        raise WexpandError("size: is missing; give a size, what a token reads, or a recipe")
    budgets = {"size_budget": size, "read_budget": read}
    if recipe is None:
        refuse_sizes(size=size, read=read)
    else:  # its own holds where nothing is given
        budgets = {key: value for key, value in budgets.items() if value is not None}
    file = find_recipe(recipe or "dial")
    check_recipe(file)
    recipe = Path(file).read_text(encoding="utf8")
    if budgets:
        recipe = with_budgets(file, budgets)
        check_recipe(file, recipe)
    options["stages"] = yaml.safe_load(recipe)
    inputs = load_inputs(
        model, dataset, samples=samples, max_seq_length=max_seq_length,
        dataset_config=dataset_config, split=split, text_column=text_column, seed=seed,
    )  # fmt: skip
    rows = inputs.rows
    if several > 1:
        if len(rows) < several:
            raise WexpandError(f"samples: {len(rows)} rows cannot be shared by {several} processes")
        rows = rows.shard(num_shards=several, index=ranks.rank())
    torch.manual_seed(seed)
    # a session of its own: a run that fails leaves nothing for the next one to clear up
    with (
        nullcontext() if several > 1 else resumable(output, resume=resume, options=options),
        create_session(),
        partial_directory(output) if first else nullcontext(Path(output)) as partial,
    ):
        dense, own = load_dense(model, dtype)
        oneshot(
            model=dense, tokenizer=inputs.tokenizer, dataset=rows, recipe=recipe,
            num_calibration_samples=len(rows), max_seq_length=inputs.length,
            batch_size=batch_size, data_collator=padded,
        )  # fmt: skip
        set_dtypes(dense, own)
        add_made_by(dense, compress=options)
        dense.save_pretrained(str(partial))
        if first:
            if left_out := copy_others(inputs.source, partial):
                for file in left_out:  # llm-compressor copies what lies beside config.json
                    (partial / file).unlink(missing_ok=True)
                logger.warning(f"not copied, as loading them runs code: {', '.join(left_out)}")
            if ModelDir(partial).ours:
                check_saved(dense, partial, inputs.rows[0]["input_ids"])
    ranks.gathered(None)  # the others end when all is in its place
    return Path(output)
