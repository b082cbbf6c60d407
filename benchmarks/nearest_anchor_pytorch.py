"""The quantizer of the PyTorch reference, for benchmarks/nearest_anchor.py, which runs it in a process of its own.

    python benchmarks/nearest_anchor_pytorch.py FOLDER

Reads FOLDER/case.npz, writes FOLDER/result.npz, and then answers each line "forward" or "training" with the seconds
that a call takes.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch


def quantize(x, anchors):
    """The released code's computation: a table of distances, the argmin of each row, a product with one-hot rows."""
    distances = (x.reshape(-1, 1) - anchors).abs()
    index = distances.argmin(dim=1)
    one_hot = torch.nn.functional.one_hot(index, len(anchors)).to(x.dtype)
    nearest = (one_hot @ anchors.reshape(-1, 1)).reshape(x.shape)
    codebook_loss = torch.mean((nearest - x.detach()) ** 2)
    commitment_loss = torch.mean((nearest.detach() - x) ** 2)
    return x + (nearest - x).detach(), index, codebook_loss, commitment_loss


def main() -> None:
    """Answers the lines of stdin."""
    folder = Path(sys.argv[1])
    case = {name: torch.from_numpy(array) for name, array in np.load(folder / "case.npz").items()}
    trained = [case["x"].requires_grad_(), case["anchors"].requires_grad_()]
    upstream = [case["d_quantized"], case["d_codebook"], case["d_commitment"]]

    @torch.no_grad()
    def forward():
        return quantize(*trained)

    def training():
        quantized, index, *losses = quantize(*trained)
        return quantized, index, *torch.autograd.grad([quantized, *losses], trained, upstream)

    names = ("quantized", "index", "d_x", "d_anchors")
    results = {name: tensor.detach().numpy() for name, tensor in zip(names, training(), strict=True)}
    np.savez(folder / "result.npz", **results)
    del results
    forward()
    print("ready", flush=True)
    for line in sys.stdin:
        function = {"forward": forward, "training": training}[line.strip()]
        # As the other rivals are measured: the mean of as many calls as take 10 ms. The first one wakes the threads.
        begin = time.perf_counter()
        function()
        calls = max(1, round(0.01 / (time.perf_counter() - begin)))
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        print((time.perf_counter() - begin) / calls, flush=True)


if __name__ == "__main__":
    main()
