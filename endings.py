"""How a command ends: exceptions that carry the exit code, the last line on stderr, and the signals that stop a run.

0 done · 1 failed · 2 refused · 3 diverged · 75 stopped by a signal, run it again · 130 stopped by Ctrl-C
"""

import contextlib
import os
import signal
import sys

LINE = 200  # characters of a refusal at most
DIVERGED, REFUSED = 3, 2  # exit codes

# from a cluster (TERM, or USR1 ahead of the time limit), a terminal that hangs up (HUP), a person (INT);
# 75 is EX_TEMPFAIL of sysexits.h
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75, signal.SIGINT: 130}
NOT_FOR_CHILDREN = {*EXIT_CODES, signal.SIGUSR2}

_received = []


class Ending(Exception):
    """The command ends with this line and exit code.

    Args:
        line: one line for the user.
        code: exit code, that of the class if None.

    `state` is what run.json says of a run that has begun.
    """

    code, state = 1, "stopped"

    def __init__(self, line, code=None):
        super().__init__(line)
        if code is not None:
            self.code = code


class Refused(Ending):
    """Bad input: the line names the flag or file, its value, and what would be right."""

    code = REFUSED


class Stopped(Ending):
    """The run stops between two decisions, where a checkpoint can be saved; the line is the reason, such as TERM."""


class Diverged(Ending):
    """A loss is not finite."""

    code, state = DIVERGED, "diverged"


class RunEnded(Ending):
    """The run has ended, just now or in an earlier process; the line names its folder."""


# what a command's main expects: other exceptions are bugs and keep their traceback
EXPECTED = (Ending, OSError, KeyboardInterrupt)


def end(error):
    """End the process with the line and the exit code of one of the `EXPECTED` exceptions."""
    command, line = os.path.basename(sys.argv[0]), " ".join(str(error).split())
    code = getattr(error, "code", 1)
    if isinstance(error, KeyboardInterrupt):
        sys.exit(130)
    if isinstance(error, Refused):
        line = f"{command}: error: {line}"
        line = line if len(line) <= LINE else line[: LINE - 3] + "..."
    elif isinstance(error, Stopped):
        line = f"{command}: stopped by {line} before it began"
    elif not isinstance(error, RunEnded):
        line = f"{command}: {line}"
    with contextlib.suppress(OSError):  # nobody may be listening
        print(line, file=sys.stderr, flush=True)
    sys.exit(code)


def listen():
    """From now on, record signals instead of dying of them; a second Ctrl-C ends the process at once.

    A signal that the process was started to ignore, as HUP by nohup or INT by a shell's `&`, stays ignored.
    """
    for number in EXIT_CODES:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _receive)


def _receive(number, frame):
    if number == signal.SIGINT and signal.SIGINT in _received:
        os._exit(EXIT_CODES[number])  # the files on disk are complete at any moment
    _received.append(number)


def check_signals():
    """Raise `Stopped` if a signal has arrived."""
    if _received:
        raise Stopped(signal.Signals(_received[0]).name, EXIT_CODES[_received[0]])


@contextlib.contextmanager
def signals_kept_from_children():
    """Child processes started here never see these signals, which a cluster or Ctrl-C sends to the whole process tree.

    They inherit the mask; a signal that arrives meanwhile reaches this process afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_CHILDREN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
