"""The ground floor: progress, the cache of costly steps, atomic files, hints for mistyped names, the allocator."""
