"""Train the drafter against a finished target: python -m training.train_drafter --out DIR.

Every row drafts K tokens with its own fed-back state (`training.drafter`). Labels are the
target's own distribution at the place of the drafted token: half its argmax, half its
softcapped probabilities. A drafted token only matters while the drafts before it were right, so
later steps weigh less, and less again where the target's own choice differs from the text. All
schedules follow the wall clock.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.corpus import Sampler, held_out_windows
from training.drafter import DRAFTER_SIZE, Drafter, drafter_places, shared_of
from training.target import Size, Target
from training.train_target import lr_share, make_optimizers, report, set_lr

POOLS = {"code": 0.82, "tests": 0.08, "chat": 0.10}
STEP_WEIGHTS = (1.0, 0.8, 0.6, 0.5)
MISS_SHARE = 0.2
UNROLLED = 1  # windows of a batch that are drafted K deep; the others train the first step
SAVE_EVERY_S = 200.0


def load_target(path: Path) -> Target:
    """Return the trained target, rounded to the bfloat16 it is exported in, without gradients."""
    target = Target(Size())
    state = torch.load(path, weights_only=True)["model"]
    target.load_state_dict({name: w.bfloat16().float() for name, w in state.items()})
    return target.requires_grad_(False)


def shift(x: Tensor, places: int) -> Tensor:
    """Return x with row n holding what row n + places held; the last rows repeat."""
    return torch.cat([x[:, places:], x[:, -1:].expand(-1, places, *x.shape[2:])], dim=1)


def unrolled_loss(
    target: Target, drafter: Drafter, ids: Tensor, step_weights: Sequence[float]
) -> Tensor:
    """Return the weighted loss of unrolled draft steps over windows [B, T]."""
    B, T = ids.shape
    by_type = drafter_places(drafter.size, T)
    with torch.no_grad():
        memory = target.memory(ids)
        probs = target.logits(memory.hidden).softmax(-1)
        choice, embedded, shared = probs.argmax(-1), target.embed(ids), shared_of(memory)
        missed = (choice != shift(ids, 1)).float()
        hidden = F.pad(memory.hidden, (0, 0, 1, 0))[:, :-1]
    weight = (torch.arange(T) >= 1).float().repeat(B, 1)
    total = torch.zeros(())
    for k, step_weight in enumerate(step_weights):
        if k:
            weight = weight * (1 - (1 - MISS_SHARE) * shift(missed, k - 1))
            weight = weight * (torch.arange(T) < T - k)
        state, hidden = drafter.step(shift(embedded, k), hidden, shared, by_type)
        total += step_weight * drafter.loss(state, shift(probs, k), shift(choice, k), weight)
    return total


@torch.no_grad()
def accepted_counts(target: Target, drafter: Drafter, texts: Tensor) -> Tensor:
    """Return [B, T]: how many of row n's K drafts in turn equal the text, as greedy text accepts.

    Rows that would draft past the end count what is inside.
    """
    T = texts.shape[1]
    window = target.size.window
    ids = F.pad(texts, (0, -T % window))
    alive = torch.ones(ids.shape, dtype=torch.bool)
    counts = torch.zeros(ids.shape, dtype=torch.long)
    for k, drafts in enumerate(draft_rows(target, drafter, ids)):
        alive = alive & (drafts == shift(ids, k + 1)) & (torch.arange(ids.shape[1]) < T - k - 1)
        counts += alive
    return counts[:, :T]


def draft_rows(target: Target, drafter: Drafter, ids: Tensor) -> Iterator[Tensor]:
    """Yield the drafts [B, T] of every row by step, each fed the text's own tokens."""
    by_type = drafter_places(drafter.size, ids.shape[1])
    memory, embedded = target.memory(ids), target.embed(ids)
    hidden, shared = F.pad(memory.hidden, (0, 0, 1, 0))[:, :-1], shared_of(memory)
    for k in range(len(STEP_WEIGHTS)):
        state, hidden = drafter.step(shift(embedded, k), hidden, shared, by_type)
        yield drafter.logits(state).argmax(-1)


@torch.no_grad()
def agreement(target: Target, drafter: Drafter, ids: Tensor) -> list[float]:
    """Return, by draft step, the share of drafts equal to the target's choice, teacher-forced.

    Step 1 counts all rows n >= 1; step k counts rows whose earlier drafts all were right and whose
    text continues with them, which is when a verify would reach step k.
    """
    T = ids.shape[1]
    choice = target(ids).argmax(-1)
    rows = torch.arange(T)
    reached = (rows >= 1).expand(ids.shape)
    shares = []
    for k, drafts in enumerate(draft_rows(target, drafter, ids)):
        reached = reached & (rows < T - k)
        right = drafts == shift(choice, k)
        shares.append((right & reached).sum().item() / max(1, reached.sum().item()))
        reached = reached & right & (shift(choice, k) == shift(ids, k + 1))
    return shares


def report_agreement(
    progress: dict, target: Target, drafter: Drafter, windows: Tensor, rows: int
) -> None:
    """Print the mean agreement over held-out windows."""
    with torch.compiler.set_stance("force_eager"):
        parts = [agreement(target, drafter, part) for part in windows.split(rows)]
    means = torch.tensor(parts).mean(0).tolist()
    report(progress, **{f"agreement_{k + 1}": share for k, share in enumerate(means)})


def train(args: argparse.Namespace) -> None:
    """Train until the time is spent; write drafter.pt and one JSON line per report."""
    torch.manual_seed(args.seed)
    target = load_target(args.out / "target.pt")
    drafter = Drafter(DRAFTER_SIZE, target.size.hidden)
    sampler = Sampler(args.out, POOLS, args.seed)
    sample = torch.from_numpy(sampler.batch(16, args.length))[:, :-1]
    drafter.initialise(target, target.memory(sample).hidden)
    if (args.out / "drafter.pt").exists():
        drafter.load_state_dict(torch.load(args.out / "drafter.pt", weights_only=True)["model"])
    optimizers = make_optimizers(drafter)
    held_out = torch.from_numpy(held_out_windows(args.out, 16, args.length))[:, :-1]
    progress = {"step": 0, "spent_s": 0.0, "tokens": 0}
    report_agreement(progress, target, drafter, held_out, args.batch)
    if args.compile:
        target.compile_parts()
        drafter.compile_parts()
    budget_s, start, saved_s, losses = args.minutes * 60, time.monotonic(), 0.0, []
    while (spent_s := time.monotonic() - start) < budget_s:
        set_lr(optimizers, args.peak * lr_share(progress["step"], spent_s / budget_s))
        ids = torch.from_numpy(sampler.batch(args.batch, args.length))[:, :-1]
        unrolled, single = ids[:UNROLLED], ids[UNROLLED:]
        loss = unrolled_loss(target, drafter, unrolled, STEP_WEIGHTS)
        loss = loss + unrolled_loss(target, drafter, single, STEP_WEIGHTS[:1])
        loss.backward()
        nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        progress = {
            "step": progress["step"] + 1,
            "spent_s": spent_s,
            "tokens": progress["tokens"] + ids.numel(),
        }
        if progress["step"] % args.report_every == 0:
            report(progress, loss=torch.stack(losses).mean().item())
            losses = []
        if spent_s - saved_s > SAVE_EVERY_S:
            saved_s = spent_s
            torch.save({"model": drafter.state_dict()}, args.out / "drafter.pt")
            report_agreement(progress, target, drafter, held_out, args.batch)
    torch.save({"model": drafter.state_dict()}, args.out / "drafter.pt")
    report_agreement(progress, target, drafter, held_out, args.batch)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=23)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--peak", type=float, default=1.0, help="share of the peak rates")
    parser.add_argument("--report-every", type=int, default=50)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
