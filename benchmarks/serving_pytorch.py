"""The rival of benchmarks/serving.py, which runs it in a process of its own.

    python benchmarks/serving_pytorch.py FOLDER eager|compile NAME

Reads FOLDER/case.npz, writes FOLDER/NAME.npz, and then answers the lines of `serving.answer_latencies`.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from serving import BATCHES, answer_latencies
from training_pytorch import VGG


def main() -> None:
    """Answers the lines of stdin."""
    folder, mode, name = Path(sys.argv[1]), *sys.argv[2:]
    with np.load(folder / "case.npz") as arrays:
        case = {name: torch.from_numpy(array) for name, array in arrays.items()}
    begin = time.perf_counter()
    state = {name.removeprefix("state/"): array for name, array in case.items() if name.startswith("state/")}
    model = VGG({name: array.shape for name, array in state.items()})
    model.load_state_dict(state)
    model.eval()
    if mode == "compile":
        model = torch.compile(model, dynamic=False)
    seconds = time.perf_counter() - begin
    images = case["images"].permute(0, 3, 1, 2).contiguous()
    with torch.inference_mode():
        begin = time.perf_counter()
        model(images[:1])
        first = time.perf_counter() - begin
        for batch in BATCHES:
            model(images[:batch])  # compiles
        np.savez(folder / f"{name}.npz", logits=model(images).numpy())
        answer_latencies(model, images, f"{seconds} {first}")


if __name__ == "__main__":
    main()
