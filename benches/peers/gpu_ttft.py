"""Full-context time to first token on one GPU: this crate against transformers on PyTorch.

Both run the shape of Llama 3.1 8B with random weights in bf16, read random tokens, and keep the cache; neither computes
logits of any row but the last. Ours come from the JSON of our benchmark program, which is started where there is none.

    FASTKV_BENCH_JSON=ttft.json cargo bench --bench ttft       (or bin/ttft of a GPU bundle)
    python benches/peers/gpu_ttft.py --ours ttft.json

A ratio above 1 means that ours is faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).resolve().parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", default=HERE.parent / "results" / "ttft.json", help="figures of our program")
    parser.add_argument("--binary", default=HERE.parent / "bin" / "ttft", help="our program, where there are none")
    parser.add_argument("--lengths", default="8192,32768,131072", help="lengths of the prompt")
    parser.add_argument("--runs", type=int, default=3, help="timed runs up to 32K; one beyond")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of transformers")
    parser.add_argument("--json", help="write all figures to this file")
    options = parser.parse_args()

    lengths = [int(length) for length in options.lengths.split(",")]
    # Our program frees the GPU before PyTorch takes it.
    ours = figures(options, lengths)
    model = llama(options.attention)
    name, torch_version = torch.cuda.get_device_name(), torch.__version__
    print(f"{name}, torch {torch_version}, transformers {transformers.__version__}, {options.attention} attention, bf16")
    print(f"{'tokens':>8} {'fastkv full':>12} {'transformers':>13} {'ratio':>6} {'their peak GiB':>15}")
    rows = []
    for tokens in lengths:
        times, peak = measure(model, tokens, options.runs if tokens <= 32768 else 1)
        mine = ours.get(tokens)
        theirs = statistics.median(times) if times else None
        rows.append({"tokens": tokens, "fastkv_s": mine, "transformers_s": theirs, "runs_s": times, "peak_bytes": peak})
        ratio = f"{theirs / mine:6.2f}" if mine and theirs else "     -"
        print(f"{tokens:8} {seconds(mine)} {seconds(theirs):>13} {ratio} {peak / 2**30:15.1f}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


def figures(options, lengths):
    """Our seconds by length, full context, a prompt at a time."""
    path = Path(options.ours)
    if not path.exists():
        lengths = ",".join(map(str, lengths))
        chosen = {"FASTKV_TTFT": lengths, "FASTKV_TTFT_POLICIES": "full", "FASTKV_BENCH_JSON": str(path)}
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([options.binary, "--bench"], check=True, env=dict(os.environ, **chosen))
    measured = json.loads(path.read_text())["measured"]
    return {row["tokens"]: row["ttft_s"] for row in measured if row["policy"] == "full" and row["batch"] == 1}


def llama(attention):
    """Random weights, made on the GPU; how they are spread makes no difference to the time."""
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131136,
        rms_norm_eps=1e-5,
        attn_implementation=attention,
    )
    torch.manual_seed(1)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


@torch.inference_mode()
def measure(model, tokens, runs):
    """Seconds of each run behind a warm-up, and the peak of memory; no run where memory is not enough."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    prompt = torch.randint(model.config.vocab_size, (1, tokens), device="cuda")
    times = []
    try:
        for run in range(runs + 1):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            model(prompt, use_cache=True, logits_to_keep=1).logits[0, -1].float().cpu()
            if run > 0:
                times.append(time.perf_counter() - begin)
    except torch.OutOfMemoryError:
        print(f"{tokens} tokens: not enough memory for transformers")
    return times, torch.cuda.max_memory_allocated()


def seconds(value):
    return f"{value:10.3f} s" if value else f"{'-':>12}"


if __name__ == "__main__":
    main()
