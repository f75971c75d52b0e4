"""The CPU kernel against the reference, for every instruction set this CPU has, and its cache.

pytest tests/kernels/test_cpu.py
"""

import ctypes
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import cases
import pytest
import torch
from cases import random_case, random_pool
from hypothesis import given, settings
from hypothesis import strategies as st

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.clusters import ClusterBias
from wexpand_plugin.format.router import ROUTER_DTYPES, choice
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.values import codec
from wexpand_plugin.kernels import LayerShape, build, choose, cpu

CPU = torch.device("cpu")
SHAPE = LayerShape(64, 32, experts=4, sparsity=0.5)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# relative to the largest output; x and weights are drawn so that no sum is far below the others
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
CODE_PATHS = {
    "native": (),
    "no-bf16": ("-mno-avx512bf16",),
    "no-vbmi2": ("-mno-avx512vbmi2",),
    "avx2": ("-march=haswell",),
    "plain": ("-march=x86-64",),
}

pytestmark = pytest.mark.skipif(
    cpu.unavailable(CPU, torch.float32, SHAPE) is not None, reason="no C++ compiler"
)


# the others are compiled for the tests alone, ten seconds each
@pytest.fixture(
    params=[pytest.param(p, marks=pytest.mark.slow if p != "native" else ()) for p in CODE_PATHS]
)
def code_path(request, monkeypatch):
    """The kernel module bound to a library compiled for one instruction set."""
    if request.param != "native":
        if not torch.cpu._is_avx2_supported():
            pytest.skip("not an x86 CPU with AVX2")
        load, flags = cpu.load, (*build.DEFAULT_FLAGS, *CODE_PATHS[request.param])
        monkeypatch.setattr(cpu, "load", lambda dtype: load(dtype, flags))
    return request.param


def assert_matches(pool, x, chosen):
    y = cpu.run(x, chosen, cpu.prepare(pool, x.dtype), pool.out_features)
    cases.assert_matches(y, pool, x, chosen, TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(code_path, dtype):
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 2**20),
        experts=st.sampled_from([1, 2, 5, 16]),
        versions=st.integers(1, 40),
        out=st.integers(1, 70),
        width=st.sampled_from([1, 2, 7, 8, 15, 16, 31, 33, 64, 172, 385, 1100]),
        density=st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]),
        tokens=st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 14, 30, 100]),
    )
    def check(seed, experts, versions, out, width, density, tokens):
        assert_matches(*random_case(seed, experts, out, width, density, tokens, dtype))

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_match_the_reference(code_path, dtype):
    """Exactly, up to the rounding of float32 sums: neither q nor x is rounded."""

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 2**20),
        experts=st.sampled_from([1, 3, 16]),
        out=st.integers(1, 40),
        width=st.sampled_from([1, 7, 8, 63, 64, 65, 128, 172, 385, 1100]),
        density=st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]),
        tokens=st.sampled_from([1, 2, 3, 5, 6, 8, 9, 15, 24, 33, 150]),
        values=st.sampled_from(cases.INTEGERS),
    )
    def check(seed, experts, out, width, density, tokens, values):
        case = random_case(seed, experts, out, width, density, tokens, dtype, values=values)
        assert_matches(*case)

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["int8", "int6", "int5", "int4", "int3", "int2"])
def test_every_integer_is_read_as_it_is(code_path, dtype, name):
    """All q there are, one in a row if it is sparse, scales that are powers of two: no rounding
    but that of y."""
    how = codec(name)
    q = torch.arange(how.lowest, how.largest + 1, 2 if how.odd else 1, dtype=torch.float32)
    for width in (len(q), len(q) + 100):
        for keep in (torch.eye(len(q), width).bool(), torch.ones(len(q), width).bool()):
            rows = torch.zeros(len(q), width)
            rows.diagonal().copy_(q / 4)
            scale = torch.full((len(q), codec(name).scales(width)), 0.25).half()
            pool = RowPool.pack(rows, keep=keep, codec=codec(name), scale=scale)
            right = pool.rows().sum(dim=1) * 2  # a full row of odd integers has no zeros
            assert torch.equal(pool.rows().diagonal(), q / 4)
            for tokens in (1, 8, 40):
                x = torch.full((tokens, width), 2.0, dtype=dtype)
                y = cpu.run(x, None, cpu.prepare(pool, dtype), len(q))
                assert torch.equal(y, right.to(dtype).expand(tokens, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", cases.INTEGERS[::6], ids=str)
def test_wide_integer_layers_cross_every_tile_and_column_block(code_path, dtype, values):
    for density, tokens in ((0.1, 300), (0.5, 40), (1.0, 70), (0.5, 1), (1.0, 7)):
        width = 5632 + 72
        case = random_case(7, 3, 150, width, density, tokens, dtype, values=values)
        assert_matches(*case)


def test_groups_too_narrow_for_the_kernel_go_to_the_reference():
    """Where tensor parallelism splits a group at a column that is no multiple of 8."""
    pool, _, _ = random_case(1, 1, 8, 64, 0.5, 1, torch.float32, values=codec("int8", 32))
    shard = pool.take(columns=(4, 64))
    shape = LayerShape.of(shard)
    assert "groups of 4 columns" in cpu.unavailable(CPU, torch.float32, shape)
    assert choose(CPU, torch.float32, shape)[0].name == "reference"
    with pytest.raises(WexpandError, match="row pool: groups of 4 columns"):
        cpu.prepare(shard, torch.float32)


@pytest.mark.parametrize("values", [None, cases.INTEGERS[0], cases.INTEGERS[6]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_biases_are_added_whatever_way_a_token_goes(code_path, dtype, values):
    """Few tokens, lists and tiles; the linear's bias, the clusters', one for all, and neither."""
    for experts, out, density, tokens in (
        (1, 70, 0.3, 1), (3, 9, 0.3, 5), (1, 150, 0.1, 150), (1, 200, 1.0, 40), (4, 77, 0.5, 1100),
        (1, 3, 0.5, 2), (2, 64, 0.5, 0),
    ):  # fmt: skip
        pool, x, chosen = random_case(out, experts, out, 172, density, tokens, dtype, values=values)
        layout = cpu.prepare(pool, dtype)
        for number in (1, 40):
            bias, clusters, biases = cases.random_biases(pool, tokens, number, dtype)
            for added in (
                (bias, clusters, biases), (None, clusters, biases), (bias, None, None),
                (bias, None, biases),
            ):  # fmt: skip
                if added[2] is not None and added[1] is None and number > 1:
                    continue  # whose bias it would be nobody said
                y = cpu.run(x, chosen, layout, out, *added)
                cases.assert_matches(y, pool, x, chosen, TOLERANCE, *added)


def test_what_is_added_is_rounded_once():
    """bfloat16 has 8 bits: 256 + 1 is 256, twice, but 256 + 2 is not."""
    pool = RowPool.pack(torch.full((8, 1), 256.0).bfloat16())
    one = ClusterBias.pack(torch.ones(1, 8))
    assert torch.equal(one.decoded(torch.bfloat16), torch.ones(1, 8, dtype=torch.bfloat16))
    bias, x = torch.ones(8, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    y = cpu.run(x, None, cpu.prepare(pool, torch.bfloat16), 8, bias, None, one)
    assert y.tolist() == [[258.0] * 8]


def test_clusters_and_biases_that_do_not_fit_are_refused():
    pool, x, _ = random_case(3, 1, 40, 64, 0.3, 2, torch.float32)
    layout, (bias, _, biases) = cpu.prepare(pool, x.dtype), cases.random_biases(pool, 2, 5, x.dtype)
    for wrong in (torch.tensor([0, 5]), torch.tensor([-1, 0])):
        with pytest.raises(WexpandError, match="clusters: .* should be within 0 to 4"):
            cpu.run(x, None, layout, 40, bias, wrong, biases)
    with pytest.raises(WexpandError, match="bias: .39. should be contiguous, 40 out"):
        cpu.run(x, None, layout, 40, bias[1:])


@pytest.mark.parametrize("weight_dtype", ROUTER_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routes(code_path, dtype, weight_dtype):
    for clusters, parents, width, tokens in [
        (2, 0, 5, 3), (40, 7, 256, 1), (256, 16, 1100, 40), (33, 2, 64, 0), (9, 9, 8, 30),
        (30, 0, 385, 20), (256, 16, 64, 1500),
    ]:  # fmt: skip
        x, weight, bias, found = cases.assert_routes_match(
            cpu, clusters, parents, width, tokens, dtype, weight_dtype
        )
        # whatever else is in the batch: a token's cluster depends on nothing else
        for token in range(min(tokens, 50)):
            assert cpu.route(x[token : token + 1], weight, bias, parents) == found[token]


def test_routes_choose_the_first_of_equals_and_never_out_of_range():
    weight, bias = torch.zeros(7 + 40, 8).half(), torch.zeros(7 + 40)
    x = torch.zeros(3, 8)
    assert cpu.route(x, weight, bias, 7).tolist() == [0, 0, 0]
    bias[[3, 5]] = 1  # the first of the parents that win, and of its children 17 to 21
    bias[[7 + 19, 7 + 20, 7 + 30]] = 1
    assert cpu.route(x, weight, bias, 7).tolist() == [19, 19, 19]
    x[1] = float("nan")
    for parents in (7, 0):
        found = cpu.route(x, weight, bias, parents)
        assert torch.equal(found, choice(cpu.logits(x, weight) + bias, parents))


@pytest.mark.parametrize("weight_dtype", ROUTER_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_router_logits(code_path, dtype, weight_dtype):
    for experts, width, tokens in [(2, 5, 3), (16, 256, 1), (7, 1100, 40), (9, 64, 0), (1, 8, 2)]:
        x, weight, found = cases.assert_logits_match(
            cpu, experts, width, tokens, dtype, weight_dtype
        )
        # the same bits whatever else is in the batch: a token's expert depends on nothing else
        for token in range(tokens):
            assert torch.equal(cpu.logits(x[token : token + 1], weight)[0], found[token])


def test_what_does_not_fit_the_router_is_refused():
    x = torch.randn(3, 8)
    for weight in (torch.randn(2, 8).bfloat16(), torch.randn(2, 9)):
        with pytest.raises(WexpandError, match="router: .* should be float16 or float32"):
            cpu.logits(x, weight)
        with pytest.raises(WexpandError, match="router: .* should be float16 or float32"):
            cpu.route(x, weight, torch.zeros(2), 0)
    with pytest.raises(WexpandError, match="router: bias .* should be float32 .2."):
        cpu.route(x, torch.randn(2, 8), torch.zeros(3), 0)


def test_nothing_depends_on_torchs_default_dtype_and_device():
    pool, x, chosen = random_case(3, 4, 40, 64, 0.3, 9, torch.float32)
    layout, weight = cpu.prepare(pool, x.dtype), torch.randn(4, 64)
    right = cpu.run(x, chosen, layout, 40), cpu.logits(x, weight)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = cpu.run(x, chosen, cpu.prepare(pool, x.dtype), 40), cpu.logits(x, weight)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_inputs_of_another_width_are_refused():
    pool, x, _ = random_case(3, 1, 40, 64, 0.3, 9, torch.float32)
    with pytest.raises(WexpandError, match="x: 48 columns do not fit"):
        cpu.run(x[:, :48], None, cpu.prepare(pool, x.dtype), 40)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens_of_very_sparse_rows(code_path, dtype, experts):
    """Panels, whatever the dtype and the instructions; more tokens than share their sums."""
    torch.manual_seed(experts)
    pool = random_pool(experts, 70, 700, 0.08, dtype)
    x = torch.randn(1100, 700).to(dtype)
    assert_matches(pool, x, torch.randint(experts, (1100,)) if experts > 1 else None)


def test_router_on_all_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        cases.assert_logits_match(cpu, 16, 1024, 200, torch.bfloat16, torch.float16)
        for tokens in (1, 200):
            cases.assert_routes_match(cpu, 1000, 32, 4096, tokens, torch.bfloat16, torch.float16)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_wide_layers_cross_every_tile_and_column_block(code_path, dtype, tokens):
    assert_matches(*random_case(7, 3, 150, 5632 + 5, 0.3, tokens, dtype))


@pytest.mark.parametrize("experts", [1, 3])
def test_more_tokens_than_one_batch(code_path, experts):
    assert_matches(*random_case(4, experts, 20, 200, 0.3, 1100, torch.bfloat16))


def test_all_tokens_of_one_expert():
    pool, x, _ = random_case(1, 4, 20, 64, 0.3, 40, torch.float32)
    assert_matches(pool, x, torch.full((40,), 3))


def test_two_to_four():
    torch.manual_seed(2)
    rows = torch.randn(32, 16, 4).to(torch.bfloat16)
    rows.scatter_(2, rows.abs().topk(2, dim=2, largest=False).indices, 0)
    pool = RowPool.pack(rows.flatten(1))
    assert_matches(pool, torch.randn(3, 64).to(torch.bfloat16), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_to_the_nearest_even_like_torch(code_path, dtype):
    """Identity weights: y is x itself, and sums of two columns round as torch rounds them."""
    torch.manual_seed(0)
    values = (torch.randn(512) * torch.logspace(-9, 4, 512)).to(dtype)
    rows = torch.eye(512).to(dtype)
    rows[1:] += rows[:-1].clone()
    pool = RowPool.pack(rows)
    y = cpu.run(values.unsqueeze(0), None, cpu.prepare(pool, dtype), 512)
    sums = values.float()
    sums[1:] += values.float()[:-1].clone()
    assert torch.equal(y[0], sums.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan_reach_the_output(code_path, dtype):
    pool, x, _ = random_case(3, 1, 10, 40, 1.0, 2, dtype)
    full = pool.kept() == pool.in_features
    assert full.any()
    x[0, 5], x[1, 39] = float("nan"), float("inf")
    y = cpu.run(x, None, cpu.prepare(pool, x.dtype), 10)
    assert y[0, full].isnan().all()
    assert not y[1, full].isfinite().any()


def test_result_does_not_depend_on_threads_or_companions():
    pool, x, chosen = random_case(5, 4, 50, 385, 0.3, 64, torch.float32)
    layout = cpu.prepare(pool, x.dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cpu.run(x, chosen, layout, 50)
        torch.set_num_threads(2)
        two = cpu.run(x, chosen, layout, 50)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)


def test_strided_x_is_accepted():
    pool, x, _ = random_case(6, 1, 9, 32, 0.5, 8, torch.float32)
    layout = cpu.prepare(pool, x.dtype)
    wide = torch.cat([x, x], dim=1)
    assert torch.equal(cpu.run(wide[:, :32], None, layout, 9), cpu.run(x, None, layout, 9))


def test_missing_expert_and_wrong_dtype_are_refused():
    pool, x, _ = random_case(6, 3, 9, 32, 0.5, 2, torch.float32)
    layout = cpu.prepare(pool, x.dtype)
    with pytest.raises(WexpandError, match="experts"):
        cpu.run(x, torch.tensor([0, 3]), layout, 9)
    with pytest.raises(WexpandError, match="float32"):
        cpu.run(x.bfloat16(), torch.tensor([0, 1]), layout, 9)


@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, *cases.INTEGERS[::6]], ids=str)
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_layout_adds_less_than_five_percent(values, density):
    """To the bytes on disk, where values are held as they are: 6 and 5 bits in 8, sparse rows of 3
    and 2 bits in 4."""
    pool, x, _ = random_case(8, 4, 400, 2048, density, 1, torch.float32, values=values)
    parts = pool.stored_bytes()
    packed = sum(parts.values())
    held = sum(tensor.nbytes for tensor in cpu.prepare(pool, x.dtype))
    bits = pool.codec.bits
    wide = 8 if bits in (6, 5) else 4 if bits in (3, 2) and pool.mask is not None else bits
    packed += parts["values"] * (wide - bits) / bits
    assert 0.999 * packed <= held < 1.05 * packed


def test_concurrent_callers_agree():
    pool, x, chosen = random_case(9, 4, 50, 200, 0.3, 64, torch.bfloat16)
    layout = cpu.prepare(pool, x.dtype)
    expected = cpu.run(x, chosen, layout, 50)
    results = []

    def call():
        results.append(cpu.run(x, chosen, layout, 50))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, expected) for result in results)


# ---- the build


def tiny(tmp_path: Path) -> Path:
    source = tmp_path / "tiny.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    return source


def test_cache_is_private_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tiny(tmp_path)
    library = build.build(source)
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    stamp = library.stat().st_mtime_ns
    assert build.build(source) == library and library.stat().st_mtime_ns == stamp
    assert build.build(source, (*build.DEFAULT_FLAGS, "-DX")) != library
    assert sorted(p.suffix for p in library.parent.iterdir()) == [".so", ".so"]


def test_a_changed_header_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, header = tmp_path / "tiny.cpp", tmp_path / "tiny_answer.h"
    source.write_text('#include "tiny_answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    for answer in (42, 43):
        header.write_text(f"#define ANSWER {answer}\n")
        assert ctypes.CDLL(str(build.build(source))).answer() == answer


def test_foreign_cache_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(build.BuildError, match="another user"):
        build.build(tiny(tmp_path))


@pytest.mark.parametrize(
    "compiler", ["no-such-compiler", pytest.param("false", marks=pytest.mark.slow)]
)
def test_without_a_compiler_warns_once_and_says_why(tmp_path, compiler):
    code = (
        "import torch, warnings\n"
        "from wexpand_plugin.kernels import LayerShape\n"
        "from wexpand_plugin.kernels import cpu\n"
        "shape = LayerShape(8, 8, 1, 0.5)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3):\n"
        "        why = cpu.unavailable(torch.device('cpu'), torch.float32, shape)\n"
        "assert len([w for w in seen if 'CPU kernel' in str(w.message)]) == 1, seen\n"
        f"assert {compiler!r} in why, why\n"
    )
    environment = os.environ | {"CXX": compiler, "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.slow
def test_processes_that_start_together_share_one_library(tmp_path):
    code = (
        "from pathlib import Path\n"
        "from wexpand_plugin.kernels.build import build\n"
        f"build(Path({str(tiny(tmp_path))!r}))"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(4)]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    assert len(list((tmp_path / "cache" / "wexpand").iterdir())) == 1
