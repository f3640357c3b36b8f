"""How well PyTorch's networks solve the puzzle of CIFAR-10, with and without padded crops.

    python pretext.py cifar-10-binary.tar.gz --crops padded --steps 150

Trains the yardstick's `Selfie` at the size of the preset `small` but with the paper's three blocks
and one summary as query, and prints a JSON line every `--every` steps: accuracy on the first 2,000
test images in evaluation mode with fixed masks, as they are and as padded crops.
"""

import argparse
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import torch

from torch_selfie import Selfie

PADDING = 4


def images(archive: Path, names: list[str]) -> np.ndarray:
    """[n, 3, 32, 32], bytes."""
    with tarfile.open(archive) as tar:
        files = [tar.extractfile(f"cifar-10-batches-bin/{name}").read() for name in names]
    return np.frombuffer(b"".join(files), np.uint8).reshape(-1, 3073)[:, 1:].reshape(-1, 3, 32, 32)


def padded_crops(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    corners = rng.integers(0, 2 * PADDING + 1, (len(x), 2))
    return np.stack([p[:, r : r + 32, c : c + 32] for p, (r, c) in zip(padded, corners, strict=True)])


def normalized(x: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(np.ascontiguousarray(x)).float() / 255 - 0.5) / 0.5


@torch.no_grad()
def accuracy(model: Selfie, x: np.ndarray) -> float:
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(1)  # the same masks every time
        found = [model(normalized(part))[1].item() for part in np.split(x, len(x) // 500)]
    model.train()
    return float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--crops", choices=["padded", "plain"], default="plain")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--schedule", type=int, default=1500, help="steps of the cosine")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=50)
    args = parser.parse_args()

    train = images(args.archive, [f"data_batch_{i}.bin" for i in range(1, 6)])
    test = images(args.archive, ["test_batch.bin"])[:2000]
    test_padded = padded_crops(test, np.random.default_rng(1))
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    model = Selfie(32, 8, 0.1, (1, 2, 2), 16, heads=8, ffn=160)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=1e-4, nesterov=True)
    for step in range(args.steps):
        decay = (1 + math.cos(math.pi * step / args.schedule)) / 2
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 100) * decay
        x = train[rng.integers(0, len(train), args.batch)]
        if args.crops == "padded":
            x = padded_crops(x, rng)
        flip = rng.random(args.batch) < 0.5
        x = np.where(flip[:, None, None, None], x[..., ::-1], x)
        loss, _ = model(normalized(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % args.every == 0:
            found = dict(step=step + 1, crops=args.crops, seed=args.seed, loss=round(loss.item(), 3))
            found |= dict(plain=accuracy(model, test), padded=accuracy(model, test_padded))
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
