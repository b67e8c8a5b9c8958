"""What a run leaves: the record, per-item scores, statistics, figures, claims and their verdicts."""
