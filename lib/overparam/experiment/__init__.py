"""What every study has in common: parameters, steps that can be replayed, costs and charts."""
