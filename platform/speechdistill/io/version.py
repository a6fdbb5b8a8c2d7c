"""The version of this package, which the package itself and its build read."""

__version__ = "0.1.0"
