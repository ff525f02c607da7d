"""The controller against every fixed setting, by recorded answers on ranks of known speed.

A model answers the texts of ``bench speculation`` once, alone; the answers are then guessed again
over links and ranks that exist in arithmetic only (see ``replay``): whatever else the machine does,
the figures are the same.  A drafting model, if there is one, says beforehand what it would guess.

    python benchmarks/speculation_replay.py MODEL.gguf [--drafter-model SMALL.gguf] --json

``share`` is the controller's speed over that of the best fixed setting, which nobody knows
beforehand; the sessions of a row go by what the ones before them have taught.  ``--held-out`` takes
the texts of ``held_out``, four a kind (``--texts 4``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial

from pyagent_node.benchmarks.held_out import HELD_OUT
from pyagent_node.benchmarks.reference import Reference
from pyagent_node.benchmarks.replay import Costs, Record, Replay
from pyagent_node.benchmarks.single import Job
from pyagent_node.benchmarks.speculation import DEPTHS, LENGTHS
from pyagent_node.benchmarks.texts import KINDS, TEXTS, Kind
from pyagent_node.inference.drafting.controller import Controller, FixedController
from pyagent_node.inference.drafting.lessons import Lessons
from pyagent_node.inference.drafting.port import Plan

Make = Callable[[], Controller | None]
Row = dict[str, str | float | int]
RANKS = 3


def record(args: argparse.Namespace) -> dict[Kind, list[Record]]:
    """Let the model answer, and its drafter say what it would have."""
    target = Reference(args.model, args.n_ctx, args.threads)
    drafting = args.drafter_model
    drafter = Reference(drafting, args.n_ctx, args.threads) if drafting else None
    found: dict[Kind, list[Record]] = {}
    texts = HELD_OUT if args.held_out else TEXTS
    for kind in KINDS:
        for text in texts[kind][: args.texts]:
            job = Job(
                path=args.model,
                prompt=text,
                max_tokens=args.tokens,
                seed=11,
                temperature=args.temperature,
                n_ctx=args.n_ctx,
                chat=False,
                ignore_eos=True,
            )
            prompt = target.prompt_tokens(text, chat=False)
            answer = target.generate(job).token_ids
            guesses = drafter.guesses(prompt, answer, job) if drafter else []
            found.setdefault(kind, []).append(
                Record(tuple(prompt), answer, tuple((g.token, g.probability) for g in guesses))
            )
    return found


def rate(records: list[Record], costs: Costs, make: Make) -> tuple[float, float]:
    """Return the tokens a second of some answers together, and what the head expected."""
    seconds = expected = 0.0
    tokens = 0
    for seed, each in enumerate(records):
        controller = make()
        replay = Replay(each, costs, controller, model_drafts=bool(each.guesses), seed=seed)
        speed, usage = replay.run()
        n = len(each.answer) - 1
        tokens += n
        seconds += n / speed
        expected += n / usage.predicted_tokens_per_second if usage is not None else 0.0
    return tokens / seconds, tokens / expected if expected else 0.0


def row(records: list[Record], costs: Costs, make: Make) -> Row:
    """Measure the controller and every fixed setting."""
    plain, _ = rate(records, costs, lambda: None)
    fixed = {(0, 1): plain}
    for length in LENGTHS:
        for depth in DEPTHS:
            make_fixed = partial(FixedController, Plan(length, depth), ranks=RANKS)
            fixed[length, depth], _ = rate(records, costs, make_fixed)
    best = max(fixed, key=lambda setting: fixed[setting])
    got, expected = rate(records, costs, make)
    return {
        "plain": round(plain, 2),
        "tokens_per_second": round(got, 2),
        "expected": round(expected, 2),
        "speedup": round(got / plain, 3),
        "best": f"{best[0]}/{best[1]}",
        "best_tokens_per_second": round(fixed[best], 2),
        "share": round(got / fixed[best], 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--drafter-model")
    parser.add_argument("--rtt-ms", default="0,20,50,100,200")
    parser.add_argument("--pass-ms", type=float, default=5.2, help="A step, whatever its width.")
    parser.add_argument("--token-ms", type=float, default=2.2, help="Each token of a step.")
    parser.add_argument("--draft-ms", type=float, default=20.0, help="A guess of the model.")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--held-out", action="store_true", help="Texts nothing was tuned on.")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--n-ctx", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    records = record(args)
    rows: list[Row] = []
    for rtt in map(float, args.rtt_ms.split(",")):
        costs = Costs(args.pass_ms / 1000, args.token_ms / 1000, args.draft_ms / 1000, rtt / 1000)
        make = partial(Controller, ranks=RANKS, lessons=Lessons())
        rate(records["copy"][-1:], costs, make)  # a node that has served before
        for kind, of_kind in records.items():
            rows.append({"rtt_ms": rtt, "prompts": kind, **row(of_kind, costs, make)})
            if not args.json:
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    shares = [float(each["share"]) for each in rows]
    if args.json:
        json.dump({"rows": rows, "least_share": min(shares)}, sys.stdout, indent=1)
        print()
        return
    print(f"least share {min(shares)}, mean {sum(shares) / len(shares):.3f}")


if __name__ == "__main__":
    main()
