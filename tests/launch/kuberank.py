"""Stands in for the trainer on the ranks that a pod's torchrun starts: notes where it is, and ends as the test wants.

What it shall do is in the configuration, which is all that travels: ``trainer.steps`` 1 ends at once, else it waits for
SIGTERM; ``trainer.seed`` 13 fails on rank 1.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

from megatron_rest.config import RestConfig, from_dict


def main() -> None:
    text = Path(sys.argv[sys.argv.index("--config") + 1]).read_text()
    config = from_dict(RestConfig, yaml.safe_load(text))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    record = {name: int(os.environ[name]) for name in names} | {"config": text, "environment": dict(os.environ)}
    folder = Path(config.trainer.run_dir)
    print(f"rank {record['RANK']} has begun", flush=True)
    (folder / f"rank-{record['RANK']}.json").write_text(json.dumps(record))
    if config.trainer.seed == 13 and record["RANK"] == 1:
        while not (folder / "rank-0.json").exists():  # torchrun would end rank 0 before it has said anything
            time.sleep(0.05)
        sys.exit(3)
    if config.trainer.steps > 1:
        signal.signal(signal.SIGTERM, lambda *_: save(folder, record["RANK"]))
        (folder / f"waiting-{record['RANK']}").touch()
        time.sleep(1000)


def save(folder: Path, rank: int) -> None:
    time.sleep(1)  # longer than an impatient parent would wait
    (folder / f"saved-{rank}").touch()
    sys.exit(75)


if __name__ == "__main__":
    main()
