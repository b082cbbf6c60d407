"""Starts a cluster of workers on this machine, and ends when they have.

python scripts/launch.py --workers=2 -- scripts/train.py --flagfile=configs/digits_aib_qt.flags --output_dir=runs/digits

Each worker gets a TF_CONFIG with a free port of its own, and its share of the cores and of the NVIDIA GPUs, as many as
the others (CUDA_VISIBLE_DEVICES; one that is set is left alone). Its lines are shown with its number in front. A .py
file is run with this Python, any other command as it is.

SIGINT and SIGTERM go to all workers, which are then waited for; a second one kills them. When a worker fails, the
others have --grace seconds to notice it and end. The exit code is that of the worker that failed first, 128 + n for
signal n. 75 says that the state is saved and the same command continues: a worker that lost another ends with it, too,
so that any other code goes before it. No worker outlives this program.
"""

import argparse
import contextlib
import json
import os
import random
import re
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time

TEMPORARY_FAILURE = 75  # EX_TEMPFAIL of sysexits.h: the state is saved, the same command continues

NVIDIA_GPUS = "/proc/driver/nvidia/gpus"  # the driver's, a folder for each

# Waits for a line, so that nothing has begun before the guard knows of it, and becomes the command.
_WORKER = ["/bin/sh", "-c", 'read -r begin && exec "$@" < /dev/null', "worker"]
# Reads the process groups of all workers, a line each time they change. The pipe ends with the launcher, whatever ends
# that, and the groups of the last line are killed.
_GUARD = [
    "/bin/sh",
    "-c",
    'while read -r line; do all=$line; done; for each in $all; do kill -s KILL -- "-$each"; done',
]

_THREADS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\n|\Z)")  # a progress bar goes back without a new line
_LONGEST_LINE = 2**16
_DRAIN_SECONDS = 5.0  # for output that a process of its own session still holds open


def main():
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, command = sys.argv[1:split], sys.argv[split + 1 :]
    parser = argparse.ArgumentParser(
        prog="launch.py",
        usage="%(prog)s [--workers=2] [--restarts=0] [--grace=60] -- COMMAND ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workers", type=int, default=2, help="How many to start; default 2.")
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        help="How often to start all workers again after one was lost: killed by a signal, or ended with exit code 75 "
        "unasked. Default 0.",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=60.0,
        help="Seconds from the first failure to SIGTERM for the other workers, and from there to SIGKILL; default 60.",
    )
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"`workers` must be an integer from 1 up. Received: workers={options.workers}")
    if options.restarts < 0:
        parser.error(f"`restarts` must be an integer from 0 up. Received: restarts={options.restarts}")
    if not options.grace >= 0:
        parser.error(f"`grace` must be a number of seconds, 0 or more. Received: grace={options.grace}")
    if not command:
        parser.error("Put the command of a worker behind --, e.g. -- scripts/train.py --output_dir=DIR")
    if os.name != "posix":
        parser.error(f"Only Linux and macOS can run this; set TF_CONFIG by hand. Received: system={sys.platform}")
    if command[0].endswith(".py"):
        if not os.path.isfile(command[0]):
            parser.error(f"There is no such script. Received: command={command[0]!r}")
        command = [sys.executable, *command]
    elif shutil.which(command[0]) is None:
        parser.error(f"There is no such command. Received: command={command[0]!r}")
    if "CUDA_VISIBLE_DEVICES" not in os.environ and 0 < number_of_gpus() < options.workers:
        say(f"there are {number_of_gpus()} GPUs for {options.workers} workers, so that all of them use the CPU")
    launcher = Launcher(command, options.workers, options.grace)
    for attempt in range(options.restarts + 1):
        if attempt:
            say(f"starting all workers again ({attempt} of {options.restarts})")
        code = launcher.run()
        if not is_lost(code) or launcher.stopped_by is not None:
            break
    sys.exit(code)


def is_lost(code):
    """Whether an exit code tells that a worker was lost. Codes of errors, and Ctrl-C, would come again."""
    return code == TEMPORARY_FAILURE or (code > 128 and code != 128 + signal.SIGINT)


class Launcher:
    """Starts the workers, shows what they say, and waits for them.

    Attributes:
        stopped_by: the first signal that asked this program to stop, or None.
    """

    def __init__(self, command, count, grace):
        self.stopped_by = None
        self._command = command
        self._count = count
        self._grace = grace
        self._asked = []  # signals that came and are not yet handled
        self._unheard = False  # whether nobody reads any more what the workers say
        self._workers = []
        # A signal, the end of a worker included, is a byte here, which ends the waiting in `select`.
        self._wakeup, write_end = socket.socketpair()
        self._wakeup.setblocking(False)
        write_end.setblocking(False)
        self._write_end = write_end
        signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks
                signal.signal(number, lambda number, _: self._asked.append(signal.Signals(number)))

    def run(self):
        """Runs one cluster to its end and returns its exit code."""
        self._failures = []  # exit codes in the order of their coming, of workers that ended by themselves
        self._killed = False
        self._deadline = None  # when the workers that are left get the next signal
        self._severity = iter((signal.SIGTERM, signal.SIGKILL))
        with selectors.DefaultSelector() as self._selector:
            self._selector.register(self._wakeup, selectors.EVENT_READ)
            with guard() as tell_guard:
                try:
                    self._start(tell_guard)
                    while self._workers:
                        self._step()
                        tell_guard(self._workers)
                finally:
                    for worker in self._workers:
                        worker.signal(signal.SIGKILL)
        if self._killed and self.stopped_by is not None:
            return 128 + self.stopped_by
        # A worker that lost another ends with 75: the cause is the one that did not.
        causes = [code for code in self._failures if code != TEMPORARY_FAILURE] or self._failures
        return causes[0] if causes else 0

    def _start(self, tell_guard):
        addresses = [f"localhost:{port}" for port in free_ports(self._count)]
        for index in range(self._count):
            task = {"type": "worker", "index": index}
            tf_config = json.dumps({"cluster": {"worker": addresses}, "task": task})
            environment = {**shares(index, self._count), **os.environ, "TF_CONFIG": tf_config}
            worker = Worker(index, self._command, environment)
            self._workers.append(worker)
            for stream in worker.streams:
                self._selector.register(stream.pipe, selectors.EVENT_READ, stream)
        tell_guard(self._workers)
        for worker in self._workers:
            worker.begin()

    def _step(self):
        """Waits for something to happen and does what is due."""
        times = [self._deadline, *(worker.drained_by for worker in self._workers)]
        times = [each for each in times if each is not None]
        timeout = max(min(times) - time.monotonic(), 0.0) if times else None
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self._wakeup.recv(4096)
            elif not key.data.forward() and not self._unheard:
                self._unheard = True
                self._asked.append(signal.SIGTERM)
        while self._asked:
            self._stop(self._asked.pop(0))
        for worker in list(self._workers):
            if worker.process.returncode is None and worker.process.poll() is not None:
                self._ended(worker)
            for stream in list(worker.streams):
                if stream.ended or (worker.drained_by is not None and time.monotonic() >= worker.drained_by):
                    self._selector.unregister(stream.pipe)
                    stream.close()
                    worker.streams.remove(stream)
            if worker.process.returncode is not None and not worker.streams:
                self._workers.remove(worker)
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._press()

    def _stop(self, number):
        if self.stopped_by is None:
            self.stopped_by = number
            # Workers are given the time they need to save, unless one has failed already.
            self._deadline = time.monotonic() + self._grace if self._failures else None
            say(f"{number.name}: waiting for the workers to end; a second one kills them")
            # A terminal that hangs up is no reason to lose what was computed.
            self._signal(signal.SIGTERM if number == signal.SIGHUP else number)
        elif not self._killed:
            say(f"{number.name}: killing the workers")
            self._killed = True
            self._signal(signal.SIGKILL)

    def _ended(self, worker):
        code = worker.process.returncode
        # What it left behind in its process group would keep its output, its port and its GPU.
        worker.signal(signal.SIGKILL)
        worker.drained_by = time.monotonic() + _DRAIN_SECONDS
        if code == 0 or worker.pressed:
            return
        how = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        say(f"worker {worker.index} {how}")
        first = not self._failures
        self._failures.append(128 - code if code < 0 else code)
        others = [other for other in self._workers if other.process.returncode is None]
        if first and others and self.stopped_by is None:
            self._deadline = time.monotonic() + self._grace

    def _press(self):
        """Signals the workers that outstay their time, SIGTERM first."""
        number = next(self._severity, None)
        self._deadline = None if number in (None, signal.SIGKILL) else time.monotonic() + self._grace
        for worker in self._workers:
            if number is not None and worker.process.returncode is None:
                say(f"worker {worker.index} has not ended {self._grace:g} s later: {number.name}")
                worker.pressed = True
                worker.signal(number)

    def _signal(self, number):
        for worker in self._workers:
            if worker.process.returncode is None:
                worker.signal(number)


class Worker:
    """One process, in a process group of its own, and its output."""

    def __init__(self, index, command, environment):
        self.index = index
        self.pressed = False  # whether it was made to end
        self.drained_by = None  # when its output ends at the latest, once it has ended itself
        self.process = subprocess.Popen(
            [*_WORKER, *command],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        prefix = b"[worker %d] " % index
        self.streams = [Stream(self.process.stdout, 1, prefix), Stream(self.process.stderr, 2, prefix)]

    def begin(self):
        with contextlib.suppress(BrokenPipeError), self.process.stdin as gate:  # it may have been killed before
            gate.write(b"\n")

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: the group is dead and not yet gone
            os.killpg(self.process.pid, number)


class Stream:
    """Copies a pipe to a file descriptor in whole lines, each with a prefix."""

    def __init__(self, pipe, descriptor, prefix):
        self.pipe = pipe
        self.ended = False
        self._descriptor = descriptor
        self._prefix = prefix
        self._rest = b""

    def forward(self):
        """Copies the lines that are there; False if nobody takes them."""
        data = os.read(self.pipe.fileno(), 2**16)
        if not data:
            self.ended = True
            return True
        *lines, self._rest = _LINE_END.split(self._rest + data)
        if len(self._rest) > _LONGEST_LINE:
            lines, self._rest = [*lines, self._rest], b""
        return self._write(lines)

    def close(self):
        if self._rest:
            self._write([self._rest.removesuffix(b"\r")])
        self.pipe.close()

    def _write(self, lines):
        return write(self._descriptor, b"".join(b"%b%b\n" % (self._prefix, line) for line in lines))


@contextlib.contextmanager
def guard():
    """Keeps a process that kills the workers when this one is gone; gives the function that names them to it."""
    process = subprocess.Popen(
        _GUARD,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,  # what kills the group of this process is not to kill its guard
    )
    known = None

    def tell(workers):
        nonlocal known
        groups = [worker.process.pid for worker in workers if worker.process.returncode is None]
        if groups != known:
            known = groups
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(" ".join(map(str, groups)).encode() + b"\n")

    try:
        yield tell
    finally:
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(b"\n")
        process.wait()


def free_ports(count):
    """Finds ports that nobody listens on, beside those that the system gives to outgoing connections."""
    first = 32768
    with contextlib.suppress(OSError, ValueError), open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        first = int(file.read().split()[0])
    candidates = range(10_000, first) if first > 12_000 else range(10_000, 65_536)
    ports = []
    with contextlib.ExitStack() as held:
        for port in random.sample(candidates, len(candidates)):
            if len(ports) == count:
                return ports
            with contextlib.suppress(OSError):
                held.enter_context(socket.create_server(("", port)))
                ports.append(port)
    raise OSError(f"There are not enough free ports. Received: workers={count}")


def number_of_gpus():
    return len(os.listdir(NVIDIA_GPUS)) if os.path.isdir(NVIDIA_GPUS) else 0


def shares(index, count):
    """What a worker gets of the cores and the GPUs, as variables that those of the user go before."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = str(max(cores // count, 1))
    gpus = number_of_gpus()
    each = gpus // count
    own = ",".join(str(number) for number in range(index * each, (index + 1) * each))
    visible = {"CUDA_VISIBLE_DEVICES": own or "-1"} if gpus else {}
    return {**dict.fromkeys(_THREADS, threads), **visible, "PYTHONUNBUFFERED": "1"}


def signal_name(number):
    names = {each.value: each.name for each in signal.Signals}
    return names.get(number, f"signal {number}")  # real-time signals have none


def say(text):
    write(2, f"launch.py: {text}\n".encode())


def write(descriptor, data):
    """Writes all of `data`; False if its reader has gone."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
        except OSError:
            return False
    return True


if __name__ == "__main__":
    main()
