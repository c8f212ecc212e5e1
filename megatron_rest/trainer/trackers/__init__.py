"""Who is told of a run besides ``metrics.jsonl`` (``trainer.loggers``): a file each, through the tracker's own client.

base.py        what a tracker is, of one's own too
told.py        all of a run's trackers: in threads, so that none can hold or end it
*_tracker.py   W&B, MLflow, SwanLab, Trackio
"""

from megatron_rest.trainer.trackers.base import TrackedRun, Tracker
from megatron_rest.trainer.trackers.told import Trackers, check_loggers

__all__ = ["TrackedRun", "Tracker", "Trackers", "check_loggers"]
