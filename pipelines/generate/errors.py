"""The one error of this package."""


class GenerateError(ValueError):
    """What was asked for cannot be generated; the message names place, value and remedy."""
