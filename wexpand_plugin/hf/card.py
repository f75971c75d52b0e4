"""The model card: the README.md of a saved model, as users of the hub look for it.

It says what the model is made from, what it weighs, how it was made and how to serve it, as far as
the checkpoint itself tells. The licence and language in the base model's card are carried over, and
that card is kept beside as README.base_model.md. The last line holds a checksum of the rest: a card
that somebody has written in, like any README that is not ours, is never overwritten.
"""

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..format.config import LinearEntry
from ..format.model_dir import ModelDir

__all__ = ["BASE_CARD", "CARD", "is_card", "write_card"]

CARD, BASE_CARD = "README.md", "README.base_model.md"

_MARK = "<!-- written by wexpand, {:08x}: a card that was changed is never replaced -->\n"
# what of a base model's card holds for what is made from it
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
# of `made_by`: not settings
_APART = ("before", "compress", "data", "dial", "model", "predicted_loss", "tuned", "tuned_model",
          "versions", "wexpand")  # fmt: skip

_TEXT = """# {title}

{what} It is read by [vLLM](https://github.com/vllm-project/vllm) and by
[transformers](https://github.com/huggingface/transformers) where wexpand-plugin is installed.

## Serve it

```console
$ vllm serve DIR
```

In transformers, for checking and evaluation:

```python
import wexpand_plugin
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIR)
tokenizer = AutoTokenizer.from_pretrained(DIR)
```

`wexpand verify DIR` compares every byte with its checksum.

## Size

{sizes}

{kinds}

## Accuracy

{accuracy}

## How it was made

```yaml
{recipe}```

{about}
"""


def write_card(
    directory: Path, target: str | Path, made_by: Mapping[str, Any], sources: Iterable[str | Path]
) -> None:
    """Write the card of the checkpoint in `directory`, which is about to become `target`.

    Nothing is written where `target` has a README that is not an unchanged card of ours.

    :param made_by: what config.json records of the run
    :param sources: directories or hub ids that the model may have come from; the first one with a
        card is asked for licence and language
    """
    old = Path(target) / CARD
    if (old.exists() and not is_card(old)) or (directory / CARD).exists():
        return
    base = _base_card(sources)
    text = _card(ModelDir(directory), made_by, _front_matter(base))
    text += _MARK.format(zlib.crc32(text.encode()))
    (directory / CARD).write_text(text, encoding="utf8")
    if base:
        (directory / BASE_CARD).write_text(base, encoding="utf8")


def is_card(path: Path) -> bool:
    """Whether a file is a card of ours as it was written."""
    text = path.read_text(encoding="utf8", errors="replace")
    body, _, last = text.rstrip("\n").rpartition("\n")
    body += "\n"
    return last + "\n" == _MARK.format(zlib.crc32(body.encode()))


def _base_card(sources: Iterable[str | Path]) -> str:
    """The card of the base model, from the first source that has one; without the network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for source in sources:
        path = Path(source)
        found: list[Any] = [path / BASE_CARD, path / CARD]
        if not path.is_dir():
            try:
                found = [try_to_load_from_cache(str(source), CARD)]
            except HFValidationError:  # neither a directory nor the id of a model
                continue
        for file in found:
            if isinstance(file, str | Path) and Path(file).is_file() and not is_card(Path(file)):
                return Path(file).read_text(encoding="utf8", errors="replace")
    return ""


def _front_matter(card: str) -> dict[str, Any]:
    """The YAML at the beginning of a card; empty if there is none that can be read."""
    import yaml

    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    try:
        values = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _card(model: ModelDir, made_by: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    import yaml

    entries = list(model.config.linears.values())
    name, identifier = _base_model(str(made_by.get("model") or ""))
    front = {key: base[key] for key in _INHERITED if key in base}
    if identifier:
        front |= {"base_model": identifier, "base_model_relation": "quantized"}
    front |= {"library_name": "vllm", "tags": _tags(entries, made_by)}
    front.setdefault("pipeline_tag", "text-generation")
    settings = {key: value for key, value in made_by.items() if key not in _APART}
    body = _TEXT.format(
        title=f"{name or 'A model'}, compressed",
        what=_what(entries, name),
        sizes=_sizes(model, entries),
        kinds=_kinds(entries),
        accuracy=_accuracy(made_by),
        # by way of JSON, so that nothing but plain values is left
        recipe=yaml.safe_dump(json.loads(json.dumps(settings, default=str)), sort_keys=False),
        about=_about(made_by),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{body}"


def _base_model(model: str) -> tuple[str, str]:
    """What a model is called, and its id on the hub if it has one, from a directory or an id."""
    path = Path(model)
    if cached := re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", path.as_posix()):
        return cached.group(2), "/".join(cached.groups())
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not path.exists():
        return path.name, model
    return path.resolve().name if model else "", ""


def _tags(entries: list[LinearEntry], made_by: Mapping[str, Any]) -> list[str]:
    tags = {"wexpand", "vllm"} | {e.values for e in entries if e.values.startswith("int")}
    if any(e.nnz < e.versions * e.in_features for e in entries):
        tags.add("sparse")
    if any(e.experts > 1 for e in entries):
        tags.add("sparse-expansion")
    if "modifier" in made_by:
        tags.add("llm-compressor")
    return sorted(tags)


def _what(entries: list[LinearEntry], name: str) -> str:
    count = f"{len(entries)} linear{'s' * (len(entries) > 1)}"
    return f"{name or 'A dense model'} with {count} compressed by wexpand-plugin."


def _sizes(model: ModelDir, entries: list[LinearEntry]) -> str:
    config = model.config
    names = [tensor for name in config.linears for tensor in config.tensors_of(name)]
    biases = sum(model.headers[n].nbytes for n in names if n.endswith(".bias"))
    stored = sum(model.headers[n].nbytes for n in names if n in model.headers) - biases
    dense = sum(entry.dense_bytes for entry in entries)
    every = sum(header.nbytes for header in model.headers.values())
    weights = sum(entry.in_features * entry.out_features for entry in entries)
    unit, size = ("GB", 1e9) if every >= 1e9 else ("MB", 1e6)
    rows = [
        (f"the compressed linears, {unit}", stored / size, dense / size),
        ("... bits per weight", 8 * stored / weights, 8 * dense / weights),
        (f"all tensors, {unit}", every / size, (every - stored + dense) / size),
    ]
    lines = [f"| {label} | {here:.2f} | {before:.2f} |" for label, here, before in rows]
    return "\n".join(["| | here | dense |", "|---|---|---|", *lines])


def _kinds(entries: list[LinearEntry]) -> str:
    kept = sum(entry.nnz for entry in entries)
    places = sum(entry.versions * entry.in_features for entry in entries)
    said = [f"{1 - kept / places:.1%} zeros", f"kept values in {_values(entries)}"]
    for word, most in (
        ("experts", max(entry.experts for entry in entries)),
        ("clusters with a bias each", max(e.clusters * e.cluster_bias for e in entries)),
    ):
        if most > 1:
            said.append(f"up to {most} {word} per linear")
    return f"{'; '.join(said)}."


def _values(entries: list[LinearEntry]) -> str:
    """The codecs: `bfloat16, and int3 and int4 in groups of 128`."""
    grouped: dict[str, list[str]] = {}
    for codec in sorted({str(entry.codec) for entry in entries}):
        kind, _, groups = codec.partition(", ")
        grouped.setdefault(f" in {groups}" if groups else "", []).append(kind)
    listed = [
        " and ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1]))) + groups
        for groups, kinds in grouped.items()
    ]
    return ", and ".join(listed)


def _about(made_by: Mapping[str, Any]) -> str:
    """Versions and calibration data, as far as they were recorded."""
    versions, data = made_by.get("versions"), made_by.get("data")
    if not isinstance(versions, Mapping):
        versions = {"wexpand": made_by.get("wexpand", "of an unknown version")}
    said = f"By {', '.join(f'{name} {version}' for name, version in versions.items())}."
    if isinstance(data, Mapping) and "tokens_counted" in data:
        said += f" Calibrated on {data['tokens_counted']} tokens."
    return said


def _accuracy(made_by: Mapping[str, Any]) -> str:
    """What is known of it: predicted loss, and errors of blocks, measured while they were tuned."""
    said = []
    predicted, tuned = made_by.get("predicted_loss"), made_by.get("tuned")
    if isinstance(predicted, Mapping) and predicted:
        total = sum(loss for loss in predicted.values() if isinstance(loss, float | int))
        said.append(f"Predicted loss over the dense model's, before tuning: {total:.3f} nats.")
    errors = [pair for pair in tuned.values() if pair] if isinstance(tuned, Mapping) else []
    if errors:
        before, after = (sum(pair[i] for pair in errors) / len(errors) for i in (0, 1))
        said.append(
            "Relative squared error of a block's output, on tokens held out from tuning, mean over "
            f"{len(errors)} blocks: {before:.3g} before tuning, {after:.3g} after."
        )
    if whole := made_by.get("tuned_model"):
        said.append(
            f"Divergence of its predictions from the dense model's there: {whole[0]:.3g} nats per "
            f"token before the whole model was tuned, {whole[1]:.3g} after."
        )
    said.append(
        "The model's loss was not measured when it was saved; to measure: `lm_eval --model vllm "
        "--model_args pretrained=DIR --tasks ...`"
    )
    return " ".join(said)
