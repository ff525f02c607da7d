"""Every planted bug; docs/simulator.md holds the table."""

from __future__ import annotations

from . import (
    context_bugs,
    guess_bugs,
    kv_bugs,
    log_bugs,
    placement_bugs,
    reshard_bugs,
    session_bugs,
)

BUGS = (
    *log_bugs.BUGS,
    *placement_bugs.BUGS,
    *reshard_bugs.BUGS,
    *session_bugs.BUGS,
    *guess_bugs.BUGS,
    *kv_bugs.BUGS,
    *context_bugs.BUGS,
)
