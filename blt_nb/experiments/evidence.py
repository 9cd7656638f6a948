"""Which trials decide the paper's claims, and how their rows are compared"""

# %% imports
import math
from statistics import NormalDist

import numpy as np
import pandas as pd

from .runs import Trial

# %% trials
BUDGETS = {"ci": (3e9,), "laptop": (3e12, 1.2e13, 4.8e13), "gpu": (1e15, 4e15, 1.6e16)} # training FLOPs, cutting included
SEEDS = {"ci": (0,), "laptop": (0, 1, 2), "gpu": (0, 1, 2)}
RATES = {"ci": (4e-3,), "laptop": (1.5e-3, 3e-3, 6e-3), "gpu": (2.5e-3, 5e-3, 1e-2)}

def trials(
    preset: str, # "ci", "laptop" or "gpu"
) -> list[Trial]: # what matters most comes first
    "Rivals with and without n-grams, and patches at matched lengths: for each budget the middle rate, then seeds, then the rates around it."
    budgets, seeds, rates = BUDGETS[preset], SEEDS[preset], RATES[preset]
    middle, made = rates[len(rates) // 2], []
    def add(part, flops, lr=middle, seed=0, **more):
        made.append(Trial(part=part, flops=flops, lr=lr, seed=seed, preset=preset, **more))
    rivals = [dict(family=family, ngrams=ngrams) for ngrams in (True, False) for family in ("blt", "byte", "bpe")]
    for flops in reversed(budgets):
        for rival in rivals: add("rivals", flops, **rival)
    for seed in seeds[1:]:
        for rival in rivals[:3]: add("rivals", budgets[-1], seed=seed, **rival)
    for patcher in ("entropy", "rise", "space", "static", "random"):
        for mean in ((None,) if patcher == "space" else (4, 6, 8)):
            for seed in seeds: add("placement", budgets[0], seed=seed, family="blt", patcher=patcher, mean_patch=mean)
    for flops in budgets:
        for lr in rates:
            if lr != middle:
                for rival in rivals[:3]: add("rates", flops, lr, **rival)
    return made

# %% paired
def paired(
    table: pd.DataFrame, # rows with "seed" and "bpb"
    ours: pd.Series,     # bool per row: one side
    theirs: pd.Series,   # bool per row: the other
    level: float = 0.95, # of the interval
) -> dict: # mean difference, interval, seeds that both have, and in how many of them ours is lower
    "Differences in bits per byte, seed by seed.."
    a, b = (table[side].groupby("seed").bpb.mean() for side in (ours, theirs))
    gaps = (a - b).dropna()
    if not len(gaps): return dict(mean=math.nan, low=math.nan, high=math.nan, seeds=0, lower=0)
    n, mean = len(gaps), float(gaps.mean())
    half = math.inf
    if n > 1: half = float(gaps.std(ddof=1)) / math.sqrt(n) * student(n - 1, level)
    return dict(mean=mean, low=mean - half, high=mean + half, seeds=n, lower=int((gaps < 0).sum()))

def student(
    freedom: int,  # degrees of freedom
    level: float,  # of the interval
) -> float: # how many standard errors the interval reaches to either side
    "Quantile of Student's t, by integrating its density."
    x = np.linspace(0, 200, 400_001)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = constant * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    reached = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x))])
    return float(x[np.searchsorted(reached, level / 2)]) if freedom < 200 else NormalDist().inv_cdf(0.5 + level / 2)
