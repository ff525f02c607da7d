"""Renders a model's own chat template, which is a program from a stranger, inside bounds.

Jinja2's immutable sandbox keeps the template from reaching Python.  On top of that the operations
with which a short template makes a huge text are bounded, the text is counted as it grows, and
rendering is interrupted when it takes too long (where the system has interval timers; elsewhere the
daemon's deadline ends the runner).

Messages cannot smuggle in control tokens.  Where a message spells one out (``<|im_end|>``), it is
replaced by a private-use character before rendering, so that afterwards every control token in the
text is the template's own; :class:`Rendered` says which characters stand for what.  A conversation
without such spellings renders, and is tokenised, exactly as it would be anywhere else.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from types import FrameType
from typing import Any, Final, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pyagent_node.base.errors import InvalidRequest, LimitExceeded, Unsupported
from pyagent_node.base.limits import KIB, MIB
from pyagent_node.inference.generation import ChatMessage

MAX_TEMPLATE: Final = 512 * KIB
"""Characters of a template."""
MAX_RENDERED: Final = 16 * MIB
"""Characters of a rendered conversation."""
MAX_MESSAGES: Final = 4096
"""Messages of a conversation."""
RENDER_SECONDS: Final = 5.0
"""Longest time for rendering."""

_PRIVATE: Final = 0x100000
"""Plane 16, private use: 65,534 characters that no text should hold."""
_PRIVATE_LAST: Final = 0x10FFFD


class Rendered(NamedTuple):
    """A rendered conversation; ``stand_ins`` maps characters in ``text`` to what they stand for."""

    text: str
    stand_ins: dict[str, str]

    @property
    def plain(self) -> str:
        """The text as the messages had it."""
        return self.restore(self.text)

    def restore(self, text: str) -> str:
        """Put the original spellings back into a piece of the text."""
        for char, original in self.stand_ins.items():
            text = text.replace(char, original)
        return text


class ChatTemplate:
    """A compiled template.

    ``control`` are the spellings of the model's control tokens.  Raises :class:`Unsupported`
    (``bad_chat_template``) when the template cannot be compiled.
    """

    def __init__(self, source: str, *, bos: str, eos: str, control: Sequence[str]) -> None:
        if len(source) > MAX_TEMPLATE:
            raise _unusable(f"it has {len(source)} characters, more than {MAX_TEMPLATE}")
        self._bos = bos
        self._eos = eos
        ordered = sorted((text for text in control if text), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        with _mapped(), _time_limit(RENDER_SECONDS):
            self._template = _ENVIRONMENT.from_string(source)

    def render(self, messages: Sequence[ChatMessage], *, now: float) -> Rendered:
        """Render a conversation up to where the answer begins; ``now`` is in Unix seconds.

        Raises :class:`InvalidRequest` (``bad_messages``) when the template refuses the messages,
        :class:`LimitExceeded` (``template_limit``) and :class:`Unsupported`
        (``bad_chat_template``).
        """
        if not 1 <= len(messages) <= MAX_MESSAGES:
            raise InvalidRequest(
                f"There are {len(messages)} messages; 1 to {MAX_MESSAGES} are taken.",
                code="bad_messages",
            )
        safe, stand_ins = self._neutralised(messages)
        moment = datetime.fromtimestamp(now, tz=UTC).astimezone()
        chunks: list[str] = []
        size = 0
        with _mapped(), _time_limit(RENDER_SECONDS):
            for chunk in self._template.generate(
                messages=safe,
                add_generation_prompt=True,
                bos_token=self._bos,
                eos_token=self._eos,
                tools=None,
                documents=None,
                raise_exception=_raise_exception,
                strftime_now=moment.strftime,
            ):
                size += len(chunk)
                if size > MAX_RENDERED:
                    raise _over(f"wrote more than {MAX_RENDERED} characters")
                chunks.append(chunk)
        return Rendered("".join(chunks), stand_ins)

    def _neutralised(
        self, messages: Sequence[ChatMessage]
    ) -> tuple[list[dict[str, str]], dict[str, str]]:
        given = [{"role": m.role, "content": m.content} for m in messages]
        control = self._control
        texts = [text for message in given for text in message.values()]
        if control is None or not any(control.search(text) for text in texts):
            return given, {}
        known: dict[str, str] = {}

        def stand_in(match: re.Match[str]) -> str:
            original = match.group()
            if original not in known:
                if _PRIVATE + len(known) > _PRIVATE_LAST:
                    raise InvalidRequest(
                        "The messages hold too many private-use characters.", code="bad_messages"
                    )
                known[original] = chr(_PRIVATE + len(known))
            return known[original]

        # stand-ins that a message brings along are replaced as well, so that each has one meaning
        pattern = re.compile(f"{control.pattern}|[{chr(_PRIVATE)}-{chr(_PRIVATE_LAST)}]")
        safe = [
            {name: pattern.sub(stand_in, text) for name, text in message.items()}
            for message in given
        ]
        return safe, {char: original for original, char in known.items()}


class TemplateRefusalError(Exception):
    """The template called ``raise_exception``; never leaves this module."""


class _TooLongError(Exception):
    """Rendering took too long."""


def _raise_exception(message: object = "") -> NoReturn:
    raise TemplateRefusalError(str(message)[:500])


def _unusable(what: str) -> Unsupported:
    return Unsupported(
        f"The model's chat template cannot be used: {what}.",
        code="bad_chat_template",
        remedy="Send a plain prompt instead of messages.",
    )


def _over(what: str) -> LimitExceeded:
    return LimitExceeded(
        f"The model's chat template {what}.",
        code="template_limit",
        remedy="Send less, or a plain prompt instead of messages.",
    )


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    """Map what a template can raise."""
    try:
        yield
    except TemplateRefusalError as error:
        raise InvalidRequest(
            f"The model's chat template refuses these messages: {error}", code="bad_messages"
        ) from None
    except _TooLongError:
        raise _over(f"took longer than {RENDER_SECONDS:g} seconds") from None
    except (MemoryError, OverflowError):
        raise _over("asked for too much") from None
    except (jinja2.TemplateError, RecursionError) as error:
        raise _unusable(f"{type(error).__name__}: {str(error)[:300]}") from None
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise _unusable(f"{type(error).__name__}: {str(error)[:300]}") from None


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Interrupt Python code of the block after ``seconds``, where that can be done."""
    if not hasattr(signal, "setitimer") or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def late(_number: int, _frame: FrameType | None) -> NoReturn:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _GenerationTag(Extension):
    """``{% generation %}`` of training templates: its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja2's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja2's sandbox with bounds on the operators that make much out of little."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        sizes = [len(x) if isinstance(x, (str, list, tuple)) else None for x in (left, right)]
        if operator == "*":
            for size, factor in ((sizes[0], right), (sizes[1], left)):
                if size is not None and isinstance(factor, int) and size * factor > MAX_RENDERED:
                    raise _over("multiplies a text too often")
        elif operator == "+" and None not in sizes and sum(x or 0 for x in sizes) > MAX_RENDERED:
            raise _over("joins texts beyond the limit")
        elif operator == "**" and (abs(left) > 1_000_000 or abs(right) > 100):
            raise _over("raises a number to a huge power")
        elif operator == "%" and isinstance(left, str) and re.search(r"\d{5}|\*", left):
            raise _over("pads a text beyond the limit")
        return super().call_binop(context, operator, left, right)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter as chat templates expect it: no HTML escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> _Sandbox:
    # white-space control and extensions as in Hugging Face's transformers, where templates are
    # written
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    return environment


_ENVIRONMENT: Final = _environment()
