"""What the exit code of a run means. A job script decides by it whether to start the run again."""

OK = 0
ERROR = 1  # a fault of the recipe or of the machine; the traceback is shown
CONFIG = 2  # the configuration is wrong, or a file it names, or the memory it needs; starting again changes nothing
DATA = 3  # the data set cannot be read
DIVERGED = 4  # the loss is no longer a number
CHECKPOINT = 5  # no checkpoint can be loaded or saved
HANG = 6  # a rank stood still
PREEMPTED = 75  # stopped from outside, and can go on: start the same command again (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # Ctrl-C, as shells report it (128 + SIGINT)
TERMINATED = 143  # 128 + SIGTERM

# Of these the same command may be started again: what stopped the run was outside of it, or may have passed.
RESUMABLE = (ERROR, HANG, PREEMPTED)
