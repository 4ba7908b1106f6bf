"""How commands end: exceptions with exit codes, the last line on stderr, and signals that stop a run.

0 done · 1 failed · 2 refused · 3 diverged · 75 stopped by a signal, run it again · 130 stopped by Ctrl-C
"""

import contextlib
import os
import re
import signal
import sys

LINE = 200  # maximum characters of a refusal
DIVERGED, REFUSED = 3, 2  # exit codes

# sent by a cluster (TERM, or ahead of a limit USR1, submitit's USR2, SGE's and LSF's XCPU), a terminal that hangs up
# (HUP) or Ctrl-C (INT); 75 is EX_TEMPFAIL of sysexits.h
EXIT_CODES = dict.fromkeys((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP), 75)
EXIT_CODES[signal.SIGINT] = 130

_received = []


class Ending(Exception):
    """Ends the command: prints one line to stderr (see `form`) and exits with `code`, by default the class's.

    A run that has started records `state` in run.json.
    """

    code, state, form = 1, "stopped", "{command}: {line}"

    def __init__(self, line, code=None):
        super().__init__(str(line) or type(line).__name__)
        self.code = self.code if code is None else code


class Refused(Ending):
    """Invalid input: the line names the flag or file, its value, and the accepted values."""

    code, form = REFUSED, "{command}: error: {line}"


class Stopped(Ending):
    """The run stops between two decisions, where it can save a checkpoint; the line is the reason, such as SIGTERM."""

    form = "{command}: stopped by {line} before it began"


class Diverged(Ending):
    """A loss is not finite."""

    code, state = DIVERGED, "diverged"


class RunEnded(Ending):
    """The run ended, in this process or an earlier one; the line names its folder."""

    form = "{line}"


def out_of_memory(error):
    """The `Ending` of a RuntimeError by which PyTorch reports a failed allocation; None for any other.

    The CPU's allocator has no class of its own for it; an illegal memory access on CUDA is another error.
    """
    if not re.search("out of memory|allocate memory", str(error)):
        return None
    less = "reduce memory with a smaller --batch_size, fewer parallel runs or --replay_device cpu"
    return Ending(f"{str(error).rpartition('Allocator: ')[2].split('. ')[0]}; {less}")


# exceptions that a command's main handles; all others are bugs and keep their traceback
EXPECTED = (Ending, OSError, MemoryError, KeyboardInterrupt)


@contextlib.contextmanager
def command():
    """Decorator of a command's `main`: an expected exception ends the process with its line and exit code."""
    prepare_console()
    try:
        yield
    except EXPECTED as error:
        end(error)


def prepare_console():
    """Make stdout and stderr writable even if they are closed or cannot encode a path's characters."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:  # closed: the next open file must not get this descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            setattr(sys, name, os.fdopen(descriptor, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")


def end(error):
    """Exit with the line and the exit code of one of the `EXPECTED` exceptions."""
    if isinstance(error, KeyboardInterrupt):
        sys.exit(EXIT_CODES[signal.SIGINT])
    if isinstance(error, BrokenPipeError):  # nobody reads what a command such as --help prints
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    ending = error if isinstance(error, Ending) else Ending(error)
    line = ending.form.format(command=os.path.basename(sys.argv[0]), line=" ".join(str(ending).split()))
    if isinstance(ending, Refused) and len(line) > LINE:
        line = line[: LINE - 3] + "..."
    with contextlib.suppress(OSError):  # stderr may be closed
        print(line, file=sys.stderr, flush=True)
    sys.exit(ending.code)


def listen():
    """From now on, record signals instead of dying from them; a second Ctrl-C ends the process at once.

    Signals that the parent set to be ignored, as nohup does with HUP and a shell's `&` with INT, stay ignored.
    """
    for number in EXIT_CODES:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _receive)


def _receive(number, frame):
    if number == signal.SIGINT and signal.SIGINT in _received:
        os._exit(EXIT_CODES[number])  # safe: files on disk are complete at any time
    _received.append(number)


def check_signals():
    """Raise `Stopped` if a signal has arrived."""
    if _received:
        raise Stopped(signal.Signals(_received[0]).name, EXIT_CODES[_received[0]])


@contextlib.contextmanager
def signals_kept_from_children():
    """Shield child processes started here from signals that a cluster or Ctrl-C sends to the whole process tree.

    Children inherit the signal mask; a signal that arrives meanwhile reaches this process afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
