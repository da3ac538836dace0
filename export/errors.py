"""Errors an export can meet, each with one line that says what, where, and the way out.

ValueError
└── EdgeError                (runtime.errors)
    ├── ExportError          an export that cannot start or go on: source, options, disk
    └── CheckpointError      a source checkpoint that is damaged, incomplete or not a Gemma 4
"""

from runtime.errors import EdgeError


class ExportError(EdgeError):
    """An export that cannot start or go on."""


class CheckpointError(EdgeError):
    """A source checkpoint that is damaged, incomplete or not a Gemma 4."""
