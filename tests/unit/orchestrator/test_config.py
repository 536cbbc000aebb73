"""Settings are strict: an unknown key, a wrong type or a bad value names its path."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orchestrator.config import flatten, from_mapping, read_toml, to_mapping, to_toml
from orchestrator.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    rate: float = 0.5
    name: str | None = None

    def __post_init__(self):
        if self.rate <= 0:
            raise ConfigError(f"rate must be > 0, got {self.rate}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    count: int = 1
    names: tuple[str, ...] = ()
    on: bool = False
    inner: Inner = field(default_factory=Inner)


def test_what_is_written_as_toml_is_read_back_equal(tmp_path: Path):
    value = Outer(count=3, names=("a", "b"), on=True, inner=Inner(rate=2.0, name="x"))
    path = tmp_path / "settings.toml"
    path.write_text(to_toml(value))
    assert read_toml(Outer, path) == value


def test_a_whole_number_is_taken_for_a_float():
    assert from_mapping(Outer, {"inner": {"rate": 2}}, where="t").inner.rate == 2.0


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"cuont": 1}, "cuont"),
        ({"inner": {"rte": 1.0}}, "rte"),
        ({"count": "three"}, "count"),
        ({"count": 1.5}, "count"),
        ({"count": True}, "count"),
        ({"names": [1]}, "names"),
        ({"inner": 3}, "inner"),
        ({"inner": {"rate": -1.0}}, "rate must be > 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_path(data, said):
    with pytest.raises(ConfigError, match=said):
        from_mapping(Outer, data, where="preset.toml")


def test_an_unknown_key_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match="known keys: name, rate"):
        from_mapping(Outer, {"inner": {"rte": 1.0}}, where="preset.toml")


def test_a_file_that_is_missing_or_not_toml_is_a_config_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_toml(Outer, tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("count = = 3")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_toml(Outer, tmp_path / "bad.toml")


def test_parameters_for_a_tracker_are_flat_text():
    assert flatten(Outer(names=("a", "b"))) == {
        "count": "1",
        "names": "a,b",
        "on": "False",
        "inner.rate": "0.5",
        "inner.name": "None",
    }


def test_none_is_left_out_of_toml():
    assert "name" not in to_mapping(Outer())["inner"]
