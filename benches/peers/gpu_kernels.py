"""Our kernels against PyTorch's on one GPU, in one run: attention, top-k, gather.

The benchmark program of this crate and PyTorch take turns, ours, theirs, ours, so that a drift of the clock shows.

    cargo bench --bench kernels --no-run       (or bin/kernels of a GPU bundle)
    python benches/peers/gpu_kernels.py --binary PATH --json FILE

A ratio below 1 means that ours is faster. PyTorch's top-k gives no order and no rule for ties; ours is ascending,
with ties to the lower index.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent
ATTENTION = [4096, 8192, 16384, 32768, 65536, 131072]
TOPK = [32768, 131072, 1048576]
GATHER = [512, 2048, 8192, 16384]
KEPT = 2048
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=HERE.parent / "bin" / "kernels", help="our benchmark program")
    parser.add_argument("--runs", type=int, default=20, help="timed launches of theirs for each shape")
    parser.add_argument("--longest", type=int, default=ATTENTION[-1], help="longest prompt of attention, in tokens")
    parser.add_argument("--json", help="write all figures to this file")
    options = parser.parse_args()

    lengths = [tokens for tokens in ATTENTION if tokens <= options.longest]
    before = ours(options.binary, lengths)
    theirs = {}
    for tokens in lengths:
        theirs[f"prefill_attention/{tokens}"] = attention(tokens, options.runs)
    for keys in TOPK:
        scores = torch.rand(8, keys, device="cuda")
        theirs[f"select_topk/{keys}"] = {"topk": measure(lambda: scores.topk(KEPT, dim=1, sorted=False), options.runs)}
    for kept in GATHER:
        theirs[f"gather_kv/{kept}"] = {"index_select": gather(kept, options.runs)}
    after = ours(options.binary, lengths)

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}; median microseconds")
    print(f"{'kernel':32} {'ours':>10} {'again':>10}  theirs (ratio)")
    for shape, peers in theirs.items():
        first, second = lookup(before, shape), lookup(after, shape)
        mine = (first + second) / 2
        words = ", ".join(
            f"{name} {us:.1f} ({mine / us:.2f})" if us else f"{name} not available" for name, us in peers.items()
        )
        print(f"{shape:32} {first:10.1f} {second:10.1f}  {words}")
    if options.json:
        Path(options.json).write_text(json.dumps({"before": before, "theirs": theirs, "after": after}, indent=1))


def ours(binary, lengths):
    """Median microseconds of every kernel and shape."""
    attention = f"prefill_attention/({'|'.join(map(str, lengths))}) tokens$"
    with tempfile.NamedTemporaryFile() as file:
        environment = dict(os.environ, FASTKV_BENCH_JSON=file.name)
        # FASTKV_BENCH_FLAGS: criterion's flags, such as shorter times.
        flags = os.environ.get("FASTKV_BENCH_FLAGS", "").split()
        run = [binary, "--bench", *flags, f"{attention}|select_topk|gather_kv"]
        subprocess.run(run, check=True, env=environment, stdout=subprocess.DEVNULL)
        return {row["name"]: row["median_us"] for row in json.load(open(file.name))}


def lookup(figures, shape):
    """Our figure of a shape: names go on with what else is fixed."""
    found = [us for name, us in figures.items() if name == shape or name.startswith((shape + " ", shape + ","))]
    return found[0] if found else float("nan")


def attention(tokens, runs):
    """One layer of Llama 3.1 8B, causal, by each of PyTorch's kernels that takes it; None where one does not."""
    q = torch.randn(1, 32, tokens, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 8, tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = {}
    for name, backend in BACKENDS.items():
        def run():
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        try:
            times[name] = measure(run, runs)
        except RuntimeError:
            times[name] = None
    return times


def gather(kept, runs):
    """K and V rows of 8 heads; one list for all heads, which is the easier case."""
    index = torch.arange(kept, device="cuda") * 32768 // kept
    k, v = (torch.randn(8, 32768, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return measure(lambda: (k.index_select(1, index), v.index_select(1, index)), runs)


def measure(run, runs):
    """Median microseconds of device time."""
    for _ in range(3):
        run()
    times = []
    for _ in range(runs):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    main()
