"""The one error that is the user's to mend: its text is a sentence, and the command line's exit code for it is 3."""

__all__ = ["BadInput"]


class BadInput(ValueError):
    """A file, folder or setting that cannot be used. The message names it, what was expected and what came."""
