import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from appliance.applier.store.adoption import LayerName, best_way

layers = st.builds(
    lambda first, count: LayerName(first, first + count), st.integers(1, 7), st.integers(0, 5)
)


def ways(found: set[LayerName], position: int) -> list[list[LayerName]]:
    """Every way from ``position`` on, as far as each goes."""
    begins = [layer for layer in found if layer.first == position + 1]
    return [[layer, *rest] for layer in begins for rest in ways(found, layer.last)] or [[]]


@given(st.sets(layers, max_size=10), st.integers(0, 3), st.sets(st.integers(0, 12)))
def test_the_best_way_is_the_best_of_all_ways(
    found: set[LayerName], position: int, held: set[int]
) -> None:
    def worth(way: list[LayerName]) -> tuple[int, int, int]:
        kept = sum(layer.last in held for layer in way)
        return (way[-1].last if way else position, kept, -len(way))

    way = best_way(found, position, held)
    assert way in ways(found, position)
    assert worth(way) == max(worth(one) for one in ways(found, position))


def test_a_thousand_layers_are_put_in_order_at_once() -> None:
    found = [LayerName(first, first) for first in range(1, 2001)]
    shuffled = random.Random(1).sample(found, len(found))
    way = best_way(shuffled, 0, ())
    assert way == found
    assert all(one.last + 1 == two.first for one, two in itertools.pairwise(way))
