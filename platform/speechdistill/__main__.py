"""`python -m speechdistill`, the same as the command `speechdistill`."""

from speechdistill.cli import entry

if __name__ == "__main__":
    entry()
