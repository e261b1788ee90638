"""Full-context time to first token: this crate against transformers on PyTorch, on the CPU, side by side.

Both read the same tokens with the same model in f32 and the same number of threads. The runs take
turns, ours, theirs, ours, theirs ..., so that a drift of the machine's speed hits both alike.

    cargo build --release
    pip install torch transformers
    python benches/peers/ttft.py --tokens 4096 --threads 2 --runs 10

The last lines say the medians and the median ratio of neighbouring runs; below 1 ours is faster.
"""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ROOT / "models/needle", help="a Hugging Face Llama directory")
    parser.add_argument("--binary", default=ROOT / "target/release/fastkv", help="the program fastkv")
    parser.add_argument("--tokens", type=int, default=4096, help="length of the prompt")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side")
    parser.add_argument("--runs", type=int, default=10, help="runs of each side that count")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"], help="transformers' attention")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, attn_implementation=options.attention
    ).eval()
    vocabulary = model.config.vocab_size
    ids = [i * 2654435761 % 2**32 % vocabulary for i in range(options.tokens)]

    theirs_first_token, _ = transformers_once(model, ids)
    ours_first_token, _ = fastkv_once(options, ids)
    ours, theirs = [], []
    for run in range(options.runs):
        ours.append(fastkv_once(options, ids)[1])
        theirs.append(transformers_once(model, ids)[1])
        print(f"run {run + 1}: fastkv {ours[-1]:.3f} s, transformers {theirs[-1]:.3f} s", flush=True)

    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, {options.tokens} tokens, f32")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.attention} attention")
    for name, times in (("fastkv", ours), ("transformers", theirs)):
        print(f"{name}: median {statistics.median(times):.3f} s, {min(times):.3f} to {max(times):.3f}")
    ratios = [a / b for a, b in zip(ours, theirs)]
    print(f"ratio: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    print(f"same first token: {'yes' if ours_first_token == theirs_first_token else 'NO'}")


@torch.inference_mode()
def transformers_once(model, ids):
    """The first token and the seconds to it, weights loaded."""
    prompt = torch.tensor([ids])
    begin = time.perf_counter()
    logits = model(prompt, use_cache=True, logits_to_keep=1).logits
    token = int(logits[0, -1].argmax())
    return token, time.perf_counter() - begin


def fastkv_once(options, ids):
    """The same of a fresh process of this crate; loading is not counted there either."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(ids, file)
        file.flush()
        command = [options.binary, "generate", "--model", options.model, "--tokens", file.name]
        command += ["--policy", "full", "--max-tokens", "1", "--threads", str(options.threads), "--json"]
        output = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
    report = json.loads(output)
    return report["tokens"][0], report["ttft_s"]


if __name__ == "__main__":
    main()
