"""How the code reads, as numbers that may fall but not grow: width, paragraphs, arrows, sizes."""
import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]
PROGRAMS = sorted(file for folder in (".", "engine", "verifier", "measure", "puzzles")
                  for file in (HERE / folder).glob("*.py") if not file.name.startswith("test_"))
READING_PATH = ("grpo.py", "rollout.py", "learner.py", "train.py", "model.py")
OBJECTIVES = {"grpo", "gtpo", "offpolicy"}      # and replay.py, which offpolicy.py brings
COMPANIONS = {"gtpo", "offpolicy", "replay", "measure", "bench", "evaluate", "matplotlib", "datasets", "lora",
              "dpo", "distill", "curriculum", "rejection", "study", "studies", "theory", "probe", "explain", "judge", "pipeline", "actors",
              "moe"}


def lines_of(file):
    return file.read_text(encoding="utf-8").splitlines()


def filled(file):
    """Lines that are not blank."""
    return sum(bool(line.strip()) for line in lines_of(file))


def modules():
    """{module: file} of the project, engine.decode and the like by their full name."""
    found = {}
    for file in PROGRAMS:
        relative = file.relative_to(HERE).with_suffix("")
        found[".".join(relative.parts)] = file
    return found


def imported(file, everywhere=False):
    """The project's modules that a file imports at its top, or anywhere in it."""
    tree, known, names = ast.parse(file.read_text(encoding="utf-8")), modules(), set()
    for node in (ast.walk(tree) if everywhere else tree.body):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (parts & known.keys()) or {node.module}
    return names & known.keys()


def test_program_lines_are_at_most_100_columns_wide():
    wide = [f"{file.name}:{i}" for file in PROGRAMS for i, line in enumerate(lines_of(file), 1) if len(line) > 100]
    assert not wide


def test_the_prose_of_pages_is_at_most_100_columns_wide():
    """All but tables, pictures and what stands between ``` marks."""
    wide = []
    for page in (HERE / "README.md", HERE / "LOG.md", *sorted((HERE / "docs").glob("*.md"))):
        prose = True
        for i, line in enumerate(lines_of(page), 1):
            prose ^= line.startswith("```")
            if prose and len(line) > 100 and not line.startswith(("|", "![")):
                wide.append(f"{page.name}:{i}")
    assert not wide


def test_long_functions_have_paragraphs():
    """A function of 15 lines or more has a blank line or a comment line in its body."""
    long, dense = 0, []
    for file in PROGRAMS:
        lines = lines_of(file)
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 14:
                has_docstring = ast.get_docstring(node) is not None
                first = node.body[1] if has_docstring and len(node.body) > 1 else node.body[0]
                body = lines[first.lineno - 1:node.end_lineno]
                long += 1
                if len(body) >= 15 and not any(not line.strip() or line.strip().startswith("#") for line in body):
                    dense.append(f"{file.name}:{node.lineno} {node.name}")
    assert long > 50 and not dense


def test_the_arrows_point_one_way():
    """engine imports nothing of the root but dist, verifier nothing at all, the concepts nothing of measure; no circle."""
    arrows = {name: imported(file, everywhere=True) for name, file in modules().items()}
    for name, targets in arrows.items():
        if name.startswith("engine"):
            assert all(target.startswith("engine") or target == "dist" for target in targets), name
        if name.startswith("verifier"):
            assert all(target.startswith("verifier") for target in targets), name
        if not name.startswith("measure") and name != "bench":
            assert not any(target.startswith(("measure", "bench")) for target in targets), name

    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for target in arrows[name]:
                visit(target, [*path, name])
            done.add(name)

    for name in arrows:
        visit(name, [])


def test_nothing_of_a_companion_is_imported_unless_it_is_asked_for():
    code = "import sys, train; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "learner" in loaded and not loaded & COMPANIONS


def test_programs_compile_without_a_warning():
    """As an escape that a later Python will refuse."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in PROGRAMS:
            compile(file.read_text(encoding="utf-8"), str(file), "exec")


def test_sizes():
    assert sum(filled(HERE / name) for name in READING_PATH) <= 1400
    assert len([path for path in subprocess.run(["git", "ls-tree", "--name-only", "HEAD"], cwd=HERE, text=True,
                                                capture_output=True).stdout.split()]) <= 57
    assert sum(filled(file) for file in (HERE / "engine").glob("*.py")) <= 2210
    assert sum(filled(file) for file in (HERE / "verifier").glob("*.py")) <= 950
    assert (HERE / "README.md").stat().st_size <= 10_000
    assert (HERE / "LOG.md").stat().st_size <= 20_000


def test_readme_names_every_program_file():
    page = (HERE / "README.md").read_text()
    assert [file.name for file in sorted(HERE.glob("*.py")) if f"({file.name})" not in page] == []


def test_the_naive_trainer_is_short_and_uses_nothing_of_the_project():
    naive = HERE / "tests" / "naive.py"
    assert filled(naive) <= 200 and not imported(naive, everywhere=True)
    assert max(map(len, lines_of(naive))) <= 100


FORBIDDEN = ("SimpleNamespace", "eval", "exec", "pickle", "dill", "joblib", "marshal", "shelve")


def forbidden(source, words=FORBIDDEN):
    """Lines of a program that run text as a program, read pickles, trust a checkpoint's code, or open a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        keywords = {k.arg: getattr(k.value, "value", "a variable") for k in getattr(node, "keywords", []) if isinstance(node, ast.Call)}
        name = node.id if isinstance(node, ast.Name) else ""
        imported = [a.name.partition(".")[0] for a in node.names] if isinstance(node, ast.Import) else []
        imported += [(node.module or "").partition(".")[0]] if isinstance(node, ast.ImportFrom) else []
        calls = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if ({name, *imported} & set(words) or keywords.get("trust_remote_code") or keywords.get("shell")
                or calls in ("os.system", "pickle.load", "pickle.loads", "pickle.Unpickler") or calls == "torch.load" and keywords.get("weights_only") is not True
                or calls in ("np.load", "numpy.load") and keywords.get("allow_pickle")):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("source", [
    "eval('1')", "exec(x)", "import pickle", "from pickle import load", "import torch\ntorch.load(f)", "torch.load(f, weights_only=False)",
    "f(a, trust_remote_code=True)", "f(a, trust_remote_code=flag)", "subprocess.run(c, shell=True)", "os.system(c)", "np.load(f, allow_pickle=True)"])
def test_the_test_of_forbidden_calls_finds_them(source):
    assert forbidden(source)


def test_no_program_runs_text_or_reads_a_pickle():
    assert not forbidden("model.eval()\nf(trust_remote_code=False)\ntorch.load(f, weights_only=True)\nspec.loader.exec_module(m)")
    for file in PROGRAMS:       # the index of a sharded checkpoint is a pickle, read into stand-ins: test_dist.py
        words = set(FORBIDDEN) - ({"pickle"} if file.name == "checkpoint.py" else set())
        assert not forbidden(file.read_text(encoding="utf-8"), words), file.name
