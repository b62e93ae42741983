"""Measure an exported pair on held-out code: python -m training.measure --run DIR --pair DIR.

Teacher-forced: the text is held-out code, and every position n >= 1 of every window counts as
one round. Free-running: the target continues held-out prompts greedily, and rounds follow one
another as in generation: K drafts, the accepted ones and one more token. Both use the exported
bfloat16 weights in float32 arithmetic. One JSON line is printed.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM

from training.corpus import held_out_windows
from training.drafter import DRAFTER_SIZE, Drafter
from training.target import Size, Target
from training.train_drafter import STEP_WEIGHTS, accepted_counts, agreement
from training.train_target import held_out_loss
from training.verify import load_checked, load_lean

K = len(STEP_WEIGHTS)
LENGTH, WINDOWS = 512, 64
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 20, 64, 192


def teacher_forced(target: Target, drafter: Drafter, windows: Tensor) -> dict:
    """Return the target's loss and top-1 accuracy and the agreement by draft step."""
    shares, right = [], []
    for part in windows.split(4):
        shares.append(agreement(target, drafter, part[:, :-1]))
        choice = target.logits(target.memory(part[:, :-1]).hidden).argmax(-1)
        right.append((choice == part[:, 1:]).float().mean().item())
    means = torch.tensor(shares).mean(0).tolist()
    return {
        "held_out_loss": round(held_out_loss(target, windows, 4), 4),
        "held_out_top1": round(sum(right) / len(right), 4),
        "agreement_by_step": [round(share, 4) for share in means],
    }


def free_running(target: Target, drafter: Drafter, texts: Tensor) -> dict:
    """Walk through rounds over greedy texts [B, T]; count accepted drafts by step."""
    counts = accepted_counts(target, drafter, texts)
    tried, accepted, rounds, tokens = [0] * K, [0] * K, 0, 0
    for row in counts.tolist():
        n = PROMPT_TOKENS
        while n + K < texts.shape[1]:
            rounds, tokens = rounds + 1, tokens + row[n] + 1
            for k in range(K):
                tried[k] += row[n] >= k
                accepted[k] += row[n] > k
            n += row[n] + 1
    return {
        "rounds": rounds,
        "tokens_per_round": round(tokens / rounds, 3),
        "accepted_by_step": [round(a / max(1, t), 4) for a, t in zip(accepted, tried, strict=True)],
        "accepted_share": round(sum(accepted) / (K * rounds), 4),
    }


@torch.no_grad()
def main() -> None:
    """Parse the command line, measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder with the token pools")
    parser.add_argument("--pair", type=Path, required=True, help="holds target/ and drafter/")
    args = parser.parse_args()
    target = load_lean(Target(Size()), args.pair / "target")
    drafter = load_lean(Drafter(DRAFTER_SIZE, Size().hidden), args.pair / "drafter")
    windows = torch.from_numpy(held_out_windows(args.run, WINDOWS, LENGTH))
    figures = teacher_forced(target, drafter, windows)
    prompts = torch.from_numpy(held_out_windows(args.run, PROMPTS, PROMPT_TOKENS))[:, :-1]
    writer = load_checked(Gemma4ForCausalLM, args.pair / "target")
    texts = writer.generate(
        prompts, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    figures["free_running"] = free_running(target, drafter, texts)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
