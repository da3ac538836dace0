"""Options that command lines which generate share: how tokens are drawn, and what the runtime may take."""

import argparse
from typing import cast, get_args

from profiles import available_profiles
from runtime.options import OptionArguments
from runtime.turns import ContextPolicy


def add_generation_arguments(parser: argparse.ArgumentParser, *, context_policy: ContextPolicy) -> None:
    """Adds those of `GenerationOptions` that serve any text; help calls `context_policy` the default."""
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens to generate at most (default: the context)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the model's)")
    parser.add_argument("--top-p", type=float, metavar="P", help="nucleus sampling (default: the model's)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest (default: the model's)")
    parser.add_argument(
        "--num-draft-tokens", type=int, metavar="K", help="drafts a step, 0 for none (default: as many as pay)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="makes sampling repeatable")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="stop before this text; repeatable")
    parser.add_argument(
        "--context-policy",
        choices=get_args(ContextPolicy),
        help="where the context is full: stop, or slide, which drops the oldest turns and goes on "
        f"(default: {context_policy})",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `Runtime.load` is told of the device."""
    parser.add_argument("--profile", default="laptop", help=f"{', '.join(available_profiles())} or a TOML file")
    parser.add_argument("--memory-budget", metavar="BYTES", help='such as "2 GiB" (default: the profile\'s)')


def given_options(options: argparse.Namespace) -> OptionArguments:
    """Generation options that were given; the others are left to the runtime's defaults."""
    given = {name: getattr(options, name, None) for name in OptionArguments.__annotations__}
    return cast(OptionArguments, {name: value for name, value in given.items() if value is not None})
