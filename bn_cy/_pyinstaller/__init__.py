"""What PyInstaller must know of the package, which finds this by an entry point."""

from pathlib import Path


def folders() -> list[str]:
    """Return the folders with hooks."""
    return [str(Path(__file__).parent)]
