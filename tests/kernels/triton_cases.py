"""The Triton kernel against the reference: on a GPU if there is one, else in Triton's interpreter.

Collected through test_triton.py, which gives the interpreter the process of its own that it needs.
By hand: `TRITON_INTERPRET=1 pytest tests/kernels/triton_cases.py`. Shapes are small, because the
interpreter takes about a millisecond per operation.
"""

from functools import partial

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wexpand_plugin.format.router import ROUTER_DTYPES
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.values import codec
from wexpand_plugin.kernels import LayerShape, reference
from wexpand_plugin.kernels import triton as kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# relative to the largest output
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
random_case = partial(cases.random_case, device=DEVICE)
assert_matches = partial(cases.assert_matches, tolerance=TOLERANCE)


def run(pool, x, chosen):
    return kernel.run(x, chosen, kernel.prepare(pool, x.dtype), pool.out_features)


def test_is_available():
    shape = LayerShape(64, 32, experts=4, sparsity=0.5)
    for how in (None, codec("int8"), codec("int4", 8)):
        assert kernel.unavailable(DEVICE, torch.bfloat16, shape._replace(codec=how)) is None
    assert "float64" in kernel.unavailable(DEVICE, torch.float64, shape)


# gather_gemv up to 4 tokens (1 without experts), unsorted blocks up to 16, sorted ones above
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("experts", "tokens", "out", "width"),
    [
        (1, 1, 6, 1),
        (1, 1, 5, 1061),
        (5, 3, 5, 77),
        (1, 2, 17, 300),
        (3, 9, 17, 259),
        (4, 16, 5, 256),
        (1, 45, 33, 100),
        (5, 70, 33, 40),
    ],
)
def test_matches_the_reference(experts, tokens, out, width, dtype):
    pool, x, chosen = random_case(tokens + width, experts, out, width, 0.3, tokens, dtype)
    assert_matches(run(pool, x, chosen), pool, x, chosen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("width", [3, 130, 256, 475])
def test_full_rows_of_floats(width, tokens, dtype):
    pool, x, chosen = random_case(width, 3, 7, width, 1, tokens, dtype)
    assert pool.mask is None
    assert_matches(run(pool, x, chosen), pool, x, chosen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_match_the_reference(dtype):
    """Neither q nor x is rounded: what differs is the rounding of float32 sums, and of y, whose
    last bits the interpreter cuts off in bfloat16.
    """

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 2**20),
        experts=st.sampled_from([1, 3, 16]),
        out=st.integers(1, 20),
        width=st.sampled_from([1, 7, 8, 63, 64, 65, 128, 172, 256, 300, 385, 530]),
        density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        tokens=st.sampled_from([1, 2, 4, 5, 16, 17, 40]),
        values=st.sampled_from(cases.INTEGERS),
    )
    def check(seed, experts, out, width, density, tokens, values):
        pool, x, chosen = random_case(
            seed, experts, out, width, density, tokens, dtype, values=values
        )
        y = run(pool, x, chosen)
        assert_matches(y, pool, x, chosen)
        if values.group % kernel.NARROW == 0:
            exact = reference.multiply(
                x.double(), chosen, lambda e: pool.expert(e).double(), experts, out
            )
            half = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
            allowed = exact.abs() * half + exact.abs().max() * 1e-5
            assert ((y.double() - exact).abs() <= allowed).all()

    check()


@pytest.mark.parametrize("tokens", [1, 5, 20])
@pytest.mark.parametrize("values", [codec("int8", 32), codec("int4"), codec("int3")], ids=str)
@pytest.mark.parametrize("density", [0.4, 1])
def test_integers_of_wide_layers(density, values, tokens):
    """More columns than a step of any kernel, and a last group and a last word that are short."""
    case = random_case(3, 2, 5, 2048 + 77, density, tokens, torch.bfloat16, values=values)
    assert_matches(run(*case), *case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["int8", "int6", "int5", "int4", "int3", "int2"])
def test_every_integer_is_read_as_it_is(name, dtype):
    """All q there are, one in a row if it is sparse, scales that are powers of two: no rounding
    but that of y."""
    how = codec(name)
    q = torch.arange(how.lowest, how.largest + 1, 2 if how.odd else 1, dtype=torch.float32)
    for keep in (torch.eye(len(q)).bool(), torch.ones(len(q), len(q)).bool()):
        scale = torch.full((len(q), codec(name).scales(len(q))), 0.25).half()
        pool = RowPool.pack(torch.diag(q / 4), keep=keep, codec=codec(name), scale=scale)
        right = pool.rows().sum(dim=1) * 2  # a full row of odd integers has no zeros
        assert torch.equal(pool.rows().diagonal(), q / 4)
        for tokens in (1, 8):
            x = torch.full((tokens, len(q)), 2.0, dtype=dtype, device=DEVICE)
            assert torch.equal(run(pool.to(DEVICE), x, None).cpu(), right.to(dtype).expand_as(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 40])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 192, 256])
def test_sums_of_integers_cancel_exactly(group, tokens, dtype):
    """100 - 100 * 1: nothing would be left of it if weights were rounded to the dtype of x."""
    rows = torch.zeros(3, 600)
    for first in range(0, 600 - 1, group):
        rows[:, first], rows[:, first + 1] = 100, 1
    scale = torch.full((3, codec("int8", group).scales(600)), 0.1).half()
    pool = RowPool.pack(rows * scale[0, 0].float(), codec=codec("int8", group), scale=scale)
    assert torch.equal(pool.stored()[0].float(), rows)
    x = torch.zeros(tokens, 600, dtype=dtype, device=DEVICE)
    x[:, 0::group], x[:, 1::group] = 1, -100
    assert not run(pool.to(DEVICE), x, None).any()


@pytest.mark.parametrize("columns", [(4, 300), (40, 300), (32, 172)])
def test_columns_of_a_tensor_parallel_rank(columns):
    """Whose groups of scales are as narrow as the place of the cut makes them."""
    pool, x, chosen = random_case(2, 3, 9, 300, 0.5, 20, torch.float32, values=codec("int4", 64))
    shard = pool.take(columns=columns)
    assert shard.codec.group < 64
    for tokens in (3, 20):
        inputs = x[:tokens, columns[0] : columns[1]]
        assert_matches(run(shard, inputs, chosen[:tokens]), shard, inputs, chosen[:tokens])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", [None, codec("int4", 32)], ids=str)
@pytest.mark.parametrize(("experts", "tokens"), [(1, 1), (3, 2), (1, 7), (2, 20), (1, 70)])
def test_biases_are_added(experts, tokens, values, dtype):
    """The linear's and the clusters', by each of the three ways, and after the largest blocks."""
    pool, x, chosen = random_case(tokens, experts, 19, 70, 0.4, tokens, dtype, values=values)
    layout = kernel.prepare(pool, dtype)
    for number in (1, 40):
        bias, clusters, biases = cases.random_biases(pool, tokens, number, dtype, DEVICE)
        for added in ((bias, clusters, biases), (None, clusters, biases), (bias, None, None)):
            y = kernel.run(x, chosen, layout, 19, *added)
            cases.assert_matches(y, pool, x, chosen, TOLERANCE, *added)
    one = cases.random_biases(pool, tokens, 1, dtype, DEVICE)[2]
    y = kernel.run(x, chosen, layout, 19, None, None, one)
    cases.assert_matches(y, pool, x, chosen, TOLERANCE, None, None, one)


@pytest.mark.parametrize("weight_dtype", ROUTER_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("clusters", "parents", "width", "tokens"),
    [
        (40, 7, 300, 1), (256, 16, 64, 4), (9, 9, 8, 16), (33, 2, 40, 20), (5, 0, 40, 3),
        (9, 2, 9, 0),
    ],
)  # fmt: skip
def test_routes(clusters, parents, width, tokens, dtype, weight_dtype):
    cases.assert_routes_match(
        kernel, clusters, parents, width, tokens, dtype, weight_dtype, DEVICE
    )


def test_routes_choose_the_first_of_equals_and_never_out_of_range():
    weight, bias = torch.zeros(7 + 40, 8, device=DEVICE), torch.zeros(7 + 40, device=DEVICE)
    x = torch.zeros(3, 8, device=DEVICE)
    assert kernel.route(x, weight, bias, 7).tolist() == [0, 0, 0]
    bias[[3, 5]] = 1
    bias[[7 + 19, 7 + 20, 7 + 30]] = 1
    assert kernel.route(x, weight, bias, 7).tolist() == [19, 19, 19]
    x[1] = float("nan")
    found = kernel.route(x, weight, bias, 7)
    assert found[0] == found[2] == 19 and 0 <= found[1] < 40


@pytest.mark.parametrize("weight_dtype", ROUTER_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("experts", "width", "tokens"), [(3, 1030, 2), (16, 64, 1), (5, 40, 17), (4, 9, 0)]
)
def test_router_logits(experts, width, tokens, dtype, weight_dtype):
    cases.assert_logits_match(kernel, experts, width, tokens, dtype, weight_dtype, DEVICE)


@pytest.mark.parametrize("values", [torch.bfloat16, codec("int4", 32), codec("int8")], ids=str)
@pytest.mark.parametrize(("tokens", "block"), [(33, 64), (130, 128)])
def test_larger_blocks(tokens, block, values):
    size = (0, 0) if isinstance(values, torch.dtype) else (values.bits, values.group)
    assert kernel.tile(tokens, 1, 3, torch.bfloat16, *size).tokens == block
    pool, x, _ = random_case(tokens, 1, 3, 70, 0.3, tokens, torch.bfloat16, values=values)
    assert_matches(run(pool, x, None), pool, x, None)


def test_larger_programs(monkeypatch):
    monkeypatch.setattr(kernel, "WIDE", 8)
    for tokens in (1, 7):
        pool, x, chosen = random_case(tokens, 2, 35, 40, 0.3, tokens, torch.bfloat16)
        assert_matches(run(pool, x, chosen), pool, x, chosen)


@pytest.mark.parametrize("tokens", [2, 10, 40])
def test_all_tokens_of_one_expert(tokens):
    pool, x, _ = random_case(1, 4, 9, 64, 0.3, tokens, torch.float32)
    chosen = torch.full((tokens,), 2, device=DEVICE)
    assert_matches(run(pool, x, chosen), pool, x, chosen)


def test_grid_holds_the_worst_split_of_tokens():
    """34 tokens in blocks of 32 need three of them when they split 33 to 1."""
    pool, x, _ = random_case(4, 2, 3, 40, 0.3, 34, torch.float32)
    chosen = torch.tensor([0] * 33 + [1], device=DEVICE)
    assert_matches(run(pool, x, chosen), pool, x, chosen)


@pytest.mark.parametrize("tokens", [1, 20])
def test_nothing_kept(tokens):
    pool = RowPool.pack(torch.zeros(4, 50)).to(DEVICE)
    assert not run(pool, torch.ones(tokens, 50, device=DEVICE), None).any()


@pytest.mark.parametrize("experts", [1, 3])
def test_no_tokens(experts):
    pool, x, chosen = random_case(2, experts, 5, 40, 0.3, 0, torch.bfloat16)
    y = run(pool, x, chosen)
    assert y.shape == (0, 5) and y.dtype == torch.bfloat16


def test_strided_x_is_accepted():
    pool, x, _ = random_case(6, 1, 5, 32, 0.5, 8, torch.float32)
    layout = kernel.prepare(pool, DTYPES[0])
    expected = kernel.run(x, None, layout, 5)
    assert torch.equal(kernel.run(torch.cat([x, x], dim=1)[:, :32], None, layout, 5), expected)
    assert torch.equal(kernel.run(x.t().contiguous().t(), None, layout, 5), expected)


def test_wide_row_starts_give_the_same():
    """Row starts are int64 from 2**31 kept weights on."""
    for tokens in (2, 20):
        pool, x, chosen = random_case(7, 3, 9, 64, 0.3, tokens, torch.float32)
        values, mask, starts, *others = kernel.prepare(pool, DTYPES[0])
        assert starts.dtype == torch.int32
        expected = kernel.run(x, chosen, [values, mask, starts, *others], 9)
        got = kernel.run(x, chosen, [values, mask, starts.long(), *others], 9)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("tokens", [20, 1500])
def test_sort_is_a_stable_counting_sort(tokens):
    from wexpand_plugin.kernels._triton_kernels import sort_tokens

    torch.manual_seed(tokens)
    chosen = torch.randint(5, (tokens,), device=DEVICE) + 1  # nobody chose 0 or 6
    order = torch.full((tokens,), -1, dtype=torch.int32, device=DEVICE)
    ends = torch.full((7,), -1, dtype=torch.int32, device=DEVICE)
    sort_tokens[(7,)](chosen, order, ends, tokens, BLOCK=1024)
    assert torch.equal(order.long(), torch.argsort(chosen, stable=True))
    assert torch.equal(ends.long(), torch.bincount(chosen, minlength=7).cumsum(0))


@pytest.mark.parametrize("values", [None, codec("int8"), codec("int4", 32)], ids=str)
@pytest.mark.parametrize("density", [0.4, 1])
def test_layout_is_as_documented(monkeypatch, density, values):
    """Group q of a span is columns q, 64+q, 128+q, 192+q, and keeps its values in that order."""
    monkeypatch.setattr(kernel, "AT_ONCE", 2 * 512)  # two rows at a time
    pool, _, _ = random_case(8, 2, 5, 300, density, 1, torch.float32, values=values)
    layout = [tensor.cpu() for tensor in kernel.prepare(pool, DTYPES[0])]
    elements, mask, starts, row_map, scale, sizes = layout
    pool = pool.to("cpu")
    assert torch.equal(row_map, pool.version_map())
    bits = 0 if values is None else values.bits
    assert sizes.shape == (0, bits, pool.codec.group)
    if values is not None:
        assert torch.equal(scale[: pool.scale.numel()], pool.scale.flatten())
    q, keep = pool.stored()
    order = [s + 64 * b + g for s in (0, 256) for g in range(64) for b in range(4)]
    order = [column for column in order if column < 300]
    for version in range(pool.versions):
        kept = keep[version][order]
        expected = q[version][order][kept].tolist()
        place = int(starts[version])
        if bits:
            words = elements[place : place + -(-len(expected) * bits // 32)].tolist()
            number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
            found = [number >> (bits * i) & (2**bits - 1) for i in range(len(expected))]
            assert found == [value & (2**bits - 1) for value in expected]
        else:
            assert elements[place : place + len(expected)].tolist() == expected
        if density < 1:
            words = mask[version].tolist()
            number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
            found = [s + 64 * b + g for s in (0, 256) for g in range(64) for b in range(4)
                     if number >> (s + 4 * g + b) & 1]  # fmt: skip
            assert found == [column for column in order if keep[version][column]]
    assert (mask.numel() == 0) == (density == 1)


@pytest.mark.parametrize("values", [torch.bfloat16, codec("int8"), codec("int4", 32)], ids=str)
@pytest.mark.parametrize("density", [1, 0.5, 0.1])
def test_layout_adds_less_than_five_percent(density, values):
    torch.manual_seed(0)
    keep = torch.rand(400, 2048 + 128) < density
    rows, how = keep.float(), values
    if isinstance(values, torch.dtype):
        rows, how = rows.to(values), None
    row_map = torch.arange(2).unsqueeze(1).repeat(1, 200)
    pool = RowPool.pack(rows, row_map, keep=keep, codec=how)
    packed = sum(pool.stored_bytes().values())
    held = sum(t.numel() * t.element_size() for t in kernel.prepare(pool, DTYPES[0]))
    assert packed <= held < 1.05 * packed


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("tokens", [1, 4, 16, 100])
def test_replays_in_a_cuda_graph(tokens):
    """Captured with one set of inputs and experts, right for another: nothing was decided early."""
    pool, x, chosen = random_case(9, 4, 70, 300, 0.3, tokens, torch.bfloat16)
    layout = kernel.prepare(pool, DTYPES[0])
    kernel.run(x, chosen, layout, 70)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.run(x, chosen, layout, 70)
    x.copy_(torch.randn_like(x))
    chosen.copy_(torch.randint(4, (tokens,)))
    graph.replay()
    torch.cuda.synchronize()
    assert_matches(y, pool, x, chosen)
