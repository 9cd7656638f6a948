"""Trials of higher levels: where they start, where their blocks lie, and one level of equal cost beside them"""

# %% imports
from .runs import Trial

# %% trials
BUDGETS = {"ci": (3e9,), "laptop": (4.8e13,), "gpu": (2e15, 6e15, 1.8e16)} # training FLOPs, cutting included
RATE = {"ci": 4e-3, "laptop": 3e-3, "gpu": 5e-3}
RULES = ("novelty", "random", "every", "U", "punctuation", "length", "byte entropy")

def trials(
    preset: str, # "ci", "laptop" or "gpu"
) -> list[Trial]: # what matters most comes first
    "Two levels by each rule, one level with more latent blocks, three levels; at all budgets with three seeds at the largest."
    made, budgets = [], BUDGETS[preset]
    rules = RULES[:2] if preset == "ci" else RULES
    blocks = (3, 4, 5, 6) if preset == "gpu" else (2, 3)
    for seed in (0,) if preset == "ci" else (0, 1, 2):
        for flops in reversed(budgets):
            if seed and flops != budgets[-1]: continue
            shared = dict(family="blt", flops=flops, lr=RATE[preset], seed=seed, preset=preset)
            made += [Trial(part="two levels", levels=(rule,), **shared) for rule in rules]
            made += [Trial(part="one level", sizes=(("latent_layers", n),), **shared) for n in blocks]
            made += [Trial(part="three levels", levels=("novelty", "novelty"), **shared)] if preset != "ci" else []
    return made
