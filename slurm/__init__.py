"""How to run any importable callable on the nodes of a cluster. A leaf: it knows nothing of what it runs.

settings     what a cluster recipe says
checks       what is found wrong before anything is submitted
groups       nodes of several kinds in one job
submission   the job's folder, its script, `submit`
code         the code as an archive in that folder, so that a requeue runs the same code
entry        what each task does first on its node; `context` is what the callable may ask for: `requeue`, `LostRanksError`
ray_cluster  a Ray cluster inside one allocation
status       where a job is, from the controller, the accounting and its folder; `logs` of all tasks, merged

`submitit` is imported by `submission` alone, when it submits.
"""
