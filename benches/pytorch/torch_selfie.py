"""The PyTorch yardstick: the same networks and training steps as this project's,
written as a PyTorch user would write them for speed.

`bench` is what throughput is compared with, `check` the reference of the parity tests.

    python torch_selfie.py bench --task pretrain --image-size 32 --batch 64
    python torch_selfie.py bench --task finetune --image-size 224 --device cuda \
        --dtype bf16 --compile max-autotune
    python torch_selfie.py check --task pretrain --image-size 32 --batch 32 \
        --depths 1,1,1,1 --width 8 --dtype f64

Parameter names: the backbone has timm's `resnetv2_50` names, the pooling network
`pool.*` (see `AttentionPool`). Prints one JSON object.
"""

import argparse
import ctypes
import json
import os
import resource
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------ ResNet-50 v2

DEPTHS = (3, 4, 6, 3)
WIDTH = 64


class NormAct(nn.BatchNorm2d):
    """Batch normalization followed by ReLU (the pre-activation of v2)."""

    def forward(self, x: Tensor) -> Tensor:
        # In place: neither backward pass needs the value between the two.
        return F.relu(super().forward(x), inplace=True)


class Downsample(nn.Module):
    """The 1x1 projection on the shortcut of a stage's first block."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Bottleneck(nn.Module):
    """Pre-activation bottleneck, stride in the 3x3 convolution (timm's PreActBottleneck)."""

    def __init__(self, cin: int, cout: int, stride: int, project: bool):
        super().__init__()
        mid = cout // 4
        self.downsample = Downsample(cin, cout, stride) if project else None
        self.norm1 = NormAct(cin)
        self.conv1 = nn.Conv2d(cin, mid, 1, bias=False)
        self.norm2 = NormAct(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride, 1, bias=False)
        self.norm3 = NormAct(mid)
        self.conv3 = nn.Conv2d(mid, cout, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pre = self.norm1(x)
        shortcut = x if self.downsample is None else self.downsample(pre)
        y = self.conv1(pre)
        y = self.conv2(self.norm2(y))
        y = self.conv3(self.norm3(y))
        return y + shortcut


class Stem(nn.Module):
    """`small`: 3x3, stride 1, no pooling (32px). Otherwise 7x7, stride 2, then 3x3/2 max-pool."""

    def __init__(self, small: bool, width: int):
        super().__init__()
        self.small = small
        if small:
            self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        else:
            self.conv = nn.Conv2d(3, width, 7, 2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.small else F.max_pool2d(x, 3, 2, 1)


class Stage(nn.Module):
    """`depth` bottlenecks; the first one projects and carries the stride."""

    def __init__(self, cin: int, cout: int, depth: int, stride: int):
        super().__init__()
        blocks = [Bottleneck(cin, cout, stride, project=True)]
        blocks += [Bottleneck(cout, cout, 1, project=False) for _ in range(depth - 1)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Backbone(nn.Module):
    """3 stages: the patch network P; 4 stages: ResNet-50 v2.

    `width` is the stem's; stage i has 4 * width * 2^i channels. Without `classes` the
    output is the pooled features [B, dim], with it the logits [B, classes].
    """

    def __init__(
        self,
        stages: int,
        small: bool,
        classes: int | None = None,
        depths: tuple[int, ...] = DEPTHS,
        width: int = WIDTH,
    ):
        super().__init__()
        self.stem = Stem(small, width)
        self.stages = nn.ModuleList()
        cin = width
        for i in range(stages):
            cout = (4 * width) << i
            self.stages.append(Stage(cin, cout, depths[i], stride=1 if i == 0 else 2))
            cin = cout
        self.dim = cin
        self.norm = NormAct(cin)
        self.head = nn.ModuleDict({"fc": nn.Linear(cin, classes)}) if classes else None

    def forward(self, x: Tensor, cells: int = 1) -> Tensor:
        """With several `cells` along a side their averages instead, [B, cells^2, dim]."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        x = self.norm(x)
        if cells > 1:
            return F.avg_pool2d(x, x.shape[3] // cells).flatten(2).transpose(1, 2)
        x = x.mean((2, 3))
        return self.head["fc"](x) if self.head else x


# ------------------------------------------------------------- attention pooling


class Block(nn.Module):
    """BERT block: post-layer-norm, exact GELU at the intermediate size."""

    def __init__(self, dim: int, heads: int, hidden: int, drop: float):
        super().__init__()
        self.heads = heads
        self.drop = drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        drop = self.drop if self.training else 0.0
        qkv = self.qkv(x).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
        a = a.transpose(1, 2).reshape(b, t, d)
        x = self.norm1(x + F.dropout(self.proj(a), drop, self.training))
        y = self.fc2(F.gelu(self.fc1(x)))
        return self.norm2(x + F.dropout(y, drop, self.training))


class AttentionPool(nn.Module):
    """Summarises visible patches [B, T, dim] into u [B, dim], the output of the token u0.

    Holds the position embeddings too: a table up to 16 places, else rows plus columns.
    """

    def __init__(
        self,
        grid: int,
        dim: int = 1024,
        heads: int = 32,
        hidden: int = 640,
        depth: int = 3,
        drop: float = 0.1,
    ):
        super().__init__()
        self.grid = grid
        self.table = grid * grid <= 16
        self.u0 = nn.Parameter(torch.randn(dim) * 0.02)
        if self.table:
            self.pos = nn.Parameter(torch.randn(grid * grid, dim) * 0.02)
        else:
            self.row = nn.Parameter(torch.randn(grid, dim) * 0.02)
            self.col = nn.Parameter(torch.randn(grid, dim) * 0.02)
        self.blocks = nn.ModuleList([Block(dim, heads, hidden, drop) for _ in range(depth)])

    def positions(self) -> Tensor:
        """One vector per place, row-major: [grid * grid, dim]."""
        if self.table:
            return self.pos
        return (self.row[:, None] + self.col[None, :]).reshape(-1, self.row.shape[1])

    def forward(self, h: Tensor, places: Tensor | None = None) -> Tensor:
        """Summary of the visible patches h [B, n, dim], [B, 1, dim]; or one for each of `places`,
        the position embeddings [B, m, dim] of what is asked for, [B, m, dim]."""
        u0 = self.u0.to(h.dtype).expand(h.shape[0], 1, -1)
        asking = u0 if places is None else u0 + places
        x = torch.cat([asking, h], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, : asking.shape[1]]


class Selfie(nn.Module):
    """The pretraining task: which hidden patch belongs at which hidden place?"""

    def __init__(
        self,
        image_size: int,
        patch: int,
        drop: float = 0.1,
        depths: tuple[int, ...] = DEPTHS,
        width: int = WIDTH,
        heads: int = 32,
        ffn: int = 640,
        encoder_positions: bool = True,
        logit_scale: float = 1.0,
        query: str = "summary",
        pool_blocks: int = 3,
        negatives: str = "image",
        temperature: float = 0.1,
    ):
        super().__init__()
        self.patch = patch
        self.grid = image_size // patch
        self.hidden_patches = round(self.grid * self.grid * 0.25)
        self.encoder_positions = encoder_positions
        self.logit_scale = logit_scale
        self.query = query
        self.negatives = negatives
        self.temperature = temperature
        self.backbone = Backbone(3, image_size <= 64, None, depths, width)
        self.pool = AttentionPool(self.grid, self.backbone.dim, heads, ffn, pool_blocks, drop)

    def forward(self, x: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of images x [B, 3, H, W].

        order [B, n] is a permutation of the patch indices of each image; the first
        `hidden_patches` are hidden. Drawn at random if not given.
        """
        b, g, p = x.shape[0], self.grid, self.patch
        patches = x.view(b, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(b * g * g, 3, p, p)
        patches = patches.contiguous(memory_format=torch.channels_last)
        h = self.backbone(patches).view(b, g * g, -1)
        if order is None:
            order = torch.rand(b, g * g, device=x.device).argsort(1)
        masked = order[:, : self.hidden_patches]
        seen = order[:, self.hidden_patches :]

        def take(index: Tensor) -> Tensor:
            return h.gather(1, index[..., None].expand(-1, -1, h.shape[2]))

        pos = self.pool.positions()
        visible = take(seen) + pos[seen] if self.encoder_positions else take(seen)
        query = self.pool(visible, pos[masked] if self.query == "places" else None) + pos[masked]
        key = take(masked)
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):  # the logits are computed in f32
            if self.negatives == "batch":
                return self.against_the_batch(query.to(wide), key.to(wide))
            logits = query.to(wide) @ key.to(wide).transpose(1, 2)
            logits = logits.flatten(0, 1) * self.logit_scale
        target = torch.arange(self.hidden_patches, device=x.device).repeat(b)
        accuracy = (logits.argmax(1) == target).float().mean()
        return F.cross_entropy(logits, target), accuracy

    def against_the_batch(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors [B, M, dim] against those of all images; the accuracy is within an image."""
        b, m, _ = query.shape
        query, key = (F.normalize(v.flatten(0, 1), dim=1) for v in (query, key))
        logits = query @ key.T / self.temperature
        own = torch.arange(b, device=query.device)
        within = logits.view(b, m, b, m)[own, :, own]
        right = within.argmax(2) == torch.arange(m, device=query.device)
        target = torch.arange(b * m, device=query.device)
        return F.cross_entropy(logits, target), right.float().mean()


class AttentionClassifier(nn.Module):
    """P and A on whole images: the pooling sums up the cells of P's map, none of them hidden."""

    def __init__(self, selfie: Selfie, classes: int):
        super().__init__()
        self.encoder_positions = selfie.encoder_positions
        self.backbone = selfie.backbone
        self.pool = selfie.pool
        self.head = nn.ModuleDict({"fc": nn.Linear(selfie.backbone.dim, classes)})

    def forward(self, x: Tensor) -> Tensor:
        h = self.backbone(x, self.pool.grid)
        if self.encoder_positions:
            h = h + self.pool.positions()
        return self.head["fc"](self.pool(h)[:, 0])


def build(args: argparse.Namespace, drop: float = 0.1, pool_blocks: int = 3) -> nn.Module:
    small = args.image_size <= 64
    depths = tuple(int(d) for d in args.depths.split(","))
    if args.task != "pretrain" and args.head == "conv":
        return Backbone(4, small, args.classes, depths, args.width)
    selfie = Selfie(
        args.image_size,
        patch=8 if small else 32,
        drop=drop,
        depths=depths,
        width=args.width,
        heads=max(1, args.width // 2),  # 32 at the full width
        ffn=10 * args.width,  # 640 at the full width
        encoder_positions=not args.no_encoder_positions,
        logit_scale=args.logit_scale,
        query=args.query,
        pool_blocks=pool_blocks,
        negatives=args.negatives,
        temperature=args.temperature,
    )
    return selfie if args.task == "pretrain" else AttentionClassifier(selfie, args.classes)


# ------------------------------------------------------------------------- bench


def cpu_seconds() -> tuple[float, float]:
    """User and system seconds that this process has used on all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime, usage.ru_stime


def machine_busy_seconds() -> float:
    """Seconds that all processes together have kept the cores busy (Linux; else NaN).

    Includes what the hypervisor took away.
    """
    try:
        with open("/proc/stat") as f:
            user, nice, system, _idle, _iowait, *rest = (int(n) for n in f.readline().split()[1:9])
    except OSError:
        return float("nan")
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def keep_freed_memory() -> None:
    """Makes glibc's malloc reuse large blocks instead of returning them to the system.

    By default every activation is mapped, zeroed by the kernel and unmapped again, which is
    about a quarter of a training step on the CPU. Costs memory by fragmentation.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    if not (mallopt(mmap_max, 0) and mallopt(trim_threshold, -1)):
        raise OSError("mallopt refused to keep freed memory")


def bench(args: argparse.Namespace) -> dict:
    """Times whole steps on random data: forward, loss, backward and optimizer."""
    if args.malloc == "retain":
        keep_freed_memory()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    model = build(args, args.dropout, args.pool_blocks).to(device)
    model = model.to(memory_format=torch.channels_last)
    model.train(args.task != "infer")
    optimizer = torch.optim.SGD(
        model.parameters(), 0.01, 0.9, weight_decay=1e-4, nesterov=True, fused=True
    )
    autocast = {"f32": None, "bf16": torch.bfloat16}[args.dtype]

    def forward(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            if args.task == "infer":
                return model(x)
            if args.task == "pretrain":
                return model(x)[0]
            return F.cross_entropy(model(x).float(), y)

    if args.compile:
        mode = None if args.compile == "default" else args.compile
        forward = torch.compile(forward, mode=mode)

    x = torch.randn(args.batch, 3, args.image_size, args.image_size, device=device)
    x = x.to(memory_format=torch.channels_last)
    y = torch.randint(0, args.classes, (args.batch,), device=device)

    def step() -> None:
        if args.task == "infer":
            with torch.inference_mode():
                forward(x, y)
            return
        optimizer.zero_grad(set_to_none=True)
        forward(x, y).backward()
        optimizer.step()

    def synchronize() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    for _ in range(args.warmup):
        step()
    synchronize()
    step_ms, user_ms, system_ms, others_ms = [], [], [], []
    for _ in range(args.repeats):
        start, (user, system), busy = time.perf_counter(), cpu_seconds(), machine_busy_seconds()
        for _ in range(args.steps):
            step()
        synchronize()
        step_ms.append(1e3 * (time.perf_counter() - start) / args.steps)
        user = cpu_seconds()[0] - user
        system = cpu_seconds()[1] - system
        busy = machine_busy_seconds() - busy
        user_ms.append(1e3 * user / args.steps)
        system_ms.append(1e3 * system / args.steps)
        others_ms.append(1e3 * max(0.0, busy - user - system) / args.steps)

    median_ms = statistics.median(step_ms)
    if on_gpu:
        peak_memory_bytes = torch.cuda.max_memory_allocated()
    else:
        peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return dict(
        peer="pytorch " + torch.__version__,
        task=args.task,
        image_size=args.image_size,
        batch=args.batch,
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        dtype=args.dtype,
        compile=args.compile,
        threads=torch.get_num_threads(),
        malloc=args.malloc,
        step_ms_median=median_ms,
        step_ms_min=min(step_ms),
        images_per_second=1e3 * args.batch / median_ms,
        step_ms=step_ms,
        user_ms=user_ms,
        system_ms=system_ms,
        others_ms=others_ms,  # core time that other processes took meanwhile
        peak_memory_bytes=peak_memory_bytes,
    )


# ------------------------------------------------------------------------- check


def hashed(name: str, n: int) -> np.ndarray:
    """n numbers in [-1, 1), multiples of 2^-15, the same on every machine and in every precision.

    FNV-1a of the name seeds a splitmix64 stream; the top 16 bits of each output are the value.
    """
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x100000001B3) & (2**64 - 1)
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(48)).astype(np.int64) - 32768) / 32768.0


def hashed_images(name: str, batch: int, image_size: int, dtype: torch.dtype) -> Tensor:
    """Images [B, 3, H, W] whose pixels are `hashed(name)` in that order."""
    pixels = torch.from_numpy(hashed(name, batch * 3 * image_size**2))
    return pixels.view(batch, 3, image_size, image_size).to(dtype)


def hashed_order(name: str, batch: int, patches: int) -> Tensor:
    """Patch indices [B, patches] of each image, sorted by hashed keys (ties by index)."""
    keys = hashed(name, batch * patches).reshape(batch, -1)
    return torch.from_numpy(np.argsort(keys, 1, kind="stable"))


@torch.no_grad()
def fill_hashed(model: nn.Module) -> None:
    """Sets every parameter to hashed values that are exact in f32."""
    for name, p in model.named_parameters():
        v = torch.from_numpy(hashed(name, p.numel())).view(p.shape)
        if p.dim() >= 2:  # scaled by a power of two to a variance of about 1 / fan-in or below
            v = v * 2.0 ** -int(np.ceil(np.log2(np.sqrt(p[0].numel() / 3.0))))
        elif name.endswith("weight"):
            v = 1.0 + v / 4
        else:
            v = v / 4
        p.copy_(v.to(p.dtype))


def fingerprint(name: str, t: Tensor, projections: int = 8, entries: int = 16) -> dict:
    """Norm, projections on hashed vectors and some entries of a tensor, row-major."""
    v = t.detach().double().cpu().contiguous().flatten().numpy()
    return dict(
        n=v.size,
        norm=float(np.linalg.norm(v)),
        projections=[
            float(v @ hashed(f"{name}/projection{i}", v.size)) for i in range(projections)
        ],
        entries=[float(v[(i * 2654435761) % v.size]) for i in range(min(entries, v.size))],
    )


@dataclass
class Replay:
    """What a few steps from hashed weights on hashed inputs computed, in full tensors."""

    loss: list[float]  # of each step
    accuracy: list[float]  # of each step, pretraining only
    logits: list[Tensor]  # of each step, finetuning only
    gradients: dict[str, Tensor]  # of the first step
    parameters: dict[str, Tensor]  # after the last step
    running: dict[str, Tensor]  # batch-norm statistics after the last step


def replay(args: argparse.Namespace, first_input: int = 0) -> Replay:
    """Takes `args.steps` Nesterov steps without dropout, patch order by a stated rule.

    Step i sees the hashed images and order number `first_input` + i.
    """
    torch.manual_seed(0)
    dtype = {"f32": torch.float32, "f64": torch.float64}[args.dtype]
    model = build(args, drop=0.0).to(dtype).train()
    fill_hashed(model)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=1e-4, nesterov=True)
    out = Replay([], [], [], {}, {}, {})
    for step in range(args.steps):
        number = first_input + step
        x = hashed_images(f"images/{number}", args.batch, args.image_size, dtype)
        optimizer.zero_grad(set_to_none=True)
        if args.task == "pretrain":
            order = hashed_order(f"order/{number}", args.batch, model.grid**2)
            loss, accuracy = model(x, order)
            out.accuracy.append(float(accuracy))
        else:
            logits = model(x)
            loss = F.cross_entropy(logits, torch.arange(args.batch) % args.classes)
            out.logits.append(logits.detach())
        loss.backward()
        out.loss.append(float(loss.detach()))
        if step == 0:
            out.gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
    out.parameters = {n: p.detach() for n, p in model.named_parameters()}
    out.running = {n: b for n, b in model.named_buffers() if "running" in n}
    return out


def check(args: argparse.Namespace) -> dict:
    """Fingerprints of `replay`: gradients of the first step, parameters and running statistics."""
    result = replay(args)

    def fingerprints(tensors: dict[str, Tensor]) -> dict:
        return {name: fingerprint(name, t) for name, t in tensors.items()}

    steps = [dict(loss=loss) for loss in result.loss]
    for row, accuracy in zip(steps, result.accuracy):
        row["accuracy"] = accuracy
    for row, logits in zip(steps, result.logits):
        row["logits"] = fingerprint("logits", logits)
    steps[0]["gradients"] = fingerprints(result.gradients)
    options = {key: value for key, value in vars(args).items() if key != "command"}
    return dict(
        reference="pytorch " + torch.__version__,
        **options,
        step=steps,
        parameters=fingerprints(result.parameters),
        running=fingerprints(result.running),
    )


# ------------------------------------------------------------------ command line


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)

    def network_options(command: argparse.ArgumentParser, tasks: list[str]) -> None:
        command.add_argument("--task", choices=tasks, default="pretrain")
        command.add_argument("--image-size", type=int, default=32)
        command.add_argument("--batch", type=int, default=64)
        command.add_argument("--classes", type=int, default=10)
        command.add_argument("--depths", default="3,4,6,3")
        command.add_argument("--width", type=int, default=64)
        command.add_argument("--logit-scale", type=float, default=1.0)
        command.add_argument("--no-encoder-positions", action="store_true")
        command.add_argument("--negatives", choices=["image", "batch"], default="image")
        command.add_argument("--temperature", type=float, default=0.1)
        command.add_argument("--head", choices=["conv", "attention"], default="conv")
        command.add_argument("--query", choices=["summary", "places"], default="summary")

    timing = commands.add_parser("bench", help="time whole steps on random data")
    network_options(timing, ["pretrain", "finetune", "infer"])
    timing.add_argument("--device", default="cpu")
    timing.add_argument("--dropout", type=float, default=0.1)
    timing.add_argument("--pool-blocks", type=int, default=3)
    timing.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    timing.add_argument(
        "--compile", default="", help="'', default, reduce-overhead or max-autotune"
    )
    timing.add_argument(
        "--malloc",
        choices=["default", "retain"],
        default="default",
        help="retain: keep freed memory for reuse (glibc; faster on the CPU, larger peak)",
    )
    timing.add_argument("--warmup", type=int, default=2)
    timing.add_argument("--steps", type=int, default=1)
    timing.add_argument("--repeats", type=int, default=5)

    parity = commands.add_parser("check", help="print the reference of the parity tests")
    network_options(parity, ["pretrain", "finetune"])
    parity.add_argument("--dtype", choices=["f32", "f64"], default="f64")
    parity.add_argument("--lr", type=float, default=0.01)
    parity.add_argument("--steps", type=int, default=3)
    return top


if __name__ == "__main__":
    arguments = parser().parse_args()
    command = bench if arguments.command == "bench" else check
    print(json.dumps(command(arguments)))
