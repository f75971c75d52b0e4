"""Damaged tensors at vLLM's door: structure that is wrong is refused by an error that names the
tensor, and whatever loads, computes.

The layers are vLLM's own, filled as its loader would (`builders`), without an engine. One of four
checkpoints is damaged in one place, drawn by hypothesis with fixed seeds. All have 20 columns,
which leave 4 spare bits in each row of a mask. Tried are

    fused qkv with 3 experts and biases, and the same with a dense k_proj; fused gate and up of
    which one is dense; one plain sparse linear with a bias

    tensors   another dtype; cut or longer, by one or by many; the same bytes in another shape;
              missing; a tensor too many; NaN or an infinity in weight, router or bias; a row map
              that wants more or fewer versions; a mask bit past the last column; a mask bit more or
              less than there are weights; a weight more or less, the config's count made right
    config    any value edited; sizes edited and the digest made right again; values of other types;
              keys missing or unknown; a linear renamed or left out
    values    1 to 8 bits flipped in any tensor: a layer refuses it or computes with it, and nothing
              else happens. Only checksums can tell (`test_loading.TestVerify`, and
              `tests/tools/test_verify.py` for any byte of any file)
"""

import hashlib
import json
import math

import pytest
import torch
from builders import (
    GATE_UP,
    QKV,
    Checkpoint,
    Linear,
    as_rank,
    groups_of,
    random_pool,
    random_router,
    run,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
)

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.config import KINDS, CheckpointConfig
from wexpand_plugin.serve.config import WexpandConfig

WIDTH, EXPERTS = 20, 3
ATTENTION, MLP, HEAD = "model.layers.0.self_attn", "model.layers.0.mlp", "model.gate"
EXAMPLES = 25
fuzz = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    as_rank(monkeypatch, 0, 1)


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
        config = WexpandConfig.from_config(values)
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
        name
        for name in sorted(checkpoint.tensors)
        for linear, _, kind in [name.rpartition(".")]
        if not kinds or (kind in kinds and linear in checkpoint.config.linears)
    ]
    assume(names)
    return draw(st.sampled_from(names))


def names_of(tensor: str) -> list[str]:
    """A dense weight of another shape is noticed by its bias, or beside vLLM's layer."""
    linear = tensor.removesuffix(".weight")
    return [tensor] if linear == tensor else [tensor, linear, f"{linear}.bias"]


# each takes hypothesis' draw and a checkpoint, damages it, and returns the names that fit


def wrong_dtype(draw, checkpoint):
    name = tensor_of(draw, checkpoint)
    old = checkpoint.tensors[name]
    others = [torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.bool]
    dtype = draw(st.sampled_from(others))
    checkpoint.tensors[name] = old.to(dtype)
    return [name]


def wrong_length(draw, checkpoint):
    name = tensor_of(draw, checkpoint)
    old = checkpoint.tensors[name]
    by = draw(st.sampled_from([-len(old), -len(old) // 2, -1, 1, len(old)]))
    changed = old[:by] if by < 0 else torch.cat([old, old[:by]])
    checkpoint.tensors[name] = changed if by > -len(old) else old[:0]
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


def missing(draw, checkpoint):
    name = tensor_of(draw, checkpoint)
    linear = name.removesuffix(".bias")
    # a dense linear's bias is in no list, and vLLM's own loader does not miss it either
    assume(linear == name or linear in checkpoint.config.linears)
    del checkpoint.tensors[name]
    return [name]


def too_many(draw, checkpoint):
    linear, found = draw(st.sampled_from(sorted(checkpoint.config.linears.items())))
    name = f"{linear}.{draw(st.sampled_from(sorted(set(KINDS) - set(found.shapes()))))}"
    assume(not name.endswith(".bias"))  # there may be one of zeros
    checkpoint.tensors[name] = torch.ones(draw(st.integers(1, 40)), 1, dtype=torch.float16)
    return [name]


def not_finite(draw, checkpoint):
    name = tensor_of(draw, checkpoint)
    assume(checkpoint.tensors[name].is_floating_point())
    damaged = checkpoint.tensors[name].clone()
    place = draw(st.integers(0, damaged.numel() - 1))
    damaged.view(-1)[place] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    checkpoint.tensors[name] = damaged
    return [name]


def row_map_of_another_pool(draw, checkpoint):
    """A neuron has more versions by it than there are, or fewer."""
    name = tensor_of(draw, checkpoint, "row_map")
    damaged = checkpoint.tensors[name].clone()
    neuron = draw(st.integers(0, damaged.shape[1] - 1))
    most = int(damaged[:, neuron].max())
    damaged[0, neuron] = draw(st.integers(most + 1, 255))
    if most and draw(st.booleans()):
        damaged[:, neuron] = 0
    checkpoint.tensors[name] = damaged
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
    return [name]


def mask_count(draw, checkpoint):
    name = tensor_of(draw, checkpoint, "weight_mask")
    damaged = checkpoint.tensors[name].clone()
    row, column = draw(st.integers(0, len(damaged) - 1)), draw(st.integers(0, WIDTH - 1))
    damaged[row, column // 8] ^= 1 << column % 8
    checkpoint.tensors[name] = damaged
    return [name]


def weight_count(draw, checkpoint):
    """The config counts the weights as they are; only the mask knows better."""
    name = tensor_of(draw, checkpoint, "weight")
    linear, old = name.removesuffix(".weight"), checkpoint.tensors[name]
    by = draw(st.integers(-old.numel(), old.numel() // 2).filter(bool))
    changed = torch.cat([old, old[:by]]) if by > 0 else old[: old.numel() + by]
    checkpoint.tensors[name] = changed.contiguous()
    values = checkpoint.config.model_dump(mode="json")
    entry(values, linear).update(nnz=changed.numel(), elements=changed.numel())
    checkpoint.config = CheckpointConfig.model_validate(values).seal()
    return [f"{linear}.weight_mask"]


DAMAGES = [
    wrong_dtype, wrong_length, same_bytes_other_shape, missing, too_many, not_finite,
    row_map_of_another_pool, mask_bit_past_the_last_column, mask_count, weight_count,
]  # fmt: skip


@pytest.mark.parametrize("build", BUILDS)
def test_undamaged_checkpoints_load(build):
    """What the corruptions below start from serves, so it is they that are refused."""
    checkpoint = made(build)
    x = torch.randn(5, WIDTH)
    truth = torch.cat([linear.forward(x) for linear in checkpoint.linears], dim=1)
    assert (run(load(checkpoint), x).double() - truth).abs().max() < 1e-5


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_structure_is_refused_by_name(damage):
    tried = 0

    @fuzz
    @given(st.data(), checkpoints)
    def corrupt(data, checkpoint):
        nonlocal tried
        names = damage(data.draw, checkpoint)
        tried += 1
        with pytest.raises(WexpandError) as error:
            load(checkpoint)
        assert any(str(error.value).startswith(f"{name}:") for name in names), error.value

    corrupt()
    assert tried >= EXAMPLES * 0.7


@fuzz
@given(st.data(), checkpoints)
def test_damaged_values_are_refused_or_computed_with(data, checkpoint):
    name = tensor_of(data.draw, checkpoint)
    damaged = checkpoint.tensors[name].clone()
    octets = damaged.view(-1).view(torch.uint8)
    bits = data.draw(st.sets(st.integers(0, 8 * octets.numel() - 1), min_size=1, max_size=8))
    for bit in bits:
        octets[bit // 8] ^= 1 << bit % 8
    checkpoint.tensors[name] = damaged
    try:
        layer = load(checkpoint)
    except WexpandError as error:
        assert error.tensor is not None
    else:
        run(layer, torch.randn(5, WIDTH))


# config.json


def entry(values: dict, linear: str) -> dict:
    return next(
        group["linears"][linear] for group in values["groups"] if linear in group["linears"]
    )


def places(values: dict) -> list[tuple[dict, str, object]]:
    """(object, key, value) of each size that config.json gives of a linear."""
    groups = values["groups"]
    objects = groups + [linear for group in groups for linear in group["linears"].values()]
    return [(o, key, value) for o in objects for key, value in o.items() if type(value) is int]


def digest(values: dict) -> str:
    """What seals `values`, made here from the description of the format."""
    rest = {key: value for key, value in values.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


SIZES = st.integers(-3, 80) | st.sampled_from([2**31 - 1, 2**31, 2**63, 10**30])


@fuzz
@given(st.data(), checkpoints)
def test_edited_config_is_refused(data, checkpoint):
    """Any value, with the digest left as it was."""
    values = checkpoint.config.model_dump(mode="json")
    kind = data.draw(st.sampled_from(["size", "bias", "digest", "made_by"]))
    linear = data.draw(st.sampled_from(sorted(checkpoint.config.linears)))
    if kind == "size":
        where, key, _ = data.draw(st.sampled_from(places(values)))
        where[key] = data.draw(SIZES)
    elif kind == "bias":
        entry(values, linear)["bias"] ^= True
    elif kind == "made_by":
        values["made_by"]["recipe"] = data.draw(st.text())
    else:
        values["digest"] = data.draw(st.text(alphabet="0123456789abcdef", max_size=64))
    assume(values != checkpoint.config.model_dump(mode="json"))
    with pytest.raises(WexpandError, match="quantization_config"):
        load(checkpoint, values)


@fuzz
@given(st.data(), checkpoints)
def test_edited_size_with_its_digest_is_refused(data, checkpoint):
    """Impossible sizes are refused when read, possible ones by the tensor that has another."""
    values = checkpoint.config.model_dump(mode="json")
    for _ in range(data.draw(st.integers(1, 3))):
        where, key, value = data.draw(st.sampled_from(places(values)))
        # widths up to 24 fill the mask's three bytes: its shape does not tell them apart
        near = st.integers(max(value - 4, 1), value + 4)
        where[key] = data.draw(near | SIZES)
    assume(values != checkpoint.config.model_dump(mode="json"))
    values["digest"] = digest(values)
    with pytest.raises(WexpandError) as error:
        load(checkpoint, values)
    assert "was changed after it was written" not in str(error.value)


@fuzz
@given(st.data(), checkpoints)
def test_config_of_other_types_is_refused(data, checkpoint):
    values = checkpoint.config.model_dump(mode="json")
    odd = st.sampled_from([None, [], {}, "many", 1.5, -1, math.nan, [1, 2], {"a": 1}, "é" * 50])
    kind = data.draw(st.sampled_from(["size", "entry", "groups", "unknown", "lost"]))
    group = data.draw(st.sampled_from(values["groups"]))
    linear = data.draw(st.sampled_from(sorted(group["linears"])))
    where, key, _ = data.draw(st.sampled_from(places(values)))
    if kind == "size":
        where[key] = data.draw(odd)
    elif kind == "entry":
        group["linears"][linear] = data.draw(odd)
    elif kind == "groups":
        values["groups"] = data.draw(odd.filter(lambda value: value != []))
    elif kind == "unknown":
        where[data.draw(st.text(min_size=1))] = 1
    else:
        assume(key not in ("experts", "value_group"))  # which have a default
        del where[key]
    with pytest.raises(WexpandError, match="quantization_config"):
        load(checkpoint, values)


@fuzz
@given(st.data())
def test_linear_renamed_or_left_out_is_refused(data):
    """Its tensors still arrive, where vLLM now expects a dense weight."""
    checkpoint = made(qkv)
    linear = data.draw(st.sampled_from(checkpoint.linears))
    name = linear.name
    others = [other for other in checkpoint.linears if other is not linear]
    if data.draw(st.booleans()):
        renamed = data.draw(st.text(min_size=1)) + name
        others.append(Linear(renamed, linear.pool, linear.router, linear.bias))
    checkpoint.config = CheckpointConfig(groups=groups_of(others)).seal()
    with pytest.raises(WexpandError) as error:
        load(checkpoint)
    assert str(error.value).startswith(f"{name}.weight:")
