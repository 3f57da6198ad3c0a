"""Ranks (gloo, forked from this process) do what one does: weights, score, Hessians, the artifact; one that dies ends
all the others. Eight of them for the record, two for the presets whose maps are made from seeds."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import random_validation, tiny

import train_gpt
from train_gpt import Launch, Run, Trainer, collect_hessians, evaluate, free_port, pack, quantize, sliding_windows
from train_gpt import dist as torch_distributed

RANKS, STEPS = 8, 20
FORK = multiprocessing.get_context("fork")


def config(corpus, preset: str = "record", **values):
    """Nine sequences a step: the ranks' shares differ."""
    return tiny(
        preset, **dict(iterations=STEPS, train_batch_tokens=9 * 32, micro_batch_tokens=64) | values, **corpus.knobs()
    )


def train_and_score(run: Run) -> dict:
    """Every step, then the score, the Hessians and the file: what every number of ranks must agree on."""
    trainer = Trainer(run)
    count = run.cfg.train_batch_tokens // run.cfg.train_seq_len
    share, losses = run.split(count), []
    for step in range(run.cfg.iterations):
        rows = trainer.stream.batch(step * count + share.start, len(share))
        losses.append(float(trainer.train_step(rows, step / run.cfg.iterations)[0]))
    val = random_validation(run.cfg, 300)
    score = evaluate(run, trainer.model, val, sliding_windows(val.targets, 32, 8), run.cfg.loops)
    hessians = collect_hessians(run, trainer.model, trainer.stream.batch(1000, 13), run.cfg.loops)
    return dict(
        weights=trainer.model.state_dict(), ema=trainer.ema.averages[-1],
        momentum=trainer.optimizers.state_dict()["momentum"],
        losses=torch.tensor(losses), nll=score.nll, hessians=hessians, artifact=packed(run.cfg, trainer),
    )  # fmt: skip


def packed(cfg, trainer: Trainer) -> bytes:
    """The file that a rank would write of its weights."""
    return pack(cfg, quantize(cfg, trainer.model.state_dict(), {}), cfg.loops)


def rank_process(rank: int, ranks: int, cfg, port: int, path: str, dies: bool) -> None:
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run = Run(cfg, Launch(rank, ranks, 0))
    if dies and rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    found = train_and_score(run)
    files = [b""] * ranks
    torch_distributed.all_gather_object(files, found["artifact"])
    if rank == 0:
        torch.save(found | dict(files=files), path)
    torch_distributed.destroy_process_group()


def waiting_process(rank: int, cfg, port: int, path: str) -> None:
    """Rank 0 is alone at work for longer than any collective would wait for it."""
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train_gpt.PATIENCE = datetime.timedelta(seconds=2)
    run = Run(cfg, Launch(rank, 2, 0))
    if rank == 0:
        time.sleep(5)
    run.after_main("work")
    Path(f"{path}{rank}").write_text(str(int(run.sum(torch.ones(1)))))
    run.leave()


def launch(cfg, path, ranks: int, dies: bool = False) -> list:
    port = free_port()
    processes = [FORK.Process(target=rank_process, args=(rank, ranks, cfg, port, str(path), dies))
                 for rank in range(ranks)]  # fmt: skip
    for process in processes:
        process.start()
    return processes


def compare(cfg, path, ranks: int) -> tuple[dict, dict]:
    """(one rank's results, those of several ranks)."""
    for process in launch(cfg, path, ranks):
        process.join(240)
        assert process.exitcode == 0
    return train_and_score(Run(cfg, Launch(0, 1, 0))), torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def both(corpus, tmp_path_factory):
    """(one rank's results, eight ranks' results)."""
    return compare(config(corpus), tmp_path_factory.mktemp("ranks") / "eight.pt", RANKS)


@pytest.mark.parametrize("part, slack", [("weights", 0.0), ("ema", 0.0), ("momentum", 1e-4), ("hessians", 1e-4)])
def test_eight_ranks_end_with_the_same_tensors(both, part, slack):
    """After 20 steps within 1e-5 (momenta and Hessians relative to their size): only the order of sums differs."""
    one, eight = (found[part] for found in both)
    assert one.keys() == eight.keys()
    for name, tensor in one.items():
        gap, size = float((tensor - eight[name]).abs().max()), float(tensor.abs().max())
        assert gap <= (slack * size if slack else 1e-5), name


@pytest.mark.parametrize("part", ["losses", "nll"])
def test_eight_ranks_tell_the_same_numbers(both, part):
    """Every step's loss and every target's score."""
    torch.testing.assert_close(both[0][part], both[1][part], rtol=0, atol=1e-4)


def test_eight_ranks_write_the_same_file(both, corpus):
    """Each of the eight, and one rank that is given their weights."""
    cfg, eight = config(corpus), both[1]
    trainer = Trainer(Run(cfg, Launch(0, 1, 0)))
    trainer.model.load_state_dict(eight["weights"])
    assert eight["files"] == [packed(cfg, trainer)] * RANKS


@pytest.mark.parametrize("preset", ["seed_lora", "pr2114"])
def test_two_ranks_share_their_random_maps(preset, corpus, tmp_path):
    """Maps made from seeds, with TTT-Linear: the same batches and losses, one file on both ranks, and the same file
    from the same weights in a process that draws the maps anew."""
    cfg = config(corpus, preset, iterations=6, ttt_linear_layers="1", ttt_linear_chunk=8)
    one, two = compare(cfg, tmp_path / "two.pt", 2)
    for part, slack in (("losses", 1e-5), ("nll", 1e-4)):
        torch.testing.assert_close(one[part], two[part], rtol=0, atol=slack)
    for name, tensor in one["weights"].items():
        torch.testing.assert_close(tensor, two["weights"][name], rtol=0, atol=1e-5, msg=name)
    trainer = Trainer(Run(cfg, Launch(0, 1, 0)))
    trainer.model.load_state_dict(two["weights"])
    assert two["files"] == [packed(cfg, trainer)] * 2


def test_a_dead_rank_ends_the_others(corpus, tmp_path):
    """When one rank is killed the others fail within 30 seconds instead of waiting for it."""
    processes, begin = launch(config(corpus), tmp_path / "never.pt", RANKS, True), time.monotonic()
    for process in processes:
        process.join(max(1.0, 30 - (time.monotonic() - begin)))
    alive = [process.pid for process in processes if process.is_alive()]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive
    assert all(process.exitcode for process in processes)


def test_the_others_wait_for_rank_0(corpus, tmp_path):
    """What rank 0 does alone may take longer than a collective's patience."""
    cfg, port = config(corpus), free_port()
    processes = [FORK.Process(target=waiting_process, args=(rank, cfg, port, f"{tmp_path}/")) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["2", "2"]
