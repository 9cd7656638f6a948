"""Does a second level help? Every run is a row of `data/results/stacked.csv`; those that are there already are left out.

    python .ci/stacked.py [--workers N] [--limit SECONDS]

All runs go on from the committed one-level BLT of the running preset and spend equally many training FLOPs."""
import argparse
import copy
import dataclasses
import math
import os
import subprocess
import sys
import time

import pandas as pd
import torch
from filelock import FileLock
from torch import nn

from blt_nb.data import OFFSET, Loader, data_dir, fingerprint, load_corpus
from blt_nb.entropy import ngram_hashes
from blt_nb.model import BLT, PatchedLoader, fit_blt, flops_per_byte, get_blt, mean_lengths, training_flops
from blt_nb.patching import StaticPatcher, ThresholdPatcher, calibrate
from blt_nb.stacked import SurprisalPatcher, stack, train_surprisal_head
from blt_nb.training import bits_per_byte, folder_of, hardware, load_splits, preset, preset_name
from blt_nb.transformer import TransformerConfig

STEPS = {"ci": 8, "laptop": 600, "gpu": 600}[preset_name()]  # of the one-level model; the others spend as many FLOPs
LR = 2e-3  # peak; below the 5e-3 of the first training, which these runs go on from
SEEDS = (0, 1, 2)
RULES = ("U high", "U risen", "every n-th", "random", "punctuation", "byte entropy")


class EndScores(ThresholdPatcher):
    "Cuts patches by a score of what stands at their last byte: a control, which knows nothing of the latent transformer."

    def __init__(self, score, threshold=None, max_length=None):
        super().__init__(threshold, None, max_length)
        self.score = score  # (B, T) ids -> (B, T)

    @torch.no_grad()
    def scores(self, ids, lengths=None, below=()):
        ends = (below[-1].lengths.cumsum(1) - 1).clamp(0, ids.shape[1] - 1)
        return self.score(ids).gather(1, ends)


def noise(ids):
    "A number in 0..1 that the last eight bytes and the place in the window decide: random, and the same at every call."
    place = torch.arange(ids.shape[1], device=ids.device) * 7919
    return ((ngram_hashes(ids, 8, 2**20) + place) * 2654435761 % 2**20).float() / 2**20


def punctuation(ids):
    "Line ends, then sentence ends, then other punctuation, then spaces, then all else; noise decides among equals."
    score = torch.zeros(ids.shape, device=ids.device)
    for marks, value in ((b" ", 1), (b",;:()[]{}\"'`=-", 2), (b".!?", 3), (b"\n", 4)):
        for mark in marks:
            score = torch.where(ids == mark + OFFSET, float(value), score)
    return score + 0.5 * noise(ids)


def longer(blt):
    "The one-level model with one block more in its latent transformer, which does nothing at first."
    config = copy.deepcopy(blt.config)
    config.latent = dataclasses.replace(config.latent, layers=config.latent.layers + 1)
    grown = BLT(config, copy.deepcopy(list(blt.patchers)))
    weights = grown.state_dict() | blt.state_dict()
    last = f"level.inner.blocks.{config.latent.layers - 1}."
    for name in (last + "attention.out.weight", last + "mlp.down.weight"):
        weights[name] = torch.zeros_like(weights[name])
    grown.load_state_dict(weights)
    return grown


def patcher_for(rule, mean, blt, train, seed):
    "What cuts the innermost patches of `blt` by a rule, calibrated to a mean length on training text."
    data, head = preset("data"), preset("head")
    longest = max(preset("stacked").max_group, 4 * round(mean))
    if rule == "every n-th":
        return StaticPatcher(round(mean))
    loader = PatchedLoader(Loader(train, data.window, data.batch_size, seed + 2), blt.segment)
    if rule.startswith("U"):
        trained, _ = train_surprisal_head(blt, loader, head.hidden, head.steps, head.lr, seed)
        patcher = SurprisalPatcher(blt.reader(), trained, max_length=longest)
    else:
        score = {"random": noise, "punctuation": punctuation, "byte entropy": lambda ids: blt.patchers[0].scores(ids)}[rule]
        patcher = EndScores(score, max_length=longest)
    device = next(blt.parameters()).device
    batches = []
    for i in range(32):
        ids, patches = loader.batch(head.steps + i)
        batches.append((ids.to(device), None, [p.to(device) for p in patches]))
    return calibrate(patcher.to(device), batches, mean, "rise" if rule == "U risen" else "threshold")


def experiments():
    "What to run, the most telling first: (model, rule, mean length, seed, budgets)."
    rows = [(model, "", math.nan, seed, 1) for seed in SEEDS for model in ("one level", "one level, one block more")]
    rows += [("two levels", rule, 4.0, seed, 1) for seed in SEEDS for rule in RULES]
    rows += [("three levels", "U high", 4.0, seed, 2) for seed in SEEDS]
    rows += [(model, rule, mean, seed, 2) for seed in SEEDS for model, rule, mean in (("one level", "", math.nan), ("two levels", "U high", 4.0))]
    rows += [("two levels", rule, mean, seed, 1) for seed in SEEDS for mean in (2.0, 6.0, 8.0) for rule in ("U high", "every n-th")]
    return rows


def key(row):
    return tuple("" if isinstance(value, float) and math.isnan(value) else value for value in row)


def table():
    return folder_of("results") / "stacked.csv"


def done():
    if not table().is_file():
        return set()
    rows = pd.read_csv(table(), keep_default_na=False)
    return {(r.model, r.rule, "" if r.asked == "" else float(r.asked), int(r.seed), int(r.budgets)) for r in rows.itertuples()}


def lock():
    (data_dir() / "cache").mkdir(parents=True, exist_ok=True)
    return FileLock(str(data_dir() / "cache" / "stacked.lock"))


def enter(row):
    with lock():
        table().parent.mkdir(parents=True, exist_ok=True)
        rows = pd.read_csv(table()).to_dict("records") if table().is_file() else []
        part = table().with_suffix(".part")
        pd.DataFrame([*rows, row]).to_csv(part, index=False)
        os.replace(part, table())


def train_on(blt, train, valid, budget, seed, title):
    "Train for a budget of FLOPs; what was spent and seen."
    data = preset("data")
    sample = train.select(range(0, len(train), max(1, len(train) // 200)))
    each = training_flops(blt, mean_lengths(blt, sample, data.window), data.window) * data.batch_size * (data.window - 1)
    steps = max(1, round(budget / each))
    history = fit_blt(blt, train, valid, steps, LR, seed + 100, title)
    return steps, steps * each, int(history.bytes.iloc[-1]), float(history.seconds.iloc[-1])


def run(model, rule, mean, seed, budgets):
    train, valid = load_splits()
    data, p = preset("data"), preset("stacked")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    one = get_blt().to(device)
    one.patchers.eval()
    budget = STEPS * data.batch_size * (data.window - 1) * training_flops(one, mean_lengths(one, valid, data.window), data.window)
    torch.manual_seed(seed)
    latent = TransformerConfig(width=p.latent_width, layers=p.latent_layers, heads=p.latent_heads)
    began = time.perf_counter()
    if model == "one level":
        blt, steps, spent, seen, seconds = copy.deepcopy(one), 0, 0.0, 0, 0.0
    elif model == "one level, one block more":
        blt, steps, spent, seen, seconds = longer(one), 0, 0.0, 0, 0.0
    else:
        blt, steps, spent, seen, seconds = stack(one, patcher_for(rule, mean, one, train, seed), latent), 0, 0.0, 0, 0.0
    blt = blt.to(device).requires_grad_(True)
    blt.patchers.requires_grad_(False)
    parts = [budget] * 2 if model == "three levels" else [budget * budgets]
    for i, part in enumerate(parts):
        if i:
            blt = stack(blt, patcher_for(rule, mean, blt.eval(), train, seed), latent).to(device).requires_grad_(True)
            blt.patchers.requires_grad_(False)
        more = train_on(blt, train, valid, part, seed, f"{model} {rule}")
        steps, spent, seen, seconds = steps + more[0], spent + more[1], seen + more[2], seconds + more[3]
    blt.eval()
    lengths = mean_lengths(blt, valid, data.window)
    flops = sum(flops_per_byte(blt.config, lengths, data.window).values())
    maker = 0.0  # what the frozen copies that cut the text cost beside it
    for patcher in blt.patchers:
        if isinstance(patcher, SurprisalPatcher):
            maker += sum(flops_per_byte(patcher.maker.config, lengths[:len(patcher.maker.config.levels)], data.window).values())
    enter(dict(model=model, rule=rule, asked=mean, seed=seed, budgets=budgets, bpb=bits_per_byte(blt, valid, data.window),
               flops_per_byte=flops, cutting_flops_per_byte=maker, training_flops=spent, steps=steps, bytes_seen=seen, lr=LR,
               **{f"mean_{i + 1}": length for i, length in enumerate(lengths)}, parameters=sum(q.numel() for q in blt.parameters() if q.requires_grad),
               seconds=round(seconds, 1), all_seconds=round(time.perf_counter() - began, 1), preset=preset_name(),
               corpus=fingerprint(load_corpus("docs")), hardware=hardware(), torch=torch.__version__))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=math.inf, help="start no run after so many seconds")
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    began = time.monotonic()
    if asked.worker is None and asked.workers > 1:
        command = [sys.executable, __file__, "--workers", str(asked.workers), "--limit", str(asked.limit), "--worker"]
        running = [subprocess.Popen([*command, str(i)]) for i in range(asked.workers)]
        sys.exit(max(process.wait() for process in running))
    rows = experiments()
    failed = 0
    for row in rows[asked.worker or 0::asked.workers]:
        if time.monotonic() - began > asked.limit:
            break
        if key(row) in done():
            continue
        try:
            run(*row)
            print(*row, f"{time.monotonic() - began:.0f} s", flush=True)
        except Exception as error:
            failed += 1
            print(*row, f"failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
