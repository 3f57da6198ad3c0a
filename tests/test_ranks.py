"""Eight ranks (gloo, forked from this process) do what one does: weights, score, Hessians; one that dies ends all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch
from conftest import random_validation, tiny

from train_gpt import Launch, Run, Trainer, collect_hessians, evaluate, free_port, sliding_windows
from train_gpt import dist as torch_distributed

RANKS, STEPS = 8, 20
FORK = multiprocessing.get_context("fork")


def config(corpus):
    """Nine sequences a step: the ranks' shares differ."""
    return tiny("record", iterations=STEPS, train_batch_tokens=9 * 32, micro_batch_tokens=64, **corpus.knobs())


def train_and_score(run: Run) -> dict:
    """Twenty steps, then the score and the Hessians: what every number of ranks must agree on."""
    trainer = Trainer(run)
    count = run.cfg.train_batch_tokens // run.cfg.train_seq_len
    share, losses = run.split(count), []
    for step in range(STEPS):
        rows = trainer.stream.batch(step * count + share.start, len(share))
        losses.append(float(trainer.train_step(rows, step / STEPS)[0]))
    val = random_validation(run.cfg, 300)
    score = evaluate(run, trainer.model, val, sliding_windows(val.targets, 32, 8), run.cfg.loops)
    hessians = collect_hessians(run, trainer.model, trainer.stream.batch(1000, 13), run.cfg.loops)
    return dict(
        weights=trainer.model.state_dict(), ema=trainer.ema.averages[-1],
        momentum=trainer.optimizers.state_dict()["momentum"],
        losses=torch.tensor(losses), nll=score.nll, hessians=hessians,
    )  # fmt: skip


def rank_process(rank: int, cfg, port: int, path: str, dies: bool) -> None:
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run = Run(cfg, Launch(rank, RANKS, 0))
    if dies and rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    found = train_and_score(run)
    if rank == 0:
        torch.save(found, path)
    torch_distributed.destroy_process_group()


def launch(cfg, path, dies: bool = False) -> list:
    port = free_port()
    processes = [FORK.Process(target=rank_process, args=(rank, cfg, port, str(path), dies)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    return processes


@pytest.fixture(scope="module")
def both(corpus, tmp_path_factory):
    """(one rank's results, eight ranks' results)."""
    cfg, path = config(corpus), tmp_path_factory.mktemp("ranks") / "eight.pt"
    for process in launch(cfg, path):
        process.join(240)
        assert process.exitcode == 0
    return train_and_score(Run(cfg, Launch(0, 1, 0))), torch.load(path, weights_only=True)


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


def test_a_dead_rank_ends_the_others(corpus, tmp_path):
    """When one rank is killed the others fail within 30 seconds instead of waiting for it."""
    processes, begin = launch(config(corpus), tmp_path / "never.pt", dies=True), time.monotonic()
    for process in processes:
        process.join(max(1.0, 30 - (time.monotonic() - begin)))
    alive = [process.pid for process in processes if process.is_alive()]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive
    assert all(process.exitcode for process in processes)
