"""Errors that are a user's to mend: the message is shown alone, without a traceback, and the exit code is 2."""


class UserError(ValueError):
    """What was given, what was expected and what to do, in one message for a person."""


class FullDisk(UserError):
    """There is no room for what was to be written; nothing that was there before is lost."""
