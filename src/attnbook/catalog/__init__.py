"""The catalog: every mechanism of the library with its specification, its paper, its cost and its chapter."""

from types import MappingProxyType

from attnbook.catalog import dense, graph, linear, selective, sparse, state, structured
from attnbook.catalog.row import Mechanism

_FAMILIES = (dense, sparse, selective, linear, state, structured, graph)

MECHANISMS = MappingProxyType({row.function.__name__: row for family in _FAMILIES for row in family.ROWS})

__all__ = ["MECHANISMS", "Mechanism"]
