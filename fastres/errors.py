"""Errors of our own."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Bad input from the command line or a file. The message is one line that says what is wrong; the CLI prints it."""
