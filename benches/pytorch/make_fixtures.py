"""Writes the fixtures of the parity tests: what `torch_selfie.py check` computes, kept small.

    python make_fixtures.py ../../selfie-model/tests/fixtures

The README in that folder describes the files.
"""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_selfie
from torch_selfie import Replay, fingerprint, hashed, hashed_images, hashed_order, replay

DIGITS = 14  # the tests compare to 1e-9 relative

REDUCED = "--depths 1,1,1,1 --width 8"
DEEP = "--width 16"
# At the default learning rate three deep pretraining steps diverge, and amplify rounding with it.
DEEP_PRETRAIN = f"{DEEP} --lr 0.001"
FULL = "--steps 1"

# File name: options of `torch_selfie.py check`.
PARITY = {
    "pretrain_32": f"--task pretrain --image-size 32 --batch 32 {REDUCED}",
    "pretrain_32_scaled": f"--task pretrain --image-size 32 --batch 32 {REDUCED}"
    " --no-encoder-positions --logit-scale 0.125",
    "pretrain_32_places": f"--task pretrain --image-size 32 --batch 32 {REDUCED} --query places",
    "pretrain_32_batch": f"--task pretrain --negatives batch --image-size 32 --batch 32 {REDUCED}",
    "pretrain_224_batch": "--task pretrain --negatives batch --temperature 0.5 --query places"
    f" --image-size 224 --batch 4 {REDUCED}",
    "pretrain_224": f"--task pretrain --image-size 224 --batch 4 {REDUCED}",
    "pretrain_224_places": f"--task pretrain --image-size 224 --batch 4 {REDUCED} --query places",
    "finetune_32": "--task finetune --image-size 32 --batch 32 --depths 2,1,2,1 --width 8",
    "finetune_224": f"--task finetune --image-size 224 --batch 4 {REDUCED}",
    "finetune_32_attention": f"--task finetune --head attention --image-size 32 --batch 32 {REDUCED}",
    "finetune_224_attention": "--task finetune --head attention --image-size 224 --batch 4"
    f" {REDUCED}",
    "pretrain_32_deep": f"--task pretrain --image-size 32 --batch 8 {DEEP_PRETRAIN}",
    "pretrain_224_deep": f"--task pretrain --image-size 224 --batch 2 {DEEP_PRETRAIN}",
    "finetune_32_deep": f"--task finetune --image-size 32 --batch 8 {DEEP}",
    "finetune_224_deep": f"--task finetune --image-size 224 --batch 2 {DEEP}",
    "pretrain_32_full": f"--task pretrain --image-size 32 --batch 4 {FULL}",
    "finetune_32_full": f"--task finetune --image-size 32 --batch 4 {FULL}",
}

# File entry: options, and the number of the hashed inputs that keep every ReLU and every maximum
# clear of its kink (see `smallest_margin`).
F32 = {
    "pretrain_32": (f"--task pretrain --image-size 32 --batch 4 {REDUCED} --steps 1", 22),
    "pretrain_32_scaled": (
        f"--task pretrain --image-size 32 --batch 4 {REDUCED} --steps 1"
        " --no-encoder-positions --logit-scale 0.125",
        22,
    ),
    "pretrain_224": (f"--task pretrain --image-size 224 --batch 1 {REDUCED} --steps 1", 29),
    "finetune_32": (
        "--task finetune --image-size 32 --batch 8 --depths 2,1,2,1 --width 8 --steps 1",
        25,
    ),
    "finetune_224": (f"--task finetune --image-size 224 --batch 2 {REDUCED} --steps 1", 23),
}
LEAST_MARGIN = 6.0


def parse(options: str, dtype: str) -> argparse.Namespace:
    return torch_selfie.parser().parse_args(["check", *options.split(), "--dtype", dtype])


def configuration(args: argparse.Namespace) -> dict:
    config = {k: v for k, v in vars(args).items() if k not in ("command", "dtype")}
    if config["head"] == "conv":
        del config["head"]
    if config["negatives"] == "image":
        del config["negatives"], config["temperature"]
    config["depths"] = [int(d) for d in args.depths.split(",")]
    config["encoder_positions"] = not config.pop("no_encoder_positions")
    return config


def rounded(x: float) -> float:
    return float(f"{x:.{DIGITS}g}")


# ------------------------------------------------------------------ f64 fingerprints


def compact(name: str, t: Tensor, projections: int, entries: int) -> list:
    """[n, norm, projection 0 .., entry 0 ..]"""
    f = fingerprint(name, t, projections, entries)
    return [f["n"], *(rounded(v) for v in (f["norm"], *f["projections"], *f["entries"]))]


def parity_fixture(name: str, options: str) -> dict:
    args = parse(options, "f64")
    result = replay(args)
    reduced = not name.endswith(("_deep", "_full"))
    projections, entries = (8, 16) if reduced else (4, 4)

    def fingerprints(tensors: dict[str, Tensor]) -> dict:
        return {n: compact(n, t, projections, entries) for n, t in tensors.items()}

    return dict(
        command=f"torch_selfie.py check {options} --dtype f64",
        reference="pytorch " + torch.__version__,
        config=configuration(args),
        projections=projections,
        entries=entries,
        loss=[rounded(v) for v in result.loss],
        accuracy=result.accuracy,
        logits=[compact("logits", t, projections, entries) for t in result.logits],
        gradients=fingerprints(result.gradients),
        parameters=fingerprints(result.parameters),
        running=fingerprints(result.running),
    )


# --------------------------------------------------------------------- f32 distances


def kink_inputs(args: argparse.Namespace, number: int) -> dict[str, Tensor]:
    """What enters each ReLU and the max-pool of the stem on the hashed inputs `number`."""
    dtype = {"f32": torch.float32, "f64": torch.float64}[args.dtype]
    model = torch_selfie.build(args, drop=0.0).to(dtype).train()
    torch_selfie.fill_hashed(model)
    found = {}

    def before_relu(name: str):
        def hook(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
            normalized = F.batch_norm(
                inputs[0], None, None, norm.weight, norm.bias, True, eps=norm.eps
            )
            found[name] = normalized.detach().double()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch_selfie.NormAct):
            module.register_forward_pre_hook(before_relu(name))
        if isinstance(module, torch_selfie.Stem) and not module.small:
            module.conv.register_forward_hook(
                lambda _module, _inputs, out: found.update({"max-pool": out.detach().double()})
            )
    x = hashed_images(f"images/{number}", args.batch, args.image_size, dtype)
    if args.task == "pretrain":
        model(x, hashed_order(f"order/{number}", args.batch, model.grid**2))
    else:
        model(x)
    return found


def smallest_margin(options: str, number: int) -> float:
    """How far the nearest kink is, in units of the root mean square f32 error in that layer.

    An f32 step differs from the f64 step by rounding, unless a value falls on the other side
    of zero before a ReLU, or another element wins a maximum. Then a gradient jumps by a
    thousand times as much, and its distance to f64 says nothing about the arithmetic.
    """
    wide = kink_inputs(parse(options, "f64"), number)
    narrow = kink_inputs(parse(options, "f32"), number)
    smallest = math.inf
    for name, z in wide.items():
        error = (narrow[name] - z).square().mean().sqrt()
        if name == "max-pool":
            padded = F.pad(z, (1, 1, 1, 1), value=-math.inf)
            windows = padded.unfold(2, 3, 2).unfold(3, 3, 2).flatten(4)
            best = windows.topk(2).values
            gap = (best[..., 0] - best[..., 1]).min() / math.sqrt(2)  # both are off
        else:
            gap = z.abs().min()
        smallest = min(smallest, float(gap / error))
    return smallest


def distances(narrow: Iterable[dict[str, Tensor]], wide: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative distance of each tensor of several f32 runs to f64."""
    return {
        name: max(float(f"{(run[name].double() - t).norm() / t.norm():.4g}") for run in narrow)
        for name, t in wide.items()
    }


def f32_fixture(options: str, number: int) -> dict:
    margin = smallest_margin(options, number)
    if margin < LEAST_MARGIN:
        raise SystemExit(f"{options}: a kink is only {margin:.2g} f32 errors from inputs {number}")
    wide = replay(parse(options, "f64"), number)
    narrow: list[Replay] = []
    for threads in (1, 2):  # they sum in different orders
        torch.set_num_threads(threads)
        narrow.append(replay(parse(options, "f32"), number))
    return dict(
        config=configuration(parse(options, "f64")),
        first_input=number,
        margin=float(f"{margin:.3g}"),
        loss_f64=rounded(wide.loss[0]),
        loss=max(rounded(abs(run.loss[0] / wide.loss[0] - 1)) for run in narrow),
        gradients=distances([run.gradients for run in narrow], wide.gradients),
        running=distances([run.running for run in narrow], wide.running),
    )


# --------------------------------------------------------------------------- writing


def write(path: Path, fixture: dict) -> None:
    """JSON with one tensor per line, so that a change shows as a short diff."""

    def lines(value, indent: str) -> str:
        if isinstance(value, dict):
            inner = indent + " "
            rows = (f"{inner}{json.dumps(k)}: {lines(v, inner)}" for k, v in value.items())
            return "{\n" + ",\n".join(rows) + "\n" + indent + "}"
        return json.dumps(value, separators=(",", ":"))

    path.write_text(lines(fixture, "") + "\n")
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folder", type=Path)
    p.add_argument("names", nargs="*", help="only these files, e.g. pretrain_32 f32 (default: all)")
    args = p.parse_args()

    def wanted(name: str) -> bool:
        return not args.names or name in args.names

    if wanted("hashed"):
        names = ["", "u0", "images/0", "stem.conv.weight", "order/0", "logits/projection7"]
        write(args.folder / "hashed.json", {name: list(hashed(name, 6)) for name in names})
    for name, options in PARITY.items():
        if wanted(name):
            write(args.folder / f"{name}.json", parity_fixture(name, options))
    if wanted("f32"):
        write(args.folder / "f32.json", {name: f32_fixture(*case) for name, case in F32.items()})


if __name__ == "__main__":
    main()
