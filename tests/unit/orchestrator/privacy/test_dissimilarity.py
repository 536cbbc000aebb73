"""The dissimilarity term, and the published facts about it (SPEC F1-F6)."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from pytorch_msssim import ssim

from orchestrator.errors import ConfigError, NonFiniteLossError, UnknownNameError
from orchestrator.privacy.dissimilarity import (
    Dissimilarity,
    DissimilarityConfig,
    dissimilarity_pull,
    pair_similarity,
)

MODES = {"raw": lambda s: s, "abs": torch.abs, "square": torch.square, "relu": torch.relu}
SIDES = {"cosine": 2, "small": 4, "window 7": 8, "window 11": 13}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relu_features(*shape: int, seed: int = 0) -> torch.Tensor:
    return randn(*shape, seed=seed).relu()


def term(**options: object) -> Dissimilarity:
    return Dissimilarity(DissimilarityConfig(**options))  # type: ignore[arg-type]


# -- the sum ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("similarity", ["ssim", "ms_ssim"])
def test_the_loss_sums_the_mean_of_the_mode_over_ordered_pairs(mode, similarity):
    features = {name: randn(3, 4, 8, 8, seed=s) for s, name in enumerate("abc")}
    features["c"] = -features["a"]  # so that there is a negative one
    value = term(similarity=similarity, similarity_mode=mode)(features)
    expected = sum(
        MODES[mode](pair_similarity(features[i], features[j], measure=similarity)).mean()
        for i, j in itertools.permutations(features, 2)
    )
    torch.testing.assert_close(value.loss, expected)


def test_every_unordered_pair_is_reported_with_its_plain_mean():
    features = {name: randn(3, 4, 8, 8, seed=s) for s, name in enumerate(["smile", "age", "gender"])}
    value = term(similarity_mode="square")(features)
    expected = {
        (i, j): float(pair_similarity(features[i], features[j]).mean())
        for i, j in [("smile", "age"), ("smile", "gender"), ("age", "gender")]
    }
    assert value.by_pair == pytest.approx(expected)
    assert value.measure_used == "ssim, window 7"


def test_raw_goes_below_zero_where_the_others_do_not():
    a = randn(2, 4, 8, 8)
    features = {"a": a, "b": -a}
    assert float(term(similarity_mode="raw")(features).loss) < -1
    assert float(term(similarity_mode="square")(features).loss) > 0.5
    assert float(term(similarity_mode="abs")(features).loss) > 1
    assert float(term(similarity_mode="relu")(features).loss) == 0


@pytest.mark.parametrize("mode", ["abs", "square"])
def test_descending_the_term_drives_the_similarity_to_zero(mode):
    fixed, x = randn(2, 4, 8, 8), randn(2, 4, 8, 8).requires_grad_()
    assert float(pair_similarity(x.detach(), fixed).mean()) == pytest.approx(1.0)
    optimiser = torch.optim.Adam([x], lr=0.1)
    for _ in range(100):
        optimiser.zero_grad()
        term(similarity_mode=mode)({"new": x, "old": fixed}, fixed=frozenset({"old"})).loss.backward()
        optimiser.step()
    assert abs(float(pair_similarity(x.detach(), fixed).mean())) < 0.1


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("similarity", "side", "value_range"),
    [("ssim", 1, "pair"), ("ssim", 4, "pair"), ("ssim", 4, "255"), ("ms_ssim", 6, "pair"), ("ms_ssim", 7, "255")],
)
def test_the_gradient_is_right_for_every_mode_and_measure(mode, similarity, side, value_range):
    """The pair's range gets no gradient. Here a constant channel holds the extremes, so the range does not move."""
    extremes = torch.full((2, 1, side, side), 9.0, dtype=torch.float64)
    extremes[:, :, 0, 0] = -9.0
    # Related, for the scales of MS-SSIM to have a contrast above 0; and an old task's feature, which is fixed.
    a = randn(2, 3, side, side).requires_grad_()
    b = (randn(2, 3, side, side) + 0.5 * randn(2, 3, side, side, seed=1)).requires_grad_()
    old = torch.cat([randn(2, 3, side, side) + 0.3 * randn(2, 3, side, side, seed=2), extremes], 1)
    loss = term(similarity=similarity, similarity_mode=mode, similarity_range=value_range)

    def value(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        free = {"a": torch.cat([a, extremes], 1), "b": torch.cat([b, -extremes], 1)}
        return loss({**free, "old": old}, fixed=frozenset({"old"})).loss

    assert float(value(a, b).detach()) != 0
    assert torch.autograd.gradcheck(value, (a, b), atol=1e-8, fast_mode=True)


@pytest.mark.parametrize("side", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("similarity", ["ssim", "ms_ssim"])
@pytest.mark.parametrize("value_range", ["pair", "255"])
def test_one_example_changes_no_other_s_value_or_gradient(side, similarity, value_range):
    """What lets the term stand beside DP-SGD: nothing is computed over the batch."""
    loss = term(similarity=similarity, similarity_range=value_range)
    shape = (4, 6, side, side)

    def run(factor: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        features = {name: randn(*shape, seed=s) + randn(*shape) for s, name in enumerate("abc", start=1)}
        for z in features.values():
            z[0] *= factor
            z.requires_grad_()
        gradients = torch.autograd.grad(loss(features).loss, list(features.values()))
        values = [
            pair_similarity(features[i].detach(), features[j].detach(), measure=similarity, value_range=value_range)
            for i, j in itertools.combinations("abc", 2)
        ]
        return values, list(gradients)

    (values, gradients), (other_values, other_gradients) = run(1.0), run(-300.0)
    for one, other in zip([*values, *gradients], [*other_values, *other_gradients], strict=True):
        torch.testing.assert_close(one[1:], other[1:], rtol=1e-12, atol=1e-15)
    assert not torch.allclose(gradients[0][0], other_gradients[0][0], rtol=1e-3)


def test_fixed_features_get_no_gradient_and_pairs_of_two_of_them_do_not_count():
    features = {name: randn(2, 4, 8, 8, seed=s).requires_grad_() for s, name in enumerate(["p", "new", "q", "also"])}
    value = term()(features, fixed=frozenset({"p", "q"}))
    assert set(value.by_pair) == {("new", "also"), ("new", "p"), ("new", "q"), ("also", "p"), ("also", "q")}
    value.loss.backward()
    assert features["p"].grad is None
    assert features["q"].grad is None
    assert all(features[name].grad.abs().sum() > 0 for name in ("new", "also"))
    moved = {**features, "q": features["p"]}
    both = {key: mean for key, mean in term()(moved, fixed=frozenset({"p", "q"})).by_pair.items() if key[1] == "q"}
    assert both == pytest.approx({(i, "q"): value.by_pair[i, "p"] for i in ("new", "also")})


@pytest.mark.parametrize("names", [["only"], ["only", "p"]])
@pytest.mark.parametrize("n_examples", [0, 2])
def test_without_a_pair_or_an_example_the_term_is_zero_and_can_still_be_differentiated(names, n_examples):
    features = {name: randn(n_examples, 4, 8, 8).requires_grad_() for name in names}
    if n_examples and len(names) == 2:
        features.pop("p")
    value = term()(features)
    assert float(value.loss.detach()) == 0
    assert value.by_pair == {}
    assert value.measure_used == ""
    gradients = torch.autograd.grad(value.loss, list(features.values()), allow_unused=True)
    assert all(g is not None and not g.any() for g in gradients)


def test_with_nothing_but_fixed_features_the_term_is_zero():
    features = {"p": randn(2, 4, 8, 8), "q": randn(2, 4, 8, 8)}
    assert float(term()(features, fixed=frozenset(features)).loss) == 0
    assert float(term()({}).loss) == 0


# -- published facts -------------------------------------------------------------------------------------------------


def test_the_library_s_range_calls_independent_features_equal_and_starves_the_gradient():
    """SPEC F3: 0.985 for independent ReLU features under data_range=255, with a gradient some 35 times smaller."""
    a, b = relu_features(8, 16, 16, 16).requires_grad_(), relu_features(8, 16, 16, 16, seed=1)
    legacy, ours = (term(similarity_mode="raw", similarity_range=r)({"a": a, "b": b}) for r in ("255", "pair"))
    assert legacy.by_pair["a", "b"] == pytest.approx(0.985, abs=0.01)
    assert ours.by_pair["a", "b"] < 0.15
    weak, strong = (float(torch.autograd.grad(v.loss, a)[0].norm()) for v in (legacy, ours))
    assert strong / weak > 15


def test_the_library_skips_the_window_on_small_maps_and_ours_does_not():
    """SPEC F4: on 8x8 it warns and compares pixel by pixel, so that independent features look alike."""
    a, b = relu_features(8, 16, 8, 8), relu_features(8, 16, 8, 8, seed=1)
    span = float(torch.stack([a, b]).max())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = float(ssim(a / span, b / span, data_range=1.0))
    assert any("Skipping Gaussian Smoothing" in str(w.message) for w in caught)
    pixelwise = ((2 * a * b + (0.01 * span) ** 2) / (a**2 + b**2 + (0.01 * span) ** 2)).mean()
    assert theirs == pytest.approx(float(pixelwise), abs=1e-6)
    assert theirs > 0.4
    assert abs(float(pair_similarity(a, b).mean())) < 0.15


def test_the_library_cannot_compare_single_positions_and_ours_can():
    """SPEC F4: split indices 8 and 9 leave 2x2 and 1x1 maps."""
    a, b = randn(64, 512, 1, 1), randn(64, 512, 1, 1, seed=1)
    with pytest.raises(ValueError, match="4-d or 5-d"):
        ssim(a, b, data_range=1.0)
    assert abs(float(pair_similarity(a, b).mean())) < 0.02
    assert float(pair_similarity(a, a).mean()) == pytest.approx(1)


def test_a_permutation_of_the_channels_or_a_mirror_hides_nothing_and_passes_for_independent():
    """SPEC F6: why a small similarity says nothing about leakage."""
    a, b = relu_features(8, 16, 16, 16), relu_features(8, 16, 16, 16, seed=1)
    independent = float(pair_similarity(a, b).mean())
    for same_information in (a[:, torch.arange(16).roll(1)], a.flip(-1)):
        assert float(pair_similarity(a, same_information).mean()) == pytest.approx(independent, abs=0.06)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_vectors_are_compared_as_maps_of_one_position():
    a, b = randn(4, 8), randn(4, 8, seed=1)
    value = term()({"a": a, "b": b})
    assert value.measure_used == "cosine of centred channel vectors"
    torch.testing.assert_close(pair_similarity(a, b), pair_similarity(a[..., None, None], b[..., None, None]))


def test_features_of_different_shapes_are_refused_with_their_names():
    with pytest.raises(ConfigError, match=r"age \(2, 4, 8, 8\), pose \(2, 4, 4, 4\)"):
        term()({"age": randn(2, 4, 8, 8), "pose": randn(2, 4, 4, 4)})
    with pytest.raises(ConfigError, match=r"got shape \(2, 4, 8\)"):
        term()({"age": randn(2, 4, 8), "pose": randn(2, 4, 8)})
    with pytest.raises(ConfigError, match="one shape"):
        pair_similarity(randn(2, 4, 8, 8), randn(3, 4, 8, 8))
    with pytest.raises(ConfigError, match="float tensor"):
        pair_similarity(torch.zeros(2, 4, 8, 8, dtype=torch.int64), torch.zeros(2, 4, 8, 8, dtype=torch.int64))


def test_a_fixed_name_without_a_feature_is_refused():
    with pytest.raises(UnknownNameError, match="no feature named 'gender'; known: age"):
        term()({"age": randn(2, 4, 8, 8)}, fixed=frozenset({"gender"}))


def test_the_pull_is_omega_times_the_terms_gradient_and_fixed_features_get_none():
    free = {name: randn(3, 4, 8, 8, seed=s).requires_grad_() for s, name in enumerate("ab")}
    fixed = {"old": randn(3, 4, 8, 8, seed=9)}
    pull = dissimilarity_pull(term(omega=0.25), free, fixed=fixed, step=0)
    value = term()({**free, **fixed}, fixed=frozenset(fixed))
    value.loss.backward()
    assert set(pull.gradients) == set(free)
    for name, z in free.items():
        torch.testing.assert_close(pull.gradients[name], 0.25 * z.grad)
    assert pull.value == pytest.approx(float(value.loss.detach()))
    assert pull.by_pair == value.by_pair


@pytest.mark.parametrize(("omega", "n_examples", "n_features"), [(0.0, 3, 2), (0.1, 0, 2), (0.1, 3, 1), (0.1, 3, 0)])
def test_there_is_no_pull_where_there_is_nothing_to_push_apart(omega, n_examples, n_features):
    features = {name: randn(n_examples, 4, 8, 8) for name in "ab"[:n_features]}
    assert dissimilarity_pull(term(omega=omega), features, fixed={}, step=0) == ({}, 0.0, {})


def test_a_pull_that_is_not_finite_is_an_error_that_names_the_step():
    features = {"a": randn(2, 4, 8, 8), "b": torch.full((2, 4, 8, 8), torch.inf, dtype=torch.float64)}
    with pytest.raises(NonFiniteLossError) as caught:
        dissimilarity_pull(term(), features, fixed={}, step=7)
    assert (caught.value.task, caught.value.step) == ("dissimilarity", 7)


def test_no_examples_have_no_similarities():
    assert pair_similarity(randn(0, 4, 8, 8), randn(0, 4, 8, 8)).shape == (0,)


@pytest.mark.parametrize("omega", [-1e-9, float("nan"), float("inf")])
def test_an_omega_that_is_no_weight_is_refused(omega):
    with pytest.raises(ConfigError, match="omega must be a finite number >= 0"):
        DissimilarityConfig(omega=omega)


@pytest.mark.parametrize("field", ["similarity", "similarity_mode", "similarity_range"])
def test_unknown_names_are_refused_with_the_known_ones(field):
    with pytest.raises(UnknownNameError, match=f"no {field} named 'cosine'; known: "):
        DissimilarityConfig(**{field: "cosine"})
