"""What the catalog needs of MLflow's model registry: names that one caller at most can take, and versions with tags."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.mlflow_store import store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PAGE = 100
Tags = Mapping[str, str]


class Registry:
    """Registered models and their versions. Raises `UnavailableError` if MLflow fails."""

    def __init__(self, client: MlflowClient, uri: str) -> None:
        self._client, self._uri = client, uri

    def models(self, name: str) -> dict[str, Tags]:
        """Name to tags of every registered model with that name, in which ``*`` stands for anything."""
        # LIKE takes `_` for any letter, and may not mind capitals: names are compared again.
        pattern, like = re.compile(re.escape(name).replace(r"\*", ".*")), name.replace("*", "%")
        with store_errors(self._uri):
            return {
                model.name: model.tags
                for model in _pages(
                    lambda token: self._client.search_registered_models(f"name LIKE '{like}'", _PAGE, None, token)
                )
                if pattern.fullmatch(model.name)
            }

    def versions(self, name: str) -> dict[int, Tags]:
        """Version to tags of every version of one registered model, oldest first."""
        with store_errors(self._uri):
            found = {
                int(version.version): version.tags
                for version in _pages(
                    lambda token: self._client.search_model_versions(f"name = '{name}'", _PAGE, None, token)
                )
            }
        return dict(sorted(found.items()))

    def take(self, name: str, tags: Tags, *, description: str) -> bool:
        """Create a registered model with these tags, in one step. False if it is somebody else's.

        Of any number of callers, in any number of processes, one is told True; ``tags["publication"]`` tells them
        apart.
        """
        from mlflow.exceptions import MlflowException

        with store_errors(self._uri):
            try:
                self._client.create_registered_model(name, tags=dict(tags), description=description)
            except MlflowException:
                # It may be ours: an answer can be lost on its way, and MLflow's client then asks again by itself.
                holder = self.models(name).get(name)
                if holder is None:
                    raise
                return holder.get("publication") == tags["publication"]
        return True

    def add_version(self, name: str, tags: Tags, *, source: str, run_id: str, description: str) -> int:
        """Add a version to a registered model, with its tags in one step, and return its number."""
        from mlflow.exceptions import MlflowException

        self.take(name, {"publication": ""}, description="")
        with store_errors(self._uri):
            try:
                self._client.create_model_version(
                    name, source, run_id=run_id, tags=dict(tags), description=description, await_creation_for=0
                )
            except MlflowException:
                if self.find(name, tags["publication"]) is None:
                    raise
        number = self.find(name, tags["publication"])
        assert number is not None
        return number

    def find(self, name: str, publication: str) -> int | None:
        """The first version that belongs to a publication. A call whose answer was lost may have made a second one."""
        return next((n for n, tags in self.versions(name).items() if tags.get("publication") == publication), None)


def _pages(fetch: Callable[[str | None], Any]) -> Iterator[Any]:
    token: str | None = None
    while True:
        page: Iterable[Any] = fetch(token)
        yield from page
        token = getattr(page, "token", None)
        if not token:
            return
