"""One process of a distributed fine-tuning, started by tests: `torchrun distributed_worker.py OUT SETTINGS`.

Writes records and weights that the main process ends with to OUT.
"""

from __future__ import annotations

import copy
import json
import signal
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from transformers import ViTImageProcessorPil

import vitprune
from vitprune.budget.calibration import calibrate
from vitprune.data.images import load_images
from vitprune.finetuning.finetune import finetune
from vitprune.finetuning.state import States
from vitprune.finetuning.step import TrainStep
from vitprune.models.module import pruning_of
from vitprune.recipe.schema import DataSpec, FinetuneSpec, PruningSpec, SplitSpec
from vitprune.runtime import distributed, signals
from vitprune.runtime.signals import TERMINATED


def tell_main_to_end(at: object) -> None:
    """SIGTERM to one of the processes, in the midst of a step."""
    original = TrainStep.__call__

    def update(self: TrainStep, parts: Any, step: int) -> Any:
        if step == at and distributed.init().is_main_process:
            signal.raise_signal(signal.SIGTERM)
        return original(self, parts, step)

    TrainStep.__call__ = update


def run(out: Path, settings: dict[str, object]) -> None:
    data, fsdp = str(settings.pop("data")), settings.pop("fsdp", False)
    held_out, dtype = settings.pop("held_out", 0), getattr(torch, str(settings.pop("dtype", "float64")))
    policy, told_at = settings.pop("policy", tiny.AS_VIT), settings.pop("told_at", None)
    state = distributed.init()
    if fsdp:
        # Accelerate shards models on accelerators only; what it then does works on CPUs too
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    images = load_images(
        DataSpec(path=data),
        SplitSpec(split="train"),
        ViTImageProcessorPil(size={"height": 32, "width": 32}),
        id2label=None,
    )
    torch.manual_seed(0)
    dense = tiny.build("vit").to(dtype)
    pruned = vitprune.prune_(copy.deepcopy(dense), PruningSpec.model_validate(policy, strict=False))
    pruning = pruning_of(pruned)
    pruning.thresholds = torch.nn.Parameter(pruning.thresholds.to(dtype))
    pruning.register_buffer("temperatures", pruning.temperatures.to(dtype))
    calibrate(pruned, [batch["pixel_values"] for batch in images.loader(16)], 0.6, progress=False)
    train, holdout = (images, None) if not held_out else images.holdout(int(str(held_out)), 0)
    spec = FinetuneSpec.model_validate(settings, strict=False)
    tell_main_to_end(told_at)
    try:
        with signals.watch():
            states = States.of(spec, out)
            history = finetune(pruned, dense, train, spec, 0.6, holdout=holdout, progress=False, states=states)
    except signals.Terminated:
        sys.exit(TERMINATED)
    if state.is_main_process:
        save_file(
            {name: weight.contiguous() for name, weight in pruned.state_dict().items()}, out / "weights.safetensors"
        )
        (out / "records.json").write_text(json.dumps(history.records))
    distributed.destroy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
