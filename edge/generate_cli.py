"""`edge-generate`: generates from an artifact, as text while it comes or as one JSON object."""

import argparse
import json
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from edge.command import CommandParser, run_command
from edge.generation_arguments import add_device_arguments, add_generation_arguments, given_options
from runtime.engine import Runtime
from runtime.errors import RequestError
from runtime.stream import Generation, GenerationStream


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_command("edge-generate", lambda: _generate(options))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="edge-generate", description="Generate text from an edge artifact.")
    parser.add_argument("artifact", metavar="ARTIFACT", help="folder made by edge-export")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--prompt-ids", metavar="2,45,...", help="token ids to continue, taken as they are")
    prompt.add_argument("--chat", metavar="TEXT", help="a user's message, put into the model's chat format")
    add_generation_arguments(parser, context_policy="stop")
    add_device_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object with token ids and statistics")
    return parser


def _generate(options: argparse.Namespace) -> None:
    with Runtime.load(options.artifact, profile=options.profile, memory_budget=options.memory_budget) as runtime:
        stream = _stream(runtime, options)
        if options.json:
            print(json.dumps(_as_json(stream.finish())))
            return
        for piece in stream:
            if piece.kind == "text":
                print(piece, end="", flush=True)
        print()


def _stream(runtime: Runtime, options: argparse.Namespace) -> GenerationStream:
    if options.chat is not None:
        return runtime.stream_chat([{"role": "user", "content": options.chat}], **given_options(options))
    return runtime.stream(_prompt(options), **given_options(options))


def _prompt(options: argparse.Namespace) -> str | list[int]:
    if options.prompt is not None:
        return str(options.prompt)
    try:
        return [int(token) for token in options.prompt_ids.split(",")]
    except ValueError:
        raise RequestError(
            f"--prompt-ids {reprlib.repr(options.prompt_ids)}: expected integers separated by commas"
        ) from None


def _as_json(generation: Generation) -> dict[str, Any]:
    return {
        "text": generation.text,
        "thinking": generation.thinking,
        "token_ids": generation.token_ids,
        "finish_reason": generation.finish_reason,
        "context_full": generation.context_full,
        "stats": asdict(generation.stats),
    }


if __name__ == "__main__":
    sys.exit(main())
