"""What a run was computed on."""

import glob
import os
import platform

import keras
import tensorflow as tf

THREADS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(threads: int) -> dict:
    """The machine and the versions on it, as a dict that JSON can hold.

    Args:
        threads: How many a process of TensorFlow gets.
    """
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "threads": threads,
        "gpus": _gpus(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
    }


def _cpu():
    model = _value_of("/proc/cpuinfo", "model name")
    return model or platform.processor() or platform.machine()


def _gpus():
    """Names of the NVIDIA GPUs, from the driver: TensorFlow would take their memory to tell."""
    found = [_value_of(file, "Model") for file in sorted(glob.glob("/proc/driver/nvidia/gpus/*/information"))]
    return [name for name in found if name]


def _value_of(file, key):
    """The value of the first line "key : value" of a file of the kernel, None where there is none."""
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == key:
                    return value.strip()
    except OSError:
        pass
    return None
