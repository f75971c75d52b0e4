"""The Triton kernel against the reference: on a GPU if there is one, else in Triton's interpreter.

Collected through test_triton.py, which gives the interpreter the process of its own that it needs.
By hand: `TRITON_INTERPRET=1 pytest tests/kernels/triton_cases.py`. Shapes are small, because the
interpreter takes about a millisecond per operation.
"""

from functools import partial

import cases
import pytest
import torch

from wexpand_plugin.format.router import ROUTER_DTYPES
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.kernels import LayerShape
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
    assert kernel.unavailable(DEVICE, torch.bfloat16, shape) is None
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


@pytest.mark.parametrize("weight_dtype", ROUTER_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("experts", "width", "tokens"), [(3, 1030, 2), (16, 64, 1), (5, 40, 17), (4, 9, 0)]
)
def test_router_logits(experts, width, tokens, dtype, weight_dtype):
    cases.assert_logits_match(kernel, experts, width, tokens, dtype, weight_dtype, DEVICE)


@pytest.mark.parametrize(("tokens", "block"), [(33, 64), (130, 128)])
def test_larger_blocks(tokens, block):
    assert kernel.tile(tokens, 1, 3, torch.bfloat16)[1] == block
    pool, x, _ = random_case(tokens, 1, 3, 70, 0.3, tokens, torch.bfloat16)
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
        values, mask, starts, row_map = kernel.prepare(pool, DTYPES[0])
        assert starts.dtype == torch.int32
        expected = kernel.run(x, chosen, [values, mask, starts, row_map], 9)
        got = kernel.run(x, chosen, [values, mask, starts.long(), row_map], 9)
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


def test_layout_is_as_documented(monkeypatch):
    """Group q of a span is columns q, 64+q, 128+q, 192+q, and keeps its values in that order."""
    monkeypatch.setattr(kernel, "AT_ONCE", 2 * 512)  # two rows at a time
    pool, _, _ = random_case(8, 2, 5, 300, 0.4, 1, torch.float32)
    values, mask, starts, row_map = (t.cpu() for t in kernel.prepare(pool, DTYPES[0]))
    assert torch.equal(row_map, pool.version_map().cpu())
    rows = torch.zeros(pool.versions, 512)
    for version, words in enumerate(mask.tolist()):
        place = int(starts[version])
        for q in range(128):
            for bit in range(4):
                if words[q // 8] >> (4 * (q % 8) + bit) & 1:
                    rows[version, q // 64 * 256 + bit * 64 + q % 64] = values[place]
                    place += 1
    assert torch.equal(rows[:, :300], pool.to("cpu").rows())
    assert not rows[:, 300:].any()


@pytest.mark.parametrize("density", [0.5, 0.1])
def test_layout_adds_less_than_five_percent(density):
    torch.manual_seed(0)
    keep = torch.rand(400, 2048 + 128) < density
    pool = RowPool.pack(keep.bfloat16(), torch.arange(2).unsqueeze(1).repeat(1, 200), keep=keep)
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
