"""Errors that are a user's to mend: their message is shown alone, without a traceback, and the program exits with code 2."""


class UserError(ValueError):
    """What was given, what was expected and what to do, in one message for a person."""
