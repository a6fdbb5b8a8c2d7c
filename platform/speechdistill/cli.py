"""`speechdistill COMMAND ...`: the commands of the platform; scripts in jobs/ run the same commands on a cluster."""

import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, get_type_hints

from speechdistill.io import console, import_path
from speechdistill.io.options import OptionError
from speechdistill.io.version import __version__

COMMANDS = {
    "ingest": "List audio files and read their headers into a manifest of clips.",
    "pseudolabel": "Degrade speech by a recipe and label it with a teacher, into shards.",
    "train-teacher": "Train a quality head above a frozen speech encoder.",
    "train-students": "Train small students on labelled shards and listeners' scores.",
    "prune": "Prune a trained teacher step by step, and fine-tune it.",
    "promote": "Make a student the champion if it is better than the champion.",
    "score": "Score recordings: a MOS from 1 (bad) to 5 (excellent) for each file.",
    "compare": "Compare models on clips that listeners scored: tables, figures and a page.",
    "recipe": "Show a degradation recipe, or make one of its samples to listen to.",
    "shards": "Show the first samples of a label run, and export them as WAV files.",
    "sync": "Send MLflow the events that it lacks of tracked runs.",
    "doctor": "Try what the other commands need, on this machine and on the nodes of a cluster.",
}
"""The commands in the order of use, each with its line in `speechdistill --help`. Each is a file in `commands/`, which
is imported only if the command is called: together they take seconds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0 done, 1 failed, 2 wrong usage, 3 not promoted, 130 stopped."""
    console.make_lasting()
    sys.path[:] = import_path.without_current_folder(sys.path)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(f"speechdistill {__version__}")
        return 0
    _quieten_libraries()
    try:
        return int(_called(words))
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def entry() -> None:
    sys.exit(main())


def _quieten_libraries() -> None:
    """Print our own messages and the errors of libraries: a user cannot act on libraries' warnings."""
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s: %(message)s")
    logging.getLogger("speechdistill").setLevel(logging.INFO)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _called(words: list[str]) -> Any:
    # Imported late: `main` has removed the current folder from the path (`python -c`, an empty PYTHONPATH entry).
    import tyro

    _join_lines_of_help()
    name = words[0].replace("_", "-") if words else ""
    if name in COMMANDS:
        command = import_module(f"speechdistill.commands.{name.replace('-', '_')}").command
        return tyro.cli(command, prog=f"speechdistill {name}", description=_description(command), args=words[1:])
    return tyro.extras.subcommand_cli_from_dict(
        {name: _summarised(line) for name, line in COMMANDS.items()},
        prog="speechdistill",
        description="Label speech with a large teacher, distil it into small students, promote the winner. "
        "`speechdistill COMMAND --help` explains a command, `speechdistill --version` prints the version.",
        args=words,
    )


def _description(command: Callable[..., int]) -> str:
    """Return the docstring of the command's options, or of a command with subcommands."""
    config = get_type_hints(command)["config"]
    return inspect.getdoc(config if isinstance(config, type) else command) or ""


def _summarised(line: str) -> Callable[[], int]:
    """Make a command that only appears in `speechdistill --help`."""

    def command() -> int:
        raise AssertionError("commands are called by their first word")

    command.__doc__ = line
    return command


def _join_lines_of_help() -> None:
    """Let tyro print each paragraph of a docstring as one text: by itself it keeps the breaks of indented lines."""
    from tyro import _strings

    _strings.remove_single_line_breaks = _paragraphs


def _paragraphs(helptext: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", helptext.strip()))
