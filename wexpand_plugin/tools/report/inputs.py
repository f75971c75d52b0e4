"""Inputs of linears: the dense model runs over some text, and hooks keep what its linears read.

All inputs of a large model do not fit into memory at once, so the model runs as often as needed,
each time for as many input groups as fit into `MAX_BYTES`.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import WexpandError, reason
from ...format.model_dir import ModelDir
from ...hf.complete import refuse_incomplete
from ...hf.hub import resolve
from ...hf.names import module_tensor_names
from ...method.inputs import record_inputs, token_rows
from ...method.neurons import MIN_TOKENS
from .data import Group, ReportData

__all__ = ["DenseModel", "dataset_rows"]

MAX_BYTES = 1 << 30


class DenseModel:
    """The model that was compressed, for its weights and for what its linears read."""

    def __init__(self, source: str | Path, data: ReportData):
        """Load a model directory or hub id; WexpandError if `data` is not made from it."""
        from transformers import AutoModelForCausalLM

        self.directory = resolve(source)
        if method := ModelDir(self.directory).quant_method:
            raise WexpandError(
                f"dense: {source} is compressed ({method}); give the model as it was before"
            )
        refuse_incomplete(self.directory)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.directory,
            dtype="auto" if self.device.type == "cuda" else torch.float32,
            trust_remote_code=False,
        )
        self.model = model.to(self.device).eval()
        names = module_tensor_names(model, [f"{linear.name}.weight" for linear in data.linears])
        self.modules: dict[str, nn.Linear] = {}
        for linear in data.linears:
            target = names.get(f"{linear.name}.weight", "").removesuffix(".weight")
            module = model.get_submodule(target) if target else None
            shape = (linear.out_features, linear.in_features)
            if not isinstance(module, nn.Linear) or module.weight.shape != shape:
                raise WexpandError(
                    f"dense: {source} has no linear {linear.name} of shape {list(shape)}, so it is "
                    f"not the model that {data.directory} was made from"
                )
            self.modules[linear.name] = module
        self._compare(source, data)

    def _compare(self, source: str | Path, data: ReportData) -> None:
        """Refuse a model whose norms or embeddings differ: compression leaves them alone."""
        ours, theirs = ModelDir(data.directory), ModelDir(self.directory)
        expanded = tuple(f"{linear.name}." for linear in data.linears)
        both = [name for name in ours.headers if name in theirs.headers]
        for name in (name for name in both if not name.startswith(expanded)):
            a, b = (model.first_row(name) for model in (ours, theirs))
            # one of them may have been rounded to bfloat16
            if a.shape != b.shape or float((a - b).abs().max()) > 2**-7 * float(b.abs().max()):
                raise WexpandError(
                    f"dense: {source} is not the model that {data.directory} was made from: "
                    f"{name} differs"
                )

    def inputs(
        self, groups: Sequence[Group], rows: Sequence[Tensor], progress: Any = None
    ) -> Iterator[tuple[Group, Tensor]]:
        """(group, inputs [tokens, in] on the CPU) of each group, in the model's dtype.

        :param rows: token ids, each [length]; every row starts a text of its own
        :param progress: a tqdm bar, moved by one for each row and pass
        """
        for batch in self._passes(groups, sum(len(row) for row in rows)):
            modules = [self.modules[group.linears[0]] for group in batch]
            kept: list[list[Tensor]] = [[] for _ in batch]
            with torch.no_grad():
                for seen in record_inputs(modules, (partial(self._run, row) for row in rows)):
                    for store, module in zip(kept, modules, strict=True):
                        store.append(token_rows(seen[module], None).to("cpu"))
                    if progress is not None:
                        progress.update()
            while kept:
                yield batch[len(batch) - len(kept)], torch.cat(kept.pop(0))

    def _run(self, row: Tensor) -> None:
        self.model(input_ids=row[None].to(self.device), use_cache=False)

    def passes(self, groups: Sequence[Group], tokens: int) -> int:
        """How often the model has to run over the text."""
        return sum(1 for _ in self._passes(groups, tokens))

    def _passes(self, groups: Sequence[Group], tokens: int) -> Iterator[list[Group]]:
        batch: list[Group] = []
        used = 0
        for group in groups:
            weight = self.modules[group.linears[0]].weight
            size = tokens * weight.shape[1] * weight.element_size()
            if batch and used + size > MAX_BYTES:
                yield batch
                batch, used = [], 0
            batch.append(group)
            used += size
        if batch:
            yield batch


def dataset_rows(dataset: str, model: DenseModel, tokens: int, context: int) -> list[Tensor]:
    """About `tokens` token ids of a text file or data set, in rows of at most `context`.

    A data set may hold `input_ids` instead of text, for a model without a tokenizer.
    """
    from transformers import AutoTokenizer

    from ...compress.data import calibration_rows, load_text

    longest = getattr(model.model.config.get_text_config(), "max_position_embeddings", context)
    length = max(2, min(context, longest or context, tokens))
    data, tokenizer = load_text(dataset), None
    if "input_ids" not in data.column_names:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.directory, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise WexpandError(
                f"dense: {model.directory} has no tokenizer ({reason(error)})"
            ) from None
    data = calibration_rows(
        data, tokenizer, samples=max(1, tokens // length), length=length, column="text", seed=0
    )
    rows: list[Tensor] = []
    left = tokens
    for given in data:
        ids = given["input_ids"]
        real = given.get("attention_mask") or [1] * len(ids)  # padding is no text
        ids = [token for token, counts in zip(ids, real, strict=True) if counts]
        row = torch.tensor(ids[: min(longest or len(ids), left)], dtype=torch.int64)
        if len(row):
            rows.append(row)
            left -= len(row)
        if left <= 0:
            break
    if tokens - left < MIN_TOKENS:
        raise WexpandError(
            f"dataset: {dataset} gives {tokens - left} tokens, too few for a distribution; "
            f"{MIN_TOKENS} is the least, some thousands are better"
        )
    return rows
