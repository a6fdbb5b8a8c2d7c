"""The end of every command: its exit code, and one line for an error that the user can fix."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from speechdistill.io.errors import UserError

P = ParamSpec("P")


def guarded(resume: str) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Report a `UserError` as one line with exit code 1, and other errors with a traceback.

    `resume` is printed after Ctrl-C: the state that it leaves.
    """

    def guard(command: Callable[P, int]) -> Callable[P, int]:
        @wraps(command)
        def guarded(*args: P.args, **options: P.kwargs) -> int:
            try:
                return command(*args, **options)
            except KeyboardInterrupt:
                print(f"\nstopped; {resume}", file=sys.stderr)
                return 130
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1

        return guarded

    return guard
