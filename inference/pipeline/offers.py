"""The models whose head this node can be, and those whose head it will be soon."""

from __future__ import annotations

from collections.abc import Iterator

import trio

from pyagent_node.base.errors import NotFound, Unavailable
from pyagent_node.base.types import Digest
from pyagent_node.inference.pipeline.ports import HeadModel


class Offers:
    """Offered models by digest; whoever waits for one is told of every change."""

    def __init__(self) -> None:
        self._models: dict[Digest, HeadModel] = {}
        self._expected: dict[Digest, str] = {}
        self._changed = trio.Event()

    def expect(self, digest: Digest, name: str) -> None:
        """Note that a model is placed, so that requests for it wait instead of failing."""
        self._expected[digest] = name

    def forget(self, digest: Digest) -> None:
        """Note that a model is placed no more."""
        self._expected.pop(digest, None)
        self.touch()

    def offer(self, model: HeadModel) -> None:
        """Make a placed model available; replaces an earlier placement of it."""
        self._models[model.placement.model] = model
        self.touch()

    def withdraw(self, digest: Digest, epoch: int) -> None:
        """Take the model away if it is still offered under ``epoch``."""
        model = self._models.get(digest)
        if model is not None and model.placement.epoch == epoch:
            del self._models[digest]

    def touch(self) -> None:
        """Let everybody who waits look again."""
        self._changed.set()
        self._changed = trio.Event()

    async def changed(self) -> None:
        """Wait for the next change."""
        await self._changed.wait()

    def __iter__(self) -> Iterator[HeadModel]:
        """Iterate over the models that are offered now."""
        return iter(list(self._models.values()))

    def get(self, digest: Digest) -> HeadModel | None:
        """Return a model if it is offered now."""
        return self._models.get(digest)

    def find(self, name: str) -> HeadModel:
        """Return a model by name or digest.

        Raises :class:`Unavailable` (``head_not_ready``) for one that is expected, and
        :class:`NotFound` (``model_not_found``).
        """
        for model in self._models.values():
            if name in (model.name, model.placement.model):
                return model
        for digest, expected in self._expected.items():
            if name in (expected, digest):
                raise Unavailable(
                    f"{expected} is placed, but this node cannot be its head yet.",
                    code="head_not_ready",
                    remedy="Ask again in a moment; see 'pyagent-node status'.",
                )
        known = ", ".join(sorted(m.name for m in self._models.values())) or "none"
        raise NotFound(
            f"Model {name[:200]!r} is not loaded; loaded are: {known}.",
            code="model_not_found",
            remedy="Load it with 'pyagent-node model load'.",
        )

    async def wait_for(self, name: str, until: float) -> HeadModel:
        """Return a model as :meth:`find` does, waiting until a time for one that is expected."""
        with trio.move_on_at(until):
            while True:
                try:
                    return self.find(name)
                except Unavailable:
                    await self.changed()
        return self.find(name)
