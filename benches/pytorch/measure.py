"""Runs the CPU rows of the comparison and appends one JSON line for each to a results file.

    python measure.py ../results/pytorch_cpu.jsonl --steps 6 --minutes 30

Wall time means something only on a machine that does nothing else. So a row starts when the
cores have been idle for two seconds, and a step counts if other processes took less than 3% of
the cores meanwhile. The rows take turns until each has enough such steps or time is up.
"""

import argparse
import datetime
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from torch_selfie import machine_busy_seconds

HERE = Path(__file__).parent
SIZES = [
    "--task pretrain --image-size 32 --batch 64",
    "--task finetune --image-size 32 --batch 64",
    "--task finetune --image-size 224 --batch 8 --classes 1000",
    "--task pretrain --image-size 224 --batch 8",
    "--task infer --image-size 224 --batch 8 --classes 1000",
]
SETTINGS = [f"--dtype {d} --malloc {m}" for d in ("f32", "bf16") for m in ("default", "retain")]
SETTINGS.append("--dtype bf16 --malloc retain --compile default")  # in f32 it is slower than eager
ROWS = [f"{size} {setting}" for size in SIZES for setting in SETTINGS]
QUIET = 0.03  # share of the cores that others may take
STEPS_PER_RUN = 3


def machine() -> dict:
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return dict(
        cpu=cpu,
        cores=os.cpu_count(),
        simd=torch.backends.cpu.get_cpu_capability(),
        memory_gib=round(memory_bytes / 2**30),
    )


def commit() -> str:
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def wait_for_quiet(deadline: float) -> bool:
    """Whether the cores were idle for two seconds before the deadline."""
    while time.monotonic() < deadline:
        busy = machine_busy_seconds()
        time.sleep(2)
        if machine_busy_seconds() - busy <= QUIET * 2 * os.cpu_count():
            return True
    return False


def run(options: str) -> tuple[dict, list[dict]]:
    """The output of one `bench` and its quiet steps."""
    command = [sys.executable, str(HERE / "torch_selfie.py"), "bench", *shlex.split(options)]
    command += ["--warmup", "1", "--repeats", str(STEPS_PER_RUN)]
    out = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    steps = [
        dict(wall=wall, cpu=user + system, system=system)
        for wall, user, system, others in zip(
            out["step_ms"], out["user_ms"], out["system_ms"], out["others_ms"], strict=True
        )
        if others <= QUIET * wall * os.cpu_count()
    ]
    return out, steps


def summary(options: str, out: dict, steps: list[dict]) -> dict:
    def median(key: str) -> float:
        return round(statistics.median(s[key] for s in steps), 1)

    kept = ["peer", "task", "image_size", "batch", "device", "dtype", "compile", "threads"]
    return dict(
        date=datetime.date.today().isoformat(),
        commit=commit(),
        machine=machine(),
        command=f"torch_selfie.py bench {options}",
        **{key: out[key] for key in [*kept, "malloc", "peak_memory_bytes"]},
        steps=len(steps),
        step_ms_median=median("wall"),
        step_ms_min=round(min(s["wall"] for s in steps), 1),
        images_per_second=round(1e3 * out["batch"] / median("wall"), 2),
        cpu_ms_median=median("cpu"),
        system_ms_median=median("system"),
    )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("results", type=Path)
    p.add_argument("--steps", type=int, default=6, help="quiet steps wanted of each row")
    p.add_argument("--minutes", type=float, default=math.inf, help="stop waiting after this long")
    p.add_argument("--only", default="", help="only rows that contain this text")
    args = p.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    steps = {row: [] for row in ROWS if args.only in row}
    latest = {}
    missing = list(steps)
    while missing:
        for row in missing:
            if not wait_for_quiet(deadline):
                break
            latest[row], quiet = run(row)
            steps[row] += quiet
            rate = latest[row]["images_per_second"]
            print(f"{len(quiet)} of {STEPS_PER_RUN} quiet, {rate:.1f} img/s: {row}", flush=True)
        else:
            missing = [row for row in missing if len(steps[row]) < args.steps]
            continue
        break
    with args.results.open("a") as f:
        for row, found in steps.items():
            if found:
                f.write(json.dumps(summary(row, latest[row], found)) + "\n")
            else:
                print(f"no quiet step: {row}", file=sys.stderr)


if __name__ == "__main__":
    main()
