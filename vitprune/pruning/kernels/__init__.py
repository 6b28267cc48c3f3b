"""The parts of a stage as one device does them fastest: a door for each device, chosen once a forward.

Torch's operators say the same and serve where no door opens, with gradients too; they are in the modules above. `flash`
is no door: attention with gradients on CUDA, which `packed.attention` asks for block by block.
"""

from __future__ import annotations

import os

from torch import Tensor

from vitprune.pruning.kernels import cpu, cuda
from vitprune.pruning.token_batch import Kernels


def choose(hidden_states: Tensor) -> Kernels | None:
    """What does the stages of a forward on such hidden states; None: torch's operators, as with VITPRUNE_KERNELS=0."""
    if os.environ.get("VITPRUNE_KERNELS") == "0":
        return None
    if cpu.fits(hidden_states):
        return cpu
    return cuda if cuda.fits(hidden_states) else None
