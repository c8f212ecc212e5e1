"""Fuzz the labeller for as long as you like; stops at the first failing seed.

python -m tests.regions.fuzz [--seconds 60] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import time

from tests.regions.test_properties import fuzz

_BATCH = 10_000


def main() -> None:
    """Run batches of cases, one seed each, and say how many passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    end, seed = time.monotonic() + args.seconds, args.seed
    while time.monotonic() < end:
        print(f"seed {seed}", flush=True)
        fuzz(random.Random(seed), num_cases=_BATCH)
        seed += 1
    print(f"{(seed - args.seed) * _BATCH} cases passed")


if __name__ == "__main__":
    main()
