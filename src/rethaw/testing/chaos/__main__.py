"""`python -m rethaw.testing.chaos`: run seeds, print what was done and what broke, exit 1 if anything did."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

from rethaw.testing.chaos.checks import check
from rethaw.testing.chaos.plan import fault_points, plan
from rethaw.testing.chaos.run import Run


def again(seed: int, turns: int) -> str:
    """How to run a seed again."""
    return f"python -m rethaw.testing.chaos --seed {seed} --turns {turns}"


def one(seed: int, turns: int, keep: Path | None, fault: str | None = None) -> list[str]:
    """Run a seed; what broke, with how to run it again. `fault`: in place of the plan's. `keep`: for the record."""
    the_plan = plan(seed, turns)
    if fault is not None:
        the_plan = replace(the_plan, fault=fault)
    run = Run(the_plan)
    try:
        record = asyncio.run(run.run())
        broken = check(record)
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"seed-{seed}.json").write_text(
                json.dumps(record.__dict__ | {"plan": str(record.plan)}, default=str, indent=1)
            )
    except Exception:
        broken = [traceback.format_exc()]
    if broken:
        broken += ["", *run.timeline, "", f"again: {again(seed, turns)}"]
    return broken


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rethaw.testing.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="one seed")
    parser.add_argument("--seeds", default="", help="FROM-TO, both included")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--fault", help="RETHAW_FAULTS of the first server in place of the plan's")
    parser.add_argument("--keep", type=Path, help="directory for the records")
    parser.add_argument("--points", action="store_true", help="list the fault points and end")
    args = parser.parse_args()
    if args.points:
        sys.stdout.write("\n".join(fault_points()) + "\n")
        return
    first, _, last = args.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1) if first else [args.seed if args.seed is not None else 0]
    failed = 0
    for seed in seeds:
        start = time.monotonic()
        broken = one(seed, args.turns, args.keep, args.fault)
        failed += bool(broken)
        verdict = "FAILED" if broken else "ok"
        sys.stdout.write(f"{verdict} {time.monotonic() - start:.1f} s {plan(seed, args.turns)}\n")
        sys.stdout.write("".join(f"    {line}\n" for line in broken))
        sys.stdout.flush()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
