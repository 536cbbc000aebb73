"""The wheel, and fresh environments that hold it, what it requires, and nothing else. No network."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny import ROOT


def run(*argv: object, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    return subprocess.run(
        list(map(str, argv)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def build_wheel(folder: Path) -> Path:
    done = run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


def fresh_environment(folder: Path, wheel: Path, *, extra: str = "") -> Path:
    """Its interpreter. The packages are links to those that are installed here."""
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for one in closure(requirements(wheel, extra)).values():
        for file in one.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (packages / file).parent.mkdir(parents=True, exist_ok=True)
                (packages / file).symlink_to(one.locate_file(file))
    interpreter = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", "--no-index", wheel)
    done = run(*pip, cwd=folder)
    assert done.returncode == 0, done.stderr
    return interpreter


def requirements(wheel: Path, extra: str) -> list[Requirement]:
    """What it asks for."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    return needed(metadata.get_all("Requires-Dist", []), extra)


def needed(lines: list[str], *extras: str) -> list[Requirement]:
    found = map(Requirement, lines)
    chosen = ("", *extras)
    return [r for r in found if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in chosen)]


def closure(requirements: list[Requirement]) -> dict[str, Distribution]:
    """They, and what they need, as they are installed here."""
    found: dict[str, Distribution] = {}
    seen, waiting = set[str](), list(requirements)
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        name = canonicalize_name(requirement.name)
        found[name] = distribution(name)
        assert requirement.specifier.contains(found[name].version), requirement
        waiting += needed(found[name].requires or [], *requirement.extras)
    return found
