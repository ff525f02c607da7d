"""The scenarios that come with the program, and files of the user's own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from pyagent_node.base.errors import ConfigError, NotFound
from pyagent_node.simulations.lab.scenario import MAX_FILE, Scenario, parse_scenario


def shipped() -> dict[str, str]:
    """Return the texts of the scenarios that come with the program, by name."""
    folder = resources.files("pyagent_node.simulations.lab").joinpath("scenarios")
    found = {
        entry.name.removesuffix(".toml"): entry.read_text("utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    }
    return dict(sorted(found.items()))


def open_scenario(name: str) -> tuple[str, Scenario]:
    """Return the text of a shipped scenario or of a file, and what it says.

    What holds a dot or a separator is a file.  Raises :class:`NotFound` (``no_scenario``) and
    :class:`ConfigError` (``bad_scenario``).
    """
    text = shipped().get(name)
    if text is None:
        if not any(mark in name for mark in "./\\"):
            raise NotFound(
                f"There is no scenario {name[:80]!r}.",
                code="no_scenario",
                remedy=f"There are {', '.join(shipped())}; or name a file, as ./{name[:40]}.toml.",
            )
        text = _read(Path(name).expanduser())
    return text, parse_scenario(text)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise ConfigError(
                f"{path} is longer than {MAX_FILE} bytes, so it is no scenario.",
                code="bad_scenario",
            )
        return data.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text in UTF-8.", code="bad_scenario") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise NotFound(
            f"The scenario {str(path)[:200]!r} cannot be read: {reason}.",
            code="no_scenario",
            remedy="`pyagent-node lab list` names those that come with the program.",
        ) from None
