"""Builds the CUDA door's kernels for a device that isn't there, as the door launches them. Arguments: capabilities.

Prints each kernel that needs more than what such a device has for a program, or that keeps much of what it counts in
memory for want of registers, and those that are built anew for another number of tokens.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vitprune.pruning.kernels import cuda, cuda_launches
from vitprune.pruning.layout import Layout
from vitprune.pruning.token_batch import Pairs

# of a program, in KiB
SHARED_MEMORY = {80: 163, 86: 99, 90: 227}
STACK = 1024  # bytes
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
built: dict[str, list[Any]] = {}


class Device:
    """What Triton asks of a device before it builds for it."""

    utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 232448})

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def stack_of(cubin: bytes) -> int:
    """Bytes of local memory of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", told)
    assert found is not None, told
    return int(found[1])


def build(name: str, grid: Any, *values: Any, **constants: int) -> None:
    made = getattr(cuda_launches, name).warmup(*values, grid=grid, **constants)
    made = made.result() if hasattr(made, "result") else made
    known = built.setdefault(name, [])
    if any(one is made for one in known):
        return
    known.append(made)
    stack = stack_of(made.asm["cubin"])
    if made.metadata.shared > 1024 * SHARED_MEMORY[made.metadata.target.arch] or stack > STACK:
        print(name, made.metadata.target, constants, f"shared {made.metadata.shared}, stack {stack}")


def run(
    dtype: torch.dtype,
    width: int,
    *,
    sized: bool,
    merges: bool | None = None,
    paired: bool | None = None,
    tokens: int = 197,
) -> None:
    """Every function of the door once; nothing is computed, so numbers mean nothing.

    merges, paired: as `sized`, if they aren't given.
    """
    merges, paired = (sized if one is None else one for one in (merges, paired))
    heads, layout = 3, Layout((tokens,) * 2)
    rows = layout.num_rows
    q, k, v = (torch.zeros(rows, heads, width, dtype=dtype) for _ in range(3))
    sizes = torch.ones(rows) if sized else None
    cuda.mean_query(q, sizes, layout)
    table = torch.zeros(1, heads, tokens, tokens, dtype=dtype)
    pairs = Pairs(table, torch.arange(rows)) if paired else None
    scores, metric = cuda.compute_stats(q[:2], k, v, sizes, 0.1, layout, pairs, wants_metric=True)
    assert scores is not None
    assert metric is not None
    patches: Any = torch.full((2, 1), tokens - 1) if sized else tokens - 1
    peaks = cuda.density_peaks(metric, scores, patches, 0.3 if sized else 0.0, 1, layout)
    keep, kept, dst = cuda.select(peaks, torch.zeros(1)[0], 2, metric, 1, layout)
    after = cuda.lay_out((100, 50), kept, torch.zeros(1, dtype=dtype))
    x, positions = torch.zeros(rows, heads * width, dtype=dtype), torch.arange(rows)
    cuda.reduce(
        x, positions, sizes, torch.zeros(2, tokens, dtype=torch.int64), keep, dst if merges else None, layout, after
    )
    cuda.unpack(x, torch.zeros(2, tokens, dtype=torch.int64), layout, 1, averages=not sized)
    cuda.packed_attention(q, k, v, sizes, layout, 0.1, pairs)
    cuda.packed_attention(q, k, v, sizes, layout, 0.1, read=1)


def main() -> None:
    cuda._launch = build
    for capability in map(int, sys.argv[1:]):
        device: Any = Device(capability)
        driver.set_active(device)
        for dtype in (torch.float32, torch.bfloat16):
            run(dtype, 64, sized=True)
            run(dtype, 64, sized=False, merges=True, paired=True)  # a merging model's first stage
        run(torch.float32, 80, sized=True)
        run(torch.float16, 80, sized=False)
        run(torch.bfloat16, 256, sized=True)
    run(torch.float32, 256, sized=False)  # on the last
    before = {name: len(kinds) for name, kinds in built.items()}
    run(torch.bfloat16, 64, sized=True, tokens=208)
    for name, kinds in built.items():
        # what takes the dense model's tokens is built once for each model
        if len(kinds) > before[name] and name not in ("move_patches", "unpack", "token_stats", "packed_attention"):
            print(f"{name} is built anew for 208 tokens")
    kernels = {name for name, value in vars(cuda_launches).items() if isinstance(value, triton.JITFunction)}
    missing = {name for name in kernels - built.keys() if not name.startswith("_")}
    print(*(f"{name} was not built" for name in sorted(missing)), end="")


if __name__ == "__main__":
    main()
