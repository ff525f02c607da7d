import io
import json
import logging

import pytest

from pyagent_node.node.logs import Redactor, set_up_logging

PSK = "7a" * 32


@pytest.fixture
def logged():
    """Set logging up for one test and return (redactor, text of the log)."""
    stream = io.StringIO()
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    levels = {n: logging.getLogger(n).level for n in ("httpx", "httpcore", "hypercorn", "libp2p")}
    redactor = Redactor()
    made = []

    def set_up(form="text", level="info"):
        made.append(set_up_logging(level, form, redactor, stream))
        return redactor, stream.getvalue

    yield set_up
    root.handlers = before
    root.setLevel(level)
    for name, number in levels.items():
        logging.getLogger(name).setLevel(number)


SECRETS = (
    "ticket pyagent1qXyz2345678abcdefABCDEF given",
    "header Authorization: Bearer abc.def-123",
    "key /key/swarm/psk/1.0.0/\n/base16/\n" + PSK,
    f"psk={PSK}",
    "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEI\n-----END PRIVATE KEY-----",
)


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_hidden(logged, form, text):
    redactor, read = logged(form)
    redactor.hide(PSK)
    logging.getLogger("pyagent_node.test").warning("%s", text)
    try:
        raise ValueError(text)
    except ValueError:
        logging.getLogger("other.library").exception("failed")
    out = read()
    assert "<hidden>" in out
    for secret in ("qXyz2345678", "abc.def-123", PSK, "MC4CAQAwBQYDK2VwBCIEI"):
        assert secret not in out


def test_text_lines(logged):
    _, read = logged()
    logging.getLogger("pyagent_node.x").info("hello %d", 5)
    logging.getLogger("pyagent_node.x").debug("not shown")
    [line] = read().splitlines()
    assert line.endswith("Z INFO    pyagent_node.x: hello 5")


def test_json_lines(logged):
    _, read = logged("json")
    logging.getLogger("pyagent_node.x").error("two\nlines \ud800")
    [line] = read().splitlines()
    record = json.loads(line)
    assert record["level"] == "error"
    assert record["area"] == "pyagent_node.x"
    assert record["message"].startswith("two\nlines")


def test_libraries_are_quiet_unless_debugging(logged):
    _, read = logged()
    logging.getLogger("httpx").info("GET http://...")
    assert read() == ""


def test_short_secrets_would_hide_too_much():
    redactor = Redactor()
    redactor.hide("a")
    assert redactor.clean("a banana") == "a banana"
