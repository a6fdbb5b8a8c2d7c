#!/usr/bin/env python3
"""`speechdistill compare` for `ray job submit` and for a checkout that is not installed; see `--help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from speechdistill.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
