"""`edge-generate`: generates from an artifact, as text while it comes or as one JSON object."""

import argparse
import json
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_args

from edge.command import CommandParser, run_command
from profiles import available_profiles
from runtime.engine import Runtime
from runtime.errors import RequestError
from runtime.stream import Generation
from runtime.turns import ContextPolicy


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
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens to generate at most (default: the context)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the model's)")
    parser.add_argument("--top-p", type=float, metavar="P", help="nucleus sampling (default: the model's)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest (default: the model's)")
    parser.add_argument(
        "--num-draft-tokens", type=int, metavar="K", help="drafts a step, 0 for none (default: as many as pay)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="makes sampling repeatable")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; repeatable")
    parser.add_argument(
        "--context-policy",
        choices=get_args(ContextPolicy),
        default="stop",
        help="where the context is full: stop (default), or slide, which drops the oldest turns and goes on",
    )
    parser.add_argument("--profile", default="laptop", help=f"{', '.join(available_profiles())} or a TOML file")
    parser.add_argument("--memory-budget", metavar="BYTES", help='such as "2 GiB" (default: the profile\'s)')
    parser.add_argument("--json", action="store_true", help="print one JSON object with token ids and statistics")
    return parser


def _generate(options: argparse.Namespace) -> None:
    with Runtime.load(options.artifact, profile=options.profile, memory_budget=options.memory_budget) as runtime:
        stream = runtime.stream(
            _prompt(runtime, options),
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
            stop=options.stop,
            num_draft_tokens=options.num_draft_tokens,
            context_policy=options.context_policy,
        )
        if options.json:
            print(json.dumps(_as_json(stream.finish())))
            return
        for piece in stream:
            print(piece, end="", flush=True)
        print()


def _prompt(runtime: Runtime, options: argparse.Namespace) -> str | list[int]:
    if options.chat is not None:
        return runtime.chat_prompt([{"role": "user", "content": options.chat}])
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
        "token_ids": generation.token_ids,
        "finish_reason": generation.finish_reason,
        "context_full": generation.context_full,
        "stats": asdict(generation.stats),
    }


if __name__ == "__main__":
    sys.exit(main())
