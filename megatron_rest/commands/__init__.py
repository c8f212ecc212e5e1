"""Commands beside the training itself, each a module with ``main(argv)``; ``cli.py`` gives them their names.

init_model.py, import_gguf.py  a model to begin with
warm_start.py                  supervised training before RL
export.py, reshard.py          a run's checkpoint in another form
resume_check.py                a killed run against an undisturbed one: run_diff.py compares, tiny.py is the run
"""
