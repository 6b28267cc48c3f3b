"""Several processes against one: the same records, the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import samples
import torch
from ports import free_port
from safetensors.torch import load_file
from tiny import Tolerance
from torch.testing import assert_close

WORKER = Path(__file__).parents[1] / "support" / "distributed_worker.py"
# float64 sums in another order, through AdamW. In float32 every second run of 20 steps has a token whose score lies
# within rounding of its threshold: it leaves in one run and stays in the other. What is recorded of a step is float32
SAME = Tolerance(rtol=1e-6, atol=1e-8)
EXACT = Tolerance(rtol=0.0, atol=0.0)
PATIENCE = 120  # seconds, for what takes ten
PAPER = {"before_blocks": [2, 4], "score": "head-weighted-class-attention", "dropped": "leave"}
# as `accelerate launch --use_fsdp --fsdp_version 2` sets them
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
Trained = tuple[list[dict[str, float]], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    samples.write_data(folder / "data", train=50)
    return folder


def start(out: Path, processes: int, *, fsdp: bool, **settings: object) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command, environment = prepare(out, torchrun if processes > 1 else [], fsdp=fsdp, **settings)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)


def prepare(out: Path, launcher: list[str], *, fsdp: bool, **settings: object) -> tuple[list[str], dict[str, str]]:
    """Command and environment of 20 steps: batches of 16 that share 50 images don't end where epochs do."""
    common = {"data": str(out.parent / "data"), "steps": 20, "augmentation": "light", "fsdp": fsdp, "held_out": 10}
    common["thresholds"] = "learned" if settings["policy"] == PAPER else "scaled"
    common |= {"losses": {"task": 1.0, "distillation": 0.5}, "learning_rate": 2e-5}
    arguments = [str(WORKER), str(out), json.dumps(common | settings)]
    out.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(FSDP if fsdp else {})}
    return [sys.executable, *launcher, *arguments], environment


def result(out: Path, done: subprocess.CompletedProcess[str]) -> Trained:
    assert done.returncode == 0, done.stderr
    return json.loads((out / "records.json").read_text()), load_file(out / "weights.safetensors")


@cache
def trained(
    folder: Path, processes: int, policy: str, batch_size: int = 16, accumulation: int = 1, fsdp: bool = False
) -> Trained:
    out = folder / f"{processes} {batch_size} {fsdp} {abs(hash(policy))}"
    sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    return result(out, start(out, processes, fsdp=fsdp, policy=json.loads(policy), **sizes))


@pytest.mark.parametrize("policy", [PAPER, {"before_blocks": [1, 3]}], ids=["paper, leave", "redundancy, merge"])
@pytest.mark.parametrize("way", ["ddp", "fsdp2", "ddp, accumulated"])
def test_two_processes_train_as_one_does(folder: Path, policy: dict[str, object], way: str) -> None:
    text = json.dumps(policy)
    sizes = (4, 4) if "accumulated" in way else (16, 1)
    records, weights = trained(folder, 2, text, *sizes, fsdp=way == "fsdp2")
    expected_records, expected_weights = trained(folder, 1, text)
    assert len(records) == 20
    assert_close(records, expected_records, **SAME)
    assert_close(weights, expected_weights, **SAME)


def test_two_machines_keep_their_states_in_a_folder_that_both_see(folder: Path) -> None:
    """Each has one process, so both are the first of their machine."""
    out, text = folder / "machines", json.dumps(PAPER)
    place = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    started = []
    for machine in range(2):
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank"]
        settings = {"policy": PAPER, "batch_size": 16, "checkpoint_every": 5, "checkpoints_kept": 2}
        command, environment = prepare(out, [*torchrun, str(machine), *place], fsdp=False, **settings)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
    ended = [process.communicate(timeout=PATIENCE)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(ended)
    assert sorted(path.name for path in out.glob("step-*")) == ["step-000000015", "step-000000020"]
    records = json.loads((out / "records.json").read_text())
    expected_records, expected_weights = trained(folder, 2, text, 16, 1, fsdp=False)
    assert_close(records, expected_records, **EXACT)
    assert_close(load_file(out / "weights.safetensors"), expected_weights, **EXACT)


def test_half_precision_is_the_same_sharded_or_not(folder: Path) -> None:
    """Weights alone are computed with in bfloat16: neither thresholds nor costs are."""
    half = {"policy": PAPER, "batch_size": 16, "mixed_precision": "bf16", "dtype": "float32", "steps": 2}
    (ddp, _), (sharded, _) = (
        result(folder / f"half {fsdp}", start(folder / f"half {fsdp}", 2, fsdp=fsdp, **half)) for fsdp in (False, True)
    )
    for name in ("loss", "ratio", "kept"):
        assert sharded[0][name] == pytest.approx(ddp[0][name], rel=1e-5)


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_processes_that_are_told_to_end_go_on(folder: Path, fsdp: bool) -> None:
    """One is told; both keep their state."""
    text = json.dumps(PAPER)
    out = folder / f"told {fsdp}"
    told = start(out, 2, fsdp=fsdp, policy=PAPER, batch_size=16, told_at=7)
    assert told.returncode != 0
    assert [path.name for path in out.iterdir()] == ["step-000000008"], told.stderr
    records, weights = result(out, start(out, 2, fsdp=fsdp, policy=PAPER, batch_size=16))
    expected_records, expected_weights = trained(folder, 2, text, 16, 1, fsdp=fsdp)
    assert_close(records, expected_records[8:], **EXACT)
    assert_close(weights, expected_weights, **EXACT)
