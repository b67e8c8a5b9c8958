"""What every study has in common: its parameters, its costs, its figures."""
