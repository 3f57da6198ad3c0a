"""The one file stays readable: banners, lengths, nesting, one place for the environment, nothing at import."""

import ast
import re
import sys

import pytest
import torch
from conftest import MECHANISMS, PRESETS, ROOT, SCRIPT, clean_env, finish, start, tg, tiny

SOURCE = SCRIPT.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith, ast.Match)


def banners() -> list[tuple[int, str, int]]:
    """(number, title, line) of each boxed banner."""
    lines, rule, found = SOURCE.splitlines(), "# " + "#" * 100, []
    for index in range(1, len(lines) - 1):
        match = re.fullmatch(r"# (\d+)  (.*\S)\s*", lines[index])
        if match and lines[index - 1].startswith(rule) and lines[index + 1].startswith(rule):
            found.append((int(match[1]), re.split(r"\s{3,}", match[2])[0], index + 1))
    return found


def nesting(node: ast.AST) -> int:
    """Deepest pile of blocks below a node; elif is no deeper than its if, an inner def starts anew."""
    deepest = 0
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.FunctionDef, ast.Lambda)):
                continue
            chained = name == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If) and len(value) == 1
            deepest = max(deepest, nesting(child) + (isinstance(child, BLOCKS) and not chained))
    return deepest


def test_docstring_lists_the_sections():
    """The table of contents names every banner, in order, and nothing else."""
    contents = re.findall(r"^ +(\d+)  (\S[^\n]*?)(?: {2,}[^\n]*)?$", (tg.__doc__ or "").split("Contents")[1], re.M)
    assert [(int(number), title) for number, title in contents] == [row[:2] for row in banners()]
    assert [row[0] for row in banners()] == list(range(1, 13))


def test_no_function_over_a_screen():
    """No def is longer than 60 lines."""
    long = {node.name: node.end_lineno - node.lineno + 1 for node in FUNCTIONS}
    assert {name: size for name, size in long.items() if size > 60} == {}


def test_nesting_stays_shallow():
    """No def nests more than four blocks."""
    assert {node.name: nesting(node) for node in FUNCTIONS if nesting(node) > 4} == {}


def test_nesting_is_counted():
    """The counter itself: five blocks are five, elif adds none."""
    deep = (
        "def f():\n if a:\n  for b in c:\n   while d:\n    with e:\n     try:\n      pass\n     finally:\n      pass\n"
    )
    flat = "def f():\n if a:\n  pass\n elif b:\n  pass\n elif c:\n  pass\n"
    assert nesting(ast.parse(deep).body[0]) == 5
    assert nesting(ast.parse(flat).body[0]) == 1


def test_environment_is_read_in_section_one():
    """os.environ and os.getenv stand between the first and the second banner only."""
    first, last = banners()[0][2], banners()[1][2]
    lines = [
        node.lineno
        for node in ast.walk(TREE)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv")
    ]
    assert lines and all(first < line < last for line in lines)


def test_ascii_only():
    """The file is plain ASCII."""
    assert [line for line in SOURCE.splitlines() if not line.isascii()] == []


def test_import_has_no_side_effects(tmp_path):
    """Importing prints nothing, writes nothing, starts no GPU, group or thread, draws no random number."""
    code = (
        f"import sys, threading; sys.path.insert(0, {str(ROOT)!r}); import torch, random, os\n"
        "before = torch.get_rng_state().clone(), dict(os.environ), torch.get_num_threads()\n"
        "import train_gpt\n"
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()\n"
        "assert torch.equal(before[0], torch.get_rng_state()) and before[1] == dict(os.environ)\n"
        "assert before[2] == torch.get_num_threads() and threading.active_count() == 1\n"
    )
    ended = finish(start([sys.executable, "-c", code], clean_env(), cwd=tmp_path))
    assert ended == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def names_of(preset: str, overrides: dict) -> list[str]:
    model = tg.GPT(tiny(preset, **overrides), torch.device("cpu"), torch.float32)
    return [name for name, _ in model.named_parameters()]


CASES = [(preset, {}) for preset in PRESETS] + [("record", values) for values in MECHANISMS.values()]


@pytest.mark.parametrize("table", ["PARAM_TABLE", "TENSOR_PLAN"])
def test_every_parameter_has_one_row(table):
    """Each parameter of each preset and mechanism has exactly one owner, and no row is idle."""
    rows, used = getattr(tg, table), set()
    for preset, overrides in CASES:
        for name in names_of(preset, overrides):
            owners = [row for row in rows if re.fullmatch(row.pattern, name)]
            assert len(owners) == 1, (preset, overrides, name)
            used.add(owners[0])
    assert set(rows) == used


def test_owner_refuses_none_and_two():
    """The look-up itself fails on a parameter without a row and on one with two."""
    with pytest.raises(AssertionError):
        tg.owner("blocks.0.unheard_of", tg.PARAM_TABLE)
    with pytest.raises(AssertionError):
        tg.owner("embed", (*tg.PARAM_TABLE, tg.ParamRow("emb.*", "adamw", "lr", "wd")))


def test_rows_name_real_knobs():
    """Learning rates, decays, bits and clips in the tables are fields of Config."""
    fields = {name.lower() for name in tg.knobs()}
    for row in tg.PARAM_TABLE:
        assert {*row.lr.split("|"), row.wd} <= fields
    for row in tg.TENSOR_PLAN:
        assert {row.bits, row.clip} - {""} <= fields
