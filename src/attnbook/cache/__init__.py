"""Key–value caches for decoding one token after another: one object for each attention layer, all used alike."""

from attnbook.cache.base import Cache
from attnbook.cache.paged import PagedCache
from attnbook.cache.sink import SinkCache
from attnbook.cache.static import StaticCache

__all__ = ["Cache", "PagedCache", "SinkCache", "StaticCache"]
