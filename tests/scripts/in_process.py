"""Scripts as modules of this process, for tests of their parts."""

import importlib.util
import sys
from pathlib import Path

from absl import flags

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def load(name):
    """The module of scripts/NAME.py. Its flags are taken away again, since other scripts have some of these names."""
    others = set(flags.FLAGS)
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(SCRIPTS))
        flags.FLAGS.remove_flag_values(set(flags.FLAGS) - others)
