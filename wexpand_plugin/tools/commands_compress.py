"""`wexpand compress` and `wexpand plan`: the commands that run a dense model on text."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import WexpandError
from .commands import Json, Model

__all__ = ["compress", "plan"]

_DATASET = typer.Option(
    "--dataset",
    "-d",
    help="Calibration text or chats: .txt, .jsonl, .csv or .parquet file, saved data set, "
    "or hub id.",
)
DatasetConfig = Annotated[str | None, typer.Option(help="Configuration of a hub data set.")]
Split = Annotated[str, typer.Option(help="Split of the data set.")]
TextColumn = Annotated[
    str, typer.Option(help="Column of texts, or of chats (lists of role and content).")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="What to compute in: float32, bfloat16, float16, or auto: the model's own dtype "
        "where this machine is fast with it, else float32. It is saved in its own."
    ),
]


def compress(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Model directory, or its id on the hub."),
    ] = None,
    dataset: Annotated[str | None, _DATASET] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="New directory.")
    ] = None,
    size: Annotated[
        float | None,
        typer.Option(
            help="Bytes of the blocks' linears over their dense bytes; 0.2 of bfloat16 is 3.2 bits "
            "per weight. In place of a recipe, or of its size_budget."
        ),
    ] = None,
    read: Annotated[
        float | None,
        typer.Option(
            help="The same for what a token reads of them, or a recipe's read_budget; without "
            "experts that is all of --size."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r",
            help="YAML file, or a recipe of the package: int4, int3, dial (what --size and --read "
            "alone mean), sparse_int4, sparsegpt_packed, sparsegpt, neuron_scores, cluster_biases, "
            "sparse_expansion_budget, sparse_expansion, sparse_expansion_2of4.",
        ),  # fmt: skip
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Rows of calibration tokens.")] = 128,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 512,
    dataset_config: DatasetConfig = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows at a time; a few make calibration faster.")
    ] = 1,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Which texts are taken, and their order.")] = 0,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="Go on with the run of OUT that ended early, at its first unfinished block; all "
            "else is taken from it.",
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No closing line; llm-compressor's log stays.")
    ] = False,
) -> None:
    """Make MODEL small, to a size or by a recipe.

    \b
    Examples:
      wexpand compress Qwen/Qwen3-0.6B -d notes.txt -o OUT --size 0.2
      wexpand compress Qwen/Qwen3-0.6B -d notes.txt -o OUT -r int4
      wexpand compress --resume OUT

    With --size, zeros and bits of each linear are chosen for the least loss, and what is kept is
    tuned (recipe "dial"); `wexpand plan` shows what sizes are predicted to cost. A recipe says
    which linears, how sparse, how many experts and how many bytes; the files of those of the
    package explain each key. Each expert wants some thousands of calibration tokens (samples x
    length). llm-compressor does the rest of the work.

    A run that was killed or ran out of disk goes on with --resume, to the same bytes as if nothing
    had happened. Until OUT is complete, finished blocks lie beside it in .OUT.unfinished.
    """
    options = {k: v for k, v in ctx.params.items() if k not in ("resume", "quiet")}
    if resume is not None:
        options = _resumed(ctx, options, resume)
    for key, flag in (("model", "MODEL"), ("dataset", "--dataset"), ("output", "--output")):
        if options[key] is None:
            hint = "" if resume is None else f" --resume {resume} alone goes on with a run."
            ctx.fail(f"Missing {flag}.{hint}")
    if all(options[key] is None for key in ("size", "read", "recipe")):
        ctx.fail("Missing --size, --read or --recipe, which say how small.")

    from ..compress.oneshot import compress
    from ..method import ranks

    compress(**options, resume=resume is not None)
    if not quiet and ranks.rank() == 0:
        from ..compress.neuron_scores import FOLDER
        from ..format.model_dir import ModelDir

        output = options["output"]
        further = f"wexpand inspect {output}, vllm serve {output}"
        if not ModelDir(output).ours:  # a recipe without a modifier of ours that packs
            further = f"wexpand pack {output} PACKED if it is pruned"
            if (output / FOLDER).is_dir():
                further = f"the scores in {output / FOLDER}"
        typer.echo(f"wrote {output}; next: {further}")


def _resumed(ctx: typer.Context, options: dict[str, Any], output: Path) -> dict[str, Any]:
    """The options of the unfinished run of `output`, under those that were given again."""
    from ..compress.progress import options_of, refuse_complete

    known = {k: v for k, v in options_of(output).items() if k in options}
    given = {k for k in options if getattr(ctx.get_parameter_source(k), "name", "") != "DEFAULT"}
    if "output" in given and options["output"] != output:
        ctx.fail(f"--output {options['output']} and --resume {output} should be the same.")
    if not known:
        refuse_complete(output)
    if not known and "model" not in given:
        raise WexpandError(f"{output}: there is no unfinished run of it to resume")
    return options | {k: v for k, v in known.items() if k not in given} | {"output": output}


def plan(
    model: Model,
    dataset: Annotated[str, _DATASET],
    size: Annotated[
        list[float] | None,
        typer.Option(help="A size to look at, bytes over dense bytes; may be repeated."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="A picture of the curve: .png, .svg or .pdf.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Rows of calibration tokens; some of them do for a plan.")
    ] = 128,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 512,
    dataset_config: DatasetConfig = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Which texts are taken, and their order.")] = 0,
    as_json: Json = False,
) -> None:
    """Predict what MODEL loses at a range of sizes.

    One backward pass says what errors of each linear cost, and trials say what errors each choice
    of zeros and bits makes. The loss is in nats per token, added to the dense model's, and before
    tuning, which lowers it.

    \b
    Example:
      wexpand plan Qwen/Qwen3-0.6B -d notes.txt --plot curve.png
      wexpand compress Qwen/Qwen3-0.6B -d notes.txt -o OUT --size 0.2
    """
    from contextlib import redirect_stdout
    from dataclasses import asdict

    from loguru import logger

    from . import plan_curve

    if plot is not None:
        plan_curve.refuse_plot(plot)
    # llm-compressor logs to standard output, from its import on; that is the table's
    with redirect_stdout(sys.stderr):
        import llmcompressor  # noqa: F401

        from ..compress.curve import curve

        logger.remove()
        logger.add(sys.stderr, level="WARNING", format="{message}")
        found = curve(
            model, dataset, sizes=size or (), samples=samples,
            max_seq_length=max_seq_length, dataset_config=dataset_config, split=split,
            text_column=text_column, dtype=dtype, seed=seed,
        )  # fmt: skip
    if plot is not None:
        plan_curve.plot(found, plot)
    typer.echo(json.dumps(asdict(found), indent=2) if as_json else plan_curve.table(found))
