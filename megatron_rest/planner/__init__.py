"""Memory and time of a configuration before it runs (docs/planner.md has every formula).  Imports no torch, but
to simulate a weight transfer, where it is installed.

shapes.py      the model's numbers: from its folder, or from a table of published models
hardware.py    what a GPU has, and how much of it a program like this one gets
parameters.py  parameters of every pipeline stage, from the table that loads and exports them
activations.py what one layer keeps for its backward pass
memory.py      bytes of one rank, item by item
lengths.py     how long prompts and responses are: from the prepared data, or assumed
work.py        operations of scoring and update, on drawn lengths packed as the trainer packs them
steptime.py    seconds from them, and of the rollouts
savings.py     what a step need not compute, and what each of these is worth
plan.py        all of it for one configuration
advice.py      which change would make it fit
report.py      the page that ``megatron-rest plan`` and ``--dryrun`` print
"""
