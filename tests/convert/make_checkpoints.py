"""Writes the small checkpoints in tests/convert/data with PyTorch, and expected.npz beside them.

    PYTHON tests/convert/make_checkpoints.py    # a Python with PyTorch; the committed files are those of 2.13.0

A name with "legacy" is in the format before PyTorch 1.6. The state dict is the same in all files: what a view, a tied
weight, a half and a counter look like in one.
"""

import argparse
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).with_name("data")


def make_state():
    """Returns a state dict with every kind of tensor that a reader can get wrong."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    shared = draw(24)
    norm = torch.nn.BatchNorm2d(3)
    norm(draw(2, 3, 4, 4))
    return OrderedDict(
        {
            "conv.weight": draw(2, 3, 3, 3),
            "conv.bias": shared[5:7],
            "tied.bias": shared[5:7],
            "overlapping": shared[4:16].view(3, 4),
            "transposed": draw(4, 3).t(),
            "strided": draw(6, 8)[1::2, ::3],
            "channels_last": draw(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "linear.weight": torch.nn.Parameter(draw(2, 3)),
            **{f"norm.{name}": tensor for name, tensor in norm.state_dict().items()},
            "half": draw(3).half(),
            "double": draw(3).double(),
            "bfloat16": draw(3, 2).bfloat16().t(),
            "bfloat16_scalar": draw(()).bfloat16(),
            "bool": torch.tensor([True, False, True]),
            "bytes": torch.arange(5, dtype=torch.uint8),
            "small": torch.tensor([[-1, 2]], dtype=torch.int8),
            "empty": torch.zeros(0, 4),
        }
    )


def with_metadata(state):
    """Returns the state dict with the attribute that `Module.state_dict` gives it."""
    state = OrderedDict(state)
    state._metadata = OrderedDict({"": {"version": 1}, "norm": {"version": 2}})
    return state


def prefixed(state):
    return OrderedDict((f"module.{name}", tensor) for name, tensor in state.items())


def averaged(state):
    return OrderedDict((name, tensor / 2 if tensor.is_floating_point() else tensor) for name, tensor in state.items())


def make_checkpoints(state):
    """Returns name -> what `torch.save` gets."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter], lr=1e-3)
    parameter.sum().backward()
    optimizer.step()
    history = defaultdict(list, {"acc": [np.float64(0.5), np.float32(0.25)], "array": np.arange(3), (1, 2): {3}})
    args = argparse.Namespace(dset_dir=Path("datasets"), lr=0.1, seed=np.int64(1), device=torch.device("cpu"))
    released = {
        "iter": 391,
        "epoch": 1,
        "history": history,
        "args": args,
        "model_states": {"net": prefixed(state), "net_ema": averaged(state)},
        "optim_states": {"optim": optimizer.state_dict()},
    }
    wide = {
        "state_dict": with_metadata(state),
        "epoch": 3,
        "best_prec1": torch.tensor(12.5),
        "best": np.float64(12.5),
        "milestones": Counter([60, 120]),
        "dtype": torch.float32,
    }
    return {"bare": with_metadata(state), "released": released, "wide_resnet": wide}


def main() -> None:
    """Writes all files."""
    FOLDER.mkdir(exist_ok=True)
    state = make_state()
    for name, content in make_checkpoints(state).items():
        torch.save(content, FOLDER / f"{name}.pth")
        torch.save(content, FOLDER / f"{name}_legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(with_metadata(state), FOLDER / "protocol4.pth", pickle_protocol=4)
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), FOLDER / "torchscript.pt")
    as_array = lambda tensor: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()  # noqa: E731
    np.savez_compressed(FOLDER / "expected.npz", **{name: as_array(tensor) for name, tensor in state.items()})


if __name__ == "__main__":
    main()
