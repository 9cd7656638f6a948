"""One runner for all tables of results: a trial is a dictionary of settings, a row is what came of it"""

# %% imports
import argparse
import copy
import dataclasses
import hashlib
import importlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock, Timeout

from ..data import Loader, data_dir, fingerprint, load_corpus, replacing, stream_of, user_path
from ..entropy import EntropyConfig, EntropyModel, NgramConfig, entropy_config
from ..model import BLT, BLTConfig, LevelConfig, PatchedLoader, ablate_latent, mean_lengths
from ..patching import EntropyPatcher, Patcher, SpacePatcher, StaticPatcher, calibrate
from ..stacked import ControlPatcher, LastByteEntropyPatcher, LengthPatcher, NextPatchEntropyPatcher, NoveltyPatcher
from ..stacked import train_next_patch_entropy_model
from ..training import PRESETS, bits_per_byte, fit, hardware, preset_name, round_bf16
from ..transformer import TransformerConfig
from .tokens import BPEPatcher, TokenConfig, TokenModel, TokenStream, token_bits_per_byte, train_bpe

# %% trial
@dataclass(frozen=True)
class Trial:
    "All that a row depends on. What isn't said is that of the preset."
    family: str                # "byte", "bpe" (transformers) or "blt"
    flops: float               # training FLOPs to spend, cutting included
    lr: float                  # peak learning rate
    seed: int = 0              # of weights and data order
    part: str = ""             # what the row is for
    preset: str = field(default_factory=preset_name)
    corpus: str = "books"      # to train on; scored on the validation split of `books`
    window: int | None = None  # ids read together, in bytes
    batch_bytes: int | None = None # bytes of a batch
    ngrams: bool = True        # hash n-grams of bytes, or of tokens
    patcher: str = "entropy"   # "entropy", "rise", "space", "bpe", "static" or "random"
    mean_patch: float | None = None
    levels: tuple = ()         # rules of the levels above bytes: "novelty", "U", "random", "every", "punctuation", "length", "byte entropy"
    sizes: tuple = ()          # pairs (name, value) that replace sizes of the preset's row, for example ("latent_layers", 4)

    @property
    def key(self) -> str: # 16 hex digits
        "Names the row: changes with any setting, the preset's sizes and the corpus."
        sizes = {name: row for name, row in PRESETS[self.preset].items()}
        made_of = json.dumps([dataclasses.asdict(self), sizes, corpus_fingerprint(self.corpus)], sort_keys=True)
        return hashlib.sha256(made_of.encode()).hexdigest()[:16]

    def size(self, stage: str) -> dict:
        "The sizes of a stage of the preset, with this trial's own."
        return PRESETS[self.preset][stage] | dict(self.sizes)

@cache
def corpus_fingerprint(corpus: str) -> str: return fingerprint(load_corpus(corpus))

@cache
def stream(corpus: str): return stream_of(load_corpus(corpus))

# %% store
class Results:
    "A table of rows in a CSV file, one per trial; several processes may add to it."
    def __init__(self,
        name: str,                   # of the table
        folder: Path | None = None,  # None: `data/results`
    ):
        self.file = (folder or data_dir() / "results") / f"{name}.csv"

    def read(self) -> pd.DataFrame: # one row per trial, indexed by key; empty if there is none yet
        "The rows so far."
        return pd.read_csv(self.file).set_index("key") if self.file.is_file() else pd.DataFrame()

    def lock(self,
        name: str,
        timeout: float = -1, # seconds
    ) -> FileLock:
        "A lock that dies with its process."
        folder = data_dir() / "cache" / "experiments"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock", timeout=timeout)

    def add(self,
        row: dict, # with "key"
    ) -> None:
        "Add a row, or replace the one with its key."
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.lock(self.file.stem):
            rows = [] if not self.file.is_file() else pd.read_csv(self.file).to_dict("records")
            rows = [old for old in rows if old["key"] != row["key"]] + [row]
            with replacing(self.file) as new: pd.DataFrame(rows).to_csv(new, index=False)

# %% parts
@cache
def entropy_model(
    preset: str,
    corpus: str,
) -> EntropyModel: # trained, in the cache
    "What cuts bytes in all trials of a preset and corpus."
    p, data = PRESETS[preset]["entropy"], PRESETS[preset]["data"]
    made_of = json.dumps([p, data, corpus_fingerprint(corpus)], sort_keys=True)
    folder = data_dir() / "cache" / "experiments" / f"entropy-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(0)
            model = EntropyModel(EntropyConfig(
                TransformerConfig(width=p["width"], layers=p["layers"], heads=p["heads"], window=p["attention"]),
                NgramConfig(sizes=p["ngram_sizes"], rows=p["ngram_rows"], width=p["ngram_width"])))
            fit(model, Loader(stream(corpus), data["window"], data["batch_size"]), p["steps"], p["lr"], title="entropy model",
                compile=torch.cuda.is_available())
            round_bf16(model).save_pretrained(folder)
    return EntropyModel.from_pretrained(folder)

@cache
def tokenizer(
    vocabulary: int,
    corpus: str,
):
    "Byte pair encoding learned from the first 20 MB or so of a corpus."
    texts, total = [], 0
    for row in load_corpus(corpus):
        if total > 2e7: break
        texts.append(row["text"])
        total += len(row["text"])
    return train_bpe(texts, vocabulary)

def byte_patcher(
    trial: Trial,
    batches: list, # of ids, to calibrate on
) -> Patcher:
    "What cuts bytes."
    mean, longest = trial.mean_patch or trial.size("blt")["mean_patch"], trial.size("blt")["max_patch"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if trial.patcher == "space": return SpacePatcher()
    if trial.patcher == "static": return StaticPatcher(round(mean))
    if trial.patcher == "bpe": return BPEPatcher(tokenizer(round(mean), trial.corpus).to_str())
    if trial.patcher == "random": return calibrate(ControlPatcher("random", max_length=longest), batches, mean)
    model = copy.deepcopy(entropy_model(trial.preset, trial.corpus)).to(device)
    rule = {"entropy": "threshold", "rise": "rise"}[trial.patcher]
    return calibrate(EntropyPatcher(model, max_length=longest), [batch.to(device) for batch in batches], mean, rule)

def group_patcher(
    rule: str,
    blt: BLT, # trained, one level less; its device counts
    loader: PatchedLoader, # its batches
    p: dict,  # sizes of the stacked level
) -> Patcher:
    "What cuts the patches of a BLT."
    device = blt.head.weight.device
    batches = [(ids.to(device), None, [q.to(device) for q in patches]) for ids, patches in map(loader.batch, range(8))]
    if rule == "every": return StaticPatcher(round(p["mean_group"]))
    if rule == "novelty": patcher = NoveltyPatcher(blt.without_patchers(), max_length=p["max_group"])
    elif rule == "U":
        head = train_next_patch_entropy_model(blt, loader, p["hidden"], p["head_steps"], p["head_lr"])[0].head
        patcher = NextPatchEntropyPatcher(blt.without_patchers(), head, max_length=p["max_group"])
    elif rule == "byte entropy": patcher = LastByteEntropyPatcher(copy.deepcopy(blt.patchers[0].model), max_length=p["max_group"])
    elif rule == "length": patcher = LengthPatcher(max_length=p["max_group"])
    else: patcher = ControlPatcher(rule, max_length=p["max_group"])
    return calibrate(patcher.to(device), batches, p["mean_group"])

# %% build
@dataclass
class Setup:
    "What a trial trains, and what it costs."
    model: torch.nn.Module
    loader: Loader | PatchedLoader
    flops: float            # of a forward pass, per byte
    cutting: float = 0.0    # FLOPs of cutting, per byte
    bytes_per_id: float = 1.0
    score: object = None    # corpus -> bits per byte

def build(
    trial: Trial,
    base: BLT | None = None, # trained, one level less than the trial's: what higher levels cut by
) -> Setup:
    "Model and batches of a trial."
    data = PRESETS[trial.preset]["data"]
    window = trial.window or data["window"]
    batch = max(1, (trial.batch_bytes or data["window"] * data["batch_size"]) // window)
    b = trial.size("blt")
    grams = NgramConfig(sizes=b["ngram_sizes"], rows=b["ngram_rows"], width=b["ngram_width"]) if trial.ngrams else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(trial.seed)
    if trial.family == "bpe":
        p = trial.size("tokens")
        tok = tokenizer(p["vocab"], trial.corpus)
        text = TokenStream(load_corpus(trial.corpus), tok)
        rate = text.bytes / len(text.ids)
        length = max(2, round(window / rate))
        model = TokenModel(TokenConfig(p["vocab"] + 4, TransformerConfig(width=p["width"], layers=p["layers"], heads=p["heads"]), grams))
        return Setup(model, Loader(text, length, batch, trial.seed), model.flops(length) / rate, 0.0, rate,
                     lambda texts: token_bits_per_byte(model, texts, tok, length))
    plain = Loader(stream(trial.corpus), window, batch, trial.seed)
    if trial.family == "byte":
        p = trial.size("byte")
        transformer = TransformerConfig(width=p["width"], layers=p["layers"], heads=p["heads"], window=p.get("attention"))
        model = EntropyModel(EntropyConfig(transformer, grams))
        return Setup(model, plain, model.flops(window), score=lambda texts: bits_per_byte(model, texts, window))
    local = dict(width=b["width"], heads=b["heads"], window=b["attention"])
    levels = [LevelConfig(TransformerConfig(layers=b["encoder_layers"], **local), TransformerConfig(layers=b["decoder_layers"], **local))]
    latent = dict(width=b["latent_width"], heads=b["latent_heads"])
    layers, patchers, s = b["latent_layers"], [byte_patcher(trial, [plain.batch(i) for i in range(8)])], trial.size("stacked")
    if trial.levels:
        patchers = [*copy.deepcopy(base.patchers), group_patcher(trial.levels[-1], base, PatchedLoader(plain, base.segment), s)]
        for _ in trial.levels:
            levels.append(LevelConfig(TransformerConfig(layers=s["encoder_layers"], **latent), TransformerConfig(layers=s["decoder_layers"], **latent)))
        latent, layers = dict(width=s["latent_width"], heads=s["latent_heads"]), s["latent_layers"]
    torch.manual_seed(trial.seed)
    model = BLT(BLTConfig(levels, TransformerConfig(layers=layers, **latent), grams), patchers).to(device)
    means = mean_lengths(model, load_corpus("books", "valid")["text"][:1], window)
    flops = model.flops(means, window)
    cutting = sum(value for name, value in flops.items() if name.startswith("cutting"))
    return Setup(model, PatchedLoader(plain, model.segment), sum(flops.values()) - cutting, cutting,
                 score=lambda texts: bits_per_byte(model, texts, window))

# %% run
def run_trial(
    trial: Trial,
    base: BLT | None = None, # see `build`
) -> tuple[dict, torch.nn.Module]: # the row, and the trained model
    "Train for the trial's FLOPs, and score. A run that diverges has no bpb, and that is a result too."
    began, setup = time.perf_counter(), build(trial, base)
    per_step = setup.loader.batch(0)
    ids = per_step if isinstance(per_step, torch.Tensor) else per_step[0]
    step_bytes = (ids.numel() - len(ids)) * setup.bytes_per_id
    steps = max(1, round(trial.flops / ((3 * setup.flops + setup.cutting) * step_bytes)))
    row = dict(key=trial.key, **{name: json.dumps(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(trial).items()},
               steps=steps, flops_per_byte=setup.flops, cutting_flops_per_byte=setup.cutting, bytes_per_id=setup.bytes_per_id,
               parameters=sum(p.numel() for p in setup.model.parameters() if p.requires_grad),
               fingerprint=corpus_fingerprint(trial.corpus), hardware=hardware(), torch=torch.__version__)
    valid = load_corpus("books", "valid")
    if trial.preset == "ci": valid = [text[:5000] for text in valid["text"][:1]]
    try: history = fit(setup.model, setup.loader, steps, trial.lr, title=trial.part or trial.family, compile=torch.cuda.is_available())
    except FloatingPointError: return row | dict(bpb=math.nan), setup.model
    round_bf16(setup.model)
    row |= dict(bytes_seen=round(history.bytes.iloc[-1] * setup.bytes_per_id), seconds=round(history.seconds.iloc[-1], 1), bpb=setup.score(valid))
    if isinstance(setup.model, BLT):
        for i, mean in enumerate(mean_lengths(setup.model, valid, ids.shape[1]), 1): row[f"mean_{i}"] = mean
        with ablate_latent(setup.model): row["bpb_without_latent"] = setup.score(valid)
    return row | dict(all_seconds=round(time.perf_counter() - began, 1)), setup.model

def run_with_base(
    trial: Trial,
    models: dict, # trained models of this process, by key
) -> dict: # the row
    "Run a trial, and first the trials with fewer levels that its cuts need."
    base = None
    if trial.levels:
        below = dataclasses.replace(trial, levels=trial.levels[:-1], seed=0, sizes=(), part="base")
        if below.key not in models: models[below.key] = run_trial(below, None if not below.levels else models.get("base"))[1].eval()
        base = models[below.key]
    return run_trial(trial, base)[0]

def work(
    table: str,          # a module of `blt_nb.experiments` with a function `trials`
    results: Results,
    deadline: float = math.inf, # seconds from now after which nothing new begins
) -> None:
    "Run the trials of a table that have no row yet and that nobody else is running."
    module, began, models = importlib.import_module(f"blt_nb.experiments.{table}"), time.perf_counter(), {}
    for trial in module.trials(preset_name()):
        if time.perf_counter() - began > deadline: return print("out of time: the rest is for another call", flush=True)
        if trial.key in results.read().index: continue
        try:
            with results.lock(f"trial-{trial.key}", timeout=0):
                if trial.key in results.read().index: continue
                row = run_with_base(trial, models)
                results.add(row)
                print(json.dumps({name: row.get(name) for name in ("part", "family", "patcher", "levels", "flops", "lr", "seed", "bpb", "seconds")}), flush=True)
        except Timeout: continue

def main(
    arguments: list[str] | None = None, # None: those of the command line
) -> None:
    "The command `python -m blt_nb.experiments.runs TABLE`."
    parser = argparse.ArgumentParser(prog="python -m blt_nb.experiments.runs", description="Run what a table of results lacks.")
    parser.add_argument("table", help="evidence or second_level")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", help="folder of the table; default: data/results")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after so many")
    given = parser.parse_args(arguments)
    if given.workers > 1:
        one = [sys.executable, "-m", "blt_nb.experiments.runs", given.table, "--seconds", str(given.seconds)]
        one += ["--out", given.out] if given.out else []
        threads = str(max(1, (os.cpu_count() or 1) // given.workers))
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        running = [subprocess.Popen(one, env=environment) for _ in range(given.workers)]
        if any([process.wait() for process in running]): sys.exit(1)
    else: work(given.table, Results(given.table, user_path(given.out) if given.out else None), given.seconds)

if __name__ == "__main__": main()
