"""What is wrong with checkpoints, as far as it is not the configuration."""


class CheckpointError(Exception):
    """No checkpoint can be used, or none can be saved: the run must not go on unprotected."""
