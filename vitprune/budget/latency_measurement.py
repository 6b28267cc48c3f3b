"""Measures what a model's blocks and stages take by the number of tokens: the table of a latency budget.

Shapes: B images, C channels, H height, W width, P measurements, S numbers of tokens in the table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitprune.budget.calibration import set_rate
from vitprune.budget.latency_table import CostTable, between
from vitprune.measure.outputs import ImageModel
from vitprune.measure.timing import PlacedBatches, Runner, placed, time_in_turn, wait_for, whole_batches
from vitprune.models import context
from vitprune.models.module import Levels, Pruning, pruning_of
from vitprune.models.structure import examine
from vitprune.models.trace import eval_mode, trace

# parts of the patches that are left behind the last stage, where the table is measured
LEFT = (1.0, 0.75, 0.5, 0.35, 0.2, 0.1)
ALMOST = 0.98  # in place of 1 where stages that keep all are left out
POINTS = 9
REPEATS = 4
# how strongly the table prefers straight lines to what few measurements say, and level ones where there are none
STIFFNESS = 0.1
LEVEL = 1e-4


@torch.no_grad()
def measure_latency(
    dense: nn.Module, pruned: nn.Module, images: Tensor, batch_size: int, *, repeats: int = REPEATS
) -> CostTable:
    """Measure what a block, a stage and the rest take by the number of tokens, where and as the models are.

    images: pixel values (B, C, H, W) of real images by chance; one batch of them is pruned at several rates, in turn
        with the dense model, so that images of a batch differ in their tokens as they will.

    Raises ValueError where `pruned` isn't pruned.
    """
    before, after = ImageModel.of(dense), ImageModel.of(pruned)
    pruning = pruning_of(pruned)
    batches = whole_batches(images, batch_size)[:1]
    blocks = _blocks(before, after)
    with eval_mode(dense, pruned), _restored(pruning):
        pruning.latency = None
        x_BCHW = placed(batches[0], pruned)
        most, stages = 1.0 if pruning.spec.select == "threshold" else ALMOST, len(pruning.before_blocks)
        rates = [1 - min(left, most) ** (1 / stages) for left in LEFT]
        probes = [_probe(after, blocks, x_BCHW, rate) for rate in rates]
        on_device = PlacedBatches(batches, pruned)
        runners = {str(index): Runner(probe, on_device) for index, probe in enumerate(probes)}
        timings, _ = time_in_turn(
            {"dense": Runner(before, PlacedBatches(batches, dense)), **runners}, repeats, warm_up=1, shortest=0
        )
    return _table(pruning, probes, timings["dense"].median, batch_size)


@dataclass(eq=False)
class _Tokens:
    """Takes the place of a table for one pass and notes the tokens that it is asked about."""

    blocks_PB: list[Tensor] = field(default_factory=list)
    stages_PB: list[Tensor] = field(default_factory=list)

    def block(self, block: int, tokens_B: Tensor) -> Tensor:
        self.blocks_PB.append(tokens_B.cpu())
        return torch.zeros_like(tokens_B)

    def stage(self, tokens_B: Tensor) -> Tensor:
        self.stages_PB.append(tokens_B.cpu())
        return torch.zeros_like(tokens_B)

    def pruned(self, inside_B: Tensor) -> Tensor:
        return inside_B

    def dense(self, tokens_B: Tensor) -> Tensor:
        return tokens_B


@dataclass(eq=False)
class _Probe:
    """A call of the pruned model at some levels. Notes when each block began and ended, and its stage, pass by pass."""

    model: ImageModel
    blocks: tuple[nn.Module, ...]
    levels: Tensor
    tokens: _Tokens
    seconds: list[list[float]] = field(default_factory=list)

    def __call__(self, x_BCHW: Tensor) -> None:
        pruning = pruning_of(self.model)
        pruning.levels.copy_(self.levels)
        stamps: list[float] = []

        def stamp(*_: object) -> None:
            wait_for(x_BCHW.device)
            stamps.append(time.perf_counter())

        handles = [block.register_forward_pre_hook(stamp, prepend=True) for block in self.blocks]
        handles += [block.register_forward_hook(stamp) for block in self.blocks]
        stamp()
        try:
            with context.within(behind_block=stamp):
                self.model(x_BCHW)
        finally:
            for handle in handles:
                handle.remove()
        stamp()
        self.seconds.append(stamps)

    def split(self, stages: tuple[int, ...]) -> tuple[list[float], list[float], float]:
        """Median seconds of each block, each stage and the rest; the first pass was for warming up."""
        blocks: list[list[float]] = [[] for _ in self.blocks]
        decided: list[list[float]] = [[] for _ in stages]
        rest = []
        for start, *inner, end in self.seconds[1:]:
            for index, (began, ended, pruned) in enumerate(zip(*(iter(inner),) * 3, strict=True)):
                blocks[index].append(ended - began)
                if index + 1 in stages:
                    decided[stages.index(index + 1)].append(pruned - ended)
            rest.append(end - start - sum(times[-1] for times in (*blocks, *decided)))
        median = statistics.median
        return [median(times) for times in blocks], [median(times) for times in decided], median(rest)


def _probe(model: ImageModel, blocks: tuple[nn.Module, ...], x_BCHW: Tensor, rate: float) -> _Probe:
    pruning = pruning_of(model)
    set_rate(model.model, [x_BCHW], rate)
    tokens = pruning.latency = _Tokens()
    with trace(model) as watched:
        model(x_BCHW)
    _ = watched.costs  # asks the table that `tokens` takes the place of
    pruning.latency = None
    return _Probe(model, blocks, pruning.levels.detach().clone(), tokens)


def _table(pruning: Pruning, probes: list[_Probe], dense_seconds: float, batch_size: int) -> CostTable:
    """Fits one curve to blocks of one kind, and one to all stages."""
    stages, linear = pruning.before_blocks, pruning.cost.linear
    last = None if pruning.cost.read is None else len(linear) - 1
    # a block that a stage follows also computes what the stage asks for; before the first stage nothing is packed; of
    # the last one the head may read few tokens
    names = [(linear[block], block + 1 in stages, block >= stages[0], block == last) for block in range(len(linear))]
    distinct = list(dict.fromkeys(names))
    kinds = tuple(distinct.index(name) for name in names)
    dense_tokens = int(probes[0].tokens.blocks_PB[0].max())
    tokens_S = torch.linspace(pruning.num_prefix_tokens + 1, dense_tokens, POINTS, dtype=torch.float64)
    splits = [probe.split(stages) for probe in probes]
    curves = tuple(
        _fit(
            tokens_S,
            [
                (probe.tokens.blocks_PB[block], blocks[block] / batch_size)
                for probe, (blocks, _, _) in zip(probes, splits, strict=True)
                for block in range(len(kinds))
                if kinds[block] == kind
            ],
        )
        for kind in range(len(distinct))
    )
    decided = [
        (tokens_B, seconds / batch_size)
        for probe, (_, seconds_of, _) in zip(probes, splits, strict=True)
        for tokens_B, seconds in zip(probe.tokens.stages_PB, seconds_of, strict=True)
    ]
    return CostTable(
        batch_size=batch_size,
        tokens=tuple(tokens_S.tolist()),
        curves=curves,
        kinds=kinds,
        stages=_fit(tokens_S, decided),
        outside_blocks=statistics.mean(rest for _, _, rest in splits) / batch_size,
        dense_tokens=dense_tokens,
        dense_seconds=dense_seconds / batch_size,
    )


def _fit(tokens_S: Tensor, measured: list[tuple[Tensor, float]]) -> tuple[float, ...]:
    """Least squares: a point's share in a measurement is what interpolation gives it, averaged over the images."""
    shares_PS = torch.stack([_shares(tokens_S, tokens_B).mean(0) for tokens_B, _ in measured])
    seconds_P = torch.tensor([seconds for _, seconds in measured], dtype=torch.float64)
    rises_SS = torch.eye(len(tokens_S), dtype=torch.float64).diff(dim=0)
    wishes_SS = torch.cat([STIFFNESS * rises_SS.diff(dim=0), LEVEL * rises_SS])
    left = torch.cat([shares_PS, wishes_SS])
    right = torch.cat([seconds_P, seconds_P.new_zeros(len(wishes_SS))])
    return tuple(torch.linalg.lstsq(left, right[:, None]).solution[:, 0].tolist())


def _shares(tokens_S: Tensor, tokens_B: Tensor) -> Tensor:
    """Shares (B, S) of the points in each image's cost."""
    right_B, part_B = between(tokens_B, tokens_S)
    shares_BS = torch.zeros(len(tokens_B), len(tokens_S), dtype=torch.float64)
    shares_BS.scatter_(1, right_B[:, None], part_B[:, None])
    return shares_BS.scatter_(1, right_B[:, None] - 1, 1 - part_B[:, None])


def _blocks(dense: ImageModel, pruned: ImageModel) -> tuple[nn.Module, ...]:
    """The pruned model's blocks: pruning leaves their names alone."""
    names = {module: name for name, module in dense.model.named_modules()}
    return tuple(pruned.model.get_submodule(names[block]) for block in examine(dense.model).blocks)


@contextmanager
def _restored(pruning: Pruning) -> Iterator[None]:
    """Afterwards levels, temperatures and table are what they were."""
    levels, latency = Levels.of(pruning), pruning.latency
    try:
        yield
    finally:
        levels.give(pruning)
        pruning.latency = latency
