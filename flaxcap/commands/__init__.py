"""The command line. Each command is a module with `run(flags, config, positional)`, which returns the exit status."""

FAILED, INTERRUPTED = 1, 130
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the run is saved, and the same command resumes it
