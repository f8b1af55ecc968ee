"""The text of language.py, what is asked of a model there, and the trigram model to beat."""

import pydoc_data.topics
import re

import numpy as np

MASK, EVERY = "□", 3


def paragraphs() -> str:
    """The topics of Python's help, each paragraph once: some topics repeat parts of others."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return "\n\n".join(dict.fromkeys(re.split(r"\n\s*\n", text)))


def next_characters(pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What GPT reads, and what it has to predict at each character."""
    return pieces[:, :-1], pieces[:, 1:]


def masked(pieces: np.ndarray, mask: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """What BERT reads, and what it has to fill in: -1 where nothing is asked.

    BERT hides 15 % at random. One of three teaches more in a minute, and leaves the two neighbours
    on either side to be seen, which is all that a trigram model can use.
    """
    first = rng.integers(EVERY, size=(len(pieces), 1))
    hidden = (np.arange(pieces.shape[1]) + first) % EVERY == 0
    return np.where(hidden, mask, pieces), np.where(hidden, pieces, -1)


def trigram(text: np.ndarray, symbols: int) -> np.ndarray:
    """How probable is c after a and b, as an array [a, b, c], smoothed as by Witten and Bell.

    The less was seen after a and b, the more counts what was seen after b alone, and so on.
    """
    counts = np.zeros((symbols,) * 3)
    np.add.at(counts, (text[:-2], text[1:-1], text[2:]), 1)
    probability = 1 / symbols
    for seen in (counts.sum((0, 1)), counts.sum(0), counts):
        kinds = np.maximum(np.count_nonzero(seen, axis=-1, keepdims=True), 1)
        probability = (seen + kinds * probability) / (seen.sum(-1, keepdims=True) + kinds)
    return probability


def trigram_bits(probability: np.ndarray, text: np.ndarray) -> float:
    """Bits per character, of all but the first two."""
    return float(-np.log2(probability[text[:-2], text[1:-1], text[2:]]).mean())


def trigram_accuracy(probability: np.ndarray, text: np.ndarray) -> float:
    """How often the character that is most probable between two on either side is the right one."""
    log = np.log(probability)
    a, b, c, d, e = (text[start : len(text) - 4 + start] for start in range(5))
    scores = log[a, b] + log[b, :, d] + log[:, d, e].T
    return float(np.mean(scores.argmax(-1) == c))
