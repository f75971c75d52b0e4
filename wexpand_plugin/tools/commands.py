"""What `wexpand` can do: the options of each command, and the call that does it.

Modules are imported when their command runs, so that `wexpand --help` is quick.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import WexpandError, reason

__all__ = [
    "inspect",
    "lm_eval",
    "pack",
    "report",
    "synth",
    "unpack",
    "verify",
]

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model directory, or its id on the Hugging Face hub.")
]
Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="Model directory written by wexpand.")
]
Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="New directory; it must not exist, or be empty.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for scripts.")]


def pack(
    model: Model,
    out: Out,
    values: Annotated[
        str | None,
        typer.Option(help="int8, int6, int5, int4, int3, int2: round what is kept; else not."),
    ] = None,
    value_group: Annotated[
        int, typer.Option(help="With --values: columns that share a scale.")
    ] = 128,
    keep_negative_zeros: Annotated[
        bool,
        typer.Option(
            "--keep-negative-zeros",
            help="Store -0.0, which pruning by multiplication leaves, like a weight, so that "
            "unpack gives back every bit. Otherwise it counts as zero.",
        ),
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Store a pruned model without its zeros: the same weights.

    Needs no calibration. For models pruned by SparseGPT, Wanda, magnitude or 2:4 and saved dense,
    as llm-compressor does. A linear is packed where that makes it smaller, above 6.25% zeros in
    bfloat16; the rest stays as it is. With --values int4, say, kept weights are rounded, zeros or
    not, and what that costs is said; a recipe with calibration text loses less. W4A16 and W8A16
    models that llm-compressor quantised (symmetric, in groups or channels) are packed bit for bit.

    \b
    Example:
      wexpand pack PRUNED OUT
      vllm serve OUT
    """
    from dataclasses import asdict

    from .inspect_table import readable_bytes
    from .pack import pack

    done = pack(
        model,
        out,
        values=values,
        value_group=value_group,
        keep_negative_zeros=keep_negative_zeros,
        quiet=quiet or as_json,
    )
    if as_json:
        typer.echo(json.dumps(asdict(done), indent=2))
    elif not quiet:
        for note in done.notes:
            typer.echo(note)
        mean = sum(done.packed.values()) / len(done.packed)
        line = f"packed {len(done.packed)} linears ({mean:.1%} zeros on average)"
        typer.echo(line)
        if done.left:
            typer.echo(
                f"left {len(done.left)} dense: below {done.threshold:.1%} zeros, packing would not "
                "make them smaller"
            )
        if done.errors:
            worst = max(done.errors, key=lambda name: done.errors[name])
            mean = sum(done.errors.values()) / len(done.errors)
            typer.echo(
                f"rounding changes weights by {mean:.4f} of their norm on average, by "
                f"{done.errors[worst]:.4f} in {worst}"
            )
        ratio = done.bytes_after / done.bytes_before
        before, after = readable_bytes(done.bytes_before), readable_bytes(done.bytes_after)
        typer.echo(f"{before} -> {after} ({ratio:.2f} x)")


def unpack(
    directory: Directory,
    out: Out,
    expert: Annotated[
        int | None,
        typer.Option(min=0, help="Which expert to write, for a model with several."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write a packed model dense again, bit for bit.

    Its zeros, too. A model with several experts per linear has no dense equal: --expert writes one
    of them, which is a different model.
    """
    from .unpack import unpack

    unpack(directory, out, expert=expert, quiet=quiet)
    if not quiet:
        typer.echo(f"wrote {out}")


def inspect(directory: Directory, as_json: Json = False) -> None:
    """Show what each linear weighs, and what a token reads.

    Reads headers, masks and row maps only, so a model of any size takes seconds. A dense model
    directory works too, for comparison; all of its weights are read, to count zeros.
    """
    from .inspect import inspect
    from .inspect_table import table

    found = inspect(directory)
    typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else table(found))


def verify(directory: Directory, quiet: Quiet = False, as_json: Json = False) -> None:
    """Check every tensor and every checksum of a model.

    And its config and index. Makes the checks that transformers and vLLM make when they load it,
    and lists all problems rather than the first, one per line. Exit code 1 if there are any.

    \b
    Example:
      wexpand verify OUT && vllm serve OUT
    """
    from .verify import verify

    problems = verify(directory, quiet=quiet or as_json)
    if as_json:
        typer.echo(json.dumps({"directory": str(directory), "problems": problems}, indent=2))
    else:
        for problem in problems:
            typer.echo(problem)
        if not problems and not quiet:
            typer.echo(f"{directory}: no problem found")
    if problems:
        raise typer.Exit(1)


def report(
    directory: Directory,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; by default DIR/report.html.")
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="The model before compression: directory or hub id.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", "-d", help="Text to run it on, not the calibration text."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="The same model one-shot, without experts, to compare with."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to use.")] = 8192,
    quiet: Quiet = False,
) -> None:
    """Write an HTML page about a compressed model.

    It shows sizes, shared rows and tokens per expert; its pictures lie beside it, in report-plots.
    With --dense and --dataset it also shows what neurons do: Wasserstein distances, output
    distributions before and after, and which neurons gain from experts.

    \b
    Example:
      wexpand report OUT --dense MODEL --dataset held_out.txt
    """
    from .report import write

    written = write(
        directory, output, dense=dense, dataset=dataset, baseline=baseline, tokens=tokens,
        quiet=quiet,
    )  # fmt: skip
    if not quiet:
        typer.echo(f"wrote {written}")


def synth(
    out: Out,
    hidden: Annotated[int, typer.Option(help="Model width.")] = 512,
    ffn: Annotated[int, typer.Option(help="Feed-forward width.")] = 1376,
    layers: Annotated[int, typer.Option(help="Decoder blocks.")] = 4,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 8,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key-value heads; by default as many as heads.")
    ] = None,
    vocab: Annotated[int, typer.Option(help="Vocabulary, at least 258.")] = 1024,
    context: Annotated[int, typer.Option(help="Longest sequence.")] = 4096,
    experts: Annotated[int, typer.Option(help="Experts per linear; 1 is plain sparse.")] = 16,
    clusters: Annotated[
        int,
        typer.Option(help="Clusters, with a bias each; 0: as many as experts, without biases."),
    ] = 0,
    sparsity: Annotated[float, typer.Option(help="Share of zeros in each row.")] = 0.8,
    budget: Annotated[
        float | None,
        typer.Option(help="Stored bytes, x the dense bytes; by default every expert in full."),
    ] = None,
    targets: Annotated[str, typer.Option(help="mlp or all: which linears.")] = "mlp",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    values: Annotated[
        str | None, typer.Option(help="int8, int6, int5, int4, int3, int2; by default the dtype.")
    ] = None,
    value_group: Annotated[
        int, typer.Option(help="Columns of a row that share a scale, with int values.")
    ] = 128,
    dense: Annotated[
        bool, typer.Option("--dense", help="The dense model of this shape, for comparison.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Make a random Llama of any shape, to measure speed.

    \b
    Example, the shape of Llama-3.2-1B:
      wexpand synth OUT --hidden 2048 --ffn 8192 --layers 16 --heads 32 --kv-heads 8 \\
        --vocab 128256 --experts 16 --sparsity 0.8 --budget 1.0
    """
    from .synth import Shape, synth

    synth(
        out, Shape(hidden, ffn, layers, heads, kv_heads, vocab, context), experts=experts,
        clusters=clusters,
        sparsity=sparsity, budget=budget, targets=targets, dtype=dtype, values=values,
        value_group=value_group, dense=dense, seed=seed, quiet=quiet,
    )  # fmt: skip
    if not quiet:
        typer.echo(f"wrote {out}")


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval, whose `--model hf` then reads our models.

    lm-eval and transformers load no plugins, so `lm_eval --model hf` alone calls the quantization
    type unknown. --help is lm-eval's own. `lm_eval --model vllm` needs no help.
    """
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *context.args]
    try:
        cli_evaluate()
    except ValueError as error:  # what lm-eval says of arguments, a task that is none for one
        raise WexpandError(f"lm-eval: {reason(error)}") from error
