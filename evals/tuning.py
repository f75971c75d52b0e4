"""How block tuning depends on its steps: a curve, drawn on the first blocks of a real model.

    python -m evals.tuning [--data FOLDER] [--model DIR] [--blocks 3] [--lr 0.01 --lr 0.05]
        [--epochs 2 --epochs 8] [--sparsity 0.8] [--values auto] [--json FILE]

The MLP linears of the first blocks are solved and tuned with every learning rate and number of
epochs, on the calibration text of `evals.real_model`, by the method's own pieces (`expand_group`,
`tune_block`) around transformers' blocks; later blocks stay dense. Each point gives the relative
squared error of each block's outputs on held-out calibration tokens, before and after, and the loss
on WikiText-2 test and on `--other`, a file with text of another kind. Points that the file has are
not run again.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from evals.processes import ROOT
from evals.real_model import CONTEXT, TOKENS, get_model, text_loss, wikitext
from wexpand_plugin.method.constant import constant_parts
from wexpand_plugin.method.group import expand_group
from wexpand_plugin.method.inputs import record_inputs
from wexpand_plugin.method.settings import Settings
from wexpand_plugin.method.tunable import TunableLinear
from wexpand_plugin.method.tuning import tune_block

__all__ = ["Blocks"]

RESULTS = ROOT / "evals" / "results" / "tuning.json"
GROUPS = (("gate_proj", "up_proj"), ("down_proj",))


class Blocks:
    """The first blocks of a Llama-like model and the calibration batches that reach them.

    :param windows: tokens [windows, context]
    :param batch: windows of a batch
    """

    def __init__(self, model: Any, windows: Tensor, batch: int):
        self.model, self.batches, self.others = model, [], {}
        first = model.model.layers[0]

        class Reached(Exception):
            pass

        def take(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.batches.append(args[0] if args else kwargs.pop("hidden_states"))
            self.others = {key: value for key, value in kwargs.items() if "past" not in key}
            raise Reached

        handle = first.register_forward_pre_hook(take, with_kwargs=True)
        with torch.no_grad():
            for ids in windows.split(batch):
                try:
                    model(ids, use_cache=False)
                except Reached:
                    pass
        handle.remove()

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states that a block gives."""
        found = block(hidden, **self.others)
        return found[0] if isinstance(found, tuple) else found

    def tuned(self, settings: Settings, chosen: Sequence[int]) -> list[tuple[float, float]]:
        """Solve and tune the MLPs of the blocks with these numbers, in place; their errors."""
        dense = list(self.batches)
        inputs, errors = list(dense), []
        for number, block in enumerate(self.model.model.layers[: max(chosen) + 1]):
            with torch.no_grad():
                dense = [self.run(block, hidden) for hidden in dense]
                if number not in chosen:
                    inputs = [self.run(block, hidden) for hidden in inputs]
                    continue
            linears = self._solved(block, inputs, settings)
            for name, linear in linears.items():
                setattr(block.mlp, name, linear)
            block.requires_grad_(False)
            for linear in linears.values():
                linear.requires_grad_(True)
            with constant_parts(block, lambda n, b=block, x=inputs: self.run(b, x[n])) as run:
                result = tune_block(
                    run, dense, list(linears.values()), epochs=settings.tune_epochs,
                    lr=settings.learning_rate, seed=settings.seed, quiet=True,
                )  # fmt: skip
            errors.append((result.before, result.after))
            for name, linear in linears.items():
                setattr(block.mlp, name, _fixed(linear))
            with torch.no_grad():
                inputs = [self.run(block, hidden) for hidden in inputs]
        return errors

    def _solved(
        self, block: Any, inputs: list[Tensor], settings: Settings
    ) -> dict[str, TunableLinear]:
        found = {}
        for names in GROUPS:
            linears = [getattr(block.mlp, name) for name in names]

            class Batches:
                def __len__(self) -> int:
                    return len(inputs)

                def identity(self, number: int, /) -> int:
                    return number

                def __call__(
                    self, numbers: Iterable[int] | None = None, linear=linears[0], of=self
                ) -> Iterator[Tensor]:
                    some = range(len(inputs)) if numbers is None else numbers
                    forwards = (lambda n=n: of.run(block, inputs[n]) for n in some)
                    with torch.no_grad():
                        for seen in record_inputs([linear], forwards):
                            yield seen[linear].flatten(0, -2)

            weights = [linear.weight.detach() for linear in linears]
            result = expand_group(weights, [None] * len(weights), Batches(), settings)
            for name, linear in zip(names, result.linears, strict=True):
                rows = linear.calibrating.rows
                numbers = torch.arange(len(rows.weights)).unsqueeze(0)
                found[name] = TunableLinear(
                    rows, rows.weights != 0, numbers, settings.grid, None, None
                )
        return found


def _fixed(linear: TunableLinear) -> nn.Linear:
    weight = linear.solved().weights
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return plain


def main(
    data: Annotated[Path | None, typer.Option(help="Folder with WikiText-2's files.")] = None,
    other: Annotated[Path | None, typer.Option(help="A text file of another kind.")] = None,
    model: Annotated[Path | None, typer.Option(help="Another model's directory.")] = None,
    out: Annotated[Path, typer.Option(help="Where the model goes.")] = Path("runs/real_model"),
    blocks: Annotated[int, typer.Option()] = 3,
    batch: Annotated[int, typer.Option(help="Windows of a step.")] = 4,
    tokens: Annotated[int, typer.Option(help="Of calibration.")] = TOKENS,
    lr: Annotated[list[float] | None, typer.Option()] = None,
    epochs: Annotated[list[int] | None, typer.Option()] = None,
    sparsity: Annotated[float, typer.Option()] = 0.8,
    values: Annotated[str, typer.Option()] = "auto",
    dtype: Annotated[str, typer.Option(help="To compute in.")] = "auto",
    json_file: Annotated[Path, typer.Option("--json")] = RESULTS,
) -> None:
    """Errors and losses of each learning rate and number of epochs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = model or get_model(out)
    valid, test = wikitext(data)
    texts = {"loss": test}
    if other is not None:
        texts["other"] = other.read_text(encoding="utf8")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(valid, return_tensors="pt").input_ids[0, : tokens // CONTEXT * CONTEXT]
    dense = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    dense.requires_grad_(False)
    rows = json.loads(json_file.read_text())["rows"] if json_file.exists() else []
    base = {key: text_loss(dense, tokenizer, text) for key, text in texts.items()}
    print("dense", base, flush=True)
    calibration = Blocks(dense, ids.view(-1, CONTEXT), batch)
    for count in epochs or (2, 8):
        for rate in lr or (0.01, 0.05, 0.2):
            point = {"sparsity": sparsity, "values": values, "blocks": blocks, "batch": batch,
                     "tokens": len(ids), "epochs": count, "lr": rate, "dtype": dtype}  # fmt: skip
            if any(point.items() <= row.items() for row in rows):
                continue
            settings = Settings(
                sparsity=sparsity, values=values, num_experts=1, tune_epochs=count, tune_lr=rate
            )
            layers = dense.model.layers
            own = [layers[number] for number in range(blocks)]
            for number in range(blocks):
                layers[number] = deepcopy(own[number])
            begin = time.monotonic()
            errors = calibration.tuned(settings, range(blocks))
            seconds = time.monotonic() - begin
            added = {k: text_loss(dense, tokenizer, t) - base[k] for k, t in texts.items()}
            for number in range(blocks):
                layers[number] = own[number]
            rows.append(point | {"errors": errors, "added": added, "seconds": round(seconds)})
            json_file.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            print(rows[-1], flush=True)


if __name__ == "__main__":
    typer.run(main)
