"""Corrupted checkpoints at vLLM's door: every one is refused by an error that names the tensor.

The layers are vLLM's own, filled as its loader would (`builders`), without an engine. One of four
checkpoints is damaged in one place, 400 times in all, drawn by hypothesis with fixed seeds, and
must end in a WexpandError: neither another exception nor a crash nor a layer that serves. All have
20 columns, which leave 4 spare bits in each row of a mask. Tried are

    fused qkv with 3 experts and biases, and the same with a dense k_proj; fused gate and up of
    which one is dense; one plain sparse linear with a bias

    tensors   1 to 8 bits flipped; another dtype (checksum right or wrong); cut or longer, by one
              or by many; the same bytes in another shape; two linears' tensors exchanged; missing;
              present but all zeros
    tensors whose checksum was made right again, so that only the content can tell: NaN or an
              infinity in weight, router or bias; a row map below 0 or above the last version; a
              mask bit past the last column; a mask bit more or less than there are weights; a
              weight more or less than the mask keeps, the config's count made right too
    config    any value of a linear's entry, a checksum or the digest edited; sizes edited and the
              digest made right again; values of other types; keys missing or unknown; a linear
              renamed or left out

Checksums and digest find damage, they are no signature: a valid tensor put there with its checksum
is another model, not a corruption. Tensors that vLLM loads by itself (embeddings, norms, layers
with no expanded linear) do not come past here: `test_fuzz_files` damages those, and the files.
"""

import hashlib
import json
import math

import pytest
import torch
from builders import GATE_UP, QKV, Checkpoint, Linear, random_pool, random_router, run
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
)
from wexpand_plugin.format.checkpoint import LinearEntry, checksum

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.serve.config import WexpandServeConfig

WIDTH, EXPERTS = 20, 3
ATTENTION, MLP, HEAD = "model.layers.0.self_attn", "model.layers.0.mlp", "model.gate"
EXAMPLES = 25
fuzz = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip


def qkv() -> Checkpoint:
    router = random_router(EXPERTS, WIDTH)
    sizes = zip(QKV, (16, 8, 8), strict=True)
    return Checkpoint([
        Linear(f"{ATTENTION}.{name}", random_pool(EXPERTS, size, WIDTH), router, torch.randn(size))
        for name, size in sizes
    ])  # fmt: skip


def mixed() -> Checkpoint:
    linears = qkv().linears
    linears[1] = Linear(linears[1].name, dense=torch.randn(8, WIDTH), bias=torch.randn(8))
    return Checkpoint(linears)


def gate_up() -> Checkpoint:
    gate, up = (f"{MLP}.{name}" for name in GATE_UP)
    return Checkpoint([
        Linear(gate, random_pool(EXPERTS, 12, WIDTH), random_router(EXPERTS, WIDTH)),
        Linear(up, dense=torch.randn(12, WIDTH)),
    ])  # fmt: skip


def plain() -> Checkpoint:
    return Checkpoint([Linear(HEAD, random_pool(1, 7, WIDTH), None, torch.randn(7))])


def load(checkpoint: Checkpoint, values: dict | None = None):
    """vLLM's layer for `checkpoint`, filled; `values` replaces its quantization_config."""
    config = checkpoint.quant_config()
    if values is not None:
        packed = config.packed_modules_mapping
        config = WexpandServeConfig.from_config(values)
        config.packed_modules_mapping = packed
    name = checkpoint.linears[0].name
    if name == HEAD:
        shards: dict[str, object] = {}
        layer = ReplicatedLinear(WIDTH, 7, quant_config=config, prefix=HEAD, disable_tp=True)
    elif name.startswith(MLP):
        shards = dict(GATE_UP)
        layer = MergedColumnParallelLinear(
            WIDTH, [12, 12], bias=False, quant_config=config, prefix=f"{MLP}.gate_up_proj",
            disable_tp=True,
        )  # fmt: skip
    else:
        shards = dict(QKV)
        layer = QKVParallelLinear(WIDTH, 4, 4, 2, bias=True, quant_config=config,
                                  prefix=f"{ATTENTION}.qkv_proj", disable_tp=True)  # fmt: skip
    checkpoint.fill(layer, shards)
    return layer


def made(build) -> Checkpoint:
    torch.manual_seed(0)
    return build()


BUILDS = [qkv, mixed, gate_up, plain]
checkpoints = st.sampled_from(BUILDS).map(made)


def tensor_of(draw, checkpoint: Checkpoint, *kinds: str) -> str:
    """The name of a tensor of these kinds of an expanded linear; without kinds, of any tensor."""
    names = [
        f"{linear}.{kind}"
        for linear, entry in checkpoint.config.linears.items()
        for kind in entry.shapes()
        if kind in kinds
    ]
    if not kinds:
        names = sorted(checkpoint.tensors)
    assume(names)
    return draw(st.sampled_from(names))


def reseal(checkpoint: Checkpoint, name: str) -> None:
    """Let the checksum of tensor `name` be right again, and the digest of the config too."""
    sums = checkpoint.config.checksums | {name: checksum(checkpoint.tensors[name])}
    checkpoint.config = checkpoint.config.model_copy(update={"checksums": sums}).seal()


def refused(checkpoint: Checkpoint, *names: str) -> None:
    """Loading raises, and the error names one of these tensors first."""
    with pytest.raises(WexpandError) as error:
        load(checkpoint)
    assert any(str(error.value).startswith(f"{name}:") for name in names), error.value


def names_of(tensor: str) -> list[str]:
    """A dense weight of another shape is noticed by its bias, or beside vLLM's layer."""
    linear = tensor.removesuffix(".weight")
    return [tensor] if linear == tensor else [tensor, linear, f"{linear}.bias"]


# each takes hypothesis' draw and a checkpoint, damages it, and returns the names that fit


def flip_bits(draw, checkpoint):
    name = tensor_of(draw, checkpoint)
    damaged = checkpoint.tensors[name].clone()
    data = damaged.view(-1).view(torch.uint8)
    bits = draw(st.sets(st.integers(0, 8 * data.numel() - 1), min_size=1, max_size=8))
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    checkpoint.tensors[name] = damaged
    return [name]


def wrong_dtype(draw, checkpoint):
    name = tensor_of(draw, checkpoint)
    old = checkpoint.tensors[name]
    others = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64,
              torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)  # fmt: skip
    dtype = draw(st.sampled_from([d for d in others if d != old.dtype]))
    checkpoint.tensors[name] = old.to(dtype)
    # float weights of another float dtype are a valid model if their checksum says so
    if not (old.dtype == torch.float32 and dtype.is_floating_point) and draw(st.booleans()):
        reseal(checkpoint, name)
    return [name]


def wrong_length(draw, checkpoint):
    name = tensor_of(draw, checkpoint)
    old = checkpoint.tensors[name]
    by = draw(st.sampled_from([-len(old), -len(old) // 2, -1, 1, len(old)]))
    changed = old[:by] if by < 0 else torch.cat([old, old[:by]])
    checkpoint.tensors[name] = changed if by > -len(old) else old[:0]
    if draw(st.booleans()):
        reseal(checkpoint, name)
    return names_of(name)


def same_bytes_other_shape(draw, checkpoint):
    name = tensor_of(draw, checkpoint)
    old = checkpoint.tensors[name]
    shapes = [(-1,), (1, -1), (-1, 1), (old.numel() // 2, -1), tuple(old.shape[::-1]), (-1, 1, 1)]
    shapes = [s for s in shapes if 0 not in s and (s[0] == -1 or old.numel() % s[0] == 0)]
    changed = old.reshape(draw(st.sampled_from(shapes)))
    assume(changed.shape != old.shape)
    checkpoint.tensors[name] = changed
    return names_of(name)


def exchanged(draw, checkpoint):
    name = tensor_of(draw, checkpoint)
    other = tensor_of(draw, checkpoint)
    a, b = checkpoint.tensors[name], checkpoint.tensors[other]
    assume(not (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)))
    checkpoint.tensors |= {name: b, other: a}
    return [name, other]


def missing(draw, checkpoint):
    name = tensor_of(draw, checkpoint)
    del checkpoint.tensors[name]
    return [name]


def all_zeros(draw, checkpoint):
    name = tensor_of(draw, checkpoint)
    checkpoint.tensors[name] = torch.zeros_like(checkpoint.tensors[name])
    return [name]


def not_finite(draw, checkpoint):
    name = tensor_of(draw, checkpoint)
    assume(checkpoint.tensors[name].is_floating_point())
    damaged = checkpoint.tensors[name].clone()
    place = draw(st.integers(0, damaged.numel() - 1))
    damaged.view(-1)[place] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    checkpoint.tensors[name] = damaged
    reseal(checkpoint, name)
    return [name]


def row_map_out_of_range(draw, checkpoint):
    name = tensor_of(draw, checkpoint, "row_map")
    versions = checkpoint.config.linears[name.removesuffix(".row_map")].versions
    outside = st.integers(-(2**31), -1) | st.integers(versions, 2**31 - 1)
    damaged = checkpoint.tensors[name].clone()
    place = draw(st.integers(0, damaged.numel() - 1))
    damaged.view(-1)[place] = draw(outside | st.sampled_from([-1, versions]))
    checkpoint.tensors[name] = damaged
    reseal(checkpoint, name)
    return [name]


def mask_bit_past_the_last_column(draw, checkpoint):
    """With the bit or without one of the others, so that the count is right or not."""
    name = tensor_of(draw, checkpoint, "weight_mask")
    damaged = checkpoint.tensors[name].clone()
    row = draw(st.integers(0, len(damaged) - 1))
    damaged[row, -1] |= 1 << draw(st.integers(WIDTH % 8, 7))
    if draw(st.booleans()) and damaged[row, 0]:
        damaged[row, 0] &= damaged[row, 0] - 1
    checkpoint.tensors[name] = damaged
    reseal(checkpoint, name)
    return [name]


def mask_count(draw, checkpoint):
    name = tensor_of(draw, checkpoint, "weight_mask")
    damaged = checkpoint.tensors[name].clone()
    row, column = draw(st.integers(0, len(damaged) - 1)), draw(st.integers(0, WIDTH - 1))
    damaged[row, column // 8] ^= 1 << column % 8
    checkpoint.tensors[name] = damaged
    reseal(checkpoint, name)
    return [name]


def weight_count(draw, checkpoint):
    """The config counts the weights as they are; only the mask knows better."""
    name = tensor_of(draw, checkpoint, "weight")
    linear, old = name.removesuffix(".weight"), checkpoint.tensors[name]
    by = draw(st.integers(-old.numel(), old.numel() // 2).filter(bool))
    changed = torch.cat([old, old[:by]]) if by > 0 else old[: old.numel() + by]
    checkpoint.tensors[name] = changed.contiguous()
    entry = checkpoint.config.linears[linear].model_copy(update={"nnz": changed.numel()})
    linears = checkpoint.config.linears | {linear: entry}
    checkpoint.config = checkpoint.config.model_copy(update={"linears": linears})
    reseal(checkpoint, name)
    return [f"{linear}.weight_mask"]


DAMAGES = [
    flip_bits, wrong_dtype, wrong_length, same_bytes_other_shape, exchanged, missing, all_zeros,
    not_finite, row_map_out_of_range, mask_bit_past_the_last_column, mask_count, weight_count,
]  # fmt: skip


@pytest.mark.parametrize("build", BUILDS)
def test_undamaged_checkpoints_load(build):
    """What the corruptions below start from serves, so it is they that are refused."""
    checkpoint = made(build)
    x = torch.randn(5, WIDTH)
    truth = torch.cat([linear.forward(x) for linear in checkpoint.linears], dim=1)
    assert (run(load(checkpoint), x).double() - truth).abs().max() < 1e-5


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_tensor_is_refused_by_name(damage):
    tried = 0

    @fuzz
    @given(st.data(), checkpoints)
    def corrupt(data, checkpoint):
        nonlocal tried
        names = damage(data.draw, checkpoint)
        tried += 1
        refused(checkpoint, *names)

    corrupt()
    assert tried >= EXAMPLES * 0.7


# config.json


def linear_of(draw, values: dict) -> str:
    return draw(st.sampled_from(sorted(values["linears"])))


def digest(values: dict) -> str:
    """What seals `values`, made here from the description of the format."""
    rest = {key: value for key, value in values.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


SIZES = ("in_features", "out_features", "experts", "versions", "nnz")
sizes = st.integers(-3, 80) | st.sampled_from([2**31 - 1, 2**31, 2**63, 10**30])


@fuzz
@given(st.data(), checkpoints)
def test_edited_config_is_refused(data, checkpoint):
    """Any value, with the digest left as it was."""
    values = checkpoint.config.model_dump()
    place = data.draw(st.sampled_from(["linear", "checksum", "digest", "made_by", "model_digest"]))
    if place == "linear":
        entry, key = (
            values["linears"][linear_of(data.draw, values)],
            data.draw(st.sampled_from([*SIZES, "bias", "tokens"])),
        )
        new = {"bias": not entry["bias"], "tokens": [5] * entry["experts"]}.get(key)
        entry[key], old = data.draw(sizes) if new is None else new, entry[key]
        assume(entry[key] != old)
    elif place == "checksum":
        name = data.draw(st.sampled_from(sorted(values["checksums"])))
        values["checksums"][name] = f"{data.draw(st.integers(0, 2**32 - 1)):08x}"
        assume(values["checksums"][name] != checkpoint.config.checksums[name])
    elif place == "made_by":
        values["made_by"]["recipe"] = data.draw(st.text())
    else:
        values[place] = data.draw(st.text(alphabet="0123456789abcdef", max_size=64))
        assume(values[place] != getattr(checkpoint.config, place))
    with pytest.raises(WexpandError, match="quantization_config"):
        load(checkpoint, values)


@fuzz
@given(st.data(), checkpoints)
def test_edited_size_with_its_digest_is_refused(data, checkpoint):
    """Impossible sizes are refused when read, possible ones by the tensor that has another."""
    values = checkpoint.config.model_dump()
    linear = linear_of(data.draw, values)
    entry = values["linears"][linear]
    for key in data.draw(st.sets(st.sampled_from(SIZES), min_size=1, max_size=3)):
        # widths up to 24 fill the mask's three bytes: its shape does not tell them apart
        near = st.integers(max(entry[key] - 4, 1), entry[key] + 4)
        entry[key] = data.draw(near | sizes)
    assume(entry != checkpoint.config.model_dump()["linears"][linear])
    values["digest"] = digest(values)
    with pytest.raises(WexpandError) as error:
        load(checkpoint, values)
    assert linear in str(error.value)
    assert "was changed after it was written" not in str(error.value)


@fuzz
@given(st.data(), checkpoints)
def test_config_of_other_types_is_refused(data, checkpoint):
    values = checkpoint.config.model_dump()
    linear = linear_of(data.draw, values)
    odd = st.sampled_from([None, [], {}, "many", 1.5, -1, math.nan, [1, 2], {"a": 1}, "é" * 50])
    where = data.draw(st.sampled_from(["size", "entry", "linears", "checksums", "unknown", "lost"]))
    if where == "size":
        values["linears"][linear][data.draw(st.sampled_from(SIZES))] = data.draw(odd)
    elif where == "entry":
        values["linears"][linear] = data.draw(odd)
    elif where in ("linears", "checksums"):
        values[where] = data.draw(odd.filter(lambda value: value not in ({}, {"a": 1})))
    elif where == "unknown":
        values["linears"][linear][data.draw(st.text(min_size=1))] = 1
    else:
        del values["linears"][linear][data.draw(st.sampled_from(SIZES))]
    with pytest.raises(WexpandError, match="quantization_config"):
        load(checkpoint, values)


@fuzz
@given(st.data())
def test_linear_renamed_or_left_out_is_refused(data):
    """Its tensors still arrive, where vLLM now expects a dense weight."""
    checkpoint = made(qkv)
    linear = data.draw(st.sampled_from(sorted(checkpoint.config.linears)))
    linears = dict(checkpoint.config.linears)
    entry: LinearEntry = linears.pop(linear)
    if data.draw(st.booleans()):
        linears[data.draw(st.text()) + linear] = entry
    assume(set(linears) != set(checkpoint.config.linears))
    checkpoint.config = checkpoint.config.model_copy(update={"linears": linears}).seal()
    refused(checkpoint, f"{linear}.weight")
