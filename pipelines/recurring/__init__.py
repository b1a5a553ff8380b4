"""Pipelines that run by themselves: `braid pipeline tick NAME`, as often as one likes, from wherever.

recipe     what a pipeline is
state      its folder: runs under way and past, each one JSON file, created exclusively
lease      who works on it; survives crashes, and never lives for ever
due        what is to be done now, and why not what is not
tick       one reconcile: lease, what crashed runs have left, what is due, record
executor   how the steps of a run are started: here, one after the other
steps      the steps themselves: tokenize, pretrain a stage, evaluate, export, clean
step       the process of one step
alerts     commands and webhooks
schedule, crontab, scrontab, systemd   who calls tick, and when
doctor     what would keep it from running
history, page   what it did

State is "inputs not yet done", never a slot of the clock: a tick that was missed is caught up by the next one, and one
that comes twice finds nothing to do.
"""
