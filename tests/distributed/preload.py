"""What the fork server of ranks.py imports before it forks: everything slow, nothing that computes."""

import train  # noqa: F401
