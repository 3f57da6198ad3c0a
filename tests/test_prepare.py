"""data/prepare.py: formats, byte accounting, resuming, splitting, error lines, and the hub against a local stand-in."""

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "prepare.py"
REAL_TOKENIZERS = ROOT.parent / "shared" / "data" / "tokenizers"
sys.path.insert(0, str(SCRIPT.parent))
import prepare

NASTY = [
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467!",
    "double  spaces   and trailing ",
    "  starts with spaces",
    " one leading space",
    "tabs\tand\r\nline\n\nbreaks\n",
    "byte fallback \u4e2d\u6587 \u0416\u0416\u0416 \u2581 literal",
    "\u2581starts with the space mark",
    "ligature \ufb01n \u00bd e\u0301 \u2460 \uff21",
    "zero\u200bwidth \ufeffmark \x00nul",
    "12345 67890 3.14159",
    "<s>not a control</s> <unk> <0x41>",
    "x",
]
WORDS = ["the", "of", "and", "model", "weights", "byte", "token", "caf\u00e9", "seven", "river", "Stone", "under", "a"]


def sentences(seed: int, count: int, words: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) + f" {seed}-{i}." for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def train_model(path: Path, text: list[str] | None = None, **options) -> Path:
    """A small tokenizer; the options are SentencePiece's."""
    model = io.BytesIO()
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    defaults = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "hard_vocab_limit": False}
    lines = iter(text if text is not None else sentences(0, 200))
    settings = defaults | ids | {"minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """One tokenizer of each normalising habit; `nfkc_bare` has the settings of the challenge's own."""
    folder = tmp_path_factory.mktemp("models")
    prepare.train_tokenizer(iter(sentences(0, 200)), 340, folder / "plain.model")
    train_model(folder / "nfkc_bare.model", add_dummy_prefix=False)
    train_model(folder / "nfkc.model")
    bare = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
    train_model(folder / "identity_bare.model", **bare)
    return {path.stem: path for path in folder.glob("*.model")}


def execute(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def cli(*args, **options) -> subprocess.CompletedProcess:
    return execute([sys.executable, str(SCRIPT), *map(str, args)], **options)


def run(*args) -> None:
    assert prepare.main([str(arg) for arg in args]) == 0


def tokens_of(folder: Path, prefix: str) -> np.ndarray:
    return np.concatenate([prepare.read_shard(path) for path in sorted(folder.glob(f"{prefix}_[0-9]*.bin"))])


def documents_of(folder: Path, split: str, model: Path) -> list[str]:
    """The texts a dataset's shards decode to (exact where the tokenizer is)."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = tokens_of(folder, f"fineweb_{split}").astype(int)
    return [sp.decode(ids[1:].tolist()) for ids in np.split(tokens, np.flatnonzero(tokens == 1))[1:]]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.bin"))}


# ---- demo -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> tuple[Path, float]:
    root = tmp_path_factory.mktemp("demo")
    start = time.monotonic()
    done = cli("demo", "--data-dir", root)
    assert done.returncode == 0, done.stderr
    return root, time.monotonic() - start


def test_demo_corpus(demo):
    root, seconds = demo
    folder = root / "datasets" / "demo_sp1024"
    model = root / "tokenizers" / "demo_1024_bpe.model"
    assert seconds < 60
    train, val = tokens_of(folder, "fineweb_train"), tokens_of(folder, "fineweb_val")
    assert 40_000 < len(val) < 80_000 and len(train) > 500_000
    assert train[0] == val[0] == 1 and max(train.max(), val.max()) < 1024
    texts = documents_of(folder, "val", model)
    assert tokens_of(folder, "fineweb_val_bytes").sum() == sum(len(text.encode()) for text in texts)
    assert not set(texts) & set(documents_of(folder, "train", model))
    assert min(map(len, texts)) >= prepare.DEMO_MIN_CHARS
    left = sorted(path.name for path in root.iterdir())
    assert left == [".prepare.lock", "datasets", "manifest.json", "tokenizers"]
    assert not list((root / "datasets").glob(".*"))


def test_demo_is_idempotent_and_checked(demo, capsys):
    root, _ = demo
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    start = time.monotonic()
    done = cli("demo", "--data-dir", root)
    assert done.returncode == 0 and "already complete" in done.stdout and time.monotonic() - start < 5
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    run("check", "--data-dir", root)
    shard = root / "datasets" / "demo_sp1024" / "fineweb_train_000000.bin"
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[:-2] + b"\x07\x00")
        assert prepare.main(["check", "--data-dir", str(root)]) == 2
        assert "SHA-256" in capsys.readouterr().err
        entry = prepare.find(prepare.load_manifest(root)["datasets"], "demo_sp1024")
        assert "train_000000" in prepare.find_fault(root, entry, deep=True)  # the demo would be made again
    finally:
        shard.write_bytes(content)


def test_doc_strings_reads_docstrings_and_added_docs(tmp_path):
    source = tmp_path / "a.py"
    source.write_text(
        '"""module"""\nclass A:\n  """klass"""\n  def f(self):\n    """method"""\n'
        'add_docstr(x, r"""\n  added\n    more""".format(1))\n'
        'if True:\n  def g():\n    """inner"""\nprint("""not a doc""")\n'
    )
    assert sorted(prepare.doc_strings(source)) == ["added\n  more", "inner", "klass", "method", "module"]
    source.write_text('"""broken"""\ndef (')
    assert prepare.doc_strings(source) == []


# ---- byte accounting ------------------------------------------------------------------------------------------------


def exact(tokenizer: prepare.Tokenizer, text: str) -> np.ndarray:
    counts = tokenizer.count_bytes(text, text.encode(), tokenizer.encode(text))
    assert counts.sum() == len(text.encode()), text
    return counts


@pytest.mark.parametrize("name", ["plain", "nfkc", "nfkc_bare", "identity_bare"])
def test_bytes_are_the_texts(models, name):
    tokenizer = prepare.Tokenizer(models[name])
    assert tokenizer.plain == (name == "plain") and tokenizer.normalizes == name.startswith("nfkc")
    rng = random.Random(5)
    letters = "ab \u00e9\u4e2d\U0001f600\u2581\n\ufb01"
    for text in NASTY + ["".join(rng.choices(letters, k=30)) + "z" for _ in range(200)]:
        exact(tokenizer, text)


@pytest.mark.parametrize("name", ["fineweb_1024_bpe", "fineweb_8192_bpe"])
def test_bytes_are_the_texts_with_the_challenges_tokenizers(name):
    path = REAL_TOKENIZERS / f"{name}.model"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    tokenizer = prepare.Tokenizer(path)
    assert tokenizer.normalizes
    for text in NASTY:
        exact(tokenizer, text)


def test_table_and_offsets_agree_token_by_token(models):
    tokenizer = prepare.Tokenizer(models["plain"])
    for text in [text for text in NASTY if "\u2581" not in text] + sentences(3, 20):
        ids, utf8 = tokenizer.encode(text), text.encode()
        assert tokenizer.count_bytes(text, utf8, ids).tolist() == tokenizer._offset_bytes(utf8, ids).tolist(), text


def test_byte_pieces_count_one_each(models):
    for name in ("plain", "nfkc_bare"):
        counts = exact(prepare.Tokenizer(models[name]), "x\U0001f600\u4e2d")
        assert counts[-7:].tolist() == [1] * 7, name


def test_unaccountable_bytes_are_an_error(models):
    tokenizer = prepare.Tokenizer(models["plain"])
    with pytest.raises(prepare.PrepareError, match="cannot account"):
        tokenizer.count_bytes("abc", b"abcd", tokenizer.encode("abc"))
    wide = prepare.Tokenizer(models["nfkc"])
    with pytest.raises(prepare.PrepareError, match="cannot account"):  # more bytes for a token than uint16 holds
        exact(wide, "a" + " " * 70_000 + "b")


@pytest.mark.parametrize("name", ["plain", "nfkc_bare"])
def test_sidecar_of_a_dataset(models, tmp_path, name, capsys):
    val = write_jsonl(tmp_path / "val.jsonl", ["", *NASTY, "   ", "\n"])
    train = write_jsonl(tmp_path / "train.jsonl", sentences(1, 50))
    run("docs", train, "--val", val, "--tokenizer", models[name], "--data-dir", tmp_path, "--name", "d", "--workers", 1)
    assert "dropped 3 validation documents that are empty" in capsys.readouterr().err
    folder = tmp_path / "datasets" / "d"
    tokens, nbytes = tokens_of(folder, "fineweb_val"), tokens_of(folder, "fineweb_val_bytes")
    starts = np.flatnonzero(tokens == 1)
    assert len(tokens) == len(nbytes) and (nbytes[starts] == 0).all()
    assert np.add.reduceat(nbytes, starts).tolist() == [len(text.encode()) for text in NASTY]
    manifest = prepare.load_manifest(tmp_path)
    assert manifest["tokenizers"][0]["normalizes"] is (name != "plain")
    assert manifest["datasets"][0]["stats"]["bytes_val"] == nbytes.sum()
    if name == "plain":
        texts = documents_of(folder, "val", models[name])
        assert [t for t in texts if t in NASTY] == [t for t in NASTY if "\u2581" not in t]


# ---- docs: formats, split, duplicates, shards, resuming -------------------------------------------------------------


def test_formats_give_the_same_shards(models, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    texts = sentences(2, 300)
    lines = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    marked = "\n<|endoftext|>\n".join(texts).encode()
    halves = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    files = {
        "a.jsonl": lines,
        "b.jsonl.gz": gzip.compress(lines),
        "c.jsonl.xz": b"".join(map(lzma.compress, halves)),  # two streams in a file, as `cat a.xz b.xz` makes
        "d.jsonl.zst": b"".join(map(zstandard.ZstdCompressor().compress, halves)),
        "e.txt": marked,
        "f.txt.xz": lzma.compress(marked),
    }
    seen = []
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        root = tmp_path / f"{name}.out"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare, "BLOCK_BYTES", 5_000)
            options = ["--tokenizer", models["plain"], "--data-dir", root, "--name", "d"]
            run("docs", tmp_path / name, "--val-docs", 20, *options)
        seen.append(hashes(root / "datasets" / "d"))
        assert documents_of(root / "datasets" / "d", "val", models["plain"]) == texts[:20]
        assert documents_of(root / "datasets" / "d", "train", models["plain"]) == texts[20:]
    assert all(row == seen[0] for row in seen)


def test_duplicates_and_disjoint_split(models, tmp_path):
    a, b = sentences(1, 30), sentences(2, 30)
    first = write_jsonl(tmp_path / "a.jsonl", [a[0], a[0], "", *a, a[5]])
    second = write_jsonl(tmp_path / "b.jsonl", [*b, a[1], a[20], b[3]])
    options = ["--tokenizer", models["plain"], "--data-dir", tmp_path]
    run("docs", first, second, "--val-docs", 3, *options, "--name", "head")
    folder = tmp_path / "datasets" / "head"
    assert documents_of(folder, "val", models["plain"]) == a[:3]
    assert documents_of(folder, "train", models["plain"]) == a[3:] + b
    held = write_jsonl(tmp_path / "held.jsonl", [b[7], a[9], b[7]])
    run("docs", first, second, "--val", held, *options, "--name", "held")
    folder = tmp_path / "datasets" / "held"
    assert documents_of(folder, "val", models["plain"]) == [b[7], a[9]]
    assert documents_of(folder, "train", models["plain"]) == [t for t in a + b if t not in (b[7], a[9])]
    stats = {entry["name"]: entry["stats"] for entry in prepare.load_manifest(tmp_path)["datasets"]}
    assert set(stats) == {"head", "held"}, "the manifest keeps both datasets"
    assert stats["held"]["duplicates_dropped_train"] == 8 and stats["held"]["empty_dropped_train"] == 1
    assert stats["head"]["docs_train"] == 57 and stats["head"]["docs_val"] == 3


def test_shards_are_cut_exactly_and_described(models, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", sentences(1, 100))
    options = ["docs", source, "--val-docs", 30, "--tokenizer", models["plain"], "--data-dir", tmp_path]
    run(*options, "--name", "one")
    run(*options, "--name", "many", "--shard-tokens", 1000, "--workers", 1)
    one, many = tmp_path / "datasets" / "one", tmp_path / "datasets" / "many"
    for prefix in ("fineweb_train", "fineweb_val", "fineweb_val_bytes"):
        paths = sorted(many.glob(f"{prefix}_[0-9]*.bin"))
        sizes = [len(prepare.read_shard(path)) for path in paths]
        assert len(paths) > 1 and set(sizes[:-1]) == {1000}
        assert [path.name for path in paths] == [f"{prefix}_{i:06d}.bin" for i in range(len(paths))]
        assert (tokens_of(one, prefix) == tokens_of(many, prefix)).all()
    header = np.fromfile(many / "fineweb_val_000000.bin", "<i4", 256)
    assert header[:3].tolist() == [20240520, 1, 1000] and not header[3:].any()
    entry = prepare.find(prepare.load_manifest(tmp_path)["datasets"], "many")
    assert {Path(path).name: row["sha256"] for path, row in entry["files"].items()} == hashes(many)
    assert entry["stats"]["files_train"] == len(list(many.glob("fineweb_train_*"))) and entry["path"] == "datasets/many"
    assert sorted(tmp_path.glob(entry["val_glob"])) == sorted(many.glob("fineweb_val_0*")), "no sidecar among them"


def test_new_tokenizer_is_deterministic_and_as_specified(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", sentences(1, 300) + NASTY + [f"2024 2024 2024 {i}" for i in range(500)])
    made = []
    for place in ("x", "y"):
        run("docs", source, "--val-docs", 20, "--vocab", 340, "--name", "mine_sp340", "--data-dir", tmp_path / place)
        made.append((tmp_path / place / "tokenizers" / "mine_340_bpe.model").read_bytes())
        assert (tmp_path / place / "tokenizers" / "mine_340_bpe.vocab").exists()
    assert made[0] == made[1]
    assert hashes(tmp_path / "x/datasets/mine_sp340") == hashes(tmp_path / "y/datasets/mine_sp340")
    sp = sentencepiece.SentencePieceProcessor(model_proto=made[0])
    assert [sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id(), sp.vocab_size()] == [0, 1, 2, 3, 340]
    assert not sp.is_unknown(sp.piece_to_id("\u2581"))
    pieces = [sp.id_to_piece(i) for i in range(340) if not sp.is_byte(i)]
    assert not [piece for piece in pieces if re.search("[0-9]{2}", piece)], "digits are split"
    assert prepare.Tokenizer(tmp_path / "x/tokenizers/mine_340_bpe.model").plain


def test_killed_run_continues_to_the_same_bytes(models, tmp_path):
    texts = sentences(1, 20_000)
    files = [write_jsonl(tmp_path / f"{i}.jsonl", texts[i::2]) for i in range(2)]
    small = "import sys, prepare; prepare.BLOCK_BYTES = 20_000; sys.exit(prepare.main())"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}

    def command(root: Path) -> list[str]:
        args = ["docs", *files, "--val-docs", 100, "--tokenizer", models["plain"], "--name", "d", "--data-dir", root]
        return [sys.executable, "-c", small, *map(str, args)]

    root = tmp_path / "killed"
    process = subprocess.Popen(command(root), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    work = root / "datasets" / ".d.work"
    while len(list(work.glob("train-*.npz"))) < 10:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)  # its workers hold the pipes: the end of file shows that they are gone too
    kept = {path: path.stat().st_mtime_ns for path in work.glob("train-*.npz")}
    assert kept and not (root / "datasets" / "d").exists() and not (root / "manifest.json").exists()
    resumed = execute(command(root), env=environment)
    assert resumed.returncode == 0 and "continuing" in resumed.stderr, resumed.stderr
    assert execute(command(tmp_path / "whole"), env=environment).returncode == 0
    assert hashes(root / "datasets/d") == hashes(tmp_path / "whole/datasets/d")
    assert (root / "manifest.json").read_bytes() == (tmp_path / "whole/manifest.json").read_bytes()
    assert not work.exists()
    again = execute(command(root), env=environment)
    assert again.returncode == 0 and "already complete" in again.stdout


def test_finished_parts_are_not_made_again(models, tmp_path):
    """Resuming uses the parts: one that is marked shows up in the shards."""
    source = write_jsonl(tmp_path / "a.jsonl", sentences(1, 50))
    args = ["docs", source, "--val-docs", 5, "--tokenizer", models["plain"], "--name", "d", "--data-dir", tmp_path]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "write_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert prepare.main(list(map(str, args))) == 130
    part = next((tmp_path / "datasets/.d.work").glob("train-*.npz"))
    with np.load(part) as arrays:
        marked = dict(arrays)
    marked["tokens"][-1] = 77
    np.savez(part, **marked)
    for note in part.parent.glob("*.done"):  # as if killed halfway through the file
        note.unlink()
    run(*args)
    assert tokens_of(tmp_path / "datasets/d", "fineweb_train")[-1] == 77


def test_full_disk_loses_nothing(models, tmp_path):
    """A real write error: the process may not write files over 64 kB, which the training shard is."""
    resource = pytest.importorskip("resource")
    source = write_jsonl(tmp_path / "a.jsonl", sentences(1, 2_000))
    args = ["docs", source, "--val-docs", 50, "--tokenizer", models["plain"], "--name", "d", "--data-dir", tmp_path]
    small = "import sys, prepare; prepare.BLOCK_BYTES = 20_000; sys.exit(prepare.main())"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    command = [sys.executable, "-c", small, *map(str, args)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))
    full = execute(command, env=environment, preexec_fn=limit)
    assert full.returncode == 2 and "fineweb_train_000000.bin: File too large; " in full.stderr, full.stderr
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "manifest.json").exists()
    again = execute(command, env=environment)
    assert again.returncode == 0 and "continuing" in again.stderr


def test_no_space_left_is_one_line():
    line = prepare.explain(OSError(28, "No space left on device", "x/y.bin"))
    assert line == "x/y.bin: No space left on device; free some space and run again: finished parts are kept"


# ---- errors: one line, exit code 2 ----------------------------------------------------------------------------------


def without_space(folder: Path) -> Path:
    text = ["abcab" * 5, "bcabc" * 7]
    return train_model(folder / "nospace.model", text, add_dummy_prefix=False, vocab_size=280, character_coverage=1.0)


def too_many_pieces(folder: Path) -> Path:
    """A model of 66,000 pieces: a protobuf message is extended by appending to it."""
    rows = b"".join(b"\x0a\x08\x0a\x06" + b"q%05d" % i for i in range(66_000))
    path = train_model(folder / "huge.model")
    path.write_bytes(path.read_bytes() + rows)
    return path


def junk(folder: Path) -> Path:
    (folder / "junk.model").write_bytes(b"not a model")
    return folder / "junk.model"


TOKENIZER_ERRORS = {
    "missing": (lambda d: d / "none.model", "none.model: no such tokenizer"),
    "junk": (junk, "junk.model: not a SentencePiece model"),
    "no space piece": (without_space, r"nospace.model: no stand-alone U\+2581"),
    "too large": (too_many_pieces, "huge.model: 66[0-9]{3} pieces, but shards hold uint16"),
    "bos": (lambda d: train_model(d / "bos.model", bos_id=2, eos_id=1), "bos.model: BOS has id 2"),
    "suffix": (
        lambda d: train_model(d / "suffix.model", treat_whitespace_as_suffix=True),
        "suffix.model: white space is a suffix",
    ),
    "no byte fallback": (
        lambda d: train_model(d / "nobytes.model", byte_fallback=False, vocab_size=80),
        "nobytes.model: cannot spell some characters",
    ),
}


def one_error_line(capsys, *args) -> str:
    assert prepare.main([str(arg) for arg in args]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prepare.py: error:")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("case", TOKENIZER_ERRORS)
def test_tokenizer_errors(case, tmp_path, capsys):
    make, message = TOKENIZER_ERRORS[case]
    source = write_jsonl(tmp_path / "a.jsonl", [*sentences(1, 20), "\u4e2d"])
    args = ["docs", source, "--val-docs", 2, "--tokenizer", make(tmp_path), "--data-dir", tmp_path / "out"]
    assert re.search(message, one_error_line(capsys, *args))
    assert not (tmp_path / "out" / "manifest.json").exists()


GOOD = b'{"text": "one"}\n{"text": "two"}\n'
INPUT_ERRORS = {  # file name, content (None: absent), what the line says
    "missing": ("gone.jsonl", None, "gone.jsonl: no such file"),
    "kind": ("a.csv", b"x", "a.csv: unknown kind of file; give .jsonl or .txt"),
    "kind of archive": ("a.jsonl.bz2", b"x", "a.jsonl.bz2: unknown kind"),
    "json": ("a.jsonl", GOOD + b'{"text": \n', r"a.jsonl:3: unreadable"),
    "no text": ("a.jsonl", GOOD + b'\n{"txt": "x"}\n', r"a.jsonl:4: unreadable \('text'\)"),
    "not text": ("a.jsonl", GOOD + b'{"text": 5}\n', r"a.jsonl:3: unreadable"),
    "list": ("a.jsonl", b"[1]\n", r"a.jsonl:1: unreadable"),
    "surrogate": ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', r"a.jsonl:3: unreadable .*surrogates"),
    "latin-1": ("a.txt", b"good<|endoftext|>caf\xe9", "a.txt: document 2: unreadable"),
    "cut xz": ("a.jsonl.xz", lzma.compress(GOOD * 9)[:-20], "a.jsonl.xz: damaged or cut short"),
    "cut gz": ("a.jsonl.gz", gzip.compress(GOOD * 9)[:-9], "a.jsonl.gz: damaged or cut short"),
    "not gz": ("a.jsonl.gz", b"plain text", "a.jsonl.gz: damaged or cut short"),
    "cut zst": ("a.jsonl.zst", "zst", "a.jsonl.zst: damaged or cut short"),
    "empty": ("a.jsonl", b"", "--val-docs 2: only 0 different documents"),
    "only blanks": ("a.jsonl", b'{"text": " "}\n' * 9, "--val-docs 2: only 0 different documents"),
    "too few": ("a.jsonl", GOOD * 5, "--val-docs 2: only 2 different documents .* lower it"),
}


@pytest.mark.parametrize("case", INPUT_ERRORS)
def test_input_errors(case, models, tmp_path, capsys):
    name, content, message = INPUT_ERRORS[case]
    if content == "zst":
        content = pytest.importorskip("zstandard").ZstdCompressor().compress(GOOD * 9)[:-6]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    args = ["docs", tmp_path / name, "--val-docs", 2, "--tokenizer", models["plain"], "--data-dir", tmp_path / "out"]
    assert re.search(message, one_error_line(capsys, *args))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_error_in_a_worker_names_the_line(models, tmp_path, capsys):
    good = write_jsonl(tmp_path / "good.jsonl", sentences(1, 50))
    (tmp_path / "bad.jsonl").write_bytes(good.read_bytes() + b"{oops\n")
    args = ["docs", good, tmp_path / "bad.jsonl", "--val-docs", 2, "--tokenizer", models["plain"]]
    assert "bad.jsonl:51: unreadable" in one_error_line(capsys, *args, "--data-dir", tmp_path)


def test_missing_zstandard(models, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    find = prepare.importlib.util.find_spec
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None if name == "zstandard" else find(name))
    line = one_error_line(capsys, "docs", tmp_path / "a.jsonl.zst", "--val-docs", 1, "--data-dir", tmp_path)
    assert "pip install zstandard" in line


def test_other_inputs_do_not_replace_a_dataset(models, tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", sentences(1, 50))
    args = ["docs", source, "--tokenizer", models["plain"], "--name", "d", "--data-dir", tmp_path, "--val-docs"]
    run(*args, 5)
    before = hashes(tmp_path / "datasets/d")
    assert "give another --name, or --force" in one_error_line(capsys, *args, 6)
    assert hashes(tmp_path / "datasets/d") == before
    run(*args, 6, "--force")
    assert hashes(tmp_path / "datasets/d") != before


def test_everything_is_a_duplicate_of_validation(models, tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", sentences(1, 5))
    args = ["docs", source, "--val", source, "--tokenizer", models["plain"], "--data-dir", tmp_path]
    assert "no training document is left (0 empty and 5 duplicate" in one_error_line(capsys, *args)


def test_empty_files_are_named(models, tmp_path, capsys):
    good, empty = write_jsonl(tmp_path / "a.jsonl", sentences(1, 5)), write_jsonl(tmp_path / "b.jsonl", [])
    options = ["--tokenizer", models["plain"], "--data-dir", tmp_path]
    assert "no validation document is left" in one_error_line(capsys, "docs", good, "--val", empty, *options)
    assert "no training document is left" in one_error_line(capsys, "docs", empty, "--val", good, *options)


def test_vocabulary_too_large_for_the_text(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", sentences(1, 20))
    args = ["docs", source, "--val-docs", 2, "--vocab", 9000, "--data-dir", tmp_path]
    assert "--vocab 9000: cannot train" in one_error_line(capsys, *args)


def test_command_line_errors_are_one_line_and_help_works():
    for args in (["docs", "a.jsonl"], ["docs", "a.jsonl", "--val-docs", "0"], ["nothing"]):
        done = cli(*args)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "error:" in done.stderr
    for args in (["--help"], ["demo", "--help"], ["docs", "--help"], ["hub", "--help"], ["check", "--help"]):
        done = cli(*args)
        assert done.returncode == 0 and "--help" in done.stdout and not done.stderr


# ---- hub: a stand-in on 127.0.0.1 -----------------------------------------------------------------------------------


class StandIn(http.server.BaseHTTPRequestHandler):
    """The resolve route of the hub: HEAD and GET with ETag, Range and 404. `drops` cuts connections short."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.log.append((self.command, self.path.rsplit("/", 1)[-1], wanted))
        path = self.path.split("?")[0]
        content = server.files.get(path)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        etag = server.etags.get(path) or hashlib.sha256(content).hexdigest()
        self.send_response(206 if wanted else 200)
        for key, value in {
            "ETag": f'"{etag}"', "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes",
            "Content-Length": len(content) - start, "Content-Type": "application/octet-stream",
        }.items():  # fmt: skip
            self.send_header(key, str(value))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not send:
            return
        stop = len(content)
        if server.drops.get(path):
            stop = min(stop, start + server.drops[path].pop())
            self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.write(content[start:stop])

    def log_message(self, *_):
        pass


def shard(tokens: np.ndarray) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


@pytest.fixture
def hub(models):
    """A published variant sp400: one validation shard, three training shards, a tokenizer, a manifest."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.log, server.drops, server.etags = [], {}, {}
    rng = np.random.default_rng(0)
    base, data = "/datasets/some/repo/resolve/main/pre", "datasets/fineweb10B_sp400"
    names = ["fineweb_val_000000", *(f"fineweb_train_{i:06d}" for i in range(3))]
    server.files = {f"{base}/{data}/{n}.bin": shard(np.r_[1, rng.integers(4, 300, 200_000)]) for n in names}
    server.files[f"{base}/tokenizers/other_name.model"] = models["nfkc_bare"].read_bytes()
    manifest = {
        "datasets": [{"name": "fineweb10B_sp400", "tokenizer_name": "t"}],
        "tokenizers": [{"name": "t", "model_path": "tokenizers/other_name.model", "vocab_path": None}],
    }
    server.files[f"{base}/manifest.json"] = json.dumps(manifest).encode()
    server.base, server.data = base, f"{base}/{data}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def download(server, root: Path, shards: int = 2, *more, prefix: str = "pre") -> subprocess.CompletedProcess:
    others = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment = {key: value for key, value in others.items() if "proxy" not in key.lower()}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HOME": str(root / "hf"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "5",
        "MATCHED_FINEWEB_REPO_ID": "some/repo", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": prefix,
    }  # fmt: skip
    server.log.clear()
    return cli("hub", "--variant", "sp400", "--train-shards", shards, "--data-dir", root, *more, env=environment)


def fetched(server) -> list[str]:
    return [name for method, name, _ in server.log if method == "GET"]


needs_hub = pytest.mark.skipif(
    prepare.importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed"
)


@needs_hub
def test_hub_downloads_verifies_and_continues(hub, tmp_path):
    done = download(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "datasets" / "fineweb10B_sp400"
    expected = ["fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    assert sorted(hashes(folder)) == expected
    assert all((folder / n).read_bytes() == hub.files[f"{hub.data}/{n}"] for n in expected)
    manifest = prepare.load_manifest(tmp_path)
    entry = manifest["datasets"][0]
    assert entry["stats"]["files_train"] == 2 and entry["stats"]["tokens_val"] == 200_001
    assert entry["docs_meta"]["remote_repo_id"] == "some/repo"
    assert manifest["tokenizers"][0]["model_path"] == "tokenizers/other_name.model"
    assert not (tmp_path / ".hub").exists()
    run("check", "--data-dir", tmp_path)
    more = download(hub, tmp_path, 3)
    assert more.returncode == 0 and fetched(hub) == ["manifest.json", "fineweb_train_000002.bin"], more.stderr
    shard_path = folder / expected[0]
    shard_path.write_bytes(shard_path.read_bytes()[:-50])
    mended = download(hub, tmp_path, 3)
    assert mended.returncode == 0 and fetched(hub) == ["manifest.json", expected[0]], mended.stderr
    run("check", "--data-dir", tmp_path)


@needs_hub
def test_hub_continues_after_an_interruption(hub, tmp_path):
    name = "fineweb_train_000001.bin"
    hub.drops[f"{hub.data}/{name}"] = [0] * 20 + [150_000]  # sends 150 kB once, then nothing until further notice
    first = download(hub, tmp_path)
    assert first.returncode == 2 and len(first.stderr.splitlines()) == 1, first.stderr
    assert name in first.stderr and "run again to continue" in first.stderr
    assert not (tmp_path / "manifest.json").exists()
    assert not (tmp_path / "datasets" / "fineweb10B_sp400" / name).exists()
    hub.drops = {f"{hub.data}/{name}": [150_000]}  # and now the connection breaks once
    second = download(hub, tmp_path)
    assert second.returncode == 0, second.stderr
    assert fetched(hub) == [name, name], "what arrived whole is not fetched again"
    assert (tmp_path / "datasets/fineweb10B_sp400" / name).read_bytes() == hub.files[f"{hub.data}/{name}"]


@needs_hub
@pytest.mark.parametrize("case", ["truncated", "not a shard", "wrong content", "token", "tokenizer path"])
def test_hub_refuses_wrong_files(hub, tmp_path, case):
    path = f"{hub.data}/fineweb_train_000000.bin"
    good = hub.files[path]
    if case == "truncated":
        hub.files[path], message = good[:-100], "train_000000.bin: 400926 bytes, but 200001 tokens announced"
    elif case == "not a shard":
        hub.files[path], message = b"<html>" * 500, "train_000000.bin: not a token shard"
    elif case == "wrong content":
        hub.etags[path], message = "a" * 64, "train_000000.bin: the content is not what its SHA-256 announces"
    elif case == "token":
        hub.files[path], message = shard(np.array([1, 5, 60_000])), "train_000000.bin: token 60000 is not in the"
    else:
        manifest = hub.files[f"{hub.base}/manifest.json"].replace(b"tokenizers/other_name", b"../../evil")
        hub.files[f"{hub.base}/manifest.json"], message = manifest, "tokenizer path '../../evil.model'"
    done = download(hub, tmp_path, 1)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr
    assert not (tmp_path / "manifest.json").exists()
    if case in ("truncated", "not a shard", "wrong content"):
        assert not (tmp_path / "datasets/fineweb10B_sp400/fineweb_train_000000.bin").exists()


@needs_hub
def test_hub_without_manifest_and_with_sidecar(hub, tmp_path, models):
    del hub.files[f"{hub.base}/manifest.json"]
    hub.files = {path.replace("/pre/", "/"): content for path, content in hub.files.items()}
    data = hub.data.replace("/pre/", "/")
    tokenizer = data.replace("datasets/fineweb10B_sp400", "tokenizers/fineweb_400_bpe.model")
    hub.files[tokenizer] = models["plain"].read_bytes()
    hub.files[f"{data}/fineweb_val_bytes_000000.bin"] = shard(np.r_[0, np.full(200_000, 3)])
    done = download(hub, tmp_path, 1, prefix="")
    assert done.returncode == 0, done.stderr
    assert prepare.load_manifest(tmp_path)["datasets"][0]["stats"]["bytes_val"] == 600_000
    many = download(hub, tmp_path, 9, prefix="")
    assert many.returncode == 2 and "--train-shards 9: some/repo has 3 of sp400" in many.stderr


@needs_hub
def test_hub_unreachable_is_one_line(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    done = download(hub, tmp_path, 1)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "some/repo/pre/manifest.json: cannot fetch" in done.stderr
