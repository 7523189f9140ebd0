"""What stops a run and is for its user to put right."""


class Problem(Exception):
    """Shown as one line on stderr, without a traceback; the exit status is 2."""


class Stopped(Exception):
    """The user asked for an end (Ctrl-C, SIGTERM) and everything is saved."""
