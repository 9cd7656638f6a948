import copy, functools, json, math, os, platform, shutil, tempfile, time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from filelock import FileLock
from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from blt_nb.data import OFFSET, data_dir, eval_batches, fingerprint, load_corpus

@functools.cache
def fast_precision() -> str: # "bf16" or "no", as `accelerate` calls them
    "bf16 where it pays: on GPUs that have it, and on CPUs that multiply bf16 matrices at least a fifth faster than float32 (measured on the spot)."
    if torch.cuda.is_available(): return "bf16" if torch.cuda.is_bf16_supported() else "no"
    if torch.backends.mps.is_available(): return "no"
    def seconds(dtype):
        a, times = torch.randn(1024, 512, dtype=dtype), []
        for _ in range(6):
            start = time.perf_counter()
            a @ a.T
            times.append(time.perf_counter() - start)
        return min(times)
    return "bf16" if seconds(torch.float32) > 1.2 * seconds(torch.bfloat16) else "no"

def next_id_loss(
    logits: Tensor, # (B, T, 260)
    ids: Tensor,    # (B, T)
) -> Tensor: # scalar, nats per id
    "Mean cross-entropy of predicting each id from those before it; the first id (BOS) is given."
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())

def param_groups(
    model: nn.Module,
    weight_decay: float, # for the matrices of linear layers
) -> list[dict]: # for an optimiser
    "Matrices decay; norms and embedding tables don't: a row that a batch doesn't use should stay as it is. Frozen parameters are left out."
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2 and id(p) not in tables]
    others = [p for p in trained if p.ndim < 2 or id(p) in tables]
    return [dict(params=matrices, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]

def lr_factor(
    step: int,    # from 0
    steps: int,   # in all
    warmup: int,  # steps of rising
    floor: float = 0.05, # where the cosine ends
) -> float: # in 0..1
    "Linear warm-up, then half a cosine down to `floor`."
    if step < warmup: return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

def replace_folder(
    new: Path, # a finished folder beside `folder`
    folder: Path, # what it becomes; an older one is dropped
) -> None:
    "Swap a folder in by renaming, so that a reader finds the old or the new one whole."
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists(): folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)

def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    state: dict, # JSON: step, history, ...
) -> None:
    "Write model, optimiser and state; tensors as safetensors, the rest as JSON."
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, new / "model.safetensors")
    moments = {f"{i}.{key}": torch.as_tensor(value) for i, slot in optimiser.state_dict()["state"].items() for key, value in slot.items()}
    save_file(moments, new / "optimiser.safetensors")
    (new / "state.json").write_text(json.dumps(state))
    replace_folder(new, folder)

def load_checkpoint(
    folder: Path,
    model: nn.Module,                   # filled in place
    optimiser: torch.optim.Optimizer,   # filled in place
) -> dict: # the state that was saved
    "Read what `save_checkpoint` wrote. `FileNotFoundError` names a missing file."
    for name in ("model.safetensors", "optimiser.safetensors", "state.json"):
        if not (folder / name).is_file(): raise FileNotFoundError(f"checkpoint {folder} lacks {name}; delete the folder to start afresh")
    weights, parameters = load_file(folder / "model.safetensors"), dict(model.named_parameters())
    if weights.keys() != parameters.keys():
        raise ValueError(f"checkpoint {folder} is of another model: {sorted(weights.keys() ^ parameters.keys())[:3]} … differ; delete the folder to start afresh")
    with torch.no_grad():
        for name, p in parameters.items(): p.copy_(weights[name])
    slots = {}
    for key, value in load_file(folder / "optimiser.safetensors").items():
        i, name = key.split(".", 1)
        slots.setdefault(int(i), {})[name] = value
    optimiser.load_state_dict({"state": slots, "param_groups": optimiser.state_dict()["param_groups"]})
    return json.loads((folder / "state.json").read_text())

def move(
    batch, # a tensor, something with `.to`, or a tuple, list or None of such
    device: torch.device,
): # the same on the device
    "Move a batch to a device."
    if isinstance(batch, (tuple, list)): return type(batch)(move(part, device) for part in batch)
    return batch if batch is None else batch.to(device)

def fit(
    model: nn.Module, # called as model(*batch); returns logits (B, T, 260)
    loader,           # has `batch(step)`, which returns ids (B, T) or a tuple that begins with them; see `blt_nb.data.Loader`
    steps: int,       # optimiser steps in all
    lr: float = 3e-3, # peak learning rate
    *,
    valid: Sequence = (),       # batches like the loader's, to watch the loss on
    valid_every: int = 100,     # steps between two looks at them
    warmup: int = 50,           # steps of rising learning rate
    weight_decay: float = 0.1,  # see `param_groups`
    clip: float = 1.0,          # largest norm of the gradient
    precision: str | None = None, # "bf16" or "no"; None: `fast_precision()`
    checkpoint: str | Path | None = None, # folder to save to, and to resume from if it is there
    checkpoint_every: int = 200,          # steps
    title: str = "training",    # beside the progress bar
    loss: Callable = None,      # loss(model, *batch) -> scalar in nats; None: `next_id_loss` of the logits
) -> pd.DataFrame: # a row each few steps: step, seconds, bytes, loss and valid in bits per byte, lr, grad_norm
    "Train in place with AdamW(0.9, 0.95), warm-up, cosine and clipping, on whatever device `accelerate` finds. `FloatingPointError` when the loss isn't finite."
    if steps < 1: raise ValueError(f"steps is {steps}; it must be at least 1")
    accelerator = Accelerator(mixed_precision=precision or fast_precision())
    optimiser = torch.optim.AdamW(param_groups(model, weight_decay), lr=lr, betas=(0.9, 0.95), fused=accelerator.device.type != "mps")
    step, rows, spent, seen = 0, [], 0.0, 0
    if checkpoint is not None and Path(checkpoint).is_dir():
        state = load_checkpoint(Path(checkpoint), model, optimiser)
        step, rows, spent, seen = state["step"], state["history"], state["seconds"], state["bytes"]
        print(f"resuming at step {step} from {Path(checkpoint).name}")
    model, optimiser = accelerator.prepare(model, optimiser)
    if loss is None: loss = lambda model, ids, *rest: next_id_loss(model(ids, *rest), ids)
    every = max(1, steps // 200)
    live, start, was_training = LivePlot(title), time.perf_counter() - spent, model.training
    model.train()
    bar = tqdm(total=steps, initial=step, desc=title, leave=False, mininterval=1.0)
    while step < steps:
        batch = loader.batch(step)
        batch = move(batch if isinstance(batch, tuple) else (batch,), accelerator.device)
        for group in optimiser.param_groups: group["lr"] = lr * lr_factor(step, steps, warmup)
        value = loss(model, *batch)
        if not torch.isfinite(value): raise FloatingPointError(f"the loss is {value.item()} at step {step}; a smaller learning rate than {lr} may help")
        accelerator.backward(value)
        norm = accelerator.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
        optimiser.zero_grad()
        step, seen = step + 1, seen + batch[0].numel() - len(batch[0])
        bar.update()
        if step % every == 0 or step == steps:
            row = dict(step=step, seconds=time.perf_counter() - start, bytes=seen, loss=value.item() / math.log(2), valid=math.nan,
                       lr=optimiser.param_groups[0]["lr"], grad_norm=float(norm))
            if valid and (step % max(every, valid_every // every * every) == 0 or step == steps):
                paused = time.perf_counter()
                row["valid"] = watch(model, valid, loss, accelerator)
                start += time.perf_counter() - paused # looking is not training
            rows.append(row)
            live.update(rows)
            bar.set_postfix(bpb=f"{row['loss']:.3f}")
        if checkpoint is not None and (step % checkpoint_every == 0 or step == steps):
            state = dict(step=step, history=rows, seconds=time.perf_counter() - start, bytes=seen)
            save_checkpoint(Path(checkpoint), accelerator.unwrap_model(model), optimiser, state)
    bar.close()
    live.close()
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.train(was_training)
    return pd.DataFrame(rows)

@torch.no_grad()
def watch(
    model: nn.Module,
    batches: Sequence,        # of ids, or tuples that begin with ids
    loss: Callable,           # as in `fit`
    accelerator: Accelerator,
) -> float: # bits per byte
    "Mean loss over some batches."
    model.eval()
    values = []
    for batch in batches:
        values.append(loss(model, *move(batch if isinstance(batch, tuple) else (batch,), accelerator.device)).item())
    model.train()
    return sum(values) / len(values) / math.log(2)

def plot_history(
    history: pd.DataFrame, # from `fit`
    ax=None,               # matplotlib axes; None: new ones
    label: str = "",       # name of the run in the legend
    x: str = "bytes",      # column for the horizontal axis: "bytes", "seconds" or "step"
):
    "Loss while training (faint, smoothed) and on the watched validation batches (dots), in bits per byte."
    import matplotlib.pyplot as plt
    ax = ax or plt.subplots(figsize=(7, 3.2))[1]
    scale, unit = {"bytes": (1e6, "MB of text seen"), "seconds": (60, "minutes"), "step": (1, "steps")}[x]
    line, = ax.plot(history[x] / scale, history.loss.rolling(9, min_periods=1, center=True).median(), alpha=0.5, label=f"{label} training".strip())
    valid = history.dropna(subset="valid")
    if len(valid): ax.plot(valid[x] / scale, valid.valid, "o-", ms=4, color=line.get_color(), label=f"{label} validation".strip())
    ax.set(xlabel=unit, ylabel="bits per byte")
    low = history.loss.min()
    ax.set_ylim(low - 0.2, max(low + 1.5, min(history.loss.max(), low + 2.5)))
    ax.grid(alpha=0.3)
    ax.legend()
    return ax

class LivePlot:
    "Redraws the loss curve every few seconds below the running cell of a notebook; does nothing elsewhere."
    def __init__(self,
        title: str,
        every: float = 5.0, # seconds between two drawings
    ):
        self.title, self.every, self.drawn, self.handle = title, every, time.monotonic(), None
        try:
            from IPython import get_ipython
            self.inside = type(get_ipython()).__name__ == "ZMQInteractiveShell"
        except ImportError: self.inside = False

    def update(self,
        rows: list[dict], # history so far
    ) -> None:
        if not self.inside or time.monotonic() - self.drawn < self.every or len(rows) < 3: return
        from IPython.display import display
        import matplotlib.pyplot as plt
        figure, ax = plt.subplots(figsize=(7, 3.2))
        plot_history(pd.DataFrame(rows), ax)
        ax.set_title(self.title)
        if self.handle is None: self.handle = display(figure, display_id=True)
        else: self.handle.update(figure)
        plt.close(figure)
        self.drawn = time.monotonic()

    def close(self) -> None:
        "Take the live drawing away: the caller draws the finished one."
        if self.handle is not None:
            from IPython.display import HTML
            self.handle.update(HTML(""))

@torch.no_grad()
def bits_per_byte(
    model: nn.Module, # called as model(ids); returns logits (B, T, 260). A model with `segment` is asked for its patches first
    data,             # a corpus, texts or a text: what `blt_nb.data.documents` takes
    window: int = 512,      # most ids that are read together
    batch_size: int = 16,   # windows a batch
    stride: int | None = None, # new bytes a window; None: half a window, so each byte but a document's first ones sees at least half a window
    progress: bool = False, # show a bar
) -> float: # bits per byte: the bits that all bytes and document ends cost, over the number of bytes
    "Score text: every byte once. `ValueError` when there is no text."
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    nats, count = 0.0, 0
    dtype = torch.bfloat16 if fast_precision() == "bf16" else torch.float32
    for ids, lengths, score in tqdm(list(eval_batches(data, window, batch_size, stride)), disable=not progress, leave=False, desc="scoring"):
        ids, lengths, score = ids.to(device), lengths.to(device), score.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(ids, model.segment(ids, lengths)) if hasattr(model, "segment") else model(ids)
        loss = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
        nats += loss[score].double().sum().item()
        count += (score & (ids[:, 1:] >= OFFSET)).sum().item()
    model.train(was_training)
    if not count: raise ValueError("there is no text to score: 0 bytes")
    return nats / count / math.log(2)

class Pretrained(ModelHubMixin):
    "Saving and loading as `config.json` and `model.safetensors`, from a folder or the Hub. For models that are built from one dataclass, `config`."
    def save_pretrained(self,
        path: str | Path, # a folder, made if it isn't there
        **kwargs,         # passed on to `huggingface_hub`, for example push_to_hub=True
    ):
        "Write configuration and weights."
        return super().save_pretrained(path, config=asdict(self.config), **kwargs)

    def _save_pretrained(self, save_directory: Path):
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, save_directory / "model.safetensors")

    @classmethod
    def from_pretrained(cls,
        path: str | Path, # a folder, or a Hub id as "user/name"
        **kwargs,         # passed on to `huggingface_hub`, for example revision="main"
    ):
        "`FileNotFoundError` for a folder that isn't there or lacks a file, `ValueError` for weights that don't fit the configuration."
        folder = Path(path)
        if folder.is_dir():
            for name in ("config.json", "model.safetensors"):
                if not (folder / name).is_file():
                    raise FileNotFoundError(f"{folder} lacks {name}; a saved {cls.__name__} is a folder with config.json and model.safetensors (see save_pretrained)")
        elif len(folder.parts) != 2 or str(path).startswith((".", "/", "~")):
            raise FileNotFoundError(f"{str(path)!r} is neither a folder nor a Hub id ('user/name')")
        return super().from_pretrained(path, **kwargs)

    @classmethod
    def _from_pretrained(cls, *, model_id, config, **hub):
        model, file = cls(config), Path(model_id) / "model.safetensors"
        if not file.is_file():
            file = hf_hub_download(model_id, "model.safetensors", **{name: hub[name] for name in ("revision", "cache_dir", "force_download", "token", "local_files_only")})
        given, wanted = load_file(file), model.state_dict()
        for name, problem in [(n, "is missing") for n in wanted.keys() - given.keys()] + [(n, "is not part of this model") for n in given.keys() - wanted.keys()] \
                + [(n, f"has shape {tuple(given[n].shape)} instead of {tuple(wanted[n].shape)}") for n in wanted.keys() & given.keys() if given[n].shape != wanted[n].shape]:
            raise ValueError(f"{file}: tensor {name!r} {problem}; weights and config.json must come from the same {cls.__name__}")
        model.load_state_dict(given)
        return model.eval()

PRESETS = {
    "ci": {
        "data": dict(window=128, batch_size=4, valid_documents=2),
        "entropy": dict(width=32, layers=1, heads=2, attention=64, ngram_sizes=(2, 3, 4), ngram_rows=2048, ngram_width=16, steps=120, lr=1e-2),
        "blt": dict(width=32, heads=2, attention=64, encoder_layers=1, decoder_layers=1, latent_width=64, latent_layers=2, latent_heads=2,
                    ngram_sizes=(3, 4, 5), ngram_rows=2048, ngram_width=16, mean_patch=4.5, max_patch=24, steps=120, lr=8e-3),
        "byte": dict(width=64, layers=1, heads=2, lr=8e-3),
        "head": dict(hidden=32, steps=40, lr=3e-3),
        "stacked": dict(latent_width=64, latent_layers=1, latent_heads=2, mean_group=4.5, max_group=12, steps=40, lr=4e-3),
    },
    "laptop": {
        "data": dict(window=512, batch_size=8, valid_documents=None),
        "entropy": dict(width=128, layers=2, heads=2, attention=128, ngram_sizes=(2, 3, 4, 5, 6), ngram_rows=8192, ngram_width=32, steps=3000, lr=4e-3),
        "blt": dict(width=128, heads=2, attention=256, encoder_layers=1, decoder_layers=2, latent_width=256, latent_layers=4, latent_heads=4,
                    ngram_sizes=(3, 4, 5, 6, 8), ngram_rows=8192, ngram_width=32, mean_patch=4.5, max_patch=24, steps=1500, lr=3e-3),
        "byte": dict(width=192, layers=4, heads=3, lr=2e-3),
        "head": dict(hidden=256, steps=300, lr=2e-3),
        "stacked": dict(latent_width=256, latent_layers=4, latent_heads=4, mean_group=4.5, max_group=16, steps=700, lr=1.5e-3),
    },
    "gpu": {
        "data": dict(window=2048, batch_size=32, valid_documents=None),
        "entropy": dict(width=512, layers=6, heads=8, attention=512, ngram_sizes=(2, 3, 4, 5, 6), ngram_rows=65536, ngram_width=64, steps=3000, lr=1.5e-3),
        "blt": dict(width=512, heads=8, attention=512, encoder_layers=1, decoder_layers=4, latent_width=1024, latent_layers=12, latent_heads=16,
                    ngram_sizes=(3, 4, 5, 6, 7, 8), ngram_rows=65536, ngram_width=64, mean_patch=4.5, max_patch=64, steps=4000, lr=8e-4),
        "byte": dict(width=768, layers=12, heads=12, lr=8e-4),
        "head": dict(hidden=1024, steps=500, lr=1e-3),
        "stacked": dict(latent_width=2048, latent_layers=4, latent_heads=16, mean_group=4.5, max_group=32, steps=1500, lr=5e-4),
    },
}

def preset_name() -> str: # "ci", "laptop" or "gpu"
    "The running preset, from the environment's `BLT_PRESET`. `ValueError` for an unknown one."
    name = os.environ.get("BLT_PRESET", "laptop")
    if name not in PRESETS: raise ValueError(f"BLT_PRESET is {name!r}; take one of {', '.join(PRESETS)}")
    return name

def preset(
    stage: str, # a row of `PRESETS`: "data", "entropy", "blt", "byte", "head" or "stacked"
) -> SimpleNamespace: # its sizes as attributes
    "Sizes and steps of a stage at the running preset."
    return SimpleNamespace(**PRESETS[preset_name()][stage])

def load_splits() -> tuple: # training and validation documents
    "The `docs` corpus as the running preset uses it."
    train, valid, few = load_corpus("docs"), load_corpus("docs", "valid"), preset("data").valid_documents
    if few: # short ones, spread over the split
        sizes = sorted((len(text), i) for i, text in enumerate(valid["text"]) if len(text) > 1000)
        valid = valid.select([i for _, i in sizes[::max(1, len(sizes) // 8)][:few]])
    return train, valid

def folder_of(
    kind: str, # "checkpoints" or "results"
) -> Path: # in `data/` for the preset that is committed, below `data/cache/` for the others
    "Where the running preset keeps what it makes."
    name = preset_name()
    return data_dir() / kind if name == "laptop" else data_dir() / "cache" / kind / name

def hardware() -> str: # for example "x86_64 CPU, 2 cores"
    "What this runs on."
    if torch.cuda.is_available(): return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"

UPSTREAM = {"entropy": (), "blt-1": ("entropy",), "byte": ("entropy", "blt-1"), "blt-2": ("entropy", "blt-1")} # stages that a stage builds on
SIZES = {"entropy": ("data", "entropy"), "blt-1": ("data", "blt"), "byte": ("data", "byte"), "blt-2": ("data", "head", "stacked")} # what it is made with

def stage_identity(
    stage: str, # "entropy", "blt-1", "byte" or "blt-2"
) -> dict: # JSON
    "What a checkpoint must have been made with to be taken for this stage: preset, sizes (of earlier stages too) and corpus."
    rows = sorted({row for s in (*UPSTREAM[stage], stage) for row in SIZES[s]})
    sizes = {row: PRESETS[preset_name()][row] for row in rows}
    return json.loads(json.dumps(dict(stage=stage, preset=preset_name(), corpus=fingerprint(load_corpus("docs")), sizes=sizes)))

def round_bf16(
    model: nn.Module,
) -> nn.Module: # the same, float32, with weights that bfloat16 can hold
    "Round the weights as saving does, so that what is scored is what others load."
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point(): tensor.copy_(tensor.bfloat16())
    return model

def save_stage(
    stage: str,            # see `stage_identity`
    model: nn.Module,      # a `Pretrained`; its weights are rounded to bfloat16
    history: pd.DataFrame, # from `fit`
    **figures,             # what was measured: bpb, mean_patch, ...
) -> dict: # the row of results
    "Save a trained stage as a checkpoint with its history, and enter it in the table of results."
    folder = folder_of("checkpoints") / stage
    folder.parent.mkdir(parents=True, exist_ok=True)
    row = dict(stage=stage, preset=preset_name(), parameters=sum(p.numel() for p in model.parameters()), bytes_seen=int(history.bytes.iloc[-1]),
               **figures, seconds=round(float(history.seconds.iloc[-1]), 1), corpus=fingerprint(load_corpus("docs")), hardware=hardware(),
               torch=torch.__version__)
    new = Path(tempfile.mkdtemp(prefix=stage + ".", dir=folder.parent))
    copy.deepcopy(model).bfloat16().save_pretrained(new)
    history.round(5).to_csv(new / "history.csv", index=False)
    (new / "training.json").write_text(json.dumps(dict(identity=stage_identity(stage), result=row), indent=1))
    new.chmod(0o755)
    replace_folder(new, folder)
    record_result(**row)
    return row

def record_result(
    stage: str, # the row's key
    **figures,  # the row: seed, preset, corpus and hardware among them
) -> None:
    "Enter a row into `series.csv` among the results of the running preset, in the place of an older row of this stage."
    file = folder_of("results") / "series.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(data_dir() / "cache" / "results.lock")):
        rows = pd.read_csv(file).to_dict("records") if file.is_file() else []
        rows = [row for row in rows if row["stage"] != stage] + [dict(stage=stage, **figures)]
        part = file.with_suffix(".part")
        pd.DataFrame(rows).to_csv(part, index=False)
        os.replace(part, file)

def results() -> pd.DataFrame: # a row a stage; empty if nothing was trained yet
    "The results of the running preset."
    file = folder_of("results") / "series.csv"
    return pd.read_csv(file).set_index("stage") if file.is_file() else pd.DataFrame()

def stage_history(
    stage: str, # see `stage_identity`
) -> pd.DataFrame: # as from `fit`
    "How the training of a stage went. `FileNotFoundError` if it hasn't been trained at the running preset."
    return pd.read_csv(folder_of("checkpoints") / stage / "history.csv")

def load_or_train(
    stage: str,      # see `stage_identity`
    cls: type,       # class of the model, a `Pretrained`
    train: Callable, # called without arguments if there is no fitting checkpoint; saves one
): # the trained model
    "The model of a stage: from its checkpoint if that was made with the running preset's sizes and this corpus, else trained now. Says which."
    folder = folder_of("checkpoints") / stage
    def why_not() -> str:
        if not (folder / "training.json").is_file(): return "there is no checkpoint yet"
        made, wanted = json.loads((folder / "training.json").read_text())["identity"], stage_identity(stage)
        differing = [key for key in wanted if made.get(key) != wanted[key]]
        return f"the checkpoint was made with another {' and '.join(differing)}" if differing else ""
    (data_dir() / "cache").mkdir(parents=True, exist_ok=True)
    with FileLock(str(data_dir() / "cache" / f"{preset_name()}-{stage}.lock")): # another notebook may be training it just now
        reason = why_not()
        if reason:
            print(f"{stage}: training it first, because {reason}")
            train()
        else: print(f"{stage}: loaded the {preset_name()} checkpoint, trained on docs {stage_identity(stage)['corpus']}")
        return cls.from_pretrained(folder)
