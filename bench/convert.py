"""Conversion beside mlx_lm's, of the same random checkpoint: MB/s and the most memory each takes.

    python -m bench.convert [--gb 1] [--runs 5] [--mode affine] [--bits 4] [--limit] [--out FILE]

A bfloat16 checkpoint in the shape of a 31B, narrower, is written to --folder once; each run is a
process of its own, in turn, with the files in the system's cache. mlx_lm's run is what
mlx_lm.convert does to weights: load lazily, quantise, save; ours also compares every packed weight
with its source and hashes every file. A run's memory is its most resident memory, its start
included. --limit: only ours, its data limited to 1.3 x the largest tensor + 1 GB.
One JSON line comes last.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mtp_mlx.checkpoint import stored_tensors
from gemma_mtp_mlx.config import FULL, SLIDING

WIDTH, INNER, VOCABULARY, HEADS, HEAD_DIM = 2048, 8192, 131_072, 8, 256
FREE_BYTES = 1e9  # beside the largest tensor
OURS = """
import json, sys, time
from pathlib import Path
from gemma_mtp_mlx.convert import Quantization, convert
began = time.perf_counter()
convert(sys.argv[1], Path(sys.argv[2]), quantization=Quantization(sys.argv[3], int(sys.argv[4])))
print(time.perf_counter() - began)
"""
MLX_LM = """
import sys, time
from pathlib import Path
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
began = time.perf_counter()
model, config = load_model(Path(sys.argv[1]), lazy=True)
model, config = quantize_model(model, config, None, int(sys.argv[4]), mode=sys.argv[3])
save_model(Path(sys.argv[2]), model, donate_model=True)
save_config(config, Path(sys.argv[2]) / "config.json")
print(time.perf_counter() - began)
"""


def main() -> None:
    """Write the checkpoint if it is not there, convert it in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gb", type=float, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mode", default="affine")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--limit", action="store_true")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "bench-convert"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    source = args.folder / f"source-{args.gb:g}"
    if not (source / "config.json").is_file():
        write_checkpoint(source, args.gb * 1e9)
    sizes = [tensor.nbytes for tensor in stored_tensors(source).values()]
    total, largest = sum(sizes), max(sizes)
    bound = 1.3 * largest + FREE_BYTES
    print(f"source {total / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB", file=sys.stderr)
    programs = {"ours": OURS} if args.limit else {"ours": OURS, "mlx_lm": MLX_LM}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for _ in range(args.runs):
        for name, program in programs.items():
            limit = int(bound) if args.limit else None
            found[name].append(run(program, source, args, limit))
    report = {
        "command": f"python -m bench.convert --gb {args.gb:g} --runs {args.runs}"
        f" --mode {args.mode} --bits {args.bits}{' --limit' if args.limit else ''}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "source_bytes": total,
        "largest_tensor_bytes": largest,
        "bound_bytes": int(bound),
        **{name: summary(runs, total) for name, runs in found.items()},
    }
    if not args.limit:
        pairs = zip(found["ours"], found["mlx_lm"], strict=True)
        report["ratio"] = spread([theirs / ours for (ours, _), (theirs, _) in pairs])
    line = json.dumps(report)
    if args.out is not None:
        args.out.write_text(line + "\n")
    print(line)


def summary(runs: list[tuple[float, float]], total: int) -> dict[str, Any]:
    """Return median, lowest and highest MB/s of the source, and the most memory of any run."""
    return {
        "mb_per_s": spread([total / seconds / 1e6 for seconds, _ in runs]),
        "peak_gb": round(max(peak for _, peak in runs) / 1e9, 3),
    }


def spread(values: list[float]) -> list[float]:
    """Return the median, the lowest and the highest."""
    return [round(f(values), 2) for f in (statistics.median, min, max)]


def run(
    program: str, source: Path, args: argparse.Namespace, limit: int | None
) -> tuple[float, float]:
    """Convert in a process of its own. Returns seconds and the most bytes resident."""
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        out = Path(scratch) / "out"
        if program is MLX_LM:
            out.mkdir()
        command = [sys.executable, "-P", "-c", program]  # the package as it is installed
        argv = [*command, str(source), str(out), args.mode, str(args.bits)]
        process = subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=None if limit is None else lambda: hold(limit),
        )
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"a conversion ended with {process.returncode}")
        unit = 1 if sys.platform == "darwin" else 1024
        return float(said.split()[-1]), usage.ru_maxrss * unit


def hold(limit: int) -> None:
    """Keep this process's data, everything it writes to but its files, within a limit."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def write_checkpoint(folder: Path, size: float) -> None:
    """Write random bfloat16 weights of about so many bytes, in the published layout."""
    attention = HEADS * HEAD_DIM * WIDTH * 2 + HEADS * HEAD_DIM * WIDTH
    layer_bytes = 2 * (3 * WIDTH * INNER + attention)
    layers = 6 * max(1, round((size - 2 * VOCABULARY * WIDTH) / layer_bytes / 6))
    config = {
        "architectures": ["Gemma4ForCausalLM"],
        "attention_k_eq_v": False,
        "dtype": "bfloat16",
        "final_logit_softcapping": 30.0,
        "global_head_dim": HEAD_DIM,
        "head_dim": HEAD_DIM,
        "hidden_size": WIDTH,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": INNER,
        "layer_types": ([SLIDING] * 5 + [FULL]) * (layers // 6),
        "model_type": "gemma4_text",
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": HEADS // 2,
        "num_kv_shared_layers": 0,
        "rms_norm_eps": 1e-6,
        "sliding_window": 512,
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": 0,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / "model.safetensors", shapes(layers))
    (folder / "config.json").write_text(json.dumps(config))


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a model of that many layers."""
    heads, shared = HEADS * HEAD_DIM, HEADS // 2 * HEAD_DIM
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(layers):
        path = f"model.layers.{layer}"
        for norm in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ):
            found[f"{path}.{norm}.weight"] = (WIDTH,)
        found[f"{path}.layer_scalar"] = (1,)
        found[f"{path}.mlp.gate_proj.weight"] = found[f"{path}.mlp.up_proj.weight"] = (INNER, WIDTH)
        found[f"{path}.mlp.down_proj.weight"] = (WIDTH, INNER)
        for name, rows in {"q": heads, "k": shared, "v": shared}.items():
            found[f"{path}.self_attn.{name}_proj.weight"] = (rows, WIDTH)
        found[f"{path}.self_attn.o_proj.weight"] = (WIDTH, heads)
        found[f"{path}.self_attn.q_norm.weight"] = (HEAD_DIM,)
        found[f"{path}.self_attn.k_norm.weight"] = (HEAD_DIM,)
    return found | {"model.norm.weight": (WIDTH,)}


def write_weights(file: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Write random values, the same block of them again and again, as a safetensors file."""
    random = np.random.default_rng(0)
    block = (random.standard_normal(1 << 22, np.float32) * 0.02).view(np.uint32)
    values = (block >> 16).astype("<u2").tobytes()
    header, end = {}, 0
    for name, shape in tensors.items():
        first, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for left in range(end, 0, -len(values)):
            out.write(values[: min(left, len(values))])


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"took {time.perf_counter() - began:.0f} s", file=sys.stderr)
