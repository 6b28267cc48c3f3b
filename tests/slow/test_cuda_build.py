"""The CUDA door's kernels are built for NVIDIA's Ampere (A100, A10) and Hopper, which takes no device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BUILD = Path(__file__).parents[1] / "support" / "cuda_build.py"


def test_every_kernel_is_built_and_fits_into_its_device(tmp_path: Path) -> None:
    # in a process without the interpreter; what Triton 3.9 warns of without it is what it does, too
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, str(BUILD), "80", "86", "90"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
