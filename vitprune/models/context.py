"""What a thread asks of the forwards that it runs, and what runs in it now: two context variables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

if TYPE_CHECKING:
    from torch import nn

    from vitprune.pruning.attention import Attention
    from vitprune.pruning.forward import Forward
    from vitprune.pruning.selection import Observer


@dataclass
class Exporting:
    """levels: of the model, which in a graph have no values. forward: what the graph was traced from."""

    levels: tuple[float, ...]
    forward: Forward | None = None


class Context(NamedTuple):
    """traces: that watch. whole_sequence: what is behind the last block is wanted whole, though the head reads less.

    for_head: only the model's own head sees what the backbone gives out.
    backbone: whose forward runs, from its first module to its last. outer: the context in which it began.
    forward: of that backbone, if it is pruned.
    checkpoints: blocks are run again in the backward pass, by us.
    exporting: what the exporter of a graph and the model in it tell each other.
    behind_block: called behind each block, before the stage that follows it.
    """

    traces: tuple[Observer, ...] = ()
    whole_sequence: bool = False
    for_head: bool = False
    backbone: ref[nn.Module] | None = None
    outer: Context | None = None
    forward: Forward | None = None
    checkpoints: bool = False
    exporting: Exporting | None = None
    behind_block: Callable[[], None] | None = None


_context: ContextVar[Context] = ContextVar("vitprune", default=Context())  # noqa: B039
_attention: ContextVar[Attention | None] = ContextVar("vitprune_attention", default=None)


def current() -> Context:
    return _context.get()


def change(**changes: Any) -> None:
    """For hooks, which begin here and end there."""
    _context.set(_context.get()._replace(**changes))


def running(backbone: nn.Module) -> Context | None:
    """The context in which a backbone's forward runs, or ran until it was interrupted; None for any other."""
    seen = _context.get()
    while seen.backbone is not None:
        if seen.backbone() is backbone:
            return seen
        assert seen.outer is not None
        seen = seen.outer
    return None


def enter(backbone: nn.Module, forward: Forward | None, *, checkpoints: bool) -> None:
    """For hooks: a backbone's forward begins, perhaps inside that of another, which goes on where it ends.

    What isn't an Exception, such as Ctrl-C, passes by the hooks that end a forward: one of the same backbone that seems
    to run was interrupted, and one of a backbone that is no more.
    """
    before = _context.get()
    outer, seen = before, before
    while seen.backbone is not None:
        assert seen.outer is not None
        if seen.backbone() in (backbone, None):
            outer = seen.outer
        seen = seen.outer
    around = {name: getattr(outer, name) for name in ("backbone", "outer", "forward", "checkpoints")}
    outer = before._replace(for_head=False, **around)
    _context.set(outer._replace(backbone=ref(backbone), outer=outer, forward=forward, checkpoints=checkpoints))


def leave(backbone: nn.Module) -> Context | None:
    """For hooks: a backbone's forward ends. Returns its context; None where that forward never began."""
    own = running(backbone)
    if own is not None:
        assert own.outer is not None
        _context.set(own.outer)
    return own


@contextmanager
def within(**changes: Any) -> Iterator[None]:
    """The context with some changes, for a while."""
    token = _context.set(_context.get()._replace(**changes))
    try:
        yield
    finally:
        _context.reset(token)


def attention() -> Attention | None:
    """That of the block that runs."""
    return _attention.get()


def attend_by(attention: Attention) -> None:
    """For hooks: what runs from here on attends so."""
    _attention.set(attention)


class Attending:
    """A block runs in it with its attention. No generator: it is entered once a block, and that counts."""

    __slots__ = ("_before", "_own")

    def __init__(self, own: Attention) -> None:
        self._own = own

    def __enter__(self) -> None:
        self._before: Token[Attention | None] = _attention.set(self._own)

    def __exit__(self, *error: object) -> None:
        _attention.reset(self._before)
