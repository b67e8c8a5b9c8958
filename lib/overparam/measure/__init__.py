"""What running costs: time, memory, energy, bytes on disk."""
