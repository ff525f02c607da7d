"""The one door to httpx: without its command line.

``import httpx`` also brings what ``python -m httpx`` would need, wherever that is installed: rich,
Pygments and click.  That is two thirds of the time that it takes, in every daemon and in every verb
that asks one.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING or "httpx" in sys.modules:  # somebody has paid already
    import httpx
else:
    modules = cast("dict[str, ModuleType | None]", sys.modules)
    modules["httpx._main"] = None  # so Python says that it is not there, as httpx expects it may
    try:
        import httpx
    finally:
        del modules["httpx._main"]

__all__ = ["httpx"]
