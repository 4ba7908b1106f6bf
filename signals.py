"""What asks a run to stop: signals, heard at once and answered between two decisions."""

import contextlib
import os
import signal

# from a cluster (TERM, or USR1 ahead of the time limit), a person (INT), a terminal that hangs up (HUP)
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75, signal.SIGINT: 130}
NOT_FOR_CHILDREN = {*EXIT_CODES, signal.SIGUSR2}

_heard = []


class Stopped(Exception):
    """The run is to stop between two decisions, where it can be saved.

    Args:
        reason: for the user, in a few words.
        code: the exit code. 75 is EX_TEMPFAIL of sysexits.h: start the same command again.
    """

    def __init__(self, reason, code):
        super().__init__(reason)
        self.code = code


def listen():
    """From now on note signals instead of dying of them; a second Ctrl-C ends the process at once.

    A signal that the process was started to ignore, as HUP by nohup or INT by a shell's `&`, stays ignored.
    """
    for number in EXIT_CODES:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _note)


def _note(number, frame):
    if number == signal.SIGINT and signal.SIGINT in _heard:
        os._exit(EXIT_CODES[number])  # what is on disk is whole at any moment
    _heard.append(number)


def check():
    """Raise `Stopped` if a signal has been heard."""
    if _heard:
        raise Stopped(signal.Signals(_heard[0]).name, EXIT_CODES[_heard[0]])


@contextlib.contextmanager
def kept_from_children():
    """Processes started here never see these signals, which a cluster or Ctrl-C sends to the whole process tree.

    They inherit the mask; what comes meanwhile reaches this process afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_CHILDREN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
