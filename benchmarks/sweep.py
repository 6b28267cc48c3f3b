"""Tries `prune_` on all of transformers' classes that take images, as their default configs make them.

    python benchmarks/sweep.py

On the meta device, without weights: accepted, refused, crashed (any error but a ValueError), or not built (its default
config needs a package or a file). Prints counts, what was accepted and what crashed; ends with 1 where something did.
Whether what is accepted is right is what tests/models/test_generic.py and the contract suite check, on tiny models.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from vitprune import PruningSpec, prune_

LONGEST = 400  # letters of a refusal


def classes() -> Iterator[type[PreTrainedModel]]:
    for name in dir(transformers):
        found: Any = getattr(transformers, name)
        if not isinstance(found, type) or not issubclass(found, PreTrainedModel) or name.endswith("PreTrainedModel"):
            continue
        if found.config_class is not None and "pixel_values" in inspect.signature(found.forward).parameters:
            yield found


def outcome(cls: Any) -> tuple[str, str]:
    try:
        with torch.device("meta"):
            model = cls(cls.config_class())
    except Exception as error:
        return "not built", f"{type(error).__name__}: {error}"
    try:
        prune_(model, PruningSpec())
    except ValueError as error:
        return ("refused", str(error)) if len(str(error)) <= LONGEST else ("refused at length", str(error))
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {error}"
    return "accepted", ""


def main() -> None:
    transformers.logging.set_verbosity_error()
    outcomes = {cls.__name__: outcome(cls) for cls in classes()}
    print(Counter(kind for kind, _ in outcomes.values()))
    for wanted in ("accepted", "crashed", "refused at length"):
        print(
            f"{wanted}:", *(f"  {name} {text}" for name, (kind, text) in outcomes.items() if kind == wanted), sep="\n"
        )
    sys.exit(any(kind in ("crashed", "refused at length") for kind, _ in outcomes.values()))


if __name__ == "__main__":
    main()
