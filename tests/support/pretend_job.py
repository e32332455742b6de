"""Every command on the CPU and on the pretended device, in one process; tests compare what they left behind.

Usage: pretend_job.py MODEL TEXT FOLDER, which gets a folder for each device and ``outcomes.json``: of each job the
traceback or output of what failed, else null.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support import pretend_device

BACKEND = pretend_device.install()

import torch  # noqa: E402  (what follows must see the changed torch)
from safetensors.torch import save_file  # noqa: E402

from importance.compensate import compensate  # noqa: E402
from minipuzzle.cut.surgery import cut_tensor  # noqa: E402
from minipuzzle.devices import Device, best_device  # noqa: E402
from minipuzzle.files.checkpoint import Checkpoint  # noqa: E402
from minipuzzle.runtime.compute import Compute  # noqa: E402
from minipuzzle.runtime.layer_stack import LayerStack  # noqa: E402
from tests.support.cli import run_cli  # noqa: E402
from tests.support.cuts import plan_with  # noqa: E402
from tests.support.text import random_tokens  # noqa: E402

SHORT = ("--sequence-length", 32, "--samples", 4)
TRAINED = ("--tokens", 384, "--sequence-length", 32, "--batch", 4, "--micro-batch", 2, "--learning-rate", 1e-3)
RACED = ("--finalists", 2, "--race-tokens", 128, "--race-batch", 2, "--race-halving")


@dataclass(frozen=True, kw_only=True)
class Jobs:
    """What is run on one device; each job's output is named as the job."""

    device: str
    model: Path
    text: Path
    folder: Path

    @property
    def narrowed(self) -> Path:
        """What the CPU cut: small differences of that are not to count as differences of what follows."""
        return self.folder.parent / "cpu" / "narrowed"

    def command(self, name: str, verb: str, *arguments: object) -> None:
        """One command, which must succeed; what it prints is kept as ``<name>.json``."""
        result = run_cli(verb, *arguments, "--device", self.device, "--json")
        assert result.exit_code == 0, result.output + "".join(traceback.format_exception(result.exception))[-2500:]
        (self.folder / f"{name}.json").write_text(result.stdout, encoding="utf-8")

    def score(self) -> None:
        out = self.folder / "score.safetensors"
        self.command("score", "score", self.model, "--data", self.text, *SHORT, "--channel-samples", 4, "-o", out)

    def prune_narrowed(self) -> None:
        self._prune("narrowed", "--candidates", 3, "--width", "ffn=32", "--refine")

    def prune_per_layer(self) -> None:
        self._prune("per_layer", "--candidates", 3, "--layout", "per-layer", "--widths", "ffn=16,32,48", *RACED)

    def _prune(self, name: str, *arguments: object) -> None:
        given = (self.model, "--data", self.text, *SHORT, "--memory", "80%", "--context", 64, "-o", self.folder / name)
        self.command(f"prune_{name}", "prune", *given, *arguments)

    def distill(self) -> None:
        self._distill("plain", "--dtype", "float32", "--hidden-weight", 0.1, "--save-every", 2)

    def distill_in_bfloat16(self) -> None:
        self._distill("low", "--dtype", "bfloat16", "--activation-checkpointing", "--ce-weight", 0.2)

    def distill_from_cache(self) -> None:
        cache = ("--top-k", 8, "--teacher-cache", self.folder / "cache")
        self._distill("cached", "--dtype", "float32", *cache, "--qat", "fp8")

    def _distill(self, name: str, *arguments: object) -> None:
        given = (self.narrowed, "--teacher", self.model, "--data", self.text, *TRAINED)
        self.command(f"distill_{name}", "distill", *given, "-o", self.folder / f"student_{name}", *arguments)

    def evaluate(self) -> None:
        given = (self.narrowed, "--against", self.model, "--data", self.text, "--sequence-length", 32)
        self.command("evaluate", "evaluate", *given, "--max-tokens", 400, "--dtype", "float32")

    def export(self) -> None:
        measured = ("--data", self.text, *SHORT)
        self._export("fp8", *measured, "--calibration", "percentile", "--kv-cache", "fp8")
        self._export("nvfp4", *measured, "--flavour", "compressed-tensors")

    def _export(self, name: str, *arguments: object) -> None:
        self.command(f"export_{name}", "export", self.model, f"--{name}", "-o", self.folder / name, *arguments)

    def verify(self) -> None:
        given = ("--data", self.text, "--against", self.model, *SHORT)
        self.command("verify", "verify", self.folder / "fp8", *given)

    def compensate(self) -> None:
        checkpoint = Checkpoint.open(self.model)
        plan = plan_with(checkpoint, ffn=24, hidden=20)
        stack = LayerStack(checkpoint, compute=Compute(device=self.device))
        found = compensate(stack, plan, random_tokens(8, 24, first=3), may_choose=True)
        save_file({name: weight.cpu() for name, weight in found.weights.items()}, self.folder / "refitted.safetensors")

    def cut(self) -> None:
        checkpoint = Checkpoint.open(self.model)
        plan = plan_with(checkpoint, ffn=24, hidden=20)
        source = checkpoint.architecture
        cut = {t.name: cut_tensor(checkpoint.tensor(t.name).to(self.device), t, plan) for t in source.tensors()}
        save_file({name: weight.cpu() for name, weight in cut.items()}, self.folder / "cut.safetensors")

    def offers(self) -> None:
        """What the packages ask of a device, and that mixing two raises."""
        own = Device(self.device)
        states = own.generator_states()
        own.synchronise()
        own.reset_peak()
        own.restore_generators(states)
        assert min(own.free_bytes, own.peak_bytes) > 0
        if own.is_cpu:
            return
        assert best_device() == own and own.backend is None and states.keys() == {"cpu", own.kind}
        assert own.free_bytes == pretend_device.FREE_BYTES and BACKEND.num_synchronised > 0
        here, there = torch.ones(3), torch.ones(3, device=self.device)
        for mixed in (lambda: here + there, lambda: there.index_select(0, here.long()), lambda: there.numpy()):
            try:
                mixed()
            except (RuntimeError, TypeError):
                continue
            raise AssertionError("tensors of two devices were mixed")

    def all(self) -> list[Callable[[], None]]:
        pruned = [self.score, self.cut, self.compensate, self.prune_narrowed, self.prune_per_layer, self.evaluate]
        trained = [self.distill, self.distill_in_bfloat16, self.distill_from_cache]
        return [*pruned, *trained, self.export, self.verify, self.offers]


def main() -> None:
    model, text, folder = map(Path, sys.argv[1:4])
    torch.set_num_threads(1)
    outcomes: dict[str, dict[str, str | None]] = {}
    with pretend_device.Placed():  # type: ignore[no-untyped-call]
        for device in ("cpu", pretend_device.NAME):
            own = folder / device
            own.mkdir(parents=True)
            for job in Jobs(device=device, model=model, text=text, folder=own).all():
                start = time.process_time()
                try:
                    job()
                    found = None
                except Exception:
                    found = traceback.format_exc(chain=False)[-3000:]
                print(f"{job.__name__} on {device}: {time.process_time() - start:.1f} s", file=sys.stderr, flush=True)
                outcomes.setdefault(job.__name__, {})[device] = found
    (folder / "outcomes.json").write_text(json.dumps(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
