"""An error keeps its meaning across processes and peers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base import errors
from pyagent_node.base.errors import ErrorInfo, PyAgentError, error_from_info

KINDS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, PyAgentError)
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_survives_the_wire(kind: type[PyAgentError]) -> None:
    error = kind("It broke.", code="why", remedy="Mend it.", rank=1, peer_id="p")
    back = error_from_info(error.to_info())
    assert type(back) is kind
    assert (back.message, back.code, back.remedy) == ("It broke.", "why", "Mend it.")
    assert back.facts == {"rank": 1, "peer_id": "p"}
    assert str(back) == "It broke. Mend it."


def test_kinds_are_distinct() -> None:
    assert len({kind.kind for kind in KINDS}) == len(KINDS)


def test_an_unknown_kind_becomes_the_base_class() -> None:
    back = error_from_info(ErrorInfo("from_the_future", "new_code", "text"))
    assert type(back) is PyAgentError
    assert back.code == "new_code"


@given(
    st.builds(
        ErrorInfo,
        st.text(),
        st.text(),
        st.text(max_size=5000),
        st.none() | st.text(),
        st.dictionaries(st.text(), st.integers() | st.text()),
    )
)
def test_any_info_from_a_peer_makes_an_error_of_bounded_size(info: ErrorInfo) -> None:
    back = error_from_info(info)
    assert len(back.message) <= errors.MAX_MESSAGE


def test_facts_cannot_shadow_the_arguments() -> None:
    info = ErrorInfo("refused", "code", "text", None, {"message": "x", "self": 1, "code": "y"})
    back = error_from_info(info)
    assert (back.message, back.code, back.facts) == ("text", "code", {})
