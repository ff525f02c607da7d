"""The single-process reference: the whole model in one process, straight on llama-cpp-python.

It shares nothing with the pipeline but the noise of seeded sampling, so that equal tokens mean
something: it opens the unsliced file, renders the prompt with the file's own chat template,
tokenises, decodes and picks tokens with a loop of its own.

As a program (``python -m pyagent_node.benchmarks.reference``) it answers one JSON ``Job`` a line
on stdin with one JSON ``SingleAnswer`` a line on stdout (see ``single``), so that llama.cpp never
runs in the process that asks.
"""

# pyright: reportArgumentType=false
# (llama_cpp declares every handle optional and every number a ctypes object)

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import llama_cpp
import msgspec
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from numpy.typing import NDArray

from pyagent_node.benchmarks.single import Job, SingleAnswer
from pyagent_node.native import gumbel

BATCH = 512
"""Tokens of the prompt that are decoded at once."""


class Guess(NamedTuple):
    """A token that a model would have said, and how probable it found it."""

    token: int
    probability: float


class Reference:
    """One loaded model with one sequence, decoded token by token."""

    def __init__(self, path: str, n_ctx: int, threads: int = 0) -> None:
        self.path = path
        self.n_ctx = n_ctx
        self._llama = llama_cpp.Llama(
            path,
            n_ctx=n_ctx,
            n_batch=BATCH,
            n_threads=threads or None,
            n_threads_batch=threads or None,
            flash_attn=True,
            verbose=False,
        )
        self._vocab = llama_cpp.llama_model_get_vocab(self._llama.model)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)

    def close(self) -> None:
        """Free the model."""
        self._llama.close()

    def prompt_tokens(self, prompt: str, chat: bool) -> list[int]:
        """Return the tokens of ``prompt``, as one user turn with the file's chat template."""
        if not chat:
            return self._llama.tokenize(prompt.encode(), add_bos=True, special=False)
        formatter = Jinja2ChatFormatter(
            template=self._llama.metadata["tokenizer.chat_template"],
            eos_token=self._piece(self._llama.token_eos()),
            bos_token=self._piece(self._llama.token_bos()),
        )
        rendered = formatter(messages=[{"role": "user", "content": prompt}])
        return self._llama.tokenize(rendered.prompt.encode(), add_bos=False, special=True)

    def generate(self, job: Job) -> SingleAnswer:
        """SingleAnswer ``job`` from an empty sequence."""
        began = time.perf_counter()
        tokens = self.prompt_tokens(job.prompt, job.chat)
        memory = llama_cpp.llama_get_memory(self._llama.ctx)
        llama_cpp.llama_memory_clear(memory, True)
        answer: list[int] = []
        stamps: list[float] = []
        for token in self._tokens(tokens, job):
            stamps.append(time.perf_counter())
            answer.append(token)
        rest = stamps[-1] - stamps[0] if stamps else 0.0
        return SingleAnswer(
            prompt_tokens=len(tokens),
            token_ids=tuple(answer),
            text=self._llama.detokenize(answer, prev_tokens=tokens).decode("utf-8", "replace"),
            ttft_seconds=stamps[0] - began if stamps else 0.0,
            tokens_per_second=(len(stamps) - 1) / rest if rest > 0 else 0.0,
        )

    def _tokens(self, prompt: list[int], job: Job) -> Iterator[int]:
        """Yield tokens until the end of the text, without the token that ends it."""
        for start in range(0, len(prompt), BATCH):
            logits = self._decode(prompt[start : start + BATCH])
        for position in range(len(prompt), min(len(prompt) + job.max_tokens, job.n_ctx)):
            token = choose(logits, job.temperature, job.seed, position)
            if not job.ignore_eos and llama_cpp.llama_vocab_is_eog(self._vocab, token):
                return
            yield token
            logits = self._decode([token])

    def guesses(self, prompt: list[int], answer: Sequence[int], job: Job) -> list[Guess]:
        """Return what this model would have said at each place of another one's answer."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._llama.ctx), True)
        found: list[Guess] = []
        logits = self._decode(prompt)
        for position, token in enumerate(answer, len(prompt)):
            guess = choose(logits, job.temperature, job.seed, position)
            wide = (logits.astype(np.float64) - logits[guess]) / (job.temperature or 1.0)
            found.append(Guess(guess, float(1.0 / np.exp(np.minimum(wide, 50.0)).sum())))
            logits = self._decode([token])
        return found

    def _decode(self, tokens: list[int]) -> NDArray[np.float32]:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(
            self._llama.ctx, llama_cpp.llama_batch_get_one(array, len(tokens))
        )
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        pointer = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        floats = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(floats, (self._n_vocab,))

    def _piece(self, token: int) -> str:
        return self._llama.detokenize([token], special=True).decode() if token >= 0 else ""


def choose(logits: NDArray[np.float32], temperature: float, seed: int, position: int) -> int:
    """Return the token at ``position``: Gumbel-max sampling in doubles, or the argmax."""
    if temperature == 0:
        return int(np.argmax(logits))
    wide = logits.astype(np.float64)
    return int(np.argmax((wide - wide.max()) / temperature + gumbel(seed, position, wide.size)))


def main() -> None:
    """SingleAnswer jobs from stdin until it ends; keep the last model loaded."""
    # llama.cpp and its bindings may print; only answers go where the caller reads.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    loaded: Reference | None = None
    for line in sys.stdin:
        job = msgspec.json.decode(line, type=Job)
        if loaded is None or (loaded.path, loaded.n_ctx) != (str(Path(job.path)), job.n_ctx):
            if loaded is not None:
                loaded.close()
            loaded = Reference(str(Path(job.path)), job.n_ctx, job.threads)
        answers.write(msgspec.json.encode(loaded.generate(job)).decode() + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
