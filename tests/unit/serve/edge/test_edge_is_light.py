"""What the edge client is made of: syntax of Python 3.9, few imports, and one clear line where something is missing."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from tiny import ROOT

CLIENT = sorted(path for path in (ROOT / "serve" / "edge").glob("*.py") if path.name != "train.py")
SHARED = [
    ROOT / "serve" / "__init__.py",
    ROOT / "serve" / "codec.py",
    ROOT / "serve" / "connection.py",
    ROOT / "serve" / "publish.py",
    ROOT / "tasks" / "__init__.py",
    ROOT / "tasks" / "errors.py",
]
NEWER = {
    "dataclass": ("slots", "kw_only"),
    "zip": ("strict",),
}
"""Arguments that came after Python 3.9: syntax alone does not show them."""
NEWER_NAMES = {"tomllib", "StrEnum", "Self", "UTC", "TypeAlias", "assert_never"}
"""Of the standard library."""


@pytest.mark.parametrize("path", [*CLIENT, *SHARED, ROOT / "serve" / "edge" / "train.py"], ids=lambda p: p.name)
def test_the_client_is_written_in_python_39(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    assert not any(isinstance(node, getattr(ast, "Match", ())) for node in ast.walk(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            given = {keyword.arg for keyword in node.keywords}
            assert not given & set(NEWER.get(node.func.id, ())), f"{path.name}:{node.lineno}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
            assert not names & {"tomllib", "StrEnum", "Self", "UTC", "TypeAlias", "assert_never"}, (
                f"{path.name}:{node.lineno}"
            )


def test_the_check_sees_what_is_newer():
    with pytest.raises(SyntaxError):
        ast.parse("match x:\n    case 1: pass", feature_version=(3, 9))


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def third_party(code: str) -> set[str]:
    """The packages outside the standard library that some code imports."""
    done = run_python(
        f"import sys\n{code}\n"
        "files = {n: str(getattr(m, '__file__', '')) for n, m in list(sys.modules.items())}\n"
        "names = {n.partition('.')[0] for n, file in files.items() if 'site-packages' in file}\n"
        "print(*sorted(names | {n for n in sys.modules if n.startswith('orchestrator')}))"
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_client_imports_neither_torch_nor_ray_nor_the_library(tmp_path):
    found = third_party("import serve.edge, serve.edge.__main__, onnxruntime")
    heavy = ("torch", "ray", "orchestrator", "mlflow", "opacus", "cryptography", "pandas", "fastapi", "sklearn", "PIL")
    assert not {name for name in found if name.partition(".")[0] in heavy}
    assert {"httpx", "numpy", "onnxruntime", "safetensors", "zstandard"} <= found


def test_a_training_tenant_imports_torch_and_nothing_of_the_cluster():
    found = third_party("import serve.edge.train, serve.remote.trainer, serve.heads")
    heavy = {
        "ray",
        "mlflow",
        "opacus",
        "pandas",
        "fastapi",
        "uvicorn",
        "sklearn",
        "scipy",
        "tyro",
        "cattrs",
        "matplotlib",
    }
    assert not found & heavy
    assert not found & {
        "orchestrator.producer",
        "orchestrator.assembly",
        "orchestrator.catalog",
        "orchestrator.settings",
    }
    assert "torch" in found


def test_without_torch_the_training_command_says_what_to_install(tmp_path):
    token = tmp_path / "token"
    token.write_text("mm_0_0")
    token.chmod(0o600)
    done = run_python(
        "import sys\nsys.modules['torch'] = None\nfrom serve.edge.train import main\n"
        f"raise SystemExit(main(['--url', 'http://127.0.0.1:1', '--task', 't', '--token-file', {str(token)!r}, "
        f"'--key-file', {str(tmp_path / 'key')!r}]))"
    )
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: this command needs torch: pip install 'metamorphosis-ray[tenant]' (Python 3.11 or newer)"
    )


def test_an_old_python_has_the_client_and_is_told_that_it_has_no_more():
    done = run_python("import sys\nsys.version_info = (3, 9, 18)\nimport serve.edge.client\nimport orchestrator")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("needs Python 3.11; on Python 3.9 there is the edge client alone")
