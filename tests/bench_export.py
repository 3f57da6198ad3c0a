"""The quantization tax of trained runs at equal bytes, ours against rounding to nearest and SDClip GPTQ, both Brotli's.

    python tests/bench_export.py runs/a runs/b runs/c --sizes 15990000 8000000      bytes of the artifact
    python tests/bench_export.py runs/a --bits 3.6 1.8 --methods scalar ours        bits a stored weight

Each folder is a finished run (model.pt, config.json, result.json); its data must be where config.json says. Runs of
several seeds give the mean and the standard deviation. Weights, Hessians and Fisher sums are the same for all methods.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg  # noqa: E402

SEEDS = dict(quant_steps="sdclip", compressor="brotli", trellis_states=1)
METHODS = {
    "nearest": SEEDS | dict(gptq=False),
    "sdclip": SEEDS,
    "sdclip_ans": SEEDS | dict(compressor="ans"),
    "scalar": dict(trellis_states=1),
    "trellis4": dict(trellis_states=4),
    "ours": {},
    "trellis16": dict(trellis_states=16),
}


def measured(folder: Path, told: argparse.Namespace) -> Iterator[tuple[str, float, float, float]]:
    """(method at a size, tax in bpb, tax in nats, predicted nats) for one run."""
    result = json.loads((folder / "result.json").read_text())
    known = {field.name for field in dataclasses.fields(tg.Config)}
    base = {name: value for name, value in result["config"].items() if name in known}
    cfg, _ = tg.read_config({}, base=base | dict(weights="auto", val_tokens_limit=told.val_tokens))
    run = tg.Run(cfg, tg.Launch(0, 1, 0))
    trainer = tg.Trainer(run)
    trainer.step, looping = result["steps"], cfg.loops
    saved = torch.load(folder / "model.pt", weights_only=True, map_location=run.device)[result["weights"]]
    state = {name: tensor.float() for name, tensor in saved.items()}
    rows = tg.calibration_rows(trainer)
    hessians, fisher = tg.calibrate(run, trainer.model, state, rows, looping, {})
    val = tg.load_validation(cfg, tg.load_tokenizer(cfg))
    windows = tg.plain_windows(val.targets, cfg.eval_seq_len)

    def score(weights: dict) -> tg.Score:
        with tg.swapped(trainer.model, weights):
            return tg.evaluate(run, trainer.model, val, windows, looping)

    whole, count = score(state), sum(tensor.numel() for tensor in state.values())
    for size in told.sizes or [int(bits * count / 8) for bits in told.bits]:
        for method in told.methods:
            own, begin = dataclasses.replace(cfg, size_target=size, **METHODS[method]), time.perf_counter()
            quantizer = tg.Quantizer(own, state, hessians if own.gptq else {}, fisher)
            packed = tg.fit(own, quantizer, looping, 0)
            seconds = time.perf_counter() - begin
            found = score(tg.Artifact({}, looping, packed.stored).state())
            predicted = sum(row["loss"] for row in tg.ledger(quantizer, packed.stored, quantizer.fisher).values())
            tax = found.val_bpb - whole.val_bpb, found.val_loss - whole.val_loss
            print(f"{folder.name} {method} bytes:{len(packed.blob)} tax_bpb:{tax[0]:.5f} tax_nats:{tax[1]:.5f} "
                  f"predicted_nats:{predicted:.6f} packs:{packed.packs} seconds:{seconds:.1f}", flush=True)  # fmt: skip
            yield f"{method} at {size}", *tax, predicted


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.5f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.5f}{deviation}"


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--sizes", type=int, nargs="+", help="bytes of the artifact")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.6, 1.8], help="bits a weight, if no sizes are told")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["nearest", "sdclip", "scalar", "ours"])
    parser.add_argument("--val-tokens", type=int, default=0, help="score the first N validation tokens only")
    told, table = parser.parse_args(words), {}
    for folder in told.folders:
        for key, *numbers in measured(folder, told):
            table.setdefault(key, []).append(numbers)
    print("\n| method | tax, bpb | tax, nats | predicted, nats |\n| --- | --- | --- | --- |")
    for key, rows in table.items():
        print(f"| {key} | {' | '.join(spread(list(column)) for column in zip(*rows, strict=True))} |")


if __name__ == "__main__":
    main(sys.argv[1:])
