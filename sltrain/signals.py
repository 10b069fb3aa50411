"""The signals that ask a run to stop: SIGTERM, Ctrl-C (SIGINT), SIGHUP of a terminal that closes, and SIGUSR1 and
SIGUSR2, by which clusters announce the end of a job's time.

One that is ignored when the process starts stays ignored: `nohup` ignores SIGHUP, a shell script SIGINT for what it
starts with `&`. SIGHUP, SIGUSR1 and SIGUSR2 are also left to a program that handles them itself, as submitit's jobs do.
"""

import signal

ALWAYS = (signal.SIGINT, signal.SIGTERM)
BY_DEFAULT_FATAL = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def stop_signals() -> list[signal.Signals]:
    """Those that this process is to handle."""
    ends_it = (signal.SIG_DFL, signal.default_int_handler)
    return [number for number in ALWAYS if signal.getsignal(number) != signal.SIG_IGN] + [
        number for number in BY_DEFAULT_FATAL if signal.getsignal(number) in ends_it
    ]
