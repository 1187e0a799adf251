"""The version, for the package and for its distribution (`pyproject.toml` reads it from here)."""

__version__ = "0.1.0"
