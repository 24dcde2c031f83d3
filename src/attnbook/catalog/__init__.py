"""The catalog: every mechanism of the library with its specification, its paper, its cost and its chapter."""

from types import MappingProxyType

from attnbook.catalog import dense, graph
from attnbook.catalog.row import Mechanism

_FAMILIES = (dense, graph)

MECHANISMS = MappingProxyType({row.function.__name__: row for family in _FAMILIES for row in family.ROWS})

__all__ = ["MECHANISMS", "Mechanism"]
