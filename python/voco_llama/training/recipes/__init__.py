"""Shipped configurations: files to copy, with paths to fill in."""

from importlib.resources import files


def recipes() -> dict[str, str]:
    """The text of each shipped configuration by name."""
    found = (file for file in files(__name__).iterdir() if file.name.endswith(".yaml"))
    return {file.name.removesuffix(".yaml"): file.read_text() for file in sorted(found, key=lambda file: file.name)}


def title(text: str) -> str:
    """The first line of a configuration, which is a comment that says what it is."""
    return text.splitlines()[0].removeprefix("#").strip()
