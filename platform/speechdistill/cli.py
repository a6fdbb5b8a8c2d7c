"""`speechdistill ...`: every command of the platform; the scripts in jobs/ are the same commands for a cluster."""

import logging
import sys
from collections.abc import Sequence

from speechdistill.io import console, import_path
from speechdistill.io.options import OptionError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 3 not promoted, 130 stopped."""
    console.make_lasting()
    sys.path[:] = import_path.without_current_folder(sys.path)
    # Here, since what these import must not be found in the current folder (`python -c`, an empty PYTHONPATH entry).
    import tyro

    from speechdistill.commands import (
        compare,
        doctor,
        ingest,
        promote,
        prune,
        pseudolabel,
        recipe,
        score,
        sync,
        train_students,
        train_teacher,
    )

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("speechdistill").setLevel(logging.INFO)
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            {
                "compare": compare.command,
                "doctor": doctor.command,
                "ingest": ingest.command,
                "promote": promote.command,
                "prune": prune.command,
                "pseudolabel": pseudolabel.command,
                "recipe": recipe.command,
                "train-students": train_students.command,
                "train-teacher": train_teacher.command,
                "score": score.command,
                "sync": sync.command,
            },
            prog="speechdistill",
            description="Label speech with a large teacher, distil it into small students, promote the winner.",
            args=arguments,
        )
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(command)


def entry() -> None:
    sys.exit(main())
