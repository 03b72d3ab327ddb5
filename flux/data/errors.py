"""The one error for faulty data; the program ends with exit code 3 on it."""


class DataError(ValueError):
    """A sample or a data set cannot be used. The message names the file, the rule and the remedy."""
