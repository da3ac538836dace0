"""Errors a user can cause or meet, each with one line that says what, where, and the way out.

ValueError
└── EdgeError
    ├── ArtifactError        a file of an artifact is damaged, missing, foreign or of another version
    ├── DestinationError     a folder cannot be written: in use, not empty, no space
    │   └── BusyDestinationError   another process is writing it
    ├── RequestError         a prompt or an option that cannot be served
    ├── MemoryBudgetError    the budget is below what is needed
    ├── BusyError            the runtime is generating for another thread
    ├── ClosedError          the runtime was closed, or belongs to another process
    ├── SessionError         a session file is damaged, foreign or cannot be written
    ├── ToolCallError        the model wrote a tool call that is none, or with arguments that do not fit
    └── InferenceError       the model produced no usable numbers
"""

import reprlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.memory_plan import MemoryPlan


class EdgeError(ValueError):
    """Base of every error that is a user's to see."""


class ArtifactError(EdgeError):
    """A file of an artifact is damaged, missing, foreign or of another format version."""


class DestinationError(EdgeError):
    """A folder that is to be written cannot be."""


class BusyDestinationError(DestinationError):
    """Another process is writing the folder."""


class RequestError(EdgeError):
    """A prompt or an option that cannot be served."""


class MemoryBudgetError(EdgeError):
    """The memory budget is below what the model needs; `plan` says what it needs, where the model was planned."""

    def __init__(self, message: str, plan: "MemoryPlan | None" = None) -> None:
        super().__init__(message)
        self.plan = plan


class BusyError(EdgeError):
    """The runtime is generating for another thread."""


class ClosedError(EdgeError):
    """The runtime was closed, or was created in another process."""


class SessionError(EdgeError):
    """A session file is damaged, foreign, of another model, or cannot be written."""


class ToolCallError(EdgeError):
    """The model wrote a tool call that is none, or whose arguments do not fit; `raw` is what it wrote."""

    def __init__(self, message: str, raw: str = "") -> None:
        super().__init__(f"{message}: {reprlib.repr(raw)}" if raw else message)
        self.raw = raw


class InferenceError(EdgeError):
    """The model produced NaN or infinite numbers, or a session failed."""
