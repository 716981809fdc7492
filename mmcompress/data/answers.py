"""Answers to questions as the VQA evaluation reads and scores them: "Two." and "2" are one answer.

The rules are those of ``processPunctuation`` and ``processDigitArticle`` in ``vqaEvaluation/vqaEval.py`` of
https://github.com/GT-Vision-Lab/VQA (Antol et al. 2015, arXiv 1505.00468), oddities included. There the model's answer goes
through both rules, the people's through the first one and only where they disagree, as the answers of VQA v2 have been
cleaned before. Other data has not, so here both go through both. A typing error there (somebody'd becomes somebodyd) is left out.
"""

import re
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The look-behind is as it stands there; it was meant as (?<!\d), and is always true.
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")
_COUNTED = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {"none": "0", "zero": "0", **{word: str(number) for number, word in enumerate(_COUNTED, start=1)}}
_ARTICLES = frozenset({"a", "an", "the"})
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd
who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
you'll you're you've
"""
_APOSTROPHES = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, letter in enumerate(word) if letter == "'"
}
"""Contractions with one apostrophe left out, and as they are written."""


def normalise(answer: str) -> str:
    """Lower case, without articles and punctuation, numbers up to ten as digits, apostrophes where they belong."""
    words = []
    for word in _without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split():
        digits = _NUMBERS.get(word, word)
        if digits not in _ARTICLES:
            words.append(_APOSTROPHES.get(digits, digits))
    return " ".join(words)


def _without_punctuation(text: str) -> str:
    """A mark next to a space goes, one between letters becomes a space; in a text with a number like 1,000 all of them go."""
    found = text
    together = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        apart = not together and f"{mark} " not in text and f" {mark}" not in text
        found = found.replace(mark, " " if apart else "")
    return _PERIOD.sub("", found, count=32)


PEOPLE = 10
"""How many people answered each question of VQA v2 and of the data sets made like it. Lists of this length are votes."""


def agreement(answer: str, references: Sequence[str]) -> float:
    """The VQA accuracy of one answer: min(people who gave it / 3, 1), averaged over leaving out each of the people.

    A list of ten references is what ten people said. Any other number are answers that are all right, as if everybody had given
    each of them: 1 for any of them.
    """
    said = normalise(answer)
    same = sum(normalise(reference) == said for reference in references)
    if len(references) != PEOPLE:
        return float(same > 0)
    without_one_who_agrees, without_another = min((same - 1) / 3, 1), min(same / 3, 1)
    return (same * without_one_who_agrees + (PEOPLE - same) * without_another) / PEOPLE


def is_most_frequent(answer: str, references: Sequence[str]) -> bool:
    """Whether no reference answer is more frequent than this one, which must be among them."""
    counts = Counter(map(normalise, references))
    return counts[normalise(answer)] == max(counts.values())


def weights(references: Sequence[str]) -> dict[str, float]:
    """Each distinct answer, as it was first written, with its training target; the most frequent ones first.

    That is min(people / 3, 1) for ten people, the score without leaving anybody out, and 1 for other lists.
    """
    counts = Counter(map(normalise, references))
    spelling = {normalise(reference): reference for reference in reversed(references)}
    people = len(references) == PEOPLE
    return {spelling[key]: min(count / 3, 1.0) if people else 1.0 for key, count in counts.most_common()}
