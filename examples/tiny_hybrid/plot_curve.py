"""Draw `training_curve.png` from `training_log.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def main() -> None:
    """Draw training loss and validation bits per byte against tokens seen."""
    lines = (HERE / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    losses = [(record["tokens"] / 1e6, record["loss"]) for record in records if "loss" in record]
    key = "validation_bits_per_byte"
    bits = [(record["tokens"] / 1e6, record[key]) for record in records if key in record]
    figure, loss_axis = plt.subplots(figsize=(7, 4))
    loss_axis.plot(*zip(*losses, strict=True), color="tab:blue", linewidth=1.2)
    loss_axis.set_xlabel("training tokens (millions)")
    loss_axis.set_ylabel("training loss, all domains (nats/token)", color="tab:blue")
    loss_axis.set_ylim(bottom=min(value for _, value in losses) - 0.2, top=6.0)
    bits_axis = loss_axis.twinx()
    bits_axis.plot(*zip(*bits, strict=True), color="tab:red", marker="o", markersize=4)
    bits_axis.set_ylabel("validation speeches (bits/byte)", color="tab:red")
    figure.tight_layout()
    figure.savefig(HERE / "training_curve.png", dpi=110)


if __name__ == "__main__":
    main()
