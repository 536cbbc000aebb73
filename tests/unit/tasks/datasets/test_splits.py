import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.datasets.splits import SUBSETS, SplitFractions, check_labels, split_rows
from tasks.datasets.table import ImageTable
from tasks.errors import ConfigError, DataError, UnknownNameError
from tasks.spec import TaskSpec

SHARES = st.lists(st.integers(1, 9), min_size=4, max_size=4).map(
    lambda weights: SplitFractions(**dict(zip(SUBSETS, (w / sum(weights) for w in weights), strict=True)))
)
SEEDS = st.integers(0, 2**63 - 1)
GROUP_SIZES = st.lists(st.integers(1, 12), min_size=4, max_size=40)


def shares(fractions):
    return [getattr(fractions, name) for name in SUBSETS]


def sizes(splits):
    return [len(splits.subset(name)) for name in SUBSETS]


def groups_of(group_sizes, seed):
    names = np.random.default_rng(seed).choice(10**6, len(group_sizes), replace=False)
    return np.random.default_rng(seed).permutation(np.repeat(names, group_sizes))


def assert_partition(splits, n):
    rows = np.concatenate([splits.subset(name) for name in SUBSETS])
    assert rows.dtype == np.int64
    assert np.array_equal(np.sort(rows), np.arange(n))


@settings(deadline=None)
@given(n=st.integers(40, 500), seed=SEEDS, fractions=SHARES)
def test_subsets_are_disjoint_and_cover_every_row(n, seed, fractions):
    assert_partition(split_rows(n, seed=seed, fractions=fractions), n)


@settings(deadline=None)
@given(n=st.integers(40, 500), seed=SEEDS, fractions=SHARES)
def test_sizes_are_the_shares_rounded_down_or_up_whatever_the_seed(n, seed, fractions):
    got = sizes(split_rows(n, seed=seed, fractions=fractions))
    assert all(abs(size - n * share) < 1 for size, share in zip(got, shares(fractions), strict=True))
    assert got == sizes(split_rows(n, seed=seed + 1, fractions=fractions))


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1797, [899, 180, 359, 359]), (10, [5, 1, 2, 2]), (624, [312, 62, 125, 125]), (20000, [10000, 2000, 4000, 4000])],
)
def test_known_sizes_of_the_default_shares(n, expected):
    assert sizes(split_rows(n, seed=0)) == expected


def test_leftover_rows_go_to_the_largest_remainders():
    fractions = SplitFractions(train=0.46, validation=0.17, attacker=0.19, test=0.18)
    assert sizes(split_rows(10, seed=0, fractions=fractions)) == [4, 2, 2, 2]


@settings(deadline=None)
@given(group_sizes=GROUP_SIZES, seed=SEEDS, fractions=SHARES)
def test_no_group_spans_two_subsets_and_no_subset_is_empty(group_sizes, seed, fractions):
    groups = groups_of(group_sizes, seed)
    splits = split_rows(len(groups), seed=seed, fractions=fractions, groups=groups)
    assert_partition(splits, len(groups))
    held = [set(groups[splits.subset(name)].tolist()) for name in SUBSETS]
    assert all(held)
    assert sum(map(len, held)) == len(set().union(*held))


@settings(deadline=None)
@given(group_sizes=GROUP_SIZES, seed=SEEDS, fractions=SHARES)
def test_no_subset_exceeds_its_share_by_as_much_as_its_largest_group(group_sizes, seed, fractions):
    groups = groups_of(group_sizes, seed)
    n = len(groups)
    splits = split_rows(n, seed=seed, fractions=fractions, groups=groups)
    for name, share in zip(SUBSETS, shares(fractions), strict=True):
        rows = splits.subset(name)
        assert len(rows) - n * share < np.unique(groups[rows], return_counts=True)[1].max() + 1e-6


def test_equal_groups_meet_the_shares_exactly():
    splits = split_rows(600, seed=3, groups=np.arange(600) % 20)
    assert sizes(splits) == [300, 60, 120, 120]


@given(seed=SEEDS)
@settings(deadline=None)
def test_large_groups_are_placed_first_so_that_small_ones_can_fill_up(seed):
    groups = groups_of([50, *[1] * 50], seed)
    assert sizes(split_rows(100, seed=seed, groups=groups)) == [50, 10, 20, 20]


def test_four_groups_give_each_subset_one():
    splits = split_rows(100, seed=0, groups=np.arange(100) % 4)
    assert sizes(splits) == [25, 25, 25, 25]


@settings(deadline=None)
@given(seed=SEEDS)
def test_the_same_seed_gives_the_same_split(seed):
    groups = np.arange(90) // 3
    for kwargs in ({}, {"groups": groups}):
        first, second = split_rows(90, seed=seed, **kwargs), split_rows(90, seed=seed, **kwargs)
        assert all(np.array_equal(first.subset(name), second.subset(name)) for name in SUBSETS)


def test_a_split_is_the_same_in_every_version():
    assert split_rows(20, seed=7).test.tolist() == [17, 2, 9, 11]
    assert split_rows(20, seed=7, groups=np.arange(20) // 2).test.tolist() == [3, 4, 5, 2]


def test_another_seed_gives_another_split():
    groups = np.arange(1000) // 10
    for kwargs in ({}, {"groups": groups}):
        first, second = split_rows(1000, seed=0, **kwargs), split_rows(1000, seed=1, **kwargs)
        assert set(first.test.tolist()) != set(second.test.tolist())


@pytest.mark.parametrize("groups", [None, np.arange(1000) // 10])
def test_example_ids_do_not_tell_the_order_of_the_file(groups):
    for name in SUBSETS:
        rows = split_rows(1000, seed=0, groups=groups).subset(name)
        ids = np.arange(len(rows))
        assert abs(np.corrcoef(ids, rows)[0, 1]) < 0.25
        assert (np.abs(np.diff(rows)) == 1).mean() < 0.05


def test_splitting_leaves_the_global_generator_alone():
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - it is the global one that is watched
    split_rows(100, seed=0)
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_an_unknown_subset_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"no subset named 'dev'; known: attacker, test, train, validation"):
        split_rows(10, seed=0).subset("dev")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"train": 0.6}, "must sum to 1, got train 0.6, validation 0.1, attacker 0.2, test 0.2, which sum to 1.1"),
        ({"train": 0.4}, "which sum to 0.9"),
        ({"validation": 0.0, "train": 0.6}, "every subset needs a share > 0, got train 0.6, validation 0"),
        ({"attacker": -0.2, "train": 0.9}, "every subset needs a share > 0"),
        ({"train": math.nan}, "every subset needs a share > 0"),
        ({"train": math.inf}, "every subset needs a share > 0"),
    ],
)
def test_shares_that_are_no_partition_are_refused(changes, text):
    with pytest.raises(ConfigError) as caught:
        SplitFractions(**changes)
    assert text in str(caught.value)


def test_shares_may_miss_one_by_a_rounding():
    thirds = SplitFractions(train=0.3333333, validation=0.3333333, attacker=0.1666667, test=0.1666666)
    assert sum(shares(thirds)) != 1
    assert sizes(split_rows(600, seed=0, fractions=thirds)) == [200, 200, 100, 100]


@pytest.mark.parametrize("n", [0, 1, 3, 4])
def test_too_few_rows_are_refused_with_a_number_that_is_enough(n):
    with pytest.raises(DataError, match=rf"{n} row\(s\) are too few: subset .*; use at least 10 rows, or other shares"):
        split_rows(n, seed=0)
    assert min(sizes(split_rows(10, seed=0))) == 1


def test_too_few_groups_are_refused():
    with pytest.raises(DataError, match=r"3 group\(s\) are too few for 4 subsets .*; group by another column"):
        split_rows(90, seed=0, groups=np.arange(90) % 3)


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match="seed of a split must be >= 0, got -1"):
        split_rows(100, seed=-1)


def table(labels, groups=None):
    return ImageTable(
        name="t",
        images=np.zeros((len(labels), 8, 8, 3), np.uint8),
        labels={"pose": np.asarray(labels)},
        specs={"pose": TaskSpec(name="pose", target="pose", classes=("left", "right", "up"))},
        fingerprint="",
        image_set="",
        groups=groups,
    )


def test_labels_are_fine_when_every_class_is_trained_on():
    check_labels(table([0, 1, 2] * 40), split_rows(120, seed=0), ["pose"])


def test_a_class_without_a_training_image_is_named():
    splits = split_rows(100, seed=0)
    labels = np.zeros(100, np.int64)
    labels[splits.test[0]], labels[splits.train[0]] = 2, 1
    with pytest.raises(DataError) as caught:
        check_labels(table(labels), splits, ["pose"])
    assert "no training image of task 'pose' has class 'up' (of 3 classes)" in str(caught.value)
    assert "another --split-seed" in str(caught.value)
    assert "--group-by" not in str(caught.value)


def test_with_groups_another_grouping_is_suggested():
    splits = split_rows(100, seed=0)
    with pytest.raises(DataError, match=r"'right', 'up'.* choose another --group-by, another --split-seed"):
        check_labels(table([0] * 100, groups=np.arange(100)), splits, ["pose"])


def test_many_missing_classes_are_counted_and_not_all_listed():
    splits = split_rows(1000, seed=0)
    classes = tuple(f"p{k:02}" for k in range(50))
    people = ImageTable(
        name="t",
        images=np.zeros((1000, 8, 8, 3), np.uint8),
        labels={"person": np.zeros(1000, np.int64)},
        specs={"person": TaskSpec(name="person", target="person", classes=classes)},
        fingerprint="",
        image_set="",
    )
    with pytest.raises(DataError, match=r"class 'p01', 'p02', 'p03', 'p04', 'p05' and 44 more \(of 50 classes\)"):
        check_labels(people, splits, ["person"])


def test_checking_an_unknown_task_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="no task named 'age'; known: pose"):
        check_labels(table([0, 1, 2] * 40), split_rows(120, seed=0), ["age"])
