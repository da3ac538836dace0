"""Gemma 4 E2B and E4B on the device: load an artifact, generate, stream, chat.

import edge

with edge.Runtime.load("gemma-4-e2b-edge") as runtime:
    for piece in runtime.stream("The capital of France is", max_tokens=20):
        print(piece, end="", flush=True)
"""

from edge.planning import plan
from profiles import DeviceProfile, ProfileError, detect_profile, load_profile
from runtime.conversation import Conversation
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
    SessionError,
    ToolCallError,
)
from runtime.grammar import Grammar, choice, json_object, json_schema, lark, regex
from runtime.memory_plan import MemoryPart, MemoryPlan
from runtime.options import GenerationOptions, OptionArguments
from runtime.response import Piece
from runtime.stats import GenerationStats
from runtime.stream import Generation, GenerationStream
from runtime.tool_calls import ToolCall
from runtime.tools import Tool

__all__ = [
    "ArtifactError",
    "BusyDestinationError",
    "BusyError",
    "ClosedError",
    "Conversation",
    "DestinationError",
    "DeviceProfile",
    "EdgeError",
    "Generation",
    "GenerationOptions",
    "GenerationStats",
    "GenerationStream",
    "Grammar",
    "InferenceError",
    "MemoryBudgetError",
    "MemoryPart",
    "MemoryPlan",
    "OptionArguments",
    "Piece",
    "ProfileError",
    "RequestError",
    "Runtime",
    "SessionError",
    "Tool",
    "ToolCall",
    "ToolCallError",
    "choice",
    "detect_profile",
    "json_object",
    "json_schema",
    "lark",
    "load_profile",
    "plan",
    "regex",
]
