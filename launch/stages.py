"""What runs around the training of a cluster's recipe: the arguments that all of these recipes take."""

from dataclasses import dataclass

__all__ = ["HELP", "Stages"]


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Number of nodes, and the jobs around the training."""

    nodes: int
    links: int = 1
    requeue: int = 0
    baseline: str = ""
    warm_start: bool = False
    evaluate: bool = False


HELP = {
    "links": "jobs one after the other, each continues where the last one stopped.",
    "requeue": "times a job goes back into the queue when it fails, loses a node or is stopped by its time limit.",
    "baseline": "grpo = uniform token weights.",
    "warm_start": "train on the reference answers first.",
    "evaluate": "score API-Bank and BFCL when training is finished.",
}
"""What ``--help`` says of each; of ``nodes`` a recipe says it itself."""
