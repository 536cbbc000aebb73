"""Two Ray nodes on one machine: the driver's, without a CPU, and one that has them all and may not open what is on the
driver's disk; then a command on them.

    python two_nodes.py FOLDER -- flags of sweep.py

In FOLDER: home is the driver's disk, scratch is the other node's own. What that node tried to open of the driver's disk
is in FOLDER/trespasses.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tiny import ROOT

_GUARD = """
import os, sys

def forbid(event, arguments):
    if event in ("open", "sqlite3.connect") and str(arguments[0]).startswith({forbidden!r}):
        with open({log!r}, "a") as log:
            log.write(f"{{event}} {{arguments[0]}}\\n")
        raise PermissionError(f"{{arguments[0]}} is on another node's disk")

sys.addaudithook(forbid)
"""


def main() -> int:
    from ray.cluster_utils import Cluster

    folder, flags = Path(sys.argv[1]), sys.argv[3:]
    home, guard = folder / "home", folder / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(_GUARD.format(forbidden=str(home), log=str(folder / "trespasses")))
    common = {"METAMORPHOSIS_HOME": "", "RAY_worker_niceness": "0"}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "env_vars": {**common, "PYTHONPATH": str(ROOT)},
        },
    )
    try:
        cluster.add_node(
            num_cpus=2,
            env_vars={
                **common,
                "METAMORPHOSIS_SCRATCH": str(folder / "scratch"),
                "PYTHONPATH": f"{guard}{os.pathsep}{ROOT}",
            },
        )
        from pipelines import sweep
        from pipelines.command import execute

        os.environ["METAMORPHOSIS_HOME"] = str(home)
        return execute(
            "orchestrator.sweep.settings:SweepSettings",
            sweep.run,
            [*flags, "--address", cluster.address],
            prog="sweep.py",
        )
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main())
