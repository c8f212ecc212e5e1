"""Somebody's own package: a reward, an environment and a logger, named in a configuration and nowhere else.

    cp -r examples/own_code/mytools ~/my-project/ && cd ~/my-project
    megatron-rest train model.path=... data.train=... \
        reward.terms.tool_call.weight=1.0 \
        reward.terms.calls.function=mytools.rewards:calls_match reward.terms.calls.weight=0.5 \
        reward.terms.short.function=mytools.rewards:brevity reward.terms.short.arguments.words=60

    megatron-rest train ... rollout.environment=mytools.environments:Workshop \
        rollout.environment_arguments.tries=3 reward.function=environment

    megatron-rest train ... trainer.loggers=tensorboard,mytools.loggers:PlainFile
"""
