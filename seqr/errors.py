"""The root of every error a user of seqr can cause."""


class SeqrError(Exception):
    """An error with a stable ``code`` and a one-sentence message that says what was wrong and what to do."""

    code: str = "seqr_error"

    @property
    def message(self) -> str:
        """The sentence shown to the user."""
        return str(self)
