"""Gemma 4 E2B and E4B on the device: load an artifact, generate, stream, chat.

import edge

with edge.Runtime.load("gemma-4-e2b-edge") as runtime:
    for piece in runtime.stream("The capital of France is", max_tokens=20):
        print(piece, end="", flush=True)
"""

from edge.planning import plan
from profiles import DeviceProfile, ProfileError, detect_profile, load_profile
from runtime.engine import Runtime
from runtime.errors import (
    ArtifactError,
    BusyDestinationError,
    BusyError,
    ClosedError,
    DestinationError,
    EdgeError,
    InferenceError,
    MemoryBudgetError,
    RequestError,
)
from runtime.memory_plan import MemoryPart, MemoryPlan
from runtime.stats import GenerationStats
from runtime.stream import Generation, GenerationStream

__all__ = [
    "ArtifactError",
    "BusyDestinationError",
    "BusyError",
    "ClosedError",
    "DestinationError",
    "DeviceProfile",
    "EdgeError",
    "Generation",
    "GenerationStats",
    "GenerationStream",
    "InferenceError",
    "MemoryBudgetError",
    "MemoryPart",
    "MemoryPlan",
    "ProfileError",
    "RequestError",
    "Runtime",
    "detect_profile",
    "load_profile",
    "plan",
]
