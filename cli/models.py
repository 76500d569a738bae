"""`penstock models`: what the model store knows, has, and where."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from .arguments import Commands, Parser, add_command
from .terminal import byte_size, table

if TYPE_CHECKING:
    from ..models.store import ModelEntry

_MODEL_HELP = (
    "name, pypi:package==version, hf:org/name[@revision], folder or .gguf file (default: smollm2-135m-instruct)"
)


def register(commands: Commands) -> None:
    details = "Models live in $PENSTOCK_CACHE, else $XDG_CACHE_HOME/penstock, else ~/.cache/penstock."
    parser = add_command(commands, "models", run_list, "List, fetch and find models.", details, "penstock models pull")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    listing = add_command(verbs, "list", run_list, "List the models known by name.", "", "penstock models list --json")
    listing.add_argument("--json", action="store_true", help="print JSON with the key `models`")
    pull = add_command(
        verbs,
        "pull",
        run_pull,
        "Fetch a model into the cache.",
        "Prints its path.",
        "penstock models pull smollm2-135m-instruct",
    )
    path = add_command(
        verbs, "path", run_path, "Print where a model is.", "Fetches nothing.", 'ls -l "$(penstock models path)"'
    )
    for verb in (pull, path):
        verb.add_argument("model", nargs="?", metavar="MODEL", default="smollm2-135m-instruct", help=_MODEL_HELP)
    parser.set_defaults(json=False)


def run_list(args: argparse.Namespace) -> int:
    from ..models.store import list_models

    entries = list_models()
    if args.json:
        print(json.dumps({"models": [_as_json(entry) for entry in entries]}, indent=2))
    else:
        print(format_models(entries))
    return 0


def format_models(entries: list[ModelEntry]) -> str:
    header = ("MODEL", "SIZE", "LICENCE", "SOURCE", "PATH")
    rows = [
        (entry.name, byte_size(entry.size_bytes), entry.licence, entry.source, str(entry.path or "not fetched yet"))
        for entry in entries
    ]
    return table([header, *rows], right=frozenset({1}))


def _as_json(entry: ModelEntry) -> dict[str, object]:
    return {
        "name": entry.name,
        "source": entry.source,
        "size_bytes": entry.size_bytes,
        "licence": entry.licence,
        "path": None if entry.path is None else str(entry.path),
    }


def run_pull(args: argparse.Namespace) -> int:
    from .model_files import local_model

    print(local_model(args.model).path)
    return 0


def run_path(args: argparse.Namespace) -> int:
    from ..models.store import resolve

    print(resolve(args.model, download=False).path)
    return 0
