"""The instructions for each source of triplets: before queries and before documents."""

from __future__ import annotations

import re
from typing import Final

# From E5-Mistral (arXiv 2401.00368), for the training data of it, LLM2Vec and L3Prune. If there are two texts, the
# lines of the file use them in turns.
_PUBLISHED: Final[dict[str, tuple[str, ...]]] = {
    "allnli": (
        "Given a premise, retrieve a hypothesis that is entailed by the premise",
        "Retrieve semantically similar text",
    ),
    "dureader": ("Given a Chinese search query, retrieve web passages that answer the question",),
    "eli5_question_answer": (
        "Provided a user question, retrieve the highest voted answers on Reddit ELI5 forum",
    ),
    "fever": ("Given a claim, retrieve documents that support or refute the claim",),
    "hotpot_qa": ("Given a multi-hop question, retrieve documents that can help answer the question",),
    "miracl": ("Given a question, retrieve Wikipedia passages that answer the question",),
    "mrtydi": ("Given a question, retrieve Wikipedia passages that answer the question",),
    "msmarco_passage": ("Given a web search query, retrieve relevant passages that answer the query",),
    "msmarco_document": ("Given a web search query, retrieve relevant documents that answer the query",),
    "nq": ("Given a question, retrieve Wikipedia passages that answer the question",),
    "quora_duplicates": (
        "Given a question, retrieve questions that are semantically equivalent to the given question",
        "Find questions that have the same meaning as the input question",
    ),
    "squad": ("Retrieve Wikipedia passages that answer the question",),
    "t2ranking": ("Given a Chinese search query, retrieve web passages that answer the question",),
    "trivia_qa": ("Retrieve Wikipedia passages that answer the question",),
}
_SYMMETRIC = (
    ("allnli", 2),
    ("quora_duplicates", 1),
    ("quora_duplicates", 2),
)  # parts, by data set and number
_SPLIT = re.compile(r"(?P<whole>.+?)[_-]split[_-]?(?P<number>\d+)")

# For the packaged triplets: (before queries, before documents)
_PACKAGED: Final[dict[str, tuple[str, str | None]]] = {
    "paraphrase": ("Find the Bible verse that says the same in another English translation",) * 2,
    "topic": ("Find a news story or newsgroup post that is about the same topic",) * 2,
    "fr": ("Given a Bible verse in English, find the same verse in French", None),
    "de": ("Given a Bible verse in English, find the same verse in German", None),
}


def packaged(source: str) -> tuple[str | None, str | None]:
    """Return the instructions of a packaged source; documents have one if both sides are of the same kind."""
    return _PACKAGED.get(source, (None, None))


def published(source: str, line: int) -> tuple[str | None, str | None]:
    """Return the instructions for a line (from 0) of a published data set, as the published code sets them.

    Documents have one only if a symmetric data set is stored in two files, such as ``allnli_split2``: for a whole file
    the published code forgets them, although its README promises them. An unknown data set has no instructions.
    """
    data_set, number = part_of(source)
    texts = _PUBLISHED.get(data_set, (None,))
    query = texts[(line if number is None else number - 1) % len(texts)]
    return query, query if (data_set, number) in _SYMMETRIC else None


def part_of(source: str) -> tuple[str, int | None]:
    """Return the data set of a file such as ``allnli_split2``, and its part number; None for a whole data set."""
    part = _SPLIT.fullmatch(source)
    return (part["whole"], int(part["number"])) if part else (source, None)
