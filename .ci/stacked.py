"""Does a second level help? Every run is a row of `data/results/stacked.csv`; those that are there already are left out.

    make stacked [WORKERS=N]

Grown models go on from the committed one-level BLT of the running preset, the others start from scratch; U is what the reader in the committed two-level BLT says. What is compared has spent equally many training FLOPs."""
import argparse
import copy
import dataclasses
import math
import multiprocessing
import os
import sys
import time
import traceback
from types import SimpleNamespace

import torch

from blt_nb.data import Loader, fingerprint
from blt_nb.evaluation import Table, cache_folder, on_its_gpu, patcher_key, remembered
from blt_nb.model import BLT, Level, PatchedLoader, blt_config, flops_per_byte, get_blt, mean_lengths, silenced, training_flops
from blt_nb.patching import StaticPatcher, calibrate
from blt_nb.stacked import CONTROLS, ControlPatcher, SurprisalPatcher, SurprisalReader, get_stacked, stack, stacked_config, surprisal_reader
from blt_nb.training import bits_per_byte, fit, folder_of, hardware, load_splits, preset, preset_name

STEPS = {"ci": 8, "laptop": 600, "gpu": 600}[preset_name()]  # of the one-level model; the others spend as many FLOPs
SEEDS = (0, 1, 2)
RULES = ("U high", "U risen", "every n-th", *CONTROLS)
SETTINGS = {  # peak learning rates, and what differs from the package's models
    "grown": dict(lr=1e-3),  # on top of the committed one-level model: what goes on from a training takes smaller steps
    "scratch": dict(lr=preset("stacked").lr),
    "scratch, no norm": dict(lr=preset("stacked").lr, norm=False),
    "scratch, one pace": dict(lr=preset("stacked").lr, pace=1.0),  # networks inside a level learn as fast as those outside
    "scratch, one rate": dict(lr=5e-3, scaled=False),  # for all parameters
    "grown, new parts faster": dict(lr=1e-3, fresh=3.0),  # three times as fast as what was trained before
    "long windows": dict(lr=preset("stacked").lr, longer=4),  # from scratch, on fewer and longer pieces of text
}


BLOCKS = {"one level": 0, "one level, one block more": 1, "one level, one block fewer": -1}  # of the latent transformer


@dataclasses.dataclass(frozen=True)
class Run:
    "One row of the table."
    model: str               # "one level" (perhaps with a block more or fewer, see `BLOCKS`), "two levels" or "three levels"
    rule: str = ""           # what cuts the innermost patches
    asked: float = math.nan  # their mean length
    seed: int = 0
    budgets: int = 1         # training FLOPs, in units of those of `STEPS` steps of the one-level model
    setting: str = "grown"

    @property
    def name(self):
        return ", ".join(str(part) for part in (self.setting, self.model, self.rule, self.asked, self.seed, self.budgets) if part == part and part != "")


def runs():
    "What to run, the most telling first."
    found = []
    for seed in SEEDS:
        for setting in ("grown", "scratch"):
            found += [Run(model, seed=seed, setting=setting) for model, more in BLOCKS.items() if setting == "scratch" or more >= 0]
            found += [Run("two levels", rule, 4.0, seed, setting=setting) for rule in RULES]
        found += [Run(model, seed=seed, budgets=4, setting="scratch") for model in BLOCKS]
        found += [Run("two levels", rule, 4.0, seed, 4, "scratch") for rule in RULES if rule != "U risen"]
        for setting in ("scratch, no norm", "scratch, one pace", "scratch, one rate"):
            found += [Run("one level", seed=seed, setting=setting), Run("two levels", "U high", 4.0, seed, setting=setting)]
        found += [Run("two levels", rule, mean, seed, setting="scratch") for mean in (2.0, 6.0, 8.0) for rule in ("U high", "every n-th")]
        found += [Run("two levels", "U high", 4.0, seed, setting="grown, new parts faster")]
        found += [Run("one level", seed=seed, budgets=2, setting="long windows")]
        found += [Run("two levels", rule, 4.0, seed, 2, "long windows") for rule in ("U high", "every n-th")]
        found += [Run("three levels", "U high", 4.0, seed, 2), Run("one level", seed=seed, budgets=2), Run("two levels", "U high", 4.0, seed, 2)]
    return sorted(found, key=lambda r: -r.budgets)  # long ones first


def data_of(setting):
    "Window and batch size."
    data, longer = preset("data"), SETTINGS[setting].get("longer", 1)
    return SimpleNamespace(window=longer * data.window, batch_size=data.batch_size // longer)


def loader(blt, split, seed, setting="grown"):
    data = data_of(setting)
    return PatchedLoader(Loader(split, data.window, data.batch_size, seed), remembered(blt.segment, patcher_key(blt.patchers)))


def reader_for(blt, seed):
    "What says how uncertain a model is: for the committed one-level model the committed one, for others trained now."
    if len(blt.patchers) == 1:
        patcher = get_stacked().patchers[1].to(next(blt.parameters()).device)
        return SurprisalReader(patcher.maker, patcher.head)
    return surprisal_reader(blt, loader(blt, load_splits()[0], seed + 2), seed)


def patcher_for(rule, mean, blt, seed, setting):
    "What cuts the innermost patches of `blt` by a rule, calibrated to a mean length on training text."
    if rule == "every n-th":
        return StaticPatcher(round(mean))
    head, longest, batches = preset("head"), max(preset("stacked").max_group, 4 * round(mean)), loader(blt, load_splits()[0], seed + 2, setting)
    if rule.startswith("U"):
        reader = reader_for(blt, seed)
        patcher = SurprisalPatcher(reader.maker, reader.head, max_length=longest)
    else:
        patcher = ControlPatcher(rule, blt.patchers[0], max_length=longest)
    device = next(blt.parameters()).device
    cut = [(ids.to(device), None, [p.to(device) for p in patches]) for ids, patches in (batches.batch(head.steps + head.own_steps + i) for i in range(32))]
    return calibrate(patcher.to(device), cut, mean, "rise" if rule == "U risen" else "threshold")


def fresh(config, patchers, setting, seed):
    "A model with random weights, as a setting has it."
    if "norm" in SETTINGS[setting]:
        config.levels = [dataclasses.replace(level, norm=SETTINGS[setting]["norm"]) for level in config.levels]
    torch.manual_seed(seed)
    blt = BLT(config, copy.deepcopy(list(patchers)))
    for level in blt.modules():
        if isinstance(level, Level) and "pace" in SETTINGS[setting]:
            level.inner.pace = SETTINGS[setting]["pace"]
    return blt


def one_level(r, trained):
    "The one-level model of a run, perhaps with a block more, which does nothing at first where the others are trained, or with one fewer."
    config, more = copy.deepcopy(trained.config) if r.setting == "grown" else blt_config(), BLOCKS[r.model]
    config.latent = dataclasses.replace(config.latent, layers=config.latent.layers + more)
    blt = fresh(config, trained.patchers, r.setting, r.seed)
    if r.setting == "grown":
        weights = blt.state_dict() | trained.state_dict()
        for name in ("attention.out.weight", "mlp.down.weight") if more else ():
            weights[f"level.inner.blocks.{config.latent.layers - 1}.{name}"].zero_()
        blt.load_state_dict(weights)
    return blt


def grown(blt, patcher, setting, again):
    "A level more around the latent transformer of a trained model, whose new parts may learn faster. What is to grow again needs two blocks."
    latent = stacked_config().latent
    blt = stack(blt, patcher, dataclasses.replace(latent, layers=max(latent.layers, 1 + again)))
    level = blt.level
    while isinstance(level.inner, Level):
        level = level.inner
    for part in (level.encoder.pool, level.decoder.unpools, level.decoder.spread, level.inner):
        part.pace = getattr(part, "pace", 1.0) * SETTINGS[setting].get("fresh", 1.0)
    return blt


def latent_worth(blt, window):
    "How many more bits a byte of some validation text costs when what the innermost transformer says is replaced by zeros."
    valid = load_splits()[1]
    some = valid.select(range(0, len(valid), 8))
    with silenced(blt):
        alone = bits_per_byte(blt, some, window)
    return alone - bits_per_byte(blt, some, window)


def train_for(blt, budget, r):
    "Train for a budget of FLOPs; what was spent and seen."
    train, data = load_splits()[0], data_of(r.setting)
    sample = train.select(range(0, len(train), max(1, len(train) // 200)))
    each = training_flops(blt, mean_lengths(blt, sample, data.window), data.window) * data.batch_size * (data.window - 1)
    steps = max(1, round(budget / each))
    blt.requires_grad_(True).patchers.requires_grad_(False)
    history = fit(blt, loader(blt, train, r.seed + 100, r.setting), steps, SETTINGS[r.setting]["lr"], title=r.name, scaled=SETTINGS[r.setting].get("scaled", True))
    blt.eval()
    return dict(steps=steps, training_flops=steps * each, bytes_seen=int(history.bytes.iloc[-1]), seconds=float(history.seconds.iloc[-1]))


def run(r):
    "Train and score; the row."
    _, valid = load_splits()
    device, began, data = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.perf_counter(), preset("data")
    trained, window = get_blt().to(device), data_of(r.setting).window
    budget = r.budgets * STEPS * data.batch_size * (data.window - 1) * training_flops(trained, mean_lengths(trained, valid, data.window), data.window)
    row = dict(name=r.name, **dataclasses.asdict(r), steps=0, training_flops=0.0, bytes_seen=0, seconds=0.0)
    depths = {"two levels": 1, "three levels": 2}.get(r.model, 0)
    blt = trained if depths else one_level(r, trained).to(device)
    for depth in range(1, max(1, depths) + 1):
        if depths:
            patcher = patcher_for(r.rule, r.asked, blt.eval(), r.seed, r.setting)
            torch.manual_seed(r.seed)
            blt = grown(blt, patcher, r.setting, depth < depths) if r.setting.startswith("grown") else fresh(stacked_config(), [*trained.patchers, patcher], r.setting, r.seed)
            blt = blt.to(device)
        for name, value in train_for(blt, budget / max(1, depths), r).items():
            row[name] += value
    lengths = mean_lengths(blt, valid, window)
    makers = [p.maker.config for p in blt.patchers if isinstance(p, SurprisalPatcher)]
    return row | dict(bpb=bits_per_byte(blt, valid, window), flops_per_byte=sum(flops_per_byte(blt.config, lengths, window).values()),
                      cutting_flops_per_byte=sum(sum(flops_per_byte(maker, lengths[:len(maker.levels)], window).values()) for maker in makers),
                      **{f"mean_{i + 1}": length for i, length in enumerate(lengths)}, parameters=sum(q.numel() for q in blt.parameters() if q.requires_grad),
                      lr=SETTINGS[r.setting]["lr"], latent_worth=latent_worth(blt, window), window=window, all_seconds=round(time.perf_counter() - began, 1), preset=preset_name(),
                      corpus=fingerprint(load_splits()[0]), hardware=hardware(), torch=torch.__version__)


def table():
    return Table(folder_of("results") / "stacked.csv", cache_folder().parent / "stacked")


def work(deadline, threads):
    "Run what is not there and nobody is at."
    torch.set_num_threads(threads)
    rows = table()
    for r in runs():
        if time.time() > deadline:
            return
        with rows.claim(r.name) as ours:
            if not ours:
                continue
            try:
                row = run(r)
                rows.append(row)
                print(f"{r.name}: {row['bpb']:.4f} bpb, {row['all_seconds']} s", flush=True)
            except Exception:
                rows.lock(r.name, "failed").write_text(traceback.format_exc())
                print(f"{r.name}: failed\n{traceback.format_exc()}", file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=math.inf, help="start no run after so many seconds")
    asked = parser.parse_args()
    get_stacked()  # and what it grew from: made before the workers start
    for file in table().locks.glob("*.failed"):
        file.unlink()
    os.environ["TQDM_DISABLE"] = "1"
    context, threads = multiprocessing.get_context("spawn"), max(1, (os.cpu_count() or 1) // asked.workers)
    processes = [context.Process(target=work, args=(time.time() + asked.limit, threads)) for _ in range(asked.workers)]
    for number, process in enumerate(processes):
        with on_its_gpu(number):
            process.start()
    for process in processes:
        process.join()
    left = len(runs()) - len(set(table().read().index) & {r.name for r in runs()})
    print(f"{left} of {len(runs())} rows are left")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
