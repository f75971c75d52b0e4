"""The Triton kernel: its results (triton_cases.py) and its compiled form.

    pytest tests/kernels/test_triton.py

With a GPU the cases run here. Without one they run in a process of their own with Triton's
interpreter, which must be turned on before anything imports triton. The compiler needs no GPU:
for each generation the kernels must compile, keep to the registers and fit the shared memory.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

if torch.cuda.is_available():
    from triton_cases import *  # noqa: F403
else:

    @pytest.mark.slow
    def test_results_in_the_interpreter():

        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
        command.append(str(HERE / "triton_cases.py"))
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        print(done.stdout[-6000:], done.stderr[-2000:])
        assert done.returncode == 0
        assert re.search(r"\d+ passed", done.stdout)


COMPILE = """
import subprocess, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from wexpand_plugin.kernels import _triton_kernels as device, triton as kernel

TYPES = dict(experts="*i64", order="*i32", ends="*i32", mask="*i32", starts="*i32", row_map="*i32",
             weight="*fp16", logits="*fp32", scale="*fp16", clusters="*i64", cluster_bias="*i8",
             cluster_scale="*fp16", chosen="*i64")
SHORT = dict(bfloat16="bf16", float32="fp32")
TODO = [("router_logits", "bf16", dict(BLOCK=1024), 4, 3),
        ("router_logits", "fp32", dict(BLOCK=1024), 4, 3),
        ("router_choice", "bf16", dict(ROWS=16, BLOCK=kernel.CHOICE_COLUMNS), 8, 3),
        ("router_choice", "fp32", dict(ROWS=64, BLOCK=kernel.CHOICE_COLUMNS), 8, 3),
        ("sort_tokens", "bf16", dict(BLOCK=1024), 4, 3)]
# floats and int4 in groups of 128, with a mask and in full rows; int8; narrower groups
CODECS = [(0, 0, {}), (0, 0, dict(mask=None)), (4, 128, {}), (4, 128, dict(mask=None)),
          (8, 128, {}), (4, 32, {}), (3, 128, {}), (3, 128, dict(mask=None)),
          (6, 128, {}), (5, 128, dict(mask=None))]
for bits, group, full in CODECS:
    codec = dict(BITS=bits, GROUP=group, SHARE=kernel.share(group)) | full
    if not bits:
        codec["scale"] = None
    constants = dict(ROWS=8, WORDS=kernel.GEMV_WORDS) | codec
    TODO.append(("gather_gemv", "bf16", constants, 4, 3))
    for tokens, dtype in ((16, "bfloat16"), (1000, "bfloat16"), (5000, "bfloat16"),
                          (5000, "float32")):
        rows, block, words, warps = kernel.tile(
            tokens, 16, 9000, getattr(torch, dtype), bits, group)
        constants = dict(EXPERTS=16, EXPERTS_PADDED=16, ROWS=rows, TOKENS=block, WORDS=words)
        if block > kernel.BIASED_TOKENS:
            constants |= dict(bias=None, clusters=None, cluster_bias=None, cluster_scale=None)
        TODO.append(("grouped_gemm", SHORT[dtype], constants | codec, warps, 2))
for name, dtype, constants, warps, stages in TODO:
    function = getattr(device, name)
    values = "*i32" if constants.get("BITS") else "*" + dtype
    types = TYPES | dict(x="*" + dtype, y="*" + dtype, values=values, bias="*" + dtype)
    if name == "router_choice":
        types["bias"] = "*fp32"
    names = function.arg_names
    types = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if n not in constants and n not in ("tokens", "scales")}
    built = triton.compile(ASTSource(function, types, constants, aligned),
                           target=GPUTarget("cuda", int(sys.argv[1]), 32),
                           options={"num_warps": warps, "num_stages": stages})
    path = sys.argv[2] + "/kernel.cubin"
    open(path, "wb").write(built.asm["cubin"])
    tool = triton.__path__[0] + "/backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    print(name, dtype, constants, "shared", built.metadata.shared, usage.stdout.split("REG:")[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "shared_kib"), [(80, 99), (90, 227)])
def test_compiles_without_spills(tmp_path, capability, shared_kib):
    """99 KiB is what a program may have on compute capability 8.6 and 8.9, built like 8.0."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, str(capability), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    stack = [int(n) for n in re.findall(r"STACK:(\d+)", done.stdout)]
    shared = [int(n) for n in re.findall(r"shared (\d+)", done.stdout)]
    assert stack == [0] * 55
    assert len(shared) == 55 and max(shared) <= shared_kib * 1024
