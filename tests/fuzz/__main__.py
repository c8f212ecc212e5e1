"""Every target: ``python -m tests.fuzz --cases 10000 [--only NAME]``; JSON at the end, status 1 if one is broken."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.fuzz.targets import TARGETS, fuzz


def main() -> int:
    """All targets in turn, ``cases`` each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="of each target (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=sorted(TARGETS))
    arguments = parser.parse_args()
    results = {}
    for name in [arguments.only] if arguments.only else TARGETS:
        with tempfile.TemporaryDirectory() as scratch:
            results[name] = fuzz(TARGETS[name], Path(scratch), cases=arguments.cases, seed=arguments.seed)
        print(name, json.dumps(asdict(results[name]))[:3000], file=sys.stderr, flush=True)
    print(json.dumps({name: {**asdict(r), "unexpected": len(r.unexpected)} for name, r in results.items()}))
    return int(any(result.unexpected for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
