"""`braid evaluate`: how good a checkpoint is, by modality, with every figure beside its baseline.

    from pipelines.evaluate import evaluate

    evaluate("demo/run", "data/animals").figures["modalities"]["image"]["loss"]

Reading order: `documents` (what is evaluated), `scoring` (what the model says of each token), `tally`, `calibration` and
`positions` (sums), `figures` (what is told of them), `pairs` and `gain` (two modalities that say the same), `generation` and
`distances` (what it makes), `bootstrap` (how sure that is), `evaluation` (all together), `terminal` and `page`.
"""

from pipelines.evaluate.errors import EvaluateError
from pipelines.evaluate.evaluation import Evaluation, evaluate

__all__ = ["EvaluateError", "Evaluation", "evaluate"]
