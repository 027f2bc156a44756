"""A run: what an algorithm's `main` calls, from its flags to the model it leaves.

To be read in this order; each module's docstring says more.

    loop.py         the loop: rollout, update, metrics, saved states; stopped and resumed
    batches.py      which problems a step is about, this rank's share of them, the seeds of rows
    parts.py        a batch sampled in parts, so that its cache keeps within --cache_tokens
    policy.py       the update: micro-batches, gradients, clipping, the learning rate
    scorer.py       log-probabilities of whole rollouts, with gradients, a shared prefix only once
    models.py       a model and its tokenizer from disk or hub, and the policy made of it
    lora.py         adapters made, saved as PEFT has them, merged
    setup.py        what comes before the loop: task, sampler, prompts that fit, a first try
    run.py          the run's directory: its lock, its logs, what is said when it can't be used
    checkpoint.py   saved states: complete or not at all
    card.py         README.md of a published model
    distributed.py  many processes: what they tell each other, weights spread over them
    flags.py        the flags that scripts share
    fitting.py      defaults that fit another model than the embedded one
    command.py      flags read, checked, taken from a run that goes on; bad input said
    announce.py     what is said before the first step
    progress.py     bars, which are lines in a log file
    loggers.py      metrics handed on to TensorBoard, wandb, Trackio
    failures.py     a file of failures, for rrr.py to reflect on
    methods.py      several attempts at a problem, which evaluate.py makes figures of
    controls.py     who reflects and who retries: what RRR's gain is compared with
    pages.py        the page of an evaluation's conversations
    partial.py      what is done of an evaluation, kept in case it is stopped
"""
