"""Signals in processes of their own, which are quick to start without torch."""

import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run(body, **kwargs):
    script = "import os, signal, subprocess, sys, endings\nme = os.getpid()\n" + body
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize(
    "name, code", [("TERM", 75), ("USR1", 75), ("USR2", 75), ("XCPU", 75), ("HUP", 75), ("INT", 130)]
)
def test_a_signal_is_recorded_and_handled_later(name, code):
    body = f"""
endings.check_signals()
endings.listen()
os.kill(me, signal.SIG{name})
try:
    endings.check_signals()
except endings.Stopped as stop:
    print(stop)
    sys.exit(stop.code)
"""
    done = run(body, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert (done.returncode, done.stdout) == (code, f"SIG{name}\n")


def test_the_second_ctrl_c_ends_at_once():
    body = "endings.listen()\nos.kill(me, signal.SIGINT)\nprint(1, flush=True)\nos.kill(me, signal.SIGINT)\nprint(2)"
    done = run(body, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert (done.returncode, done.stdout) == (130, "1\n")


@pytest.mark.parametrize("name", ["HUP", "INT"])
def test_what_was_ignored_stays_ignored(name):
    """As in a process started by nohup or a shell's &."""
    number = getattr(signal, f"SIG{name}")
    body = f"endings.listen()\nos.kill(me, signal.SIG{name})\nendings.check_signals()\nprint('continues')"
    done = run(body, preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
    assert (done.returncode, done.stdout) == (0, "continues\n")


def test_children_do_not_hear():
    """Not even one sent while they start; the parent receives it afterwards."""
    body = """
endings.listen()
with endings.signals_kept_from_children():
    child = subprocess.Popen(["sleep", "0.3"])
    os.kill(me, signal.SIGTERM)
for number in endings.EXIT_CODES:
    child.send_signal(number)
print(child.wait())
try:
    endings.check_signals()
except endings.Stopped as stop:
    print(stop)
"""
    assert run(body).stdout == "0\nSIGTERM\n"
