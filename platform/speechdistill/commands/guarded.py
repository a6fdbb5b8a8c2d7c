"""How every command ends: with its exit code, or with one line for an error that the user can mend."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from speechdistill.io.errors import UserError

P = ParamSpec("P")


def guarded(resume: str) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """A user's error as one line and exit code 1, any other with its traceback; `resume` says what Ctrl-C leaves."""

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
