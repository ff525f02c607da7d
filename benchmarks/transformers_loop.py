"""What others make of the same weights: transformers' own ``generate``, to be compared with.

    loop = TransformersLoop(folder, dtype="float16", threads=1)
    times = loop.run(prompt, 32)

Needs transformers and torch (``make setup-torch``); nothing of ours is in the way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray


class LoopTimes(NamedTuple):
    """Seconds until the first token, seconds for the others, and the tokens."""

    prefill_seconds: float
    decode_seconds: float
    tokens: list[int]


class TransformersLoop:
    """A whole model in a folder of safetensors, as its users run it: greedy, one sequence."""

    def __init__(
        self, folder: Path, *, dtype: Literal["float16", "float32"] = "float16", threads: int = 1
    ) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch  # pyright: ignore[reportMissingImports] # noqa: PLC0415 - takes seconds
        import transformers  # pyright: ignore[reportMissingImports] # noqa: PLC0415

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch = torch
        self._config = transformers.GenerationConfig
        self.name = "transformers"
        self.version = str(transformers.__version__)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True
        )
        self._model = model.to(self.device).eval()

    def run(self, prompt: Sequence[int], n: int) -> LoopTimes:
        """Generate ``n`` tokens (2 or more) behind ``prompt``.

        The time of the first token is that of a call for one token, the time of the others what a
        call for all takes longer.
        """
        ids = self._torch.tensor([list(prompt)], device=self.device)
        first, _ = self._timed(ids, 1)
        whole, tokens = self._timed(ids, n)
        return LoopTimes(first, max(whole - first, 1e-9), tokens)

    def _timed(self, ids: object, n: int) -> tuple[float, list[int]]:
        settings = self._config(
            max_new_tokens=n, min_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        begun = time.perf_counter()
        out = self._model.generate(
            ids, generation_config=settings, attention_mask=self._torch.ones_like(ids)
        )
        tokens: list[int] = out[0, -n:].tolist()
        return time.perf_counter() - begun, tokens

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits behind each token, shape (n, n_vocab)."""
        with self._torch.inference_mode():
            ids = self._torch.tensor([list(tokens)], device=self.device)
            found: NDArray[np.float32] = self._model(ids).logits[0].float().cpu().numpy()
        return found
