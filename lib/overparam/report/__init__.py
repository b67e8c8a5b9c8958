"""What a run leaves behind: its record, statistics, figures and verdicts."""
