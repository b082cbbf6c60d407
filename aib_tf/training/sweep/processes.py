"""Processes that are run one by one in several threads, timed, and stopped together."""

import contextlib
import dataclasses
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

_LAST_LINES = 15
_LAST_BYTES = 20_000
# ru_maxrss is in bytes on macOS, in KiB elsewhere.
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


class StoppedError(Exception):
    """A signal has asked to stop, and nothing is started any more."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: Its exit code, -n where signal n killed it.
        seconds: How long it ran.
        peak_memory_bytes: Its largest resident memory, None where the system cannot tell it from that of this process.
        last_lines: The end of what it wrote.
    """

    code: int
    seconds: float
    peak_memory_bytes: int | None
    last_lines: str

    @property
    def how(self) -> str:
        """How it ended, in words."""
        if self.code < 0:
            with contextlib.suppress(ValueError):
                name = signal.Signals(-self.code).name
                # The kernel's answer to a machine without memory.
                return f"was killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
            return f"was killed by signal {-self.code}"
        return f"ended with exit code {self.code}"


class Processes:
    """Runs processes, and passes on to all of them the signals that this one gets while it is entered.

    The first signal lets them save and end; each further one goes to them as well, and training then stops at once.

    Attributes:
        signal: Name of the first signal that asked to stop, or None.

    Args:
        environment: Variables of the processes that those of this one go before.
    """

    def __init__(self, environment: Mapping[str, str]):
        self.signal = None
        self._environment = {**environment, **os.environ, "PYTHONUNBUFFERED": "1"}
        self._live = set()
        self._lock = threading.RLock()  # the main thread takes it in handlers only, and one may interrupt another
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks
                    self._previous[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def run(self, command: Sequence[str], log: os.PathLike) -> Ended:
        """Runs a command to its end; what it writes is put behind what is in the file `log`.

        Raises:
            StoppedError: A signal came before the command was started.
            OSError: It cannot be started, or the file cannot be written.
        """
        self.check_signal()
        with open(log, "ab") as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            start = output.tell()
            with self._lock:
                self.check_signal()  # from here on, a signal reaches the process
                # The kernel counts the peak of this process, which it is forked from, as its own.
                floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                began = time.monotonic()
                process = subprocess.Popen(
                    command,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C in a terminal goes to this process alone, which passes it on once
                )
                self._live.add(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
            with self._lock:
                self._live.discard(process.pid)
            seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss * _MAXRSS_UNIT if usage.ru_maxrss > floor else None
        return Ended(process.returncode, seconds, peak, _last_lines(log, start))

    def check_signal(self):
        """Raises StoppedError after a signal that asked to stop."""
        if self.signal is not None:
            raise StoppedError(self.signal)

    def _pass_on(self, number, frame):
        number = signal.Signals(number)
        # A terminal that hangs up is no reason to lose what was computed.
        number = signal.SIGTERM if number == signal.SIGHUP else number
        with self._lock:
            self.signal = self.signal or number.name
            for pid in self._live:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: it is dead and not yet gone
                    os.killpg(pid, number)


def _last_lines(log, start):
    with open(log, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(start, end - _LAST_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-_LAST_LINES:])
