"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """Its message names the file, field or flag, what was found and what was expected; the program exits with 1."""
