"""Shared by all tests: tiny configurations of every preset, a synthetic corpus, a tokenizer, and clean processes."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sentencepiece
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_gpt.py"
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402

torch.set_num_threads(1)

PRESETS = list(tg.PRESETS)
VOCAB = 320

# Each optional mechanism on top of the record preset, alone or with its likes (test_mechanisms.py has those alone).
MECHANISMS = {
    "smear": dict(smear_gate=True),
    "sparse_gate": dict(attn_gate="sparse"),
    "no_gates": dict(smear_gate=False, attn_gate="none"),
    "ttt_linear": dict(ttt_linear_layers="1,3", ttt_linear_chunk=8, pack_docs=True),
    "bigram": dict(bigram_vocab_size=97, bigram_hashes=2, bigram_dim=8),
    "value_embedding": dict(ve_layers="2,5", ve_dim=8),
    "normuon": dict(muon_beta2=0.95),
    "seeded_visits": dict(seed_maps="q,up", seed_scale="one", seed_per_visit=True, seed_layers="2,4"),
    "frozen_up": dict(seed_maps="up", seed_basis="gaussian", lora_rank_mlp=0),
    "adapters": dict(seed_maps="all", seed_basis="none"),
    "contraction": dict(residual_kind="contraction", residual_scale=0.9, depth_embed=True, step_gates=True),
    "pack_docs": dict(pack_docs=True),
    "no_skips": dict(skip_kind="none"),
    "added_skips": dict(skip_kind="add"),
    "gated_skips": dict(skip_kind="gated"),
    "no_loop": dict(num_loops=0),
    "one_loop": dict(num_loops=1),
    "three_loops": dict(num_loops=3),
    "untied": dict(tie_embeddings=False),
    "sequential": dict(parallel_residual_start=-1),
    "no_xsa": dict(xsa_last_n=0),
    "full_rope": dict(rope_dims=0),
    "equilibrium": dict(deq_layer=1),
    "equilibrium_looped": dict(deq_layer=3, deq_grad="ift"),
    "equilibrium_unrolled": dict(deq_layer=5, deq_grad="unroll", deq_solver="picard"),
    "lanes": dict(parallel_start_layer=2, recur_layers="2,3,3", pass_controls=True, skip_over="visits"),
    "passes": dict(num_passes=2, num_layers=4, skip_over="visits", skip_kind="add", k_rank=8, input_table=True),
    "linear_experts": dict(linear_layers="1,-1", use_eigenspace_routing=True, pack_docs=True),
    "carries": dict(
        use_resonant_encoding=True,
        use_selective_state=True,
        use_confidence_conditioning=True,
        use_gradient_memory=True,
        use_td_recurrence=True,
        use_adaptive_depth=True,
        pack_docs=True,
    ),
    "routed_passes": dict(mod_layers="1,5@0.25", mod_pass_capacity="1,0.5,0.25", mod_rule="quantile"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share costly processes go to one worker: the files that start runs, and the scored artifacts."""
    for item in items:
        name = "rescored" if "rescored" in item.fixturenames else item.module.__name__
        if name in ("rescored", "test_runs", "test_ranks", "test_gauntlet", "test_prepare", "test_deq", "test_devices"):
            item.add_marker(pytest.mark.xdist_group(name))


def variants() -> list[Any]:
    """(preset, overrides) of every preset as it is, and of record with each mechanism alone."""
    rows = [pytest.param((preset, {}), id=preset) for preset in PRESETS]
    return rows + [pytest.param(("record", values), id=f"record-{name}") for name, values in MECHANISMS.items()]


every_variant = pytest.mark.parametrize("variant", variants())
every_preset = pytest.mark.parametrize("preset", PRESETS)
both_loop_states = pytest.mark.parametrize("looping", [False, True], ids=["loop_off", "loop_on"])


def as_text(value: Any) -> str:
    """A knob's value as an environment variable."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def tiny_values(preset: str) -> dict[str, Any]:
    """Overrides that shrink a preset and keep its features on."""
    full, _ = tg.read_config({"PRESET": preset})
    return dict(
        vocab_size=VOCAB, model_dim=64, num_heads=4, num_kv_heads=2, mlp_mult=2,
        num_layers=2 if full.num_passes > 1 else 6 if full.loops else min(6, full.num_layers),
        num_loops=min(3, full.num_loops), recur_layers="2,3" if full.recur_layers else "",
        parallel_start_layer=min(4, full.parallel_start_layer), k_rank=min(8, full.k_rank),
        bigram_vocab_size=min(97, full.bigram_vocab_size),
        loop_start=2, loop_end=3, parallel_residual_start=3 if full.parallel_residual_start >= 0 else -1,
        adapter_rank=min(8, full.adapter_rank), lora_rank_attn=8, lora_rank_mlp=4,
        xsa_last_n=min(6, full.xsa_last_n), rope_dims=8 if full.rope_dims else 0, train_seq_len=32, eval_seq_len=32,
        train_batch_tokens=128, micro_batch_tokens=64, iterations=4, max_wallclock_seconds=0, warmup_steps=0,
        eval_stride=8, val_batch_tokens=128, ttt_chunk_tokens=64, ttt_batch_seqs=2, ttt_epochs=1,
        gptq_batch_tokens=128, gptq_calibration_batches=4, size_target=0, checkpoint_every=0, val_loss_every=0,
        train_log_every=1, device="cpu", threads=1, deq_max_iter_train=4, deq_max_iter_eval=6, deq_phantom_steps=2,
    )  # fmt: skip


def tiny_env(preset: str, **overrides: Any) -> dict[str, str]:
    """Environment variables of a tiny run."""
    values = {**tiny_values(preset), **overrides}
    return {"PRESET": preset, **{name.upper(): as_text(value) for name, value in values.items()}}


def tiny(preset: str, **overrides: Any) -> tg.Config:
    """The Config of a tiny run of a preset; refused where the environment would be refused."""
    cfg, warnings = tg.read_config(tiny_env(preset, **overrides))
    assert all(" has no effect: it needs " in line for line in warnings), warnings  # of sizes, whatever the preset
    return cfg


def single(cfg: tg.Config) -> tg.Run:
    """A Run of one process without a folder."""
    return tg.Run(cfg, tg.Launch(0, 1, 0))


class OneOf(tg.Run):
    """Rank ``rank`` of ``world_size``, without the others: sums are left to the test."""

    def __init__(self, cfg, rank, world_size):
        super().__init__(cfg, tg.Launch(0, 1, 0))
        self.rank, self.world_size = rank, world_size

    def sum(self, tensor):
        return tensor

    def vote(self, tensor):
        return tensor

    def share(self, value):
        return value


def randomise(model: tg.GPT, seed: int = 0, size: float = 0.3) -> tg.GPT:
    """Noise on every parameter: zero-initialised maps would make most laws hold for nothing."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            fan = param.shape[-1] if param.dim() > 1 else 1
            param += size * torch.randn(param.shape, generator=noise) / (fan**0.5 if fan > 2 else 1)
    return model


def tiny_model(cfg: tg.Config, seed: int = 0) -> tg.GPT:
    """A randomised model of a configuration."""
    return randomise(tg.build_model(cfg, single(cfg)), seed)


def random_ids(cfg: tg.Config, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, length] with a document's start here and there."""
    noise = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, cfg.vocab_size, (batch, length), generator=noise)
    ids[:, 0] = ids[:, length // 3] = tg.BOS
    return ids


def random_validation(cfg: tg.Config, targets: int, seed: int = 0) -> tg.ValStream:
    """A validation stream of random tokens, three bytes a target."""
    tokens = random_ids(cfg, 1, targets + 1, seed)[0]
    return tg.ValStream(tokens, torch.full((targets,), 3))


# ---- text, tokenizer and shards -------------------------------------------------------------------------------------

WORDS = (
    "the of a model weights byte token number seven river stone under light caf\u00e9 falls over while it reads".split()
)


def documents(count: int, seed: int) -> list[str]:
    """Sentences in which each word depends on the one before it, so that there is something to learn."""
    rng, out = random.Random(seed), []
    for _ in range(count):
        word, words = rng.randrange(len(WORDS)), []
        for _ in range(rng.randrange(10, 40)):
            words.append(WORDS[word])
            word = (3 * word + rng.randrange(4)) % len(WORDS)
        out.append(" ".join(words).capitalize() + ".")
    return out


def train_tokenizer(lines: list[str] | None = None, **options: Any) -> bytes:
    """A small SentencePiece BPE model with byte fallback, BOS 1; the options are SentencePiece's."""
    model = io.BytesIO()
    settings = dict(
        model_type="bpe", vocab_size=VOCAB, byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines or documents(300, 1)), model_writer=model, **settings | options
    )
    return model.getvalue()


def write_shard(path: Path, tokens: Any) -> Path:
    """A token shard in the challenge's format."""
    header = np.zeros(256, "<i4")
    header[:3] = tg.SHARD_MAGIC, tg.SHARD_VERSION, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


def encode(pieces: Any, texts: list[str]) -> list[int]:
    """Documents as one stream of tokens, each after BOS."""
    return [token for text in texts for token in (tg.BOS, *pieces.encode(text))]


class Corpus(NamedTuple):
    """A synthetic data set: folder of shards, tokenizer, and the validation documents."""

    folder: Path
    tokenizer: Path
    texts: list[str]

    def env(self) -> dict[str, str]:
        return {"DATA_PATH": str(self.folder), "TOKENIZER_PATH": str(self.tokenizer)}

    def knobs(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.env().items()}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    root = tmp_path_factory.mktemp("corpus")
    tokenizer = root / "tiny.model"
    tokenizer.write_bytes(train_tokenizer())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    texts = documents(12, 99)
    for index in range(3):
        write_shard(root / f"fineweb_train_{index:06d}.bin", encode(pieces, documents(80 + 20 * index, index)))
    write_shard(root / "fineweb_val_000000.bin", encode(pieces, texts))
    return Corpus(root, tokenizer, texts)


@pytest.fixture(scope="session")
def validation(corpus) -> tg.ValStream:
    cfg = tiny("record", **corpus.knobs())
    return tg.load_validation(cfg, tg.load_tokenizer(cfg))


def trainer_of(cfg: tg.Config, folder: Path | None = None) -> tg.Trainer:
    """A trainer, in a run folder if one is given."""
    run = single(cfg)
    if folder is not None:
        run.open(folder)
    return tg.Trainer(run)


def run_steps(trainer: tg.Trainer, steps: int, of: int) -> list[float]:
    """Steps of a run of ``of`` steps, from where the trainer stands; returns the losses."""
    count = trainer.cfg.train_batch_tokens // trainer.cfg.train_seq_len
    losses = []
    for _ in range(steps):
        rows = trainer.stream.batch(trainer.step * count, count)
        losses.append(float(trainer.train_step(rows, trainer.step / of)[0]))
    return losses


# ---- processes ------------------------------------------------------------------------------------------------------

KEPT = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH", "SYSTEMROOT", "LANG")


def clean_env(*parts: dict[str, str]) -> dict[str, str]:
    """What a process needs of this environment, one thread, and the given variables."""
    env = {name: os.environ[name] for name in KEPT if name in os.environ}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for part in parts:
        env |= part
    return env


def start(command: list[Any], env: dict[str, str], **options: Any) -> subprocess.Popen:
    """A process with both outputs as text pipes."""
    return subprocess.Popen(
        [str(word) for word in command], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str


def finish(process: subprocess.Popen, timeout: float = 150) -> Ended:
    """Wait for a process; kill it when it hangs."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        err += "\n(killed by the test: it hung)"
    return Ended(process.returncode, out, err)


# Runs the script's main in a fork a job (much faster than a fresh Python a job), with 4 GB of memory and a time limit.
SANDBOX = """
import json, os, resource, signal, sys, traceback
jobs = json.load(sys.stdin)
sys.path.insert(0, os.path.dirname(jobs["script"]))
import train_gpt
codes = {}
for name, job in jobs["jobs"].items():
    child = os.fork()
    if not child:
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(job["folder"] + "/" + name + "." + kind, os.O_WRONLY | os.O_CREAT), number)
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30,) * 2)
        signal.alarm(jobs["seconds"])
        sys.argv = [jobs["script"], *job["arguments"]]
        os.environ.clear()
        os.environ.update(job["env"])
        code = 1
        try:
            code = train_gpt.main()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


def sandbox(jobs: dict[str, tuple], folder: Path, seconds: int = 60) -> dict[str, Ended]:
    """How the script ends for each named (arguments, environment), in a process of its own each."""
    told = {
        name: dict(arguments=[str(word) for word in arguments], env=env, folder=str(folder))
        for name, (arguments, env) in jobs.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", SANDBOX], input=json.dumps(dict(script=str(SCRIPT), jobs=told, seconds=seconds)),
        env=clean_env(), cwd=folder, text=True, capture_output=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = {name: [(folder / f"{name}.{kind}").read_text() for kind in ("out", "err")] for name in jobs}
    return {name: Ended(code, *ends[name]) for name, code in json.loads(done.stdout).items()}


def script(*arguments: Any) -> list[Any]:
    """The command line of the script in this Python."""
    return [sys.executable, SCRIPT, *arguments]


def available_compressors() -> list[str]:
    """Compressors whose package is installed."""
    return [name for name, coder in tg.COMPRESSORS.items() if importlib.util.find_spec(coder.package)]


def round_to_nearest(W: torch.Tensor, row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    """What the exporter has to beat: int16 [n, r, c] of matrices [n, r, c], steps row [n, r] x col [n, c]."""
    return (W / (row[:, :, None] * col[:, None, :])).round().clamp(-tg.TOP, tg.TOP).to(torch.int16)


def replace(cfg: tg.Config, **values: Any) -> tg.Config:
    return dataclasses.replace(cfg, **values)
