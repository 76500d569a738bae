"""`penstock`: finds the command, runs it, and turns what goes wrong into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong command line or configuration, 130 interrupted. Data goes to stdout, the rest to
stderr.
Nothing heavy is imported before the command line is parsed; each command imports what it needs when it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..core.errors import ConfigError, ServeError
from . import (
    bench,
    chat,
    doctor,
    explain,
    gateway,
    generate,
    models,
    role,
    roles,
    serve,
    simulate,
    status,
    top,
    train_draft,
)
from .arguments import Parser
from .errors import FAILURE, INTERRUPTED, USAGE, CliError, print_error


def build_parser() -> Parser:
    parser = Parser(
        prog="penstock",
        description="Serve a large language model, prefill and decode apart, behind an OpenAI-compatible API.",
        epilog="examples:\n  penstock serve                 start a cluster on this machine\n"
        "  penstock chat                  talk to it\n  penstock doctor                check this machine",
    )
    parser.add_argument("--version", action="version", version=f"penstock {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    everyday = (serve, chat, generate, models, status, top, explain, role, doctor)
    for module in (*everyday, bench, simulate, train_draft, gateway, roles):
        module.register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return USAGE
    try:
        code: int = args.run(args)
    except CliError as err:
        print_error(str(err), err.hint)
        return err.exit_code
    except ConfigError as err:
        print_error(str(err), "`penstock serve --help` lists the settings; docs/ARCHITECTURE.md shows a topology file")
        return USAGE
    except ServeError as err:
        print_error(str(err), "`penstock doctor` checks this machine")
        return FAILURE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our stdout has gone; a flush at exit must not complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    return code
