"""Calibration data: found, read and cut into rows of tokens, or refused before work starts.

Texts are joined and cut into rows of equal length, so that no token is spent on padding. Data that
is tokenised already is taken as it is; its masks say which of its tokens count.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WexpandError, reason

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

__all__ = ["calibration_rows", "check_rows", "cut_rows", "load_text", "padded"]

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_text(
    dataset: str, *, config: str | None = None, split: str = "train", column: str = "text"
) -> "Dataset":
    """A data set with a text column: a local file or directory, or the id of a hub data set.

    :raises WexpandError: it is not there, cannot be read, is empty, or has neither `column` nor
        `input_ids`
    """
    import datasets

    path = Path(dataset)
    loaded: Any
    if path.is_file():
        if path.suffix not in FORMATS:
            raise WexpandError(f"{path}: ends in {path.suffix!r}, not in {', '.join(FORMATS)}")
        if not path.stat().st_size:
            raise WexpandError(f"{path}: is empty")
    elif not path.exists() and (path.suffix in FORMATS or dataset.startswith((".", "/", "~"))):
        raise WexpandError(f"dataset: {dataset!r}: there is no such file")  # no id on the hub
    try:
        if path.is_dir() and (path / "dataset_info.json").exists():
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file():
            kind = FORMATS[path.suffix]
            options = {"sample_by": "document"} if kind == "text" else {}
            loaded = datasets.load_dataset(kind, data_files=str(path), split="train", **options)
        else:
            loaded = datasets.load_dataset(dataset, config, split=split)
    except Exception as error:  # the library raises its own, those of pyarrow and of the hub
        if path.is_file():
            problem = f"cannot be read as {FORMATS[path.suffix]}"
        elif path.is_dir():
            problem = "is a directory that holds no saved data set, and no files that make one"
        else:
            problem = "is no local file, and the hub did not give it"
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise WexpandError(f"dataset: {dataset!r} {problem} ({reason(cause)})") from None
    if isinstance(loaded, dict):
        if split not in loaded:
            raise WexpandError(f"split: {split!r} is not one of {', '.join(loaded)} of {dataset!r}")
        loaded = loaded[split]
    if not len(loaded):
        raise WexpandError(f"dataset: {dataset!r} is empty")
    if not {column, "input_ids"} & set(loaded.column_names):
        raise WexpandError(
            f"dataset: {dataset!r} has no column {column!r}, only {', '.join(loaded.column_names)}"
        )
    return loaded


def calibration_rows(
    data: "Dataset", tokenizer: Any, *, samples: int, length: int, column: str, seed: int
) -> "Dataset":
    """`samples` rows of `length` tokens each, from the texts in random order, without padding.

    Chats, lists of messages with a role and content, are rendered by the tokenizer's template.

    :return: a data set with `input_ids` and `attention_mask`; the rows of `data`, if they are
        tokenised already, with their masks
    :raises WexpandError: neither text nor chat; the texts are too short for a single row
    """
    from datasets import Dataset

    from .calibration import MASKS

    if "input_ids" in data.column_names:
        return data.select_columns([c for c in ("input_ids", *MASKS) if c in data.column_names])
    ids: list[int] = []
    for value in data.shuffle(seed=seed)[column]:
        ids += _tokens(value, tokenizer, column)
        if len(ids) >= samples * length:
            break
    rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)][:samples]
    if not rows:
        raise WexpandError(
            f"dataset: {len(ids)} tokens do not fill one row of {length}; use more text or a "
            "smaller --max-seq-length"
        )
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length] * len(rows)})


def _tokens(value: Any, tokenizer: Any, column: str) -> list[int]:
    """Token ids of a text, after a token that begins it, or of a chat, which brings its own."""
    if isinstance(value, str):
        begin = tokenizer.bos_token_id if value else None
        text, ids = value, [] if begin is None else [begin]
    elif isinstance(value, list) and all(isinstance(message, dict) for message in value):
        if not tokenizer.chat_template:
            raise WexpandError(
                f"dataset: column {column!r} holds chats, and the tokenizer has no chat template; "
                "use a column of text, or the model's instruction-tuned sibling"
            )
        try:
            text, ids = tokenizer.apply_chat_template(value, tokenize=False), []
        except Exception as error:  # whatever the template raises
            raise WexpandError(
                f"dataset: column {column!r}: the tokenizer's chat template refuses "
                f"{str(value)[:80]!r} ({reason(error)})"
            ) from None
    else:
        raise WexpandError(
            f"dataset: column {column!r} holds {str(value)[:80]!r} where a text or a list of "
            "messages should be; remove such rows, or name another column (--text-column)"
        )
    return ids + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def check_rows(rows: "Dataset", vocabulary: int | None, length: int) -> int:
    """How many tokens of `rows` count: of each row's first `length`, those that no mask leaves out.

    :param vocabulary: how many tokens the model knows, None: not known
    :raises WexpandError: what are no lists of whole numbers; a row without tokens, a mask of
        another length, a token that the model does not know
    """
    import torch

    from .calibration import MASKS, counted_tokens

    for name in ("input_ids", *MASKS):
        feature = rows.features.get(name)
        kind = str(getattr(getattr(feature, "feature", feature), "dtype", feature))
        if feature is not None and not kind.startswith(("int", "uint", "bool", "null")):
            raise WexpandError(
                f"dataset: column {name!r} holds {kind} where lists of whole numbers should be"
            )
    found = 0
    for number, row in enumerate(rows):
        ids = row["input_ids"]
        if not ids:
            raise WexpandError(f"dataset: input_ids of row {number} are empty; remove such rows")
        wrong = [i for i in (min(ids), max(ids)) if i < 0 or vocabulary and i >= vocabulary]
        if wrong:
            raise WexpandError(
                f"dataset: row {number} holds token id {wrong[0]}, outside the {vocabulary} of the "
                "model's vocabulary; tokenise the data with this model's tokenizer"
            )
        tensors = {name: torch.tensor(row[name]) for name in ("input_ids", *MASKS) if row.get(name)}
        counts = counted_tokens(tensors)
        assert counts is not None
        found += int(counts[:length].sum())
    return found


def cut_rows(rows: "Dataset", length: int) -> "Dataset":
    """The first `length` tokens of each row, and what its masks say of them."""
    if max(map(len, rows["input_ids"])) <= length:
        return rows
    return rows.map(lambda row: {key: value and value[:length] for key, value in row.items()})


def padded(rows: Sequence[dict[str, Any]]) -> dict[str, "Tensor"]:
    """A batch of `rows`, each tensor int64 [rows, longest row]: where one ends before others, no
    mask counts what follows. Rows without a mask are counted whole."""
    import torch

    from .calibration import MASKS

    longest = max(len(row["input_ids"]) for row in rows)
    found: dict[str, Tensor] = {}
    for key in ("input_ids", *MASKS):
        if key == "loss_mask" and not any(row.get(key) for row in rows):
            continue
        values = [row.get(key) or [1] * len(row["input_ids"]) for row in rows]
        found[key] = torch.tensor([value + [0] * (longest - len(value)) for value in values])
    return found
