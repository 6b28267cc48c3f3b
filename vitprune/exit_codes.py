"""What the command's exit codes mean, for scripts that start it again."""

FAILED = 1
USAGE = 2
# told to end (SIGTERM, as on pre-emption); what was done is kept, and the same command goes on from there
TERMINATED = 75
INTERRUPTED = 130
