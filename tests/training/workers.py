"""Starts the worker processes of a cluster on this machine, and collects what they say."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Only a hang takes this long, on whatever machine.
_TIMEOUT_SECONDS = 300


def free_ports(count):
    """Numbers of TCP ports of 127.0.0.1 that nobody listens to, each a different one."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def tf_config(ports, index):
    """The text of TF_CONFIG of worker `index` of a cluster that listens to `ports`."""
    addresses = [f"127.0.0.1:{port}" for port in ports]
    return json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})


class Workers:
    """Worker processes, which are there for the `with` block and not after it.

    Attributes:
        processes: the `subprocess.Popen` of each worker, in the order of their indices.

    Args:
        arguments: what follows `python` on the command line, the same for each worker.
        count: number of workers.
        environment: dict of variables that the workers see besides this process's own.
    """

    def __init__(self, arguments, count=2, environment=()):
        ports = free_ports(count)
        # Not pipes: one that nobody reads fills up.
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, f"{index}.txt") for index in range(count)]
        self.processes = []
        common = {
            **os.environ,
            # One core each, as several machines would have; more threads than cores only disturb one another.
            "OMP_NUM_THREADS": "1",
            "TF_NUM_INTRAOP_THREADS": "1",
            "TF_NUM_INTEROP_THREADS": "1",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "CUDA_VISIBLE_DEVICES": "-1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            **dict(environment),
        }
        try:
            for index, path in enumerate(self._outputs):
                with open(path, "wb") as output:
                    self.processes.append(
                        subprocess.Popen(
                            [sys.executable, *map(str, arguments)],
                            stdout=output,
                            stderr=subprocess.STDOUT,
                            env={**common, "TF_CONFIG": tf_config(ports, index)},
                        )
                    )
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def wait(self, timeout=_TIMEOUT_SECONDS):
        """Waits for all of them.

        Returns:
            A list with (exit code, what it wrote to its standard output and error) of each worker.

        Raises:
            AssertionError: if one is still running after `timeout` seconds. It says what each of them wrote.
        """
        end = time.monotonic() + timeout
        try:
            codes = [process.wait(max(0.0, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            states = [process.poll() for process in self.processes]
            raise AssertionError(
                f"After {timeout} s the workers' exit codes are {states}. They wrote:\n"
                + "\n".join(f"--- worker {index}\n{text}" for index, text in enumerate(self.outputs()))
            ) from None
        return list(zip(codes, self.outputs(), strict=True))

    def wait_for(self, index, text, timeout=_TIMEOUT_SECONDS):
        """Waits until worker `index` wrote `text`.

        Raises:
            AssertionError: if it ended without, or did not in `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while True:
            ended = self.processes[index].poll() is not None
            output = self.outputs()[index]
            if text in output:
                return
            assert not ended and time.monotonic() < end, f"Worker {index} did not write {text!r}, but:\n{output}"
            time.sleep(0.05)

    def outputs(self):
        """What each worker has written to its standard output and error so far."""
        return [path.read_text(errors="replace") for path in self._outputs]

    def close(self):
        """Kills those that are still there."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        self._folder.cleanup()
