"""Train the target from scratch for a given time: python -m training.train_target --out DIR.

The first part of the time trains half the layers, twice as fast; then the model grows: the
second half starts as a damped copy of the first (progressive stacking, Gong et al. 2019,
"Efficient Training of BERT by Progressively Stacking"). The learning rate warms up, stays
constant, and falls linearly. All phases follow the wall clock, so the decay is always
completed. A checkpoint is written every few minutes and an interrupted run resumes from it.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from training.corpus import Sampler, held_out_windows, prepare
from training.muon import Muon
from training.target import Size, Target

POOLS = {"code": 0.74, "tests": 0.18, "chat": 0.08}
MUON_LR, ADAM_LR = 0.02, 3e-3
WARMUP_STEPS, CONSTANT_UNTIL, FINAL_SHARE = 100, 0.5, 0.02
GROW_AT, COPY_DAMPING = 0.28, 0.3
SAVE_EVERY_S = 240.0


def lr_share(step: int, spent: float) -> float:
    """Return the share of the peak rate at `step` of this size, `spent` (0..1) of all the time."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    fallen = max(0.0, (spent - CONSTANT_UNTIL) / (1 - CONSTANT_UNTIL))
    return warm * (1 - (1 - FINAL_SHARE) * min(1.0, fallen))


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Give Muon every matrix but the embedding, and AdamW the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [w for name, w in named if w.ndim == 2 and "embed_tokens" not in name]
    others = [w for name, w in named if w.ndim != 2 or "embed_tokens" in name]
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    optimizers = [Muon(matrices, lr=MUON_LR), adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Set every group's learning rate to a share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]


def half_size() -> Size:
    """Return the size trained first: one period of layers."""
    types = Size().layer_types
    return replace(Size(), layer_types=types[: len(types) // 2])


@torch.no_grad()
def grow(small: Target) -> Target:
    """Return the whole target: the small one's layers, then copies that add a damped share."""
    model = Target(Size())
    model.model.embed_tokens.load_state_dict(small.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(small.model.norm.state_dict())
    half = len(small.model.layers)
    for i, layer in enumerate(model.model.layers):
        layer.load_state_dict(small.model.layers[i % half].state_dict())
        if i >= half:
            layer.post_attention_layernorm.weight.mul_(COPY_DAMPING)
            layer.post_feedforward_layernorm.weight.mul_(COPY_DAMPING)
    return model


class Run:
    """A model with its optimizers and progress, as saved in one checkpoint."""

    def __init__(self, path: Path, compile_parts: bool) -> None:
        self.path, self.compile_parts = path, compile_parts
        self.progress = {"step": 0, "grown_at": -1, "spent_s": 0.0, "tokens": 0}
        self.use(Target(half_size()))
        if path.exists():
            self.load()

    def use(self, model: Target) -> None:
        """Train this model from now on, with fresh optimizers."""
        self.model, self.optimizers = model, make_optimizers(model)
        if self.compile_parts:
            self.model.compile_parts()

    def load(self) -> None:
        """Continue from the checkpoint."""
        state = torch.load(self.path, weights_only=True)
        self.progress = state["progress"]
        if self.progress["grown_at"] >= 0:
            self.use(Target(Size()))
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def save(self) -> None:
        """Write the checkpoint through a temporary name."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": self.progress,
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").rename(self.path)

    def step(self, windows: Tensor, spent: float) -> Tensor:
        """Take one optimizer step and return the loss; grow the model when its time has come."""
        if spent >= GROW_AT and self.progress["grown_at"] < 0:
            self.use(grow(self.model))
            self.progress["grown_at"] = self.progress["step"]
        since = self.progress["step"] - max(0, self.progress["grown_at"])
        set_lr(self.optimizers, lr_share(since, spent))
        loss = loss_of(self.model, windows)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress["step"] += 1
        self.progress["tokens"] += windows[:, 1:].numel()
        return loss.detach()


def loss_of(model: Target, windows: Tensor) -> Tensor:
    """Return the mean cross entropy of the next token over [B, T + 1] windows."""
    return model.loss(model.memory(windows[:, :-1]).hidden, windows[:, 1:])


@torch.no_grad()
def held_out_loss(model: Target, windows: Tensor, rows: int) -> float:
    """Return the mean cross entropy over held-out windows, `rows` at a time."""
    return float(np.mean([loss_of(model, part).item() for part in windows.split(rows)]))


def train(args: argparse.Namespace) -> None:
    """Train until the time is spent; write target.pt and one JSON line per report."""
    prepare(args.out)
    torch.manual_seed(args.seed)
    run = Run(args.out / "target.pt", args.compile)
    sampler = Sampler(args.out, POOLS, args.seed + run.progress["step"])
    held_out = torch.from_numpy(held_out_windows(args.out, 32, args.length))
    budget_s, start = args.minutes * 60, time.monotonic() - run.progress["spent_s"]
    saved_s, losses = run.progress["spent_s"], []
    while (spent_s := time.monotonic() - start) < budget_s * args.until:
        run.progress["spent_s"] = spent_s
        windows = torch.from_numpy(sampler.batch(args.batch, args.length))
        losses.append(run.step(windows, spent_s / budget_s))
        if run.progress["step"] % args.report_every == 0:
            report(run.progress, loss=torch.stack(losses).mean().item())
            losses = []
        if spent_s - saved_s > SAVE_EVERY_S:
            saved_s = spent_s
            run.save()
            report(run.progress, held_out_loss=held_out_loss(run.model, held_out, args.batch))
    run.save()
    report(run.progress, held_out_loss=held_out_loss(run.model, held_out, args.batch))


def report(progress: dict[str, float], **figures: float) -> None:
    """Print progress and figures as one JSON line."""
    line = {name: round(value, 4) for name, value in {**progress, **figures}.items()}
    print(json.dumps(line), flush=True)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--until", type=float, default=1.0, help="stop at this share of the time")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report-every", type=int, default=50)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
