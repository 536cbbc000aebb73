"""The Serve shell of the page, as far as it can be tested without a cluster."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from tiny import ROOT

from orchestrator.errors import UnavailableError
from serve.arguments import task_app_name
from serve.operator.views import Unreadable
from serve.problems import Problem

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own code, when it is loaded


def test_the_front_and_an_idle_viewer_load_no_networks():
    program = (
        "import sys, serve.front_app, serve.operator.app; serve.operator.app.LazyViewer(serve.operator.app.ViewerArgs("
        "folder='x')); print(sorted({'torch', 'mlflow', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_tasks_app_is_known_by_its_name():
    from serve.front_app import TASK_APP

    assert task_app_name("loop") == f"{TASK_APP}loop"


def test_a_viewer_of_a_folder_in_which_nothing_is_served_says_so(tmp_path):
    from serve.operator.app import LazyViewer, ViewerArgs

    viewer = LazyViewer(ViewerArgs(folder=str(tmp_path)))
    served = asyncio.run(viewer.served())
    assert served.tasks == ()
    assert asyncio.run(viewer.look(sample=1, image=None)) == Unreadable("nothing is served yet")
    assert list(tmp_path.iterdir()) == []


class Failing:
    """A handle whose calls fail."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.served = self.look = self

    async def remote(self, **_: object) -> None:
        raise self.error


def test_what_serve_says_of_the_viewer_is_told_in_words():
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    from serve.operator.app import RemoteViewer

    told = {
        BackPressureError(num_queued_requests=9, max_queued_requests=8): Problem,
        RayActorError(): UnavailableError,
        DeploymentUnavailableError("Viewer"): UnavailableError,
    }
    for error, kind in told.items():
        with pytest.raises(kind):
            asyncio.run(RemoteViewer(Failing(error)).look(sample=1, image=None))
