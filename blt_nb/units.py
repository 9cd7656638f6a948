"""Do boundaries fall where people put them? Boundaries of patches against gold phrases, clauses, sentences and paragraphs"""

# %% imports
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import conllu
import numpy as np
import pandas as pd
import torch

from .data import BOS_ID, OFFSET, eval_spans, stream_of, user_path
from .model import BLT
from .patching import Patcher, Patches
from .stacked import last_bytes

# %% gold
@dataclass
class GoldText:
    "A text and the places where people say that units start, in bytes of its UTF-8."
    name: str
    genre: str
    text: bytes
    starts: dict[str, np.ndarray] # "words", "discourse units", "sentences", "paragraphs" -> sorted offsets
    arcs: np.ndarray              # (A, 2) dependency arcs: where the two words start, the first one first

def read_conllu(
    path: str | Path, # a file in CoNLL-U
) -> list[GoldText]:
    "The texts of a treebank of Universal Dependencies. Words are spaced as its `SpaceAfter` says; a paragraph is a line."
    documents = []
    for sentence in conllu.parse(user_path(path).read_text(encoding="utf-8")):
        if "newdoc id" in sentence.metadata or not documents: documents.append([])
        documents[-1].append(sentence)
    return [gold_text(document) for document in documents]

def gold_text(
    document: Sequence[conllu.TokenList], # the sentences of a text
) -> GoldText:
    "One text, its words laid one after the other."
    text, arcs = b"", []
    starts = {"words": [], "discourse units": [], "sentences": [], "paragraphs": []}
    for sentence in document:
        if {"newpar", "newpar id", "newdoc id"} & set(sentence.metadata):
            text = text.rstrip(b" ") + b"\n" if text else text
            starts["paragraphs"].append(len(text))
        starts["sentences"].append(len(text))
        places, shared = {}, 0 # where each word starts; the last word of a token that holds several, such as "don't"
        for token in sentence:
            number, misc = token["id"], token["misc"] or {}
            if isinstance(number, tuple): # a token of several words, or an empty node, which isn't written
                if number[1] == ".": continue
                shared = number[2]
                places |= dict.fromkeys(range(number[0], shared + 1), len(text))
            elif number > shared: places[number] = len(text)
            elif "Discourse" not in misc: continue
            if "Discourse" in misc: starts["discourse units"].append(places[number])
            if isinstance(number, int) and number <= shared: continue
            starts["words"].append(len(text))
            text += token["form"].encode() + (b"" if misc.get("SpaceAfter") == "No" else b" ")
        heads = {token["id"]: token["head"] for token in sentence if isinstance(token["id"], int)}
        arcs += [sorted((places[word], places[head])) for word, head in heads.items() if head]
    about = document[0].metadata
    arcs = np.array([arc for arc in arcs if arc[0] != arc[1]], dtype=np.int64).reshape(-1, 2)
    return GoldText(about.get("newdoc id", ""), about.get("meta::genre", ""), text,
                    {unit: np.unique(np.array(offsets, dtype=np.int64)) for unit, offsets in starts.items()}, arcs)

# %% boundaries
@torch.no_grad()
def score_boundaries(
    gold: Sequence[GoldText],
    blt: BLT,                       # cuts the patches whose boundaries are judged
    rules: Mapping[str, Callable],  # name -> (ids, patches) -> (B, N) score of each patch, see `Patcher.scores`
    window: int = 512,              # ids read together; each boundary has at least half of that before it
) -> pd.DataFrame: # one row per boundary between innermost patches: text, where it is, what it hits, and each rule's score
    """Every boundary between the patches of some texts, with the score that each rule gives the patch before it.

    A boundary before a space counts as lying before the word that follows."""
    frames = []
    for number, text in enumerate(gold):
        stream, found = stream_of([text.text]), {}
        for first, scored, end in eval_spans(stream, window):
            ids = torch.tensor([[BOS_ID, *stream.ids[first:end].astype(int)]], device=blt.head.weight.device)
            patches = blt.segment(ids)
            scores = {name: rule(ids, patches)[0].float().cpu() for name, rule in rules.items()}
            last = last_bytes(patches)[0].tolist() # of each patch, in ids: the byte at `first` has id 1
            for n in range(1, len(last) - 1):
                at = first + last[n] # in bytes: the next patch starts here
                if at >= scored: found[at] = [float(values[n]) for values in scores.values()]
        at = np.array(sorted(found), dtype=np.int64)
        spaces = np.frombuffer(text.text + b"x", np.uint8)[at] == ord(" ")
        word = at + spaces
        crossed = ((text.arcs[:, :1] < word) & (text.arcs[:, 1:] >= word)).sum(0)
        frame = pd.DataFrame(dict(text=number, genre=text.genre, at=at, between_words=np.isin(word, text.starts["words"]), arcs=crossed))
        for unit in ("discourse units", "sentences", "paragraphs"): frame[unit] = np.isin(word, text.starts[unit])
        frame[list(rules)] = np.array([found[i] for i in at]).reshape(len(at), -1)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)

# %% judge
UNITS = ("discourse units", "sentences", "paragraphs")

def auc(
    scores: np.ndarray,
    hits: np.ndarray, # bool
) -> float: # 0.5: no better than chance, 1: every hit scores above every miss
    "Chance that a boundary at a unit's start scores above one that isn't."
    ranks = pd.Series(scores).rank().to_numpy()
    n = hits.sum()
    return float((ranks[hits].sum() - n * (n + 1) / 2) / (n * (len(hits) - n))) if 0 < n < len(hits) else float("nan")

def judge(
    boundaries: pd.DataFrame, # from `score_boundaries`
    rule: str,                # column of the scores
    every: float = 4.5,       # one boundary in so many is chosen, those that score highest
) -> dict[str, float]: # AUC, lift, precision, recall and F1 for each unit; arcs; share between words
    """How well a rule's boundaries fall where units start.

    Lift: share of the chosen boundaries that are at a unit's start, over that of all. Arcs: mean number of dependency arcs
    that a chosen boundary between words crosses, over that of all of them: below 1 it lies between phrases, above inside."""
    b, scores = boundaries, boundaries[rule].to_numpy()
    noise = np.random.default_rng(0).random(len(b)) # decides among equal scores
    chosen = np.zeros(len(b), dtype=bool)
    chosen[np.lexsort((noise, scores))[::-1][:round(len(b) / every)]] = True
    result = {}
    for unit in UNITS:
        hits = b[unit].to_numpy()
        if not hits.any(): continue
        precision, recall = hits[chosen].mean(), hits[chosen].sum() / hits.sum()
        result |= {f"AUC {unit}": auc(scores, hits), f"lift {unit}": precision / hits.mean(), f"precision {unit}": precision,
                   f"recall {unit}": recall, f"F1 {unit}": 2 * precision * recall / (precision + recall) if precision else 0.0}
    inside = b.between_words.to_numpy()
    return result | {"arcs": b.arcs[chosen & inside].mean() / b.arcs[inside].mean(), "between words": inside[chosen].mean()}

def bootstrap(
    boundaries: pd.DataFrame, # from `score_boundaries`
    rule: str,
    every: float = 4.5, # see `judge`
    rounds: int = 200,
    seed: int = 0,
) -> pd.DataFrame: # for each figure of `judge` the value, and the 2.5% and 97.5% quantiles
    "Intervals over texts: judge samples of them, drawn with replacement."
    random, parts = np.random.default_rng(seed), [part for _, part in boundaries.groupby("text")]
    drawn = [judge(pd.concat([parts[i] for i in random.integers(len(parts), size=len(parts))]), rule, every) for _ in range(rounds)]
    table = pd.DataFrame(drawn).quantile([0.025, 0.975]).T
    table.columns = ["low", "high"]
    table.insert(0, "value", pd.Series(judge(boundaries, rule, every)))
    return table
