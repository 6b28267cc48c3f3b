"""What `vitprune bench` finds out, as values: `bench.json` is a `Benchmark`.

Knows names, units, the file, and what follows from the numbers: where pruning pays, as a plain sentence.
`docs/bench.md` explains each field.
"""

from __future__ import annotations

from itertools import takewhile
from pathlib import PurePath
from typing import Any, Literal

from pydantic import PositiveFloat, computed_field

from vitprune.reports.results import PAYS, Document, Environment, PairedTiming, Result, Timing


class Setting(Result):
    """What a row was measured with.

    mode: eager, or compiled (each block by torch.compile); of an exported model its format.
    """

    image_size: int
    dtype: str
    mode: str = "eager"

    @property
    def setting(self) -> Setting:
        """This part of a row alone."""
        return Setting(image_size=self.image_size, dtype=self.dtype, mode=self.mode)


class Case(Setting, PairedTiming):
    """Dense, attached and pruned model in turn on the same batches.

    attached: pruned, but with thresholds that keep everything. target: the part of the dense MACs that thresholds were
    calibrated to; None where the model has its own. macs_ratio: pruned by dense MACs of the images that were timed.
    peak_memory: working memory of one forward, in bytes, weights not counted. Of exported models there is neither.
    """

    batch_size: int
    target: float | None
    attached: Timing | None = None
    macs_ratio: PositiveFloat
    dense_peak_memory: int | None = None
    attached_peak_memory: int | None = None
    pruned_peak_memory: int | None = None

    @computed_field
    @property
    def ideal_speedup(self) -> float:
        """What the MACs allow."""
        return 1 / self.macs_ratio

    @computed_field
    @property
    def efficiency(self) -> float:
        """How much of the ideal speed-up is real."""
        return self.speedup / self.ideal_speedup

    @computed_field
    @property
    def attached_speedup(self) -> float | None:
        """Median of dense by median of attached: what pruning costs before it saves anything."""
        return None if self.attached is None else self.dense.median / self.attached.median


class TrainingStep(Setting, PairedTiming):
    """One step of fine-tuning, the dense teacher's forward included. execution: how the pruned student was trained.

    dense: the same step with a dense student. macs_ratio: what inference would execute of the dense MACs.
    """

    batch_size: int
    execution: Literal["packed", "masked"]
    target: float | None
    macs_ratio: PositiveFloat
    dense_peak_memory: int
    pruned_peak_memory: int

    @computed_field
    @property
    def ideal_speedup(self) -> float:
        """If time were work: a forward for the teacher, three for the student (its backward counts as two)."""
        return 4 / (1 + 3 * self.macs_ratio)

    @computed_field
    @property
    def efficiency(self) -> float:
        """How much of the ideal speed-up is real."""
        return self.speedup / self.ideal_speedup


class Failure(Setting):
    """What could not be measured, and why. Without a batch size: at none; without a target: at none."""

    batch_size: int | None = None
    target: float | None = None
    what: str
    reason: str


class Verdict(Setting):
    """What one setting and target come to. speedup, ideal_speedup: at `batch_size`, the largest that was measured.

    break_even: the smallest batch size measured from which on pruned is `PAYS` times as fast as dense, or None.
    """

    target: float | None
    macs_ratio: PositiveFloat
    batch_size: int
    speedup: float
    ideal_speedup: float
    break_even: int | None
    sentence: str


class Benchmark(Document):
    """Everything that a benchmark found out. pruning: the `PruningSpec`. images: what was timed, in words."""

    environment: Environment
    checkpoint: str
    pruning: dict[str, Any]
    images: str
    repeats: int
    cases: tuple[Case, ...] = ()
    training: tuple[TrainingStep, ...] = ()
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()

    @computed_field
    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """One for each setting and target, in the order in which they were measured."""
        groups: dict[tuple[Setting, float | None], list[Case]] = {}
        for case in self.cases:
            groups.setdefault((case.setting, case.target), []).append(case)
        return tuple(self._verdict(setting, cases) for (setting, _), cases in groups.items())

    def _verdict(self, setting: Setting, cases: list[Case]) -> Verdict:
        cases = sorted(cases, key=lambda case: case.batch_size)
        largest, first = cases[-1], break_even(cases)
        return Verdict(
            **setting.model_dump(),
            target=largest.target,
            macs_ratio=largest.macs_ratio,
            batch_size=largest.batch_size,
            speedup=largest.speedup,
            ideal_speedup=largest.ideal_speedup,
            break_even=first,
            sentence=f"{self._where()} {self._gain(largest)}; {_pays(cases, first)}.",
        )

    def _where(self) -> str:
        machine = self.environment
        threads = f"{machine.threads} thread{'' if machine.threads == 1 else 's'}"
        name = f"{machine.cpu}, {threads}" if machine.device == "cpu" else machine.device
        return f"On this machine ({name}), pruned to"

    def _gain(self, case: Case) -> str:
        compiled = "" if case.mode == "eager" else f", {case.mode}"
        return (
            f"{100 * case.macs_ratio:.0f} % of the MACs, {PurePath(self.checkpoint).name} is {case.speedup:.2f}x as "
            f"fast as dense at batch size {case.batch_size} in {case.dtype} at {case.image_size} px{compiled} "
            f"({case.ideal_speedup:.2f}x is what the MACs allow)"
        )


def break_even(cases: list[Case]) -> int | None:
    """The smallest batch size from which on pruned is `PAYS` times as fast as dense at all that were measured."""
    falling = sorted(cases, key=lambda case: case.batch_size, reverse=True)
    faster = list(takewhile(lambda case: case.speedup >= PAYS, falling))
    return faster[-1].batch_size if faster else None


def _pays(cases: list[Case], first: int | None) -> str:
    if first is None:
        paying = [str(case.batch_size) for case in cases if case.speedup >= PAYS]
        return f"it pays at batch size {', '.join(paying)} alone" if paying else "it doesn't pay here"
    if len(cases) == 1:
        return "it pays there, the only batch size measured"
    if first == cases[0].batch_size:
        return "it pays at every batch size measured"
    return f"it pays from batch size {first} on"
