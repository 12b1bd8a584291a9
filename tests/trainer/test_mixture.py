"""Laws 8 and 10 for mixtures and skipped ranges: one integer, any world size, against a merge written out plainly."""

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import UserError
from tests.trainer.made import made, spread_out
from trainer.data import ordered
from trainer.mixture import Mixture
from trainer.ranks import ALONE
from trainer.stream import Geometry, Order, steps


def lettered(letter, lengths):
    """Windows of these lengths in groups of three, each token the source's own letter."""
    found = made(lengths, fingerprint=f"{letter}{lengths}")
    for number, group in enumerate(found.groups):
        found.groups[number] = [
            replace(window, doc_id=f"{letter}{window.doc_id}", tokens=np.full(len(window.tokens), letter))
            for window in group
        ]
    found.letter = letter
    return found


def placed_from(mixture, seed, position, count):
    return list(itertools.islice(spread_out(mixture, mixture.ordered(seed, 2, position)), count))


def sources():
    rng = np.random.default_rng(3)
    sizes = {1: (40, 30), 2: (25, 9), 3: (7, 50)}  # windows and their mean length
    return [lettered(letter, rng.integers(1, 2 * mean, count).tolist()) for letter, (count, mean) in sizes.items()]


WEIGHTS = [6, 3, 1]


@pytest.fixture
def mixture():
    return Mixture(sources(), WEIGHTS)


def plainly(parts, weights, count):
    """Which source each of the first windows is of: by due time, in exact fractions; the earlier source of equals."""
    every = []
    for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        mean = Fraction(part.tokens, int(part.group_sizes.sum()))
        every += [((2 * j + 1) * mean / Fraction(weight), number) for j in range(count)]
    return [number for _, number in sorted(every)[:count]]


PARTS = st.lists(
    st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 9)), min_size=1, max_size=4
)


@given(PARTS, st.integers(0, 60))
def test_how_many_of_each_come_first_is_what_a_merge_by_due_time_says(parts, position):
    made = [lettered(number, lengths) for number, (lengths, _) in enumerate(parts)]
    weights = [weight for _, weight in parts]
    mixture, turns = Mixture(made, weights), plainly(made, weights, position)
    drawn = mixture.drawn(position)
    assert sum(drawn) == position
    # Distances are rounded to one part in a million: equals may change places, nothing else.
    assert all(abs(count - turns.count(number)) <= 1 for number, count in enumerate(drawn))
    placed = placed_from(mixture, 0, 0, position)
    assert [sum(int(p.window.tokens[0]) == n for p in placed) for n in range(len(made))] == drawn


def test_tokens_come_in_the_shares_of_the_weights(mixture):
    seen = np.zeros(4)
    for placed in placed_from(mixture, 0, 0, 20_000):
        seen[int(placed.window.tokens[0])] += len(placed.window.tokens)
    np.testing.assert_allclose(seen[1:] / seen.sum(), np.array(WEIGHTS) / 10, rtol=0.002)


def test_every_source_keeps_its_own_order_and_epochs(mixture):
    placed = placed_from(mixture, 7, 0, 500)
    for number, source in enumerate(mixture.sources):
        own = [item for item in placed if item.window.tokens[0] == source.letter]
        alone = list(itertools.islice(spread_out(source, ordered(source, 7, 2, 0)), len(own)))
        assert [item.window.doc_id for item in own] == [item.window.doc_id for item in alone]
        offset = sum(mixture.windows[:number])
        assert [(item.epoch, item.key) for item in own] == [(item.epoch, item.key + offset) for item in alone]


def test_a_mixture_of_one_is_that_one_and_read_numbers_groups_source_after_source(mixture):
    alone = Mixture(mixture.sources[:1], [0.3])
    one = [p.window.doc_id for p in placed_from(alone, 1, 5, 60)]
    (source,) = alone.sources
    assert one == [p.window.doc_id for p in itertools.islice(spread_out(source, ordered(source, 1, 2, 5)), 60)]
    found = [window.doc_id for group in range(len(mixture.group_sizes)) for window in mixture.read(group)]
    assert found == [w.doc_id for s in mixture.sources for g in range(len(s.groups)) for w in s.read(g)]
    with pytest.raises(IndexError):
        mixture.read(len(mixture.group_sizes))


def test_any_position_opens_the_same_order(mixture):
    whole = placed_from(mixture, 1, 0, 400)
    for position in (0, 1, 2, 39, 77, 300):
        assert sum(mixture.drawn(position)) == position
        again = placed_from(mixture, 1, position, 20)
        assert [(p.epoch, p.key) for p in again] == [(p.epoch, p.key) for p in whole[position : position + 20]]


def test_places_of_billions_of_windows_are_found_at_once(mixture):
    drawn = mixture.drawn(10**11)
    assert sum(drawn) == 10**11
    means = [source.tokens / windows for source, windows in zip(mixture.sources, mixture.windows, strict=True)]
    tokens = [count * mean for count, mean in zip(drawn, means, strict=True)]
    np.testing.assert_allclose(np.array(tokens) / sum(tokens), np.array(WEIGHTS) / 10, rtol=1e-5)


def test_windows_come_in_their_order_also_where_their_times_outgrow_64_bits(mixture):
    position = 10**13
    stretch, before = next(mixture.ordered(0, 2, position)), mixture.drawn(position)
    owners = np.searchsorted(np.cumsum(mixture.windows), stretch.keys, side="right")
    for count in (1, 2, 3, 10, 100, len(stretch)):
        found = np.bincount(owners[:count], minlength=3)
        assert found.tolist() == [b - a for a, b in zip(before, mixture.drawn(position + count), strict=True)]


SKIP = [(3, 8), (8, 11), (40, 41), (90, 2000)]


@pytest.mark.parametrize("skip", [[], SKIP])
@pytest.mark.parametrize("world", [2, 4])
def test_steps_do_not_depend_on_world_size_and_go_on_from_their_integer(mixture, world, skip):
    order = Order(mixture, 0, 2, ("ref_loss", "chance"), skip)
    alone = list(itertools.islice(steps(order, Geometry(4, 128, 4), 0), 6))
    ranks = [list(itertools.islice(steps(order, Geometry(4, 128, 4 // world, r, world), 0), 6)) for r in range(world)]
    for number, step in enumerate(alone):
        assert {rank[number].position for rank in ranks} == {step.position}
        rows = torch.cat([rank[number].micros[0].batch.ids for rank in ranks])
        assert torch.equal(rows, step.micros[0].batch.ids)
        resumed = list(itertools.islice(steps(order, Geometry(4, 128, 4), step.position), 6 - number - 1))
        assert [s.position for s in resumed] == [s.position for s in alone[number + 1 :]]
        for one, other in zip(resumed, alone[number + 1 :], strict=True):
            assert torch.equal(one.micros[0].batch.ids, other.micros[0].batch.ids)


def test_what_is_skipped_is_passed_over_and_nothing_else(mixture):
    places = set(range(2100)) - {place for start, end in SKIP for place in range(start, end)}
    whole = placed_from(mixture, 0, 0, 2100)
    for position in (0, 5, 8, 41, 100, 2000, 2050):
        stretches = Order(mixture, 0, 2, (), SKIP).stretches(position)
        found = list(itertools.islice(((place + i, s[i : i + 1]) for place, s in stretches for i in range(len(s))), 60))
        wanted = [place for place in sorted(places) if place >= position][:60]
        assert [place for place, _ in found][: len(wanted)] == wanted
        assert [(s.epochs[0], s.keys[0]) for _, s in found][: len(wanted)] == [
            (whole[w].epoch, whole[w].key) for w in wanted
        ]


def test_the_fingerprint_knows_parts_weights_and_their_order():
    parts = sources()
    prints = {
        Mixture(parts, WEIGHTS).fingerprint,
        Mixture(parts[::-1], WEIGHTS[::-1]).fingerprint,
        Mixture(parts, [6, 3, 2]).fingerprint,
        Mixture([*parts[:2], parts[0]], WEIGHTS).fingerprint,
    }
    assert len(prints) == 4
    assert Mixture(parts, [6.0, 3.0, 1.0]).fingerprint in prints


def test_columns_are_what_all_parts_have_and_an_empty_part_is_refused():
    assert Mixture([sources()[0], made([5], columns=())], [1, 1]).columns == set()
    with pytest.raises(UserError, match=r"train\.mixture: a dataset holds no windows; look at them"):
        Mixture([sources()[0], made([])], [1, 1])


def test_a_mixture_is_known_by_all_that_its_parts_are_known_by(mixture):
    parts = mixture.sources
    for number, part in enumerate(parts):
        part.scored_by, part.made_of, part.asked = frozenset({f"model {number}"}), frozenset({f"web {number}"}), []
        part.counted = part.counted - number  # as of conversations: fewer than all but the first
        part.index = part.asked.append
    parts[1].conversations = True
    again = Mixture(parts, WEIGHTS)
    assert again.tokens == sum(part.tokens for part in parts)
    assert again.scored_by == {"model 0", "model 1", "model 2"} and again.made_of == {"web 0", "web 1", "web 2"}
    assert again.conversations and not Mixture([parts[0], parts[2]], [1, 1]).conversations
    again.index(ALONE)
    assert [part.asked for part in parts] == [[ALONE]] * 3
    assert again.lengths.tolist() == [length for part in parts for length in part.lengths.tolist()]
    counted = np.concatenate([part.counted for part in parts])
    keys = np.random.default_rng(0).permutation(len(counted))[:50]
    assert again.valid(keys).tolist() == counted[keys].tolist()
    edges = np.array([0, 39, 40, 64, 65, 71])
    assert again.valid(edges).tolist() == counted[edges].tolist()


def test_windows_and_columns_are_asked_of_the_part_that_has_them(mixture):
    asked = []
    for number, part in enumerate(mixture.sources):
        part.read = lambda *call, number=number: asked.append((number, *call))
    for group in (0, 13, 14, 22, 23, 25):  # of 14, 9 and 3
        mixture.read(group, [1], {"ref_loss"})
    assert asked == [(n, g, [1], {"ref_loss"}) for n, g in ((0, 0), (0, 13), (1, 0), (1, 8), (2, 0), (2, 2))]


@pytest.mark.parametrize("shuffle_groups", [1, 2, 5])
def test_a_block_of_any_part_lies_within_so_many_windows_of_the_order_and_hardly_fewer(shuffle_groups):
    parts = [lettered(1, [30] * 42), lettered(2, [9] * 24), lettered(3, [50] * 9)]
    mixture = Mixture(parts, WEIGHTS)
    ends, spans, order = np.cumsum(mixture.group_sizes), {}, mixture.ordered(5, shuffle_groups, 0)
    for place, item in enumerate(itertools.islice(spread_out(mixture, order), 3000)):
        group = item.epoch, int(np.searchsorted(ends, item.key, side="right"))
        first, _ = spans.setdefault(group, (place, place))
        spans[group] = (first, place)
    longest = max(last - first + 1 for first, last in spans.values())
    between = (6 / 30 + 3 / 9 + 1 / 50) * 50  # windows of the order from one of the rarest part to the next
    assert longest <= mixture.block(shuffle_groups) <= longest + between + 3
    assert Mixture(parts[:1], [2]).block(shuffle_groups) == 3 * shuffle_groups + 1


def test_of_windows_due_at_the_same_time_the_earlier_parts_come_first():
    parts = [lettered(letter, [5] * 4) for letter in (1, 2, 3)]
    placed = placed_from(Mixture(parts, [1, 1, 1]), 0, 0, 9)
    assert [int(item.window.tokens[0]) for item in placed] == [1, 2, 3] * 3
    assert [Mixture(parts, [1, 1, 1]).drawn(position) for position in range(5)] == [
        [0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [2, 1, 1]
    ]  # fmt: skip
    two = Mixture(parts[:2], [2, 1])  # the example of its docstring
    assert "".join("ab"[int(item.window.tokens[0]) - 1] for item in placed_from(two, 0, 0, 8)) == "abaabaab"
    # A window of twice the tokens comes half as often for the same weight.
    longer = Mixture([parts[0], lettered(2, [10] * 4)], [1, 1])
    assert longer.drawn(300) == [200, 100]
