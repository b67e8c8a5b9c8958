"""What is made of a folder of results: front page, REPORT.md, gallery, checks, comparisons, citations."""
