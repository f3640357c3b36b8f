"""PyTorch's steps on request: one process for all rows, so that PyTorch is imported, and its kernels are chosen, once.

Reads a JSON list of words on each line of standard input, answers with a JSON object on one line: `["bench", ..]` with
the options of `torch_selfie.py`, `["about"]`, or `["ceilings"]`. An answer with the key `error` says what went wrong.
"""

import contextlib
import gc
import json
import statistics
import sys
import time

import torch

import torch_selfie


def about() -> dict:
    on_gpu = torch.cuda.is_available()
    return dict(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if on_gpu else None,
        device=torch.cuda.get_device_name() if on_gpu else None,
    )


def milliseconds(work, times: int = 20) -> float:
    """Of one call on the GPU, the median after some that do not count."""
    found = []
    for i in range(times + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        if i >= 3:
            found.append(begin.elapsed_time(end))
    return statistics.median(found)


def ceilings() -> dict:
    """What the GPU itself can do: bytes copied in memory, and products of bf16 matrices."""
    a = torch.randn(2**28, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    copy = milliseconds(lambda: b.copy_(a))
    n = 8192
    x, y = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: x @ y)
    return dict(copy_tb_per_s=2 * a.nbytes / copy / 1e9, bf16_tflops=2 * n**3 / product / 1e9)


def bench(options: list[str]) -> dict:
    args = torch_selfie.parser().parse_args(options)
    start = time.perf_counter()
    result = torch_selfie.bench(args)
    return dict(**result, seconds=time.perf_counter() - start)


def release() -> None:
    """Gives the GPU's memory back, for ours to use, and counts the next request's peak from nothing."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def answer(words: list[str]) -> dict:
    match words:
        case ["about"]:
            return about()
        case ["ceilings"]:
            return ceilings()
        case ["bench", *_]:
            return bench(words)
    raise ValueError(f"expected about, ceilings or bench, found {words}")


def main() -> None:
    out = sys.stdout
    for line in sys.stdin:
        # Whatever PyTorch prints on the way is no answer.
        with contextlib.redirect_stdout(sys.stderr):
            try:
                found = answer(json.loads(line))
            except (Exception, SystemExit) as error:  # the next row may do
                found = dict(error=f"{type(error).__name__}: {error}")
            release()
        print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
