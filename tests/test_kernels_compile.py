# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels, compiled without a GPU for A100, H100 and B200: they fit, spill nothing, and load 16 bytes at once."""

import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from emerging_optimizers.adaptive_muon.kernels import addresses, apply, average, normalize, trial
from emerging_optimizers.adaptive_muon.orthogonalize import symmetric_kernel


if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
    pytest.skip("Triton 3.2 compiles other sources, and its kernels are not used", allow_module_level=True)

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# The bytes of shared memory that a block can have.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
STRIDES = re.compile(r"_(batch|row|column|member)$")


def compiled(
    kernel: Any, pointers: dict[str, str], floats: set[str], constants: dict[str, Any], arch: int, **options: int
) -> Any:
    """A kernel compiled as for aligned addresses and for sizes and strides that are multiples of 16."""
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else pointers.get(name) or ("fp32" if name in floats else "i32")
        for name in names
    }
    multiples = [
        name
        for name in names
        if name in pointers
        or name in ("rows", "columns", "n", "k", "elements")
        or STRIDES.search(name)
        or name.endswith("_stride")
    ]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in multiples if name not in constants}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(found: Any) -> str:
    """The registers and bytes that a compiled kernel takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(found.asm["cubin"])
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


AVERAGE = {
    "gradients": "*i64",
    "buffers": "*i64",
    "momentum_out": "*fp32",
    "G_sums": "*fp32",
    "M_sums": "*fp32",
    "keys": "*i32",
}
APPLY = {"weights": "*i64", "O": "*fp16", "D": "*fp32", "decays": "*fp32", "keys": "*i32"}
PRODUCT = {name: "*fp16" for name in ("S", "T", "plus", "out")}
ROWS, COLUMNS = {"ROWS": 32, "COLUMNS": 128}, {"ROWS": 16, "COLUMNS": 256}
BY_ROWS, BY_COLUMNS = {"S_column": 1, "T_row": 1}, {"S_row": 1, "T_column": 1}

CASES: dict[str, Any] = {
    **{
        f"average, sums {summed}, {dtype}": (
            average.average_kernel, AVERAGE, {"weight", "momentum"},
            {
                "G_TYPE": dtype, "M_TYPE": dtype, "ALIGNED": True, "NESTEROV": True, "SUMMED": summed,
                "STOCHASTIC": dtype == tl.bfloat16, **ROWS,
            }, {},
        )
        for summed, dtype in product((-1, 0, 1, 2), (tl.float32, tl.bfloat16))
    },
    **{
        f"apply, D {column}, {dtype}": (
            apply.apply_kernel, APPLY, {"lr", "decay"},
            {
                "W_TYPE": dtype, "ALIGNED": True, "O_COLUMN": 1, "D_COLUMN": column, "DECAY_COLUMN": column,
                "HAS_DECAYS": bool(column), "CAUTIOUS": bool(column),
                "STOCHASTIC": dtype == tl.bfloat16, **COLUMNS,
            }, {},
        )
        for column, dtype in product((0, 1), (tl.float32, tl.bfloat16))
    },
    "divide": (
        normalize.divide_kernel, {"matrices": "*fp32", "divisors": "*fp32", "out": "*fp16"}, set(), {"BLOCK": 4096}, {"num_warps": 8},
    ),
    **{
        f"product, {name}": (
            symmetric_kernel.product_kernel, PRODUCT, {"alpha", "beta", "diagonal"},
            {
                "HAS_PLUS": True, "EVEN": True, "INDEX": tl.int32, "BLOCK": 128, "BLOCK_K": tiles["BLOCK_K"],
                "plus_column": 1, "out_column": 1, **strides,
            },
            {key: value for key, value in tiles.items() if key.startswith("num")},
        )
        for name, tiles, strides in (("by rows", symmetric_kernel.BY_ROWS, BY_ROWS), ("by columns", symmetric_kernel.BY_COLUMNS, BY_COLUMNS))
    },
}  # fmt: skip


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("case", CASES)
def test_fits_and_spills_nothing(case: str, arch: int) -> None:
    kernel, pointers, floats, constants, options = CASES[case]
    if case.startswith("product"):
        options = options | {"num_warps": 4 if arch == 90 else 8}
    found = compiled(kernel, pointers, floats, constants, arch, **options)
    assert found.metadata.shared <= SHARED[arch]
    said = resources(found)
    assert "STACK:0 " in said, said  # where registers would be spilled to
    if not case.startswith("product"):
        assert re.search(r"ld\.global\.v[48]", found.asm["ptx"]) and re.search(r"st\.global\.v[248]", found.asm["ptx"])
    elif arch == 90:
        assert "wgmma" in found.asm["ptx"]


@pytest.mark.parametrize("arch", SHARED)
def test_the_small_ones_compile(arch: int) -> None:
    numbers = {f"p{i}": "i64" for i in range(16)}
    compiled(addresses.store_kernel, {"out": "*i64", **numbers}, set(), {}, arch, num_warps=1)
    compiled(trial.set_one_kernel, {"out": "*fp32"}, set(), {}, arch)
