"""What can be wrong with raw data, as opposed to with the program that reads it."""


class MediaError(ValueError):
    """Bytes that cannot become a picture or a sound; the message names the source and the reason.

    One such document goes to quarantine, and the job goes on.
    """


class CorpusError(ValueError):
    """A corpus that cannot be listed or made: missing, empty, or unreadable. The message names the path and remedy.

    Nothing can go on without it, so the command ends with its message.
    """
