"""How long a forward takes and how much memory: dense, attached and pruned models in turn on the same batches.

Tensor suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitprune.bench.subjects import BenchSubjects, Levels, compile_
from vitprune.measure.memory import peak_memory, require_memory
from vitprune.measure.outputs import ImageModel
from vitprune.measure.timing import WARM_UP, PlacedBatches, Runner, time_in_turn, whole_batches
from vitprune.models.trace import eval_mode, trace
from vitprune.reports.bench_results import Case, Setting

DENSE, ATTACHED = "dense", "attached"
TRACED = 8  # images at a time, to count their MACs


@dataclass
class Ratios:
    """MACs of the timed images under one model's thresholds. An image's don't depend on its batch: counted once."""

    model: PreTrainedModel
    x_BCHW: Tensor
    macs: list[float] = field(default_factory=list)
    dense_macs: list[float] = field(default_factory=list)

    def of_first(self, count: int) -> float:
        """Pruned by dense MACs of the first images."""
        while len(self.macs) < count:
            batch = self.x_BCHW[len(self.macs) :][:TRACED]
            with trace(self.model) as seen, torch.no_grad():
                ImageModel(self.model)(PlacedBatches([batch], self.model)[0])
            self.macs += seen.macs.tolist()
            self.dense_macs += seen.dense_macs.tolist()
        return sum(self.macs[:count]) / sum(self.dense_macs[:count])


@dataclass(frozen=True)
class Lineup:
    """All models of one setting. answers, by name; targets and ratios: of those that are pruned."""

    setting: Setting
    x_BCHW: Tensor
    answers: dict[str, ImageModel]
    targets: dict[str, float | None]
    ratios: dict[str, Ratios]

    @classmethod
    def of(
        cls, subjects: BenchSubjects, levels: Mapping[float | None, Levels], setting: Setting, x_BCHW: Tensor
    ) -> Lineup:
        """setting: eager. x_BCHW: the images to time."""
        targets = {str(target): target for target in levels}
        pruned = {name: subjects.pruned(levels[target]) for name, target in targets.items()}
        models = {DENSE: subjects.dense, ATTACHED: subjects.attached(), **pruned}
        return cls(
            setting=setting,
            x_BCHW=x_BCHW,
            answers={name: ImageModel(model) for name, model in models.items()},
            targets=targets,
            ratios={name: Ratios(model, x_BCHW) for name, model in pruned.items()},
        )

    def compiled(self, subjects: BenchSubjects, levels: Mapping[float | None, Levels]) -> Lineup:
        """The same models anew, their blocks compiled."""
        fresh = Lineup.of(subjects.again(), levels, self.setting.model_copy(update={"mode": "compiled"}), self.x_BCHW)
        for answers in fresh.answers.values():
            compile_(answers.model)
        return Lineup(fresh.setting, fresh.x_BCHW, fresh.answers, fresh.targets, self.ratios)

    @torch.no_grad()
    def measure(self, batch_size: int, repeats: int) -> list[Case]:
        """One case for each target. Raises MemoryError for a batch that would take more memory than there is."""
        with eval_mode(*self.answers.values()):
            batches = PlacedBatches(whole_batches(self.x_BCHW, batch_size), self.answers[DENSE])
            for name in (DENSE, ATTACHED):
                require_memory(self.answers[name], batches[0], batch_size)
            runners = {name: Runner(model, batches) for name, model in self.answers.items()}
            timings, measured = time_in_turn(runners, repeats, warm_up=self._warm_up(len(batches)))
            first = batches[0]
            peaks = {name: peak_memory(lambda name=name: self.answers[name](first), first.device) for name in runners}
        images = min(measured * batch_size, len(self.x_BCHW))
        return [
            Case(
                **self.setting.model_dump(),
                batch_size=batch_size,
                target=target,
                dense=timings[DENSE],
                attached=timings[ATTACHED],
                pruned=timings[name],
                macs_ratio=self.ratios[name].of_first(images),
                dense_peak_memory=peaks[DENSE],
                attached_peak_memory=peaks[ATTACHED],
                pruned_peak_memory=peaks[name],
            )
            for name, target in self.targets.items()
        ]

    def _warm_up(self, batches: int) -> int:
        """A compiled model may compile anew for a batch with other numbers of tokens: that is no part of its time."""
        return WARM_UP if self.setting.mode == "eager" else max(WARM_UP, batches)
