"""`vgg_aib_qt` in plain PyTorch, for benchmarks/training.py, which runs it in a process of its own.

    python benchmarks/training_pytorch.py FOLDER training|inference contiguous|channels_last NAME

Reads FOLDER/case.npz, writes FOLDER/NAME.npz, and then answers lines: "training" or "inference N" with the seconds that
a training step, or the classification of N images, takes; "memory" with the bytes at the peak, and with those that the
imports alone took.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from training import STEPS, peak_memory, seconds_of


class Block(nn.Module):
    """3x3 convolutions with batch normalisation and ReLU, each followed by a pooling if `pool`."""

    def __init__(self, channels, outputs, count, pool=False):
        super().__init__()
        layers = []
        for _ in range(count):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)] if pool else []
            channels = outputs
        self.op = nn.Sequential(*layers)

    def forward(self, x):
        return self.op(x)


class VGG(nn.Module):
    """The layers of the released VGG with quantized attention, under its names; sizes are those of the weights."""

    def __init__(self, shapes):
        super().__init__()
        narrow, middle, wide = (shapes[f"features.{block}.op.0.weight"][0] for block in range(3))
        deep, (latent, hidden), classes = (
            shapes["encode.5.weight"][0],
            shapes["decode.0.weight"],
            shapes["decode.2.bias"],
        )
        self.features = nn.Sequential(
            Block(3, narrow, 2), Block(narrow, middle, 2), Block(middle, wide, 3), nn.MaxPool2d(2)
        )
        self.att_module_mu = nn.Sequential(nn.Conv2d(wide, 1, 3, padding=1))
        self.att_module_std = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1))
        self.emb = nn.Embedding(1, shapes["emb.weight"][1])
        self.encode = nn.Sequential(
            *(Block(wide, deep, 3), nn.MaxPool2d(2), Block(deep, deep, 3), nn.MaxPool2d(2)),
            *(Block(deep, deep, 2, pool=True), nn.Conv2d(deep, deep, 1), nn.ReLU(inplace=True)),
            *(nn.Flatten(), nn.Linear(deep, shapes["encode.8.bias"][0])),
        )
        self.decode = nn.Sequential(nn.Linear(hidden, latent), nn.ReLU(inplace=True), nn.Linear(latent, classes[0]))

    def forward(self, images, noise=None):
        """Returns logits, and in training the rate in nats and the two losses of the quantizer."""
        features = self.features(images)
        attention = torch.sigmoid(self.att_module_mu(features))
        if self.training:
            stddev = functional.softplus(self.att_module_std(attention) - 5)
            attention = attention + stddev * draw(attention, noise and noise[0])
        anchors = self.emb.weight[0]
        nearest = anchors[(attention.detach().reshape(-1, 1) - anchors).abs().argmin(dim=1)].reshape(attention.shape)
        quantized = attention + (nearest - attention).detach()
        latent, scores = self.encode(features + features * quantized).chunk(2, dim=1)
        if not self.training:
            return self.decode(latent)
        stddev = functional.softplus(scores - 5)
        rate = (0.5 * (latent**2 + stddev**2 - 1) - stddev.log()).sum(dim=1).mean()
        codebook_loss = functional.mse_loss(nearest, attention.detach())
        commitment_loss = functional.mse_loss(attention, nearest.detach())
        latent = latent + stddev * draw(latent, noise and noise[1])
        return self.decode(latent), rate, codebook_loss, commitment_loss


def draw(like, noise):
    return torch.randn_like(like) if noise is None else noise


def main() -> None:
    """Answers the lines of stdin."""
    folder, task, layout, name = Path(sys.argv[1]), *sys.argv[2:]
    memory_format = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    before = peak_memory()
    with np.load(folder / "case.npz") as arrays:
        case = {name: torch.from_numpy(array) for name, array in arrays.items()}
    state = {name.removeprefix("state/"): array for name, array in case.items() if name.startswith("state/")}
    model = VGG({name: array.shape for name, array in state.items()})
    model.load_state_dict(state)
    model.to(memory_format=memory_format)
    images = case["images"].permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
    labels, learning_rate = case["labels"], float(case["learning_rate"])
    noise = [case["attention_noise"].permute(0, 3, 1, 2).contiguous(), case["latent_noise"]]
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)

    def train(noise=None):
        optimizer.zero_grad(set_to_none=True)
        logits, rate, codebook_loss, commitment_loss = model(images, noise)
        bits = (functional.cross_entropy(logits, labels) + 0.01 * rate) / math.log(2)
        loss = bits + 0.4 * codebook_loss + 0.1 * commitment_loss
        loss.backward()
        optimizer.step()
        return loss

    if task == "training":
        model.train()
        losses = [train(noise).item() for _ in range(STEPS)]
        results = {"loss": losses[0], "progress": np.diff(losses)}
        optimizer.param_groups[0]["lr"] = 1e-6  # as much work, and the weights stay where they are
        answers = {"training": lambda: seconds_of(train)}
    else:
        model.eval()
        with torch.inference_mode():
            results = {"logits": model(images).numpy()}

        def infer(count):
            with torch.inference_mode():
                model(images[:count])

        answers = {
            f"inference {count}": lambda count=count: seconds_of(lambda: infer(count)) for count in (1, len(images))
        }
    answers["memory"] = lambda: f"{peak_memory()} {before}"
    np.savez(folder / f"{name}.npz", **results)
    print("ready", flush=True)
    for line in sys.stdin:
        print(answers[line.strip()](), flush=True)


if __name__ == "__main__":
    main()
