"""Who draws on a generation: a thread, or an asyncio task whose steps run in whichever thread is free."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import asyncio

_task: "ContextVar[asyncio.Task[Any] | None]" = ContextVar("_task", default=None)


@dataclass(frozen=True, slots=True)
class Owner:
    """A task, or else a thread."""

    thread: threading.Thread | None
    task: "asyncio.Task[Any] | None"

    @classmethod
    def current(cls) -> Self:
        """The task that this thread acts for, or the thread itself."""
        task = _task.get()
        return cls(None if task else threading.current_thread(), task)

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        if self.task is not None:
            return not self.task.done()
        return self.thread is not None and self.thread.is_alive()


@contextmanager
def acting_for(task: "asyncio.Task[Any] | None") -> Iterator[None]:
    """Within, this thread acts for a task."""
    before = _task.set(task)
    try:
        yield
    finally:
        _task.reset(before)
