"""What can be wrong with raw data, as opposed to with the program that reads it."""


class MediaError(ValueError):
    """Bytes that cannot become a picture or a sound; the message names the source and the reason.

    One such document goes to quarantine, and the job goes on.
    """

    def __init__(self, error: str, fault: str = "cannot be decoded") -> None:
        super().__init__(error)
        self.fault = fault
        """The short class of fault, such as `damaged`; behind the modality's name it is the reason of the reject."""


class CorpusError(ValueError):
    """A corpus that cannot be listed or made: missing, empty, or unreadable. The message names the path and remedy.

    Nothing can go on without it, so the command ends with its message.
    """


class RecordError(ValueError):
    """One record that cannot become a document; the message says what is wrong, where, and what to do.

    It becomes a `Reject`, and reading goes on.
    """

    def __init__(self, reason: str, error: str) -> None:
        super().__init__(error)
        self.reason = reason
        """The short class of fault that rejects are counted by."""


class TransientError(RuntimeError):
    """The network or a store failed again and again, within the tries of one operation: nothing is wrong with the data.

    Never a `Reject`: whoever asked for the work may try it again as a whole.
    """


class StoreError(ValueError):
    """An object store refuses: no such bucket, no access, or a kind of store that is not known. Trying again is no use."""
