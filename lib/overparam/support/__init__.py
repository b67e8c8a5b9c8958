"""Helpers that everything else uses: progress, cache of costly steps, atomic files, name hints, memory allocation."""
