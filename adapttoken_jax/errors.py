"""The one exception that a user's own mistake raises."""


class UserError(ValueError):
    """A mistake in a flag, a file or an argument.

    The message is one line that names the flag or file and says what to do. The command line prints it and exits with
    status 2; Python callers catch it as a `ValueError`.
    """
