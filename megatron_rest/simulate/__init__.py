"""What a configuration does at its real size, by running the parts that decide it on one CPU.

    balance     the trainer's packing on drawn lengths; Megatron's pipeline orders, event by event
    transfer    the plan that ranks would make; links, windows and hosts, event by event (weight_sync/timing.py)
    exchange    the bytes in which rollouts travel, and what each rank receives of them
    judging     the host's seconds between rollouts and samples, by the judge itself
    start       the process groups that a rank makes, and whom it connects to
    dry         a rank's real model, optimiser, schedule and checkpoint on tensors without memory

Nothing here is measured on a GPU: what is assumed is named in ``weight_sync/rates.py`` and docs/planner.md.
"""
