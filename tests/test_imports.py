"""Data flow one way through the packages: this is the only place that says which may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "gradsieve"

BASE = {"errors", "types", "__init__", "atomic"}
ALLOWED = {
    "errors": set(),
    "types": {"errors"},
    "atomic": {"errors"},
    "clock": set(),
    "foreign": set(),
    "memory": set(),
    "data": BASE,
    "gradients": BASE | {"data"},
    "store": BASE,
    "selectors": BASE,
    "report": BASE,
    "evaluate": BASE | {"clock", "data", "foreign", "gradients"},
    "demo": BASE | {"data"},
    "train": BASE | {"clock", "data", "foreign", "gradients"},
    "models": BASE | {"demo", "foreign"},
    "compute": BASE | {"data", "gradients", "models"},
    "references": BASE | {"atomic", "clock", "memory", "data", "gradients", "store", "models", "compute"},
    "extraction": BASE | {"clock", "memory", "data", "gradients", "store", "models", "compute", "references"},
    "check": BASE | {"clock", "data", "gradients", "models", "compute", "references"},
    "batch_size": BASE | {"data", "gradients", "compute"},
    "online": BASE | {"data", "gradients", "store", "compute", "extraction", "train"},
    "warmup": BASE | {"atomic", "clock", "data", "gradients", "store", "models", "compute", "extraction", "train", "online"},
    "filling": BASE
    | {
        "batch_size",
        "clock",
        "compute",
        "data",
        "extraction",
        "gradients",
        "models",
        "references",
        "store",
        "warmup",
    },
    "needs": BASE,
    "views": BASE | {"data", "store"},
    "terminal": BASE | {"report", "demo_run"},
    "job": BASE | {"data", "models", "compute"},
    "inputs": BASE | {"data", "demo", "job", "needs"},
    "run": BASE
    | {
        "inputs",
        "check",
        "clock",
        "compute",
        "data",
        "demo",
        "extraction",
        "filling",
        "gradients",
        "job",
        "models",
        "navigation",
        "needs",
        "overhead",
        "references",
        "selectors",
        "store",
        "train",
        "views",
        "warmup",
    },
    "pipeline": BASE
    | {
        "alignment",
        "batch_size",
        "check",
        "clock",
        "data",
        "job",
        "models",
        "outputs",
        "overhead",
        "run",
        "selectors",
    },
    "rehearsal": BASE | {"clock", "data", "gradients", "job", "pipeline", "run", "train", "warmup"},
    "outputs": BASE | {"clock", "data", "demo", "report", "pipeline"},
    "estimate": BASE | {"job", "run", "clock", "data", "pipeline", "warmup"},
    "export": BASE | {"data", "models", "outputs"},
    "rebuild": BASE | {"data", "demo", "report", "outputs"},
    "compare": BASE
    | {
        "job",
        "needs",
        "clock",
        "data",
        "demo",
        "foreign",
        "models",
        "selectors",
        "pipeline",
        "rehearsal",
        "outputs",
        "report",
        "train",
        "evaluate",
    },
    "overhead": set(),
    "alignment": {"types"},
    "navigation": BASE | {"data", "evaluate", "train"},
    "transfer": BASE | {"atomic", "clock", "data", "demo", "models", "pipeline", "selectors"},
    "demo_run": BASE | {"clock", "data", "selectors", "pipeline"},
    "cli": BASE
    | {
        "job",
        "needs",
        "terminal",
        "demo",
        "data",
        "store",
        "selectors",
        "pipeline",
        "outputs",
        "report",
        "estimate",
        "export",
        "rebuild",
        "compare",
        "demo_run",
        "transfer",
    },
    "__init__": BASE | {"job", "pipeline", "selectors"},
}


def package_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gradsieve":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gradsieve.")}
    return {"__init__" if name == "__version__" else name for name in found}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_module_imports_only_what_stands_before_it(path: Path) -> None:
    package = package_of(path)
    assert imports(path) <= ALLOWED[package] | {package}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_gradsieve_loads_neither_torch_nor_transformers_nor_datasets() -> None:
    heavy = {"torch", "transformers", "datasets", "pyarrow", "peft", "scipy", "sklearn"}
    assert run(f"import sys, gradsieve; print(sorted({heavy!r} & set(sys.modules)))").strip() == "[]"


def test_the_public_names_are_all_there() -> None:
    assert run("import gradsieve as gs; print([name for name in gs.__all__ if not hasattr(gs, name)])").strip() == "[]"


def test_help_does_not_load_torch() -> None:
    code = "import sys; from gradsieve import cli; cli.run(['--help']); print('torch' in sys.modules)"
    assert run(code).strip().endswith("False")
