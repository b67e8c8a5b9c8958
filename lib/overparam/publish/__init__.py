"""What is made of a folder of results: README's table, REPORT.md, the gallery, checks, comparisons, citations."""
