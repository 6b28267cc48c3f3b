"""Builds the CUDA door's kernels for a device that isn't there, as the door launches them. Arguments: capabilities.

Prints each kernel that needs more than what the smallest device has for a program.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vitprune.pruning.kernels import cuda, cuda_launches
from vitprune.pruning.layout import Layout
from vitprune.pruning.token_batch import Pairs

SHARED_MEMORY = 99 * 1024
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
built: set[str] = set()


def type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def build(capability: int, name: str, values: tuple[Any, ...], constants: dict[str, int]) -> None:
    kernel = getattr(cuda_launches, name)
    given = dict(zip(kernel.arg_names, values, strict=False))
    fixed = {**constants, **{n: None for n, value in given.items() if value is None}}
    assert given.keys() | constants.keys() == set(kernel.arg_names), name
    types = {n: "constexpr" if n in fixed else type_of(given[n]) for n in kernel.arg_names}
    made = triton.compile(ASTSource(kernel, types, constexprs=fixed), target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"]
    built.add(name)
    if made.metadata.shared > SHARED_MEMORY:
        print(name, capability, types, fixed, made.metadata.shared)


def run(dtype: torch.dtype, width: int, *, sized: bool) -> None:
    """Every function of the door once; nothing is computed, so numbers mean nothing."""
    heads, layout = 3, Layout((197,) * 2)
    rows = layout.num_rows
    q, k, v = (torch.zeros(rows, heads, width, dtype=dtype) for _ in range(3))
    sizes = torch.ones(rows) if sized else None
    cuda.mean_query(q, sizes, layout)
    table = torch.zeros(1, heads, 197, 197, dtype=dtype)
    pairs = Pairs(table, torch.arange(rows)) if sized else None
    scores, metric = cuda.compute_stats(q[:2], k, v, sizes, 0.1, layout, pairs, wants_metric=True)
    assert scores is not None
    assert metric is not None
    patches: Any = torch.full((2, 1), 196) if sized else 196
    peaks = cuda.density_peaks(metric, scores, patches, 0.3 if sized else 0.5, 1, layout)
    keep, kept, dst = cuda.select(peaks, torch.zeros(1)[0], 2, metric, 1, layout)
    after = cuda.lay_out((100, 50), kept, torch.zeros(1, dtype=dtype))
    x, positions = torch.zeros(rows, heads * width, dtype=dtype), torch.arange(rows)
    cuda.reduce(
        x, positions, sizes, torch.zeros(2, 197, dtype=torch.int64), keep, dst if sized else None, layout, after
    )
    cuda.unpack(x, torch.zeros(2, 197, dtype=torch.int64), layout, 1, averages=not sized)
    cuda.packed_attention(q, k, v, sizes, layout, 0.1, pairs)
    cuda.packed_attention(q, k, v, sizes, layout, 0.1, read=1)


def main() -> None:
    for capability in map(int, sys.argv[1:]):

        def launch(name: str, grid: Any, *values: Any, capability: int = capability, **constants: int) -> None:
            build(capability, name, values, constants)

        cuda._launch = launch
        for dtype in (torch.float32, torch.bfloat16):
            run(dtype, 64, sized=True)
        run(torch.float16, 80, sized=False)
    for dtype in (torch.float32, torch.bfloat16):  # on the last
        run(dtype, 256, sized=False)
    kernels = {name for name, value in vars(cuda_launches).items() if isinstance(value, triton.JITFunction)}
    missing = {name for name in kernels - built if not name.startswith("_")}
    print(*(f"{name} was not built" for name in sorted(missing)), end="")


if __name__ == "__main__":
    main()
