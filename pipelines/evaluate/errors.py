"""The one error of this package."""


class EvaluateError(ValueError):
    """A checkpoint cannot be evaluated on a dataset; the message names place, value and remedy."""
