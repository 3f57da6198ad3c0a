"""Make training data: token shards, a tokenizer, a byte sidecar for validation, and a manifest.

    python data/prepare.py demo                                       built-in English, no network, under a minute
    python data/prepare.py docs a.jsonl.xz b.txt --val-docs 1000      your own documents
    python data/prepare.py hub --variant sp1024 --train-shards 10     the challenge's published shards
    python data/prepare.py check                                      every file against the manifest's SHA-256

Layout under --data-dir: datasets/<name>/fineweb_{train,val}_%06d.bin, fineweb_val_bytes_%06d.bin,
tokenizers/<name>.model, manifest.json. A shard is 256 little-endian int32 (magic, version, token count, zeros), then
uint16 tokens; every document is preceded by BOS (id 1). A byte sidecar has the same layout and says how many bytes
of the original UTF-8 text each validation token stands for.

Contents: 1 constants  2 errors and files  3 reading documents  4 tokenizer  5 tokenizing in parallel  6 shards
          7 manifest  8 docs  9 demo  10 hub  11 check  12 command line
Core needs: numpy, sentencepiece. Only where used: zstandard (.zst input), huggingface_hub (hub), tqdm (nicer progress).
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures as cf
import errno
import hashlib
import importlib.util
import inspect
import io
import json
import lzma
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import sysconfig
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import sentencepiece

# ---- 1. Constants ---------------------------------------------------------------------------------------------------

MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
BOS = 1
SPACE = "\u2581"  # SentencePiece writes a space as this character
END_OF_TEXT = b"<|endoftext|>"
SHARD_TOKENS = 100_000_000
BLOCK_BYTES = 2 << 20  # text handed to a worker at a time; part files depend on it, so it is not a knob
RECORD_LIMIT = 64 << 20  # a longer document is a missing separator, and would have to be held in memory whole
SAMPLE_BYTES = 64 << 20  # text a new tokenizer is trained on
SEPARATORS = {".jsonl": b"\n", ".txt": END_OF_TEXT}
RECIPE = 1  # raise when the same input would give other bytes: older unfinished work is then not continued

DEMO_NAME, DEMO_VOCAB = "demo_sp1024", 1024
DEMO_MIN_CHARS, DEMO_MAX_VAL_CHARS = 200, 4_000
DEMO_VAL_BYTES = 130_000  # about 60,000 tokens: small, because a laptop evaluates it several times
DEMO_SKIP_DIRS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
DEMO_DOC_CALLS = {"add_docstr", "add_newdoc", "add_docstr_all"}  # how torch and numpy document compiled functions

HUB_REPO, HUB_PREFIX = "willdepueoai/parameter-golf", "datasets"
HUB_REPOS = {  # where the community publishes what the official repository does not
    "sp4096": "kevclark/parameter-golf",
    "sp8192": "kevclark/parameter-golf",
    "sp8192_lossless_caps_caseops_v1_reserved": "romeerp/parameter-golf-caseops-v1",
}


# ---- 2. Errors and files --------------------------------------------------------------------------------------------


class PrepareError(Exception):
    """Bad input. The message is one line that names the thing and the remedy; the command exits with 2."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that takes `path`'s place only when the block ends well; OSErrors name `path`."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as file:
            yield file
        os.replace(tmp, path)
    except BaseException as e:
        tmp.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.errno:
            raise OSError(e.errno, os.strerror(e.errno), str(path)) from e
        raise


def sha256_of(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            sha.update(chunk)
    return sha.hexdigest()


class Progress:
    """Bytes done of a known total, with the time left: tqdm on a terminal, else a line every few seconds."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self.start = self.last = time.monotonic()
        self.lock = threading.Lock()
        self.bar = None
        if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, leave=False)

    def add(self, amount: int) -> None:
        with self.lock:
            self.done += amount
            if self.bar is not None:
                self.bar.update(amount)
            elif time.monotonic() - self.last > 5 and self.done:
                self.last = time.monotonic()
                left = (self.last - self.start) * max(self.total - self.done, 0) / self.done
                say(f"{self.label}: {100 * self.done / max(self.total, 1):.0f} %, about {left:.0f} s left")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


# ---- 3. Reading documents: a file is a stream of records, handed on in blocks of whole records ----------------------


def file_kind(path: Path) -> str:
    """'.jsonl' or '.txt', seen through one compression suffix. Raises PrepareError for anything else."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in SEPARATORS:
        raise PrepareError(f"{path}: unknown kind of file; give .jsonl or .txt, plain or with .gz, .xz or .zst")
    return suffixes[-1]


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


OPENERS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".xz": lzma.LZMADecompressor,
    ".zst": _zstd,
}


def read_chunks(raw: BinaryIO, suffix: str) -> Iterator[bytes]:
    """The text of a file, decompressed frame by frame. Raises EOFError where the last frame is cut short."""
    if suffix not in OPENERS:
        yield from iter(lambda: raw.read(BLOCK_BYTES), b"")
        return
    frame = None
    while data := raw.read(1 << 17):
        while data:
            frame = OPENERS[suffix]() if frame is None or frame.eof else frame
            yield frame.decompress(data)
            data = frame.unused_data.lstrip(b"\0") if frame.eof else b""  # frames may be padded with zeros
    if frame is None or not frame.eof:
        raise EOFError("the compressed data stops early")


def check_inputs(files: list[Path]) -> None:
    """Raise PrepareError for a missing file, an unknown kind, or a missing zstandard, before any work starts."""
    for path in files:
        if not path.is_file():
            raise PrepareError(f"{path}: no such file; check the path")
        file_kind(path)
        if path.suffix.lower() == ".zst" and importlib.util.find_spec("zstandard") is None:
            raise PrepareError(f"{path}: reading .zst needs the zstandard package; pip install zstandard")


def read_blocks(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Yield (number of the first record, about BLOCK_BYTES of whole records, position in the file on disk)."""
    separator = SEPARATORS[file_kind(path)]
    first, held, size = 1, [], 0
    try:
        with open(path, "rb") as raw:
            for chunk in read_chunks(raw, path.suffix.lower()):
                held.append(chunk)
                size += len(chunk)
                if size < BLOCK_BYTES:
                    continue
                text = b"".join(held)
                cut = text.rfind(separator) + len(separator)
                none = cut < len(separator)  # not one whole record yet
                if none and size > RECORD_LIMIT:
                    raise PrepareError(f"{path}: record {first} is longer than {RECORD_LIMIT >> 20} MB; split it")
                if none:
                    held = [text]
                    continue
                yield first, text[:cut], raw.tell()
                first += text.count(separator, 0, cut)
                held, size = [text[cut:]], len(text) - cut
            if size:
                yield first, b"".join(held), raw.tell()
    except Exception as e:
        if isinstance(e, (EOFError, lzma.LZMAError, zlib.error)) or type(e).__name__ == "ZstdError":
            raise PrepareError(f"{path}: damaged or cut short after record {first} ({e}); fetch it again") from e
        raise


def parse_block(path: Path, first: int, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield each record's (text, UTF-8 bytes); blank lines are no records. Errors name file and line or document."""
    jsonl = file_kind(path) == ".jsonl"
    for number, record in enumerate(data.split(SEPARATORS[file_kind(path)]), first):
        try:
            if not jsonl:
                text = record.decode().strip("\r\n")
            elif record.strip():
                text = json.loads(record)["text"]
            else:
                continue
            yield text, text.encode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            what = 'want one {"text": "..."} object of valid Unicode' if jsonl else "want UTF-8"
            where = f"{path}:{number}" if jsonl else f"{path}: document {number}"
            detail = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise PrepareError(f"{where}: unreadable ({detail}); {what}: mend or remove it") from e


def read_documents(files: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    for path in files:
        for first, data, _ in read_blocks(path):
            yield from parse_block(path, first, data)


def digest(utf8: bytes) -> bytes:
    """16 bytes by which exact duplicates are found."""
    return hashlib.blake2b(utf8, digest_size=16).digest()


# ---- 4. Tokenizer: token ids, and the bytes each token stands for ---------------------------------------------------


def wire_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, int or bytes) of a protobuf message.

    Twenty lines instead of the protobuf package, which newer SentencePiece asks for to show surfaces and settings.
    """
    at, size = 0, len(data)

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < size:
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        length = varint() if key & 7 == 2 else {1: 8, 5: 4}[key & 7]
        yield key >> 3, data[at : at + length]
        at += length


class Tokenizer:
    """A SentencePiece model with its byte table.

    `plain`: encoding keeps the text as it is and adds a dummy prefix, so a table of bytes per id is exact. Otherwise
    (NFKC, white space removed, no dummy prefix) the bytes come from SentencePiece's offsets into the original text.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise PrepareError(f"{path}: no such tokenizer; check --tokenizer")
        try:
            model = path.read_bytes()
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
            parts: dict[int, Any] = dict(wire_fields(model))  # 2 trainer_spec, 3 normalizer_spec
            trainer, rules = dict(wire_fields(parts.get(2, b""))), dict(wire_fields(parts.get(3, b"")))
        except (RuntimeError, ValueError, IndexError, KeyError) as e:
            raise PrepareError(f"{path}: not a SentencePiece model; give a .model file") from e
        self.path, self.vocab = path, self.sp.vocab_size()
        self.rule = rules.get(1, b"").decode()
        self.dummy_prefix = bool(rules.get(3, 1))
        self.normalizes = bool(rules.get(2, b"")) or bool(rules.get(4, 1))  # a character map; extra white space removed
        self.plain = self.dummy_prefix and not self.normalizes and bool(rules.get(5, 1))
        self._check(suffix=bool(trainer.get(24, 0)))
        ids = range(self.vocab)
        pieces = [self.sp.id_to_piece(i) for i in ids]
        silent = [self.sp.is_control(i) or self.sp.is_unused(i) or self.sp.is_unknown(i) for i in ids]
        self.is_byte = np.array([self.sp.is_byte(i) for i in ids])
        self.leads = np.array([p.startswith(SPACE) and not s for p, s in zip(pieces, silent, strict=True)])
        lengths = [len(p.removeprefix(SPACE).replace(SPACE, " ").encode()) for p in pieces]
        self.base = np.where(silent, 0, np.where(self.is_byte, 1, lengths)).astype(np.int64)

    def _check(self, suffix: bool) -> None:
        sp, name = self.sp, self.path
        if self.vocab > 65535:
            raise PrepareError(f"{name}: {self.vocab} pieces, but shards hold uint16 tokens; use at most 65535")
        if sp.bos_id() != BOS:
            raise PrepareError(f"{name}: BOS has id {sp.bos_id()}, shards need id {BOS}; train with bos_id=1")
        if sp.is_unknown(sp.piece_to_id(SPACE)):
            raise PrepareError(f"{name}: no stand-alone U+2581 (space) piece, bytes cannot be counted; train another")
        if suffix:
            raise PrepareError(f"{name}: white space is a suffix of its pieces, which is not supported; train another")

    def encode(self, text: str) -> np.ndarray:
        """Token ids (n,) int64, without BOS. Raises PrepareError where a character has no spelling."""
        ids = np.asarray(self.sp.encode(text), dtype=np.int64)
        unknown = self.sp.unk_id()
        if unknown >= 0 and (ids == unknown).any():
            raise PrepareError(f"{self.path}: cannot spell some characters; use a tokenizer with byte fallback")
        return ids

    def count_bytes(self, text: str, utf8: bytes, ids: np.ndarray) -> np.ndarray:
        """Original UTF-8 bytes (n,) int64 of each of a document's tokens; their sum is exactly len(utf8)."""
        if self.plain and SPACE not in text:
            space = self.leads[ids]
            space[:1] = False  # after BOS the leading space is the dummy prefix, not text
            counts = self.base[ids] + space
        else:
            counts = self._offset_bytes(utf8, ids)
        if counts.sum() != len(utf8) or counts.min() < 0 or counts.max() > 65535:
            raise PrepareError(
                f"{self.path}: cannot account for the bytes of the document that starts with {text[:40]!r} "
                f"({counts.sum()} of {len(utf8)}, at most {counts.max()} a token); remove it or use another tokenizer"
            )
        return counts

    def _offset_bytes(self, utf8: bytes, ids: np.ndarray) -> np.ndarray:
        """Each token takes the original text from the end of the one before to its own end; the last takes the rest."""
        proto = self.sp.encode(utf8.decode(), out_type="serialized_proto")
        ends = [dict(wire_fields(piece)).get(5, 0) for field, piece in wire_fields(proto) if field == 2]
        if len(ends) != len(ids):
            raise PrepareError(f"{self.path}: SentencePiece {sentencepiece.__version__} encodes a text in two ways")
        ends[-1] = len(utf8)
        counts = np.diff(np.array(ends, dtype=np.int64), prepend=0)
        # SentencePiece puts a byte-spelt character on its last byte piece: give each byte piece its own byte.
        edges = np.flatnonzero(np.diff(self.is_byte[ids].astype(np.int8), prepend=0, append=0))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            if (spare := int(counts[start:stop].sum()) - int(stop - start)) >= 0:
                counts[start:stop] = 1
                counts[stop - 1] += spare
        return counts


def train_tokenizer(texts: Iterator[str], vocab: int, path: Path) -> None:
    """Train BPE on `texts`; write `path` (.model) and its .vocab. One thread: the result depends on their number."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts), model_writer=model, model_type="bpe", vocab_size=vocab,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=True, split_digits=True, pad_id=0, bos_id=BOS, eos_id=2, unk_id=3,
            required_chars=SPACE, character_coverage=0.999, num_threads=1, minloglevel=2,
        )  # fmt: skip  # by default no piece holds an inner space, which other people's byte tables miscount
    except (RuntimeError, OSError) as e:  # SentencePiece reports too little text for the vocabulary as either
        reason = str(e).strip().splitlines()[-1].split("] ")[-1]
        raise PrepareError(f"--vocab {vocab}: cannot train a tokenizer on this text ({reason}) change --vocab") from e
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    with atomic(path.with_suffix(".vocab")) as file:
        rows = (f"{sp.id_to_piece(i)}\t{sp.get_score(i):g}\n" for i in range(sp.vocab_size()))
        file.write("".join(rows).encode())
    with atomic(path) as file:
        file.write(model.getvalue())


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    """Lines in pieces that SentencePiece accepts (it silently skips sentences over 4,192 bytes)."""
    for text in texts:
        for line in text.replace("\0", "").splitlines():
            yield from (line[i : i + 1000] for i in range(0, len(line), 1000))


# ---- 5. Tokenizing in parallel: one part file a block, so that an interrupted run continues -------------------------

_WORKER: dict[str, Tokenizer] = {}  # a worker process loads the tokenizer once


def _start_worker(model: Path | None) -> None:
    def follow_parent() -> None:  # a killed parent must not leave workers behind
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: only the parent answers
    threading.Thread(target=follow_parent, daemon=True).start()
    if model is not None:
        _WORKER["tokenizer"] = Tokenizer(model)


def make_pool(workers: int, model: Path | None = None) -> cf.ProcessPoolExecutor:
    # "spawn": the readers below are threads, and forking a process that has threads can deadlock
    context = multiprocessing.get_context("spawn")
    return cf.ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(model,))


def tokenize_block(path: Path, first: int, data: bytes, part: Path, with_bytes: bool) -> None:
    """Write a part: tokens (n,) u16 with BOS, lengths (d,) in tokens, sizes (d,) in bytes, digests (d,) and, if asked,
    nbytes (n,) u16. A document that is empty, or of which the tokenizer leaves nothing, has length 0."""
    tokenizer = _WORKER["tokenizer"]
    tokens, nbytes, lengths, sizes, digests = [], [], [], [], []
    for text, utf8 in parse_block(path, first, data):
        ids = tokenizer.encode(text) if text.strip() else np.zeros(0, np.int64)
        digests.append(digest(utf8))
        sizes.append(len(utf8))
        lengths.append(len(ids) + 1 if len(ids) else 0)
        if len(ids):
            tokens += [[BOS], ids]
            nbytes += [[0], tokenizer.count_bytes(text, utf8, ids)] if with_bytes else []
    arrays = {
        "tokens": np.concatenate([[], *tokens]).astype("<u2"),
        "lengths": np.array(lengths, np.int64),
        "sizes": np.array(sizes, np.int64),
        "digests": np.array(digests, "S16"),
    }
    if with_bytes:
        arrays["nbytes"] = np.concatenate([[], *nbytes]).astype("<u2")
    with atomic(part) as file:
        np.savez(file, **arrays)


class Feeder:
    """Reads files in threads (decompression releases the GIL) and hands blocks to worker processes, a bounded number
    at a time."""

    def __init__(self, pool: cf.Executor, workers: int, work: Path) -> None:
        self.pool, self.workers, self.work = pool, workers, work
        self.slots = threading.Semaphore(3 * workers)
        self.error: BaseException | None = None  # the first one stops every reader

    def tokenize(self, split: str, files: list[Path]) -> list[Path]:
        """Tokenize a split; returns its part files in stream order. Byte counts are kept for "val" only."""
        progress = Progress(f"tokenize {split}", sum(path.stat().st_size for path in files))
        threads = cf.ThreadPoolExecutor(min(len(files), self.workers))
        try:
            counts = list(threads.map(lambda row: self._feed(split, *row, progress), enumerate(files)))
        except BaseException as e:
            self.error = self.error or e
            raise
        finally:
            threads.shutdown()
            progress.close()
        if self.error is not None:
            raise self.error
        return [self._part(split, i, k) for i, count in enumerate(counts) for k in range(count)]

    def _part(self, split: str, index: int, block: int) -> Path:
        return self.work / f"{split}-{index:05d}-{block:06d}.npz"

    def _feed(self, split: str, index: int, path: Path, progress: Progress) -> int:
        """Submit the blocks of one file that have no part yet, wait for them, and return how many blocks there are."""
        done = self.work / f"{split}-{index:05d}.done"
        if done.exists():
            progress.add(path.stat().st_size)
            return int(done.read_text())
        futures, count, at = [], 0, 0
        try:
            for count, (first, data, position) in enumerate(read_blocks(path), 1):
                part, step, at = self._part(split, index, count - 1), position - at, position
                if part.exists():
                    progress.add(step)
                    continue
                self.slots.acquire()
                if self.error is not None:
                    break
                future = self.pool.submit(tokenize_block, path, first, data, part, split == "val")
                future.add_done_callback(lambda f, step=step: self._finished(f, step, progress))
                futures.append(future)
        except (PrepareError, OSError, RuntimeError) as e:
            self.error = self.error or e
        cf.wait(futures)
        if self.error is None:
            with atomic(done) as file:
                file.write(str(count).encode())
        return count

    def _finished(self, future: cf.Future, step: int, progress: Progress) -> None:
        error = cf.CancelledError() if future.cancelled() else future.exception()
        self.error = self.error or error
        self.slots.release()
        progress.add(step)


# ---- 6. Shards ------------------------------------------------------------------------------------------------------


def read_part(part: Path, *names: str) -> list[np.ndarray]:
    try:
        with np.load(part) as arrays:
            return [arrays[name] for name in names]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise PrepareError(f"{part}: damaged part file ({e}); delete it and its .done file, and run again") from e


@dataclass
class Selection:
    """Which documents of a split's parts are kept, and what was counted on the way."""

    parts: list[Path]
    keep: list[np.ndarray]  # one bool array (d,) a part
    digests: np.ndarray  # (kept documents,) S16
    docs: int
    tokens: int
    text_bytes: int
    empty: int
    duplicates: int


def select_documents(parts: list[Path], banned: np.ndarray) -> Selection:
    """Drop empty documents, documents whose digest is in `banned`, and all but the first of equal ones.

    Holds about 50 bytes a document, never their text or tokens.
    """
    if not parts:
        return Selection([], [], np.zeros(0, "S16"), docs=0, tokens=0, text_bytes=0, empty=0, duplicates=0)
    rows = [read_part(part, "digests", "lengths", "sizes") for part in parts]
    digests, lengths, sizes = (np.concatenate(column) for column in zip(*rows, strict=True))
    filled = lengths > 0
    first = np.zeros(len(digests), bool)
    first[np.unique(digests, return_index=True)[1]] = True
    keep = filled & first & ~np.isin(digests, banned)
    ends = np.cumsum([len(row[0]) for row in rows])[:-1]
    return Selection(
        parts, np.split(keep, ends), digests[keep], int(keep.sum()), int(lengths[keep].sum()), int(sizes[keep].sum()),
        empty=int((~filled).sum()), duplicates=int((filled & ~keep).sum()),
    )  # fmt: skip


def write_shards(chosen: Selection, array: str, folder: Path, prefix: str, shard_tokens: int) -> dict[str, dict]:
    """Write the kept documents' `array` as shards; returns {file name: {sha256, bytes}}. Holds one part at a time."""
    pairs = zip(chosen.parts, chosen.keep, strict=True)
    loaded = ((keep, *read_part(part, array, "lengths")) for part, keep in pairs)
    chunks = (values[np.repeat(keep, lengths)] for keep, values, lengths in loaded)
    files, pending = {}, np.zeros(0, "<u2")
    for index, start in enumerate(range(0, chosen.tokens, shard_tokens)):
        left = min(shard_tokens, chosen.tokens - start)
        header = np.zeros(256, "<i4")
        header[:3] = MAGIC, SHARD_VERSION, left
        path = folder / f"{prefix}_{index:06d}.bin"
        with atomic(path) as file:
            sha = hashlib.sha256(header.tobytes())
            file.write(header.tobytes())
            while left:
                pending = pending if len(pending) else next(chunks)
                data = pending[:left].tobytes()
                pending, left = pending[left:], left - len(data) // 2
                file.write(data)
                sha.update(data)
        files[path.name] = {"sha256": sha.hexdigest(), "bytes": path.stat().st_size}
    return files


def read_shard(path: Path) -> np.ndarray:
    """A shard's values (n,) u16, memory-mapped. Raises PrepareError where size or header is not a shard's."""
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", 256) if size >= HEADER_BYTES else np.zeros(3)
    if header[0] != MAGIC or header[1] != SHARD_VERSION:
        raise PrepareError(f"{path}: not a token shard (wrong header); delete it and run again")
    if size != HEADER_BYTES + 2 * int(header[2]):
        raise PrepareError(f"{path}: {size} bytes, but {header[2]} tokens announced; delete it and run again")
    return np.memmap(path, "<u2", "r", HEADER_BYTES)


# ---- 7. Manifest ----------------------------------------------------------------------------------------------------


def load_manifest(root: Path) -> dict[str, Any]:
    path = root / "manifest.json"
    manifest: dict[str, Any] = {
        "version": "1.0", "num_docs": 0, "num_val_docs": 0, "shuffle_seed": None, "shard_size": SHARD_TOKENS,
        "append_eos": False, "docs_jsonl": None, "docs_meta": {},
        "tokenizer_specs": [], "tokenizers": [], "datasets": [],
    }  # fmt: skip
    if not path.exists():
        return manifest
    try:
        manifest.update(json.loads(path.read_bytes()))
        if all(isinstance(entry["name"], str) for key in ("datasets", "tokenizers") for entry in manifest[key]):
            return manifest
        raise ValueError("a name is not text")
    except (ValueError, TypeError, KeyError) as e:
        raise PrepareError(f"{path}: unreadable manifest ({e}); move it away and run again") from e


def find(entries: list[dict], name: str | None) -> dict | None:
    return next((entry for entry in entries if entry.get("name") == name), None)


def save_manifest(root: Path, dataset: dict, tokenizer: dict, top: dict) -> None:
    """Merge one dataset and its tokenizer into the manifest; entries of the same name are replaced."""
    manifest = load_manifest(root) | top
    for key, entry in (("datasets", dataset), ("tokenizers", tokenizer)):
        manifest[key] = [old for old in manifest[key] if old["name"] != entry["name"]] + [entry]
    with atomic(root / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=2).encode() + b"\n")


def tokenizer_entry(root: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    model = tokenizer.path
    vocab = model.with_suffix(".vocab")
    return {
        "name": model.stem,
        "kind": "sentencepiece_bpe",
        "vocab_size": tokenizer.vocab,
        "bos_id": BOS,
        "eos_id": tokenizer.sp.eos_id(),
        "model_path": str(model.relative_to(root).as_posix()),
        "vocab_path": str(vocab.relative_to(root).as_posix()) if vocab.exists() else None,
        "sha256": sha256_of(model),
        "normalizer": tokenizer.rule or "identity",
        "normalizes": tokenizer.normalizes,
        "add_dummy_prefix": tokenizer.dummy_prefix,
    }


def dataset_entry(root: Path, name: str, tokenizer: Tokenizer, files: dict[str, dict], stats: dict) -> dict[str, Any]:
    """A dataset's manifest row; `files` is keyed by file name here and by path relative to the data root there."""
    folder = f"datasets/{name}"
    count = {split: len([f for f in files if re.match(rf"fineweb_{split}_\d", f)]) for split in ("train", "val")}
    return {
        "name": name,
        "tokenizer_name": tokenizer.path.stem,
        "tokenizer_kind": "sentencepiece_bpe",
        "path": folder,
        "train_glob": f"{folder}/fineweb_train_[0-9]*.bin",
        "val_glob": f"{folder}/fineweb_val_[0-9]*.bin",
        "val_bytes_glob": f"{folder}/fineweb_val_bytes_*.bin",
        "vocab_size": tokenizer.vocab,
        "bos_id": BOS,
        "eos_id": tokenizer.sp.eos_id(),
        "append_eos": False,
        "recommended_bigram_vocab_size": 5 * tokenizer.vocab,
        "stats": {"files_total": sum(count.values()), "files_train": count["train"], "files_val": count["val"]} | stats,
        "files": {f"{folder}/{file}": row for file, row in sorted(files.items())},
    }


def find_fault(root: Path, dataset: dict, deep: bool) -> str | None:
    """What is wrong with a dataset on disk, in a line, or None. `deep` reads every byte; else sizes and headers."""
    tokenizer = find(load_manifest(root)["tokenizers"], dataset.get("tokenizer_name"))
    if tokenizer is None:
        return f"{dataset['name']}: its tokenizer {dataset.get('tokenizer_name')} is not in the manifest"
    rows = {tokenizer["model_path"]: {"sha256": tokenizer.get("sha256")}} | dataset.get("files", {})
    for relative, row in rows.items():
        path = root / relative
        if not path.is_file():
            return f"{path}: missing"
        if "bytes" in row and path.stat().st_size != row["bytes"]:
            return f"{path}: {path.stat().st_size} bytes, the manifest says {row['bytes']}"
        if (deep or path.suffix == ".model") and sha256_of(path) != row["sha256"]:
            return f"{path}: the SHA-256 is not the manifest's"
    return None


# ---- 8. docs: documents to a dataset --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One dataset to build. One of `val` (held-out files) and `val_docs` is set; `tokenizer` None: train one."""

    root: Path
    name: str
    train: list[Path]
    val: list[Path]
    val_docs: int
    tokenizer: Path | None
    vocab: int
    shard_tokens: int
    workers: int
    key: str  # what the bytes depend on; equal keys give equal bytes

    @property
    def work(self) -> Path:
        return self.root / "datasets" / f".{self.name}.work"


def build_key(files: list[Path], *settings: Any) -> str:
    """Hash of the settings, and of each file's kind, size, first and last megabyte (not of its name or date)."""
    sha = hashlib.sha256(repr((RECIPE, BLOCK_BYTES, settings)).encode())
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(1 << 20)
            file.seek(max(0, size - (1 << 20)))
            sha.update(repr((file_kind(path), size, sha256_bytes(head), sha256_bytes(file.read()))).encode())
    return sha.hexdigest()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def open_work(job: Job) -> None:
    """Make the work folder; what another recipe or other input left there is of no use and goes."""
    note = job.work / "key"
    if job.work.exists() and (not note.exists() or note.read_text() != job.key):
        shutil.rmtree(job.work)
    if job.work.exists():
        say(f"{job.name}: continuing the work in {job.work}")
    with atomic(note) as file:
        file.write(job.key.encode())


def held_out_files(job: Job) -> list[Path]:
    """--val's files, or a file of the first `val_docs` different, non-empty documents of the input."""
    if job.val:
        return job.val
    path = job.work / "val.jsonl"
    if path.exists():
        return [path]
    seen: set[bytes] = set()
    with atomic(path) as file:
        for text, utf8 in read_documents(job.train):
            key = digest(utf8)
            if not text.strip() or key in seen:
                continue
            if len(seen) == job.val_docs:
                return [path]
            seen.add(key)
            file.write(json.dumps({"text": text}).encode() + b"\n")
        count = f"{len(seen)} different documents in the input"
        raise PrepareError(f"--val-docs {job.val_docs}: only {count}, and training needs some; give more or lower it")


def prepare_tokenizer(job: Job, val: list[Path]) -> Path:
    """The tokenizer in the work folder: a copy of --tokenizer, or one trained on the head of every training file."""
    if job.tokenizer is not None:
        path = job.work / "given" / job.tokenizer.name
        with atomic(path) as file:
            file.write(job.tokenizer.read_bytes())
        return path
    path = job.work / "trained" / f"{re.sub(r'_sp[0-9]+$', '', job.name)}_{job.vocab}_bpe.model"
    if not path.exists():
        banned = {digest(utf8) for _, utf8 in read_documents(val)}
        say(f"{job.name}: training a tokenizer of {job.vocab} pieces")
        train_tokenizer(_sample(job.train, banned), job.vocab, path)
    return path


def _sample(files: list[Path], banned: set[bytes]) -> Iterator[str]:
    share = SAMPLE_BYTES // len(files)
    for path in files:
        left = share
        for text, utf8 in read_documents([path]):
            if left <= 0:
                break
            if digest(utf8) not in banned:
                left -= len(utf8)
                yield text


def build(job: Job, docs_meta: dict[str, Any]) -> dict[str, Any]:
    """Run every stage, each continuing what an earlier run left; returns the dataset's manifest entry."""
    open_work(job)
    val_files = held_out_files(job)
    model = prepare_tokenizer(job, val_files)
    tokenizer = Tokenizer(model)
    if job.tokenizer is not None and tokenizer.normalizes:
        say(f"{job.name}: the tokenizer normalises text ({tokenizer.rule}); the sidecar counts the original bytes")
    with make_pool(job.workers, model) as pool:
        try:
            feeder = Feeder(pool, job.workers, job.work)
            val_parts, train_parts = feeder.tokenize("val", val_files), feeder.tokenize("train", job.train)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    val = select_documents(val_parts, np.zeros(0, "S16"))
    train = select_documents(train_parts, val.digests)
    for split, chosen in (("validation", val), ("training", train)):
        if not chosen.docs:
            why = f"{chosen.empty} empty and {chosen.duplicates} duplicate documents dropped"
            raise PrepareError(f"{job.name}: no {split} document is left ({why}); give more text")
        if chosen.empty:
            say(f"{job.name}: dropped {chosen.empty} {split} documents that are empty or only white space")
    out = job.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    files = write_shards(val, "tokens", out, "fineweb_val", job.shard_tokens)
    files |= write_shards(val, "nbytes", out, "fineweb_val_bytes", job.shard_tokens)
    files |= write_shards(train, "tokens", out, "fineweb_train", job.shard_tokens)
    check_sidecar(out, val)
    return install(job, tokenizer, files, val, train, docs_meta)


def check_sidecar(folder: Path, val: Selection) -> None:
    """The validation split's bytes, read back from disk, are the documents' UTF-8 length."""
    total = sum(int(read_shard(path).sum(dtype=np.int64)) for path in sorted(folder.glob("fineweb_val_bytes_*.bin")))
    if total != val.text_bytes:
        raise PrepareError(f"{folder}: the sidecar counts {total} bytes, the documents {val.text_bytes}; run again")


def install(
    job: Job, tokenizer: Tokenizer, files: dict[str, dict], val: Selection, train: Selection, docs_meta: dict[str, Any]
) -> dict[str, Any]:
    """Move shards and tokenizer into place, write the manifest, drop the work folder."""
    folder, home = job.root / "datasets" / job.name, job.root / "tokenizers"
    home.mkdir(parents=True, exist_ok=True)
    for source in (tokenizer.path, tokenizer.path.with_suffix(".vocab")):
        if source.exists():
            with atomic(home / source.name) as file:
                file.write(source.read_bytes())
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(job.work / "out", folder)
    splits = {"val": val, "train": train}
    stats: dict[str, int] = {}
    for field in ("docs", "tokens"):
        counts = {split: getattr(chosen, field) for split, chosen in splits.items()}
        stats |= {f"{field}_total": sum(counts.values())} | {f"{field}_{split}": n for split, n in counts.items()}
    for split, chosen in splits.items():
        stats |= {f"bytes_{split}": chosen.text_bytes, f"empty_dropped_{split}": chosen.empty}
        stats[f"duplicates_dropped_{split}"] = chosen.duplicates
    placed = Tokenizer(home / tokenizer.path.name)
    entry = dataset_entry(job.root, job.name, placed, files, stats) | {
        "build_key": job.key,
        "byte_accounting": "table" if placed.plain else "offsets into the original text (the tokenizer changes it)",
        "docs_meta": docs_meta,
    }
    top = {"num_docs": stats["docs_total"], "num_val_docs": stats["docs_val"], "shard_size": job.shard_tokens}
    save_manifest(job.root, entry, tokenizer_entry(job.root, placed), top | {"docs_meta": docs_meta})
    shutil.rmtree(job.work, ignore_errors=True)
    return entry


def already_done(job: Job, force: bool) -> dict[str, Any] | None:
    """The finished dataset's entry if it is this very one. Raises PrepareError rather than replace another one."""
    entry = find(load_manifest(job.root)["datasets"], job.name)
    folder, note = job.root / "datasets" / job.name, job.work / "key"
    if force:
        return None
    if entry is not None and entry.get("build_key") == job.key:
        fault = find_fault(job.root, entry, deep=False)
        if fault is None:
            return entry
        say(f"{fault}; making {job.name} again")
    elif folder.exists() and not (note.exists() and note.read_text() == job.key):  # else: stopped just before the end
        raise PrepareError(f"{folder}: exists, made from other input or settings; give another --name, or --force")
    if job.tokenizer is not None:
        placed = job.root / "tokenizers" / job.tokenizer.name
        if placed.exists() and sha256_of(placed) != sha256_of(job.tokenizer):
            raise PrepareError(f"{placed}: another tokenizer of that name is there; rename yours, or --force")
    return None


def summary(entry: dict[str, Any], root: Path) -> str:
    s = entry["stats"]
    rows = [f"{s[f'docs_{x}']:,} {x} documents ({s[f'tokens_{x}']:,} tokens)" for x in ("train", "val")]
    size = f", {s['bytes_val']:,} val bytes" if "bytes_val" in s else ""
    return f"{entry['name']}: {' and '.join(rows)}{size} in {root / entry['path']}"


def training_command(entry: dict[str, Any], root: Path) -> str:
    """How train_gpt.py is told of a dataset."""
    tokenizer = root / find(load_manifest(root)["tokenizers"], entry["tokenizer_name"])["model_path"]
    where = dict(DATA_DIR=root, DATASET=entry["name"], VOCAB_SIZE=entry["vocab_size"], TOKENIZER_PATH=tokenizer)
    return f"train on it: {' '.join(f'{k}={shlex.quote(str(v))}' for k, v in where.items())} python train_gpt.py"


def run_docs(args: argparse.Namespace) -> None:
    files, val = [Path(f) for f in args.files], [Path(f) for f in args.val or []]
    check_inputs(files + val)
    tokenizer = Path(args.tokenizer) if args.tokenizer else None
    vocab = Tokenizer(tokenizer).vocab if tokenizer else args.vocab
    model = sha256_of(tokenizer) if tokenizer else "trained"
    key = build_key(files + val, len(val), args.val_docs, model, vocab, args.shard_tokens)
    name = args.name or f"docs_sp{vocab}"
    root, val_docs = args.data_dir, args.val_docs or 0
    job = Job(root, name, files, val, val_docs, tokenizer, vocab, args.shard_tokens, args.workers, key)
    meta = {"source": "docs", "files": [path.name for path in files], "val_files": [path.name for path in val]}
    with locked(args.data_dir):
        done = already_done(job, args.force)
        entry = done or build(job, meta)
    print(("already complete, " if done else "") + summary(entry, args.data_dir))
    print(training_command(entry, root))


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """One writer a data folder: a second command waits. The lock goes with the process, whatever ends it."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".prepare.lock", "a") as file:
        try:
            import fcntl
        except ImportError:  # Windows: run one command at a time
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{root}: another prepare.py is at work there; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- 9. demo: English that every machine that can run us already has ------------------------------------------------


def doc_strings(path: Path) -> list[str]:
    """Docstrings of a source file's module, classes and functions, and texts given to add_docstr and its like."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            source = path.read_text(encoding="utf-8")
            body = ast.parse(source).body if '"""' in source or "'''" in source else []
            found, stack = [ast.get_docstring(ast.Module(body, []))], body[::-1]
    except (OSError, ValueError, SyntaxError, RecursionError):
        return []  # test data that is not meant to parse, other encodings
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(ast.get_docstring(node))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            found.append(_added_doc(node.value))
        stack += [child for child in getattr(node, "body", [])[::-1] if isinstance(child, ast.stmt)]
    return [text for text in found if text]


def _added_doc(call: ast.Call) -> str | None:
    name = getattr(call.func, "id", getattr(call.func, "attr", None))
    if name not in DEMO_DOC_CALLS:
        return None
    texts = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return inspect.cleandoc(max(texts, key=len, default=""))


def demo_sources() -> list[Path]:
    """Python files of the standard library, torch and numpy, found without importing them, in a fixed order."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for package in ("torch", "numpy"):
        spec = importlib.util.find_spec(package)
        roots += [Path(place) for place in (spec.submodule_search_locations if spec else None) or []]
    files = []
    for root in roots:
        inside = ((path.relative_to(root), path) for path in root.rglob("*.py"))
        files += [path for relative, path in sorted(inside) if not DEMO_SKIP_DIRS & set(relative.parts)]
    return files


def demo_documents(workers: int) -> tuple[list[str], list[str]]:
    """(training, validation) documents: different, shuffled by their digests, the first short ones held out."""
    texts: list[str] = []
    try:
        from pydoc_data.topics import topics

        texts += [topics[name].strip() for name in sorted(topics)]
    except ImportError:
        pass  # some distributions leave it out
    files = demo_sources()
    with make_pool(workers) as pool:
        texts += [text for found in pool.map(doc_strings, files, chunksize=32) for text in found]
    order = {}
    for text in texts:
        try:
            order[digest(text.encode())] = text
        except UnicodeEncodeError:
            pass  # a docstring with a lone surrogate
    train, val, held = [], [], 0
    for _, text in sorted(order.items()):
        if len(text) < DEMO_MIN_CHARS:
            continue
        if held < DEMO_VAL_BYTES and len(text) <= DEMO_MAX_VAL_CHARS:
            val.append(text)
            held += len(text.encode())
        else:
            train.append(text)
    if sum(map(len, train)) < 500_000:
        raise PrepareError("demo: this Python has too little documentation installed; use the docs command instead")
    return train, val


def run_demo(args: argparse.Namespace) -> None:
    start, root = time.monotonic(), args.data_dir
    with locked(root):
        entry = find(load_manifest(root)["datasets"], DEMO_NAME)
        if entry is not None and not args.force:
            fault = find_fault(root, entry, deep=True)
            if fault is None:
                print("already complete, " + summary(entry, root))
                return
            say(f"{fault}; making the demo again")
        say("demo: collecting the documentation of Python, torch and numpy")
        source = root / f".{DEMO_NAME}.source"
        try:
            for split, texts in zip(("train", "val"), demo_documents(args.workers), strict=True):
                with atomic(source / f"{split}.jsonl") as file:
                    file.writelines(json.dumps({"text": text}).encode() + b"\n" for text in texts)
            train, val = [source / "train.jsonl"], [source / "val.jsonl"]
            key = build_key(train + val, *map(sha256_of, train + val))
            job = Job(root, DEMO_NAME, train, val, 0, None, DEMO_VOCAB, SHARD_TOKENS, args.workers, key)
            meta = {"source": "docstrings of the installed Python, torch and numpy", "python": sys.version.split()[0]}
            entry = build(job, meta)
        finally:
            shutil.rmtree(source, ignore_errors=True)
    print(f"{summary(entry, root)} ({time.monotonic() - start:.0f} s)")


# ---- 10. hub: the challenge's published shards ----------------------------------------------------------------------


class Hub:
    """A dataset repository on the Hugging Face hub, read through its official client into DATA_DIR/.hub and moved from
    there into place once checked. The client itself goes on within a file when a connection breaks."""

    def __init__(self, root: Path, repo: str, prefix: str) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one bar for all files, one line for an error
        os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
        try:
            import huggingface_hub
        except ImportError as e:
            raise PrepareError("hub: needs the huggingface_hub package; pip install huggingface_hub") from e
        self.api, self.root, self.repo, self.prefix = huggingface_hub, root, repo, prefix.strip("/")
        self.staging = root / ".hub"
        self.known: dict[str, dict] = {}  # the SHA-256 of files that an earlier run has read
        for entry in load_manifest(root)["datasets"]:
            self.known |= entry.get("files", {})

    def _remote(self, relative: str) -> str:
        return f"{self.prefix}/{relative}" if self.prefix else relative

    def _failure(self, relative: str, e: Exception) -> PrepareError:
        detail = next(iter(str(e).strip().splitlines()), "") or type(e).__name__
        where = f"{self.repo}/{self._remote(relative)}"
        return PrepareError(f"{where}: cannot fetch ({detail}); what has arrived is kept, run again to continue")

    def look_up(self, relative: str) -> dict[str, Any] | None:
        """{relative, size, sha256 (None where the hub gives none)} of a published file, or None if there is none."""
        url = self.api.hf_hub_url(self.repo, self._remote(relative), repo_type="dataset")
        try:
            meta = self.api.get_hf_file_metadata(url)
        except self.api.errors.EntryNotFoundError:
            return None
        except Exception as e:
            raise self._failure(relative, e) from e
        is_sha = re.fullmatch("[0-9a-f]{64}", meta.etag or "")  # large files have their SHA-256 as ETag
        return {"relative": relative, "size": meta.size, "sha256": meta.etag if is_sha else None}

    def need(self, relative: str, remedy: str) -> dict[str, Any]:
        row = self.look_up(relative)
        if row is None:
            raise PrepareError(f"{self.repo}/{self._remote(relative)}: not published; {remedy}")
        return row

    def count(self, pattern: str, limit: int) -> list[dict[str, Any]]:
        """The published files of a numbered series, at most `limit`."""
        rows = []
        while len(rows) < limit and (row := self.look_up(pattern % len(rows))):
            rows.append(row)
        return rows

    def fetch(self, row: dict[str, Any], target: Path | None = None) -> Path:
        """Bring a file to DATA_DIR unless the same one is there. Raises PrepareError when what arrives is wrong."""
        relative = row["relative"]
        target = target or self.root / relative
        if target.exists() and self._fault(target, row) is None:
            return target
        try:
            name = self._remote(relative)
            got = Path(self.api.hf_hub_download(self.repo, name, repo_type="dataset", local_dir=self.staging))
        except OSError as e:
            raise e if e.errno == errno.ENOSPC else self._failure(relative, e) from e
        except Exception as e:
            raise self._failure(relative, e) from e
        if fault := self._fault(got, row):
            got.unlink()
            raise PrepareError(f"{self.repo}/{name}: {fault}; nothing was kept of it: run again, or report it there")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(got, target)
        return target

    def _fault(self, path: Path, row: dict[str, Any]) -> str | None:
        size = path.stat().st_size
        if row["size"] is not None and size != row["size"]:
            return f"{size} bytes, {row['size']} announced"
        if row["sha256"] is not None and self.sha256(row["relative"], path) != row["sha256"]:
            return "the content is not what its SHA-256 announces"
        try:
            if path.suffix == ".bin":
                read_shard(path)
        except PrepareError as e:
            return str(e).split(": ", 1)[1].split(";")[0]
        return None

    def sha256(self, relative: str, path: Path) -> str:
        known = self.known.get(relative)
        if path != self.root / relative or known is None or known["bytes"] != path.stat().st_size:
            known = self.known[relative] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        return known["sha256"]


def hub_tokenizer(hub: Hub, variant: str, dataset: str) -> Tokenizer:
    """Fetch the variant's tokenizer: the remote manifest names it; without one, the challenge's naming does."""
    vocab, rest = re.fullmatch(r"sp([0-9]+)(.*)", variant).groups()
    paths = {"model_path": f"tokenizers/fineweb_{vocab}_bpe{rest}.model"}
    if row := hub.look_up("manifest.json"):
        try:
            manifest = json.loads(hub.fetch(row, hub.staging / "remote_manifest.json").read_bytes())
            entry = find(manifest["datasets"], dataset) or {}
            paths |= find(manifest["tokenizers"], entry.get("tokenizer_name")) or {}
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise PrepareError(f"{hub.repo}/manifest.json: unreadable ({e}); report it there") from e
    for path in filter(None, (paths["model_path"], paths.get("vocab_path"))):
        if not re.fullmatch(r"tokenizers/[\w.-]+", path):  # it is a path that we write to
            raise PrepareError(f"{hub.repo}/manifest.json: tokenizer path {path!r} is unsafe; report it there")
    model = hub.fetch(hub.need(paths["model_path"], "check --variant and MATCHED_FINEWEB_REPO_ID"))
    vocab_row = hub.look_up(paths.get("vocab_path") or paths["model_path"].replace(".model", ".vocab"))
    if vocab_row is not None:
        hub.fetch(vocab_row)
    return Tokenizer(model)


def run_hub(args: argparse.Namespace) -> None:
    root, variant = args.data_dir, args.variant
    if not re.fullmatch(r"sp[0-9]+[\w.-]*", variant):
        raise PrepareError(f"--variant {variant}: want sp<vocabulary>, such as sp1024 or sp8192")
    repo = os.environ.get("MATCHED_FINEWEB_REPO_ID") or HUB_REPOS.get(variant, HUB_REPO)
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", HUB_PREFIX)
    name = f"fineweb10B_{variant}"
    with locked(root):
        old = find(load_manifest(root)["datasets"], name)
        if old and old.get("docs_meta", {}).get("remote_repo_id") != repo and not args.force:
            raise PrepareError(f"{root / old['path']}: does not come from {repo}; use another --data-dir, or --force")
        hub = Hub(root, repo, prefix)
        tokenizer = hub_tokenizer(hub, variant, name)
        stem = f"datasets/{name}/fineweb"
        hub.need(f"{stem}_val_%06d.bin" % 0, "check --variant and MATCHED_FINEWEB_REPO_ID")
        rows = hub.count(f"{stem}_val_%06d.bin", 10_000) + hub.count(f"{stem}_val_bytes_%06d.bin", 10_000)
        train = hub.count(f"{stem}_train_%06d.bin", args.train_shards)
        if len(train) < args.train_shards:
            raise PrepareError(f"--train-shards {args.train_shards}: {repo} has {len(train)} of {variant}; lower it")
        fetch_all(hub, rows + train, args.workers)
        entry = hub_entry(hub, name, tokenizer, [row["relative"] for row in rows + train])
        save_manifest(root, entry, tokenizer_entry(root, tokenizer), {"docs_meta": entry["docs_meta"]})
        shutil.rmtree(hub.staging, ignore_errors=True)
    print(summary(entry, root))
    print(training_command(entry, root))


def fetch_all(hub: Hub, rows: list[dict[str, Any]], workers: int) -> None:
    progress = Progress("download", sum(row["size"] or 0 for row in rows))

    def fetch(row: dict[str, Any]) -> None:
        hub.fetch(row)
        progress.add(row["size"] or 0)

    threads = cf.ThreadPoolExecutor(min(4, workers))
    try:
        list(threads.map(fetch, rows))
    finally:
        threads.shutdown(cancel_futures=True)
        progress.close()


def hub_entry(hub: Hub, name: str, tokenizer: Tokenizer, relatives: list[str]) -> dict[str, Any]:
    """The manifest row of fetched shards, counted from the files. Raises PrepareError for tokens out of range."""
    files, stats = {}, {f"{field}_{split}": 0 for field in ("docs", "tokens") for split in ("total", "val", "train")}
    for relative in relatives:
        path = hub.root / relative
        files[path.name] = {"sha256": hub.sha256(relative, path), "bytes": path.stat().st_size}
        values = read_shard(path)
        if "_bytes_" in path.name:
            stats["bytes_val"] = stats.get("bytes_val", 0) + int(values.sum(dtype=np.int64))
            if len(values) != len(read_shard(path.with_name(path.name.replace("_bytes_", "_")))):
                raise PrepareError(f"{path}: not as many entries as the shard it belongs to; delete both and run again")
            continue
        if len(values) and values.max() >= tokenizer.vocab:
            raise PrepareError(f"{path}: token {values.max()} is not in the {tokenizer.vocab} of {tokenizer.path.name}")
        split = "val" if "_val_" in path.name else "train"
        for key in ("total", split):
            stats[f"docs_{key}"] += int((values == BOS).sum())
            stats[f"tokens_{key}"] += len(values)
    meta = {"source": "hub", "remote_repo_id": hub.repo, "remote_root": hub.prefix}
    return dataset_entry(hub.root, name, tokenizer, files, stats) | {"docs_meta": meta}


# ---- 11. check ------------------------------------------------------------------------------------------------------


def run_check(args: argparse.Namespace) -> None:
    """Every file of every dataset against the manifest's SHA-256."""
    entries = load_manifest(args.data_dir)["datasets"]
    if not entries:
        raise PrepareError(f"{args.data_dir / 'manifest.json'}: no dataset in it; make one with demo, docs or hub")
    for entry in entries:
        if fault := find_fault(args.data_dir, entry, deep=True):
            raise PrepareError(f"{fault}; make {entry['name']} again with --force")
        print("intact, " + summary(entry, args.data_dir))


# ---- 12. Command line -----------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:  # one line, where argparse prints its usage first
        self.exit(2, f"prepare.py: error: {message} (see {self.prog} --help)\n")


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive(text: str) -> int:
    if natural(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not positive")
    return int(text)


def make_parser() -> Parser:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    common = argparse.ArgumentParser(add_help=False)
    here = Path(__file__).resolve().parent
    common.add_argument("--data-dir", type=Path, default=here, help="where everything goes (%(default)s)")
    common.add_argument("--workers", type=positive, default=cores, help="processes (%(default)s)")
    common.add_argument("--force", action="store_true", help="make it again, replacing what is there")
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="prepare.py", description=__doc__.split("\n\nLayout")[0], formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,docs,hub,check}")

    def command(name: str, run: Callable, text: str, help: str) -> Parser:
        sub = commands.add_parser(name, parents=[common], help=help, description=text, formatter_class=raw)
        sub.set_defaults(run=run)
        return sub

    command("demo", run_demo, DEMO_HELP, "a small English corpus from installed documentation; no network")
    docs = command("docs", run_docs, DOCS_HELP, "your own .jsonl or .txt documents")
    docs.add_argument("files", nargs="+", metavar="FILE", help=".jsonl or .txt, plain or .gz, .xz, .zst")
    held = docs.add_mutually_exclusive_group(required=True)
    held.add_argument("--val-docs", type=positive, metavar="N", help="hold out the first N different documents")
    held.add_argument("--val", nargs="+", metavar="FILE", help="held-out files; training loses their documents")
    which = docs.add_mutually_exclusive_group()
    which.add_argument("--tokenizer", metavar="PATH", help="a SentencePiece .model to use")
    which.add_argument("--vocab", type=positive, default=1024, metavar="V", help="train one of V pieces (%(default)s)")
    docs.add_argument("--name", help="dataset name (docs_sp<vocabulary>)")
    docs.add_argument("--shard-tokens", type=positive, default=SHARD_TOKENS, help="(%(default)s)")
    hub = command("hub", run_hub, HUB_HELP, "the challenge's published shards")
    hub.add_argument("--variant", default="sp1024", help="sp1024, sp4096, sp8192, ... (%(default)s)")
    hub.add_argument(
        "--train-shards", type=natural, default=80, metavar="N", help="training shards (%(default)s); 0: none"
    )
    command("check", run_check, CHECK_HELP, "every file against the manifest's SHA-256")
    return parser


DEMO_HELP = """\
Make a demo corpus from English that is already installed: Python's topics and docstrings, torch's and numpy's.
Writes the dataset demo_sp1024 and the tokenizer demo_1024_bpe.model. Returns at once if they are there and intact."""

DOCS_HELP = """\
Tokenize your documents. A .jsonl file has one {"text": "..."} a line; a .txt file is one document, or several separated
by the marker <|endoftext|> (line breaks at a document's ends are not part of it). Empty and duplicate documents are
dropped, and no training document equals a validation document. The order is kept: shuffle sorted input before
--val-docs. An interrupted run continues when repeated, and ends with the same bytes."""

HUB_HELP = """\
Download the challenge's published shards and tokenizer with huggingface_hub, checking sizes, headers and SHA-256.
An interrupted download continues when repeated, with the first unfinished file. Variables: MATCHED_FINEWEB_REPO_ID (the
repository), MATCHED_FINEWEB_REMOTE_ROOT_PREFIX (the folder in it), HF_TOKEN, HF_ENDPOINT."""

CHECK_HELP = """\
Read every file of every dataset in the manifest and compare its SHA-256."""


def explain(e: OSError) -> str:
    """One line for an operating system's error: the file, what happened, the remedy."""
    remedies = {
        errno.ENOSPC: "free some space and run again: finished parts are kept",
        errno.EDQUOT: "free some of your quota and run again: finished parts are kept",
        errno.EFBIG: "lower --shard-tokens or raise the file size limit, and run again",
        errno.EACCES: "check the permissions, or choose another --data-dir",
        errno.EROFS: "choose another --data-dir",
        errno.ENOENT: "check the path",
    }
    return f"{e.filename or 'input/output'}: {e.strerror or e}; {remedies.get(e.errno or 0, 'mend that and run again')}"


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
        return 0
    except PrepareError as e:
        message, code = str(e), 2
    except OSError as e:
        message, code = explain(e), 2
    except BrokenProcessPool:
        message, code = "a worker process was killed (out of memory?); run again with fewer --workers", 2
    except KeyboardInterrupt:
        message, code = "interrupted; the same command continues", 130
    say(f"prepare.py: error: {message}")
    return code


if __name__ == "__main__":
    sys.exit(main())
