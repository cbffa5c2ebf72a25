"""The errors that are a user's to mend; commands show their message without a traceback."""


class UserError(Exception):
    """A mistake in data, settings or surroundings, with what to do about it."""


class InvalidInputError(UserError, ValueError):
    """A value that cannot be used."""


class OutputError(UserError, OSError):
    """What is to be kept cannot be written."""


class DivergedError(UserError):
    """A model's probabilities are no numbers any more."""


class UnhealthyError(UserError):
    """A run that `on_unhealthy="stop"` has ended."""
