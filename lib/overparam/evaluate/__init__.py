"""Evaluation of embeddings (local tasks and hub tasks, both scored by mteb) and of translations."""

LOCAL_TASKS = (
    "LeeSTS",
    "ReutersR8",
    "ReutersR52",
    "NewsgroupsClustering",
    "VerseParaphrase",
    "VerseCrossReference",
    "VerseFrench",
    "VerseGerman",
    "VersePairs",
)
"""Names of the tasks that need no network, readable without importing mteb."""

TOPIC_TASKS = ("ReutersR8", "ReutersR52", "Newsgroups")
"""Topic classification of packaged texts, see `topics`."""

GLUE_TASKS = tuple(f"glue/{name}" for name in ("cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte"))
"""Tasks of GLUE on the hub, see `topics`."""
