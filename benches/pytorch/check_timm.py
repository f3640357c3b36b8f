"""Checks that weights travel between this project and timm's `resnetv2_50`.

    python check_timm.py yardstick                      timm computes what torch_selfie.py does
    python check_timm.py make DIR [--layers 3,4,6]      a random timm network for us to load
    python check_timm.py compare DIR --expect FILE      timm loads DIR and computes what FILE says

DIR holds `model.safetensors` and `config.json`. FILE, and `DIR/expected.json` that `make` writes:

    {"images": "images/0", "shape": [2, 3, 224, 224], "outputs": [[...], [...]]}

`images` names the hashed pixels (`torch_selfie.hashed`); `outputs` has one row per image: what the
network in evaluation mode returns, the logits or, where `num_classes` is 0, the pooled features.
In the file that `make` writes, the outputs are computed in f64 and `f32_distance` is PyTorch's
own relative distance to them in f32.
"""

import argparse
import json
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from torch_selfie import Backbone, fill_hashed, hashed, hashed_images

ALLOWED = 4.0  # times PyTorch's own distance to f64


def relative_distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def images(name: str, shape: list[int]) -> Tensor:
    return torch.from_numpy(hashed(name, torch.Size(shape).numel())).view(shape).float()


@torch.inference_mode()
def outputs_f32_f64(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    model.eval()
    narrow = model.float()(x.float())
    return narrow, model.double()(x.double())


def fail_unless(condition: bool, message: str) -> None:
    if not condition:
        sys.exit("FAILED: " + message)


# -------------------------------------------------------------------------- compare


def compare(args: argparse.Namespace) -> None:
    # timm loads strictly as long as num_classes is that of config.json.
    model = timm.create_model(f"local-dir:{args.folder}", pretrained=True)
    expected = json.loads(args.expect.read_text())
    x = images(expected["images"], expected["shape"])
    narrow, wide = outputs_f32_f64(model, x)
    ours = torch.tensor(expected["outputs"], dtype=torch.float64)
    fail_unless(ours.shape == wide.shape, f"shape {list(ours.shape)}, timm's is {list(wide.shape)}")
    distance = relative_distance(ours, wide)
    own = relative_distance(narrow, wide)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"timm {timm.__version__} loaded {args.folder}: {parameters:,} parameters")
    print(f"outputs {list(wide.shape)}, relative distance to timm in f64: {distance:.3g}")
    print(f"timm's own in f32: {own:.3g}")
    fail_unless(distance <= ALLOWED * own, f"more than {ALLOWED:g} times as far as timm's own f32")


# ----------------------------------------------------------------------------- make


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Gives every norm its own scale, shift and statistics, so that a mix-up shows."""
    torch.manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.25)
        norm.momentum = 1.0
    model.train()(torch.randn(8, 3, 224, 224))
    for norm in norms:
        norm.momentum = 0.1


def make(args: argparse.Namespace) -> None:
    layers = [int(n) for n in args.layers.split(",")]
    channels = [256 << i for i in range(len(layers))]
    whole = layers == [3, 4, 6, 3]
    model_args = {} if whole else dict(layers=layers, channels=channels)
    torch.manual_seed(args.seed)
    model = timm.create_model("resnetv2_50", num_classes=args.classes, **model_args)
    randomize(model, args.seed)

    args.folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.contiguous() for name, t in model.state_dict().items()}
    save_file(state, args.folder / "model.safetensors", metadata={"format": "pt"})
    config = dict(
        architecture="resnetv2_50",
        num_classes=args.classes,
        num_features=channels[-1],
        **({} if whole else {"model_args": model_args}),
        pretrained_cfg=dict(
            input_size=[3, 224, 224],
            interpolation="bilinear",
            crop_pct=0.875,
            crop_mode="center",
            mean=[0.5, 0.5, 0.5],
            std=[0.5, 0.5, 0.5],
            num_classes=args.classes,
            pool_size=[7, 7] if whole else [14, 14],
            first_conv="stem.conv",
            classifier="head.fc",
        ),
    )
    (args.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    shape = [2, 3, 224, 224]
    narrow, wide = outputs_f32_f64(model, images("images/0", shape))
    expected = dict(
        images="images/0",
        shape=shape,
        outputs=wide.tolist(),
        f32_distance=relative_distance(narrow, wide),
    )
    (args.folder / "expected.json").write_text(json.dumps(expected) + "\n")
    print(f"wrote {args.folder}: {len(state)} tensors, outputs {list(wide.shape)}")


# ------------------------------------------------------------------------ yardstick


def yardstick(_args: argparse.Namespace) -> None:
    """timm's network and the yardstick's Backbone, same weights, f64: everything to 1e-12."""
    cases = [
        ("ResNet-50 v2, 224px, 1000 classes", 4, False, 1000, 25_549_352),
        ("ResNet-50 v2, 32px, 10 classes", 4, True, 10, 23_513_162),
        ("patch network, 224px stem", 3, False, None, None),
        ("patch network, 32px stem", 3, True, None, 8_532_032),
    ]
    for title, stages, small, classes, parameters in cases:
        ours = Backbone(stages, small, classes).double()
        fill_hashed(ours)
        model_args = {} if stages == 4 else dict(layers=[3, 4, 6], channels=[256, 512, 1024])
        theirs = timm.create_model("resnetv2_50", num_classes=classes or 0, **model_args)
        if small:  # not a timm model: this line makes it one
            theirs.stem = nn.Sequential()
            theirs.stem.add_module("conv", nn.Conv2d(3, 64, 3, 1, 1, bias=False))
        theirs = theirs.double()
        counted = sum(p.numel() for p in theirs.parameters())
        fail_unless(parameters in (None, counted), f"{title}: {counted:,} parameters in timm")

        shapes = {name: t.shape for name, t in theirs.state_dict().items()}
        state = {name: t.reshape(shapes[name]) for name, t in ours.state_dict().items()}
        theirs.load_state_dict(state, strict=True)

        # Patches for the patch network, whole images for the classifier.
        size, batch = (32, 4) if small else (224, 2)
        if stages == 3:
            size, batch = (8, 16) if small else (32, 16)
        x = hashed_images("images/0", batch, size, torch.float64)
        found = []
        for model in (ours.train(), theirs.train()):
            y = model(x)
            if classes:
                loss = F.cross_entropy(y, torch.arange(batch))
            else:
                weights = torch.from_numpy(hashed("weights", y.numel())).view(y.shape)
                loss = (y * weights).sum()
            loss.backward()
            with torch.no_grad():
                after = model.eval()(x)
            tensors = {"train": y.detach(), "eval": after}
            tensors |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
            tensors |= {n: b for n, b in model.named_buffers() if "running" in n}
            found.append(tensors)
        fail_unless(found[0].keys() == found[1].keys(), f"{title}: other names")
        worst = max(
            relative_distance(t.reshape(found[1][name].shape), found[1][name])
            for name, t in found[0].items()
        )
        print(f"{title}: {counted:,} parameters, {len(found[0])} tensors, worst {worst:.2g}")
        fail_unless(worst <= 1e-12, title)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(required=True)
    q = commands.add_parser("yardstick")
    q.set_defaults(run=yardstick)
    q = commands.add_parser("make")
    q.add_argument("folder", type=Path)
    q.add_argument("--layers", default="3,4,6,3", help="3,4,6: a patch network")
    q.add_argument("--classes", type=int, default=1000, help="0: pooled features")
    q.add_argument("--seed", type=int, default=0)
    q.set_defaults(run=make)
    q = commands.add_parser("compare")
    q.add_argument("folder", type=Path)
    q.add_argument("--expect", type=Path, required=True)
    q.set_defaults(run=compare)
    args = p.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
