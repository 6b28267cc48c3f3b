"""The parts of a stage as one device does them fastest: a door for each device, chosen once a forward.

Torch's operators say the same and serve where no door opens; they are in the modules above. So far the CPU has one;
`cuda` holds packed attention alone, which `packed_attention` asks for block by block.
"""

from __future__ import annotations

from torch import Tensor

from vitprune.pruning.kernels import cpu
from vitprune.pruning.token_batch import Kernels


def choose(hidden_states: Tensor) -> Kernels | None:
    """What does the stages of a forward on such hidden states; None: torch's operators."""
    return cpu if cpu.fits(hidden_states) else None
