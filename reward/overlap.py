"""Overlap of a completion with reference texts: ROUGE-L, BLEU, chrF, each from 0 to 1. Word F1 is in `text`."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

from align.errors import missing_dependency
from align.reward.json_schema import INSTALL

Overlap = Literal["rouge_l", "bleu", "chrf"]
_TOKENS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")


def overlap_score(measure: Overlap, completion: str, references: list[str]) -> float:
    """Overlap with the references: the largest for rouge_l, with all of them together for bleu and chrf."""
    if measure == "rouge_l":
        return max(rouge_l(completion, reference) for reference in references)
    return _sacrebleu(measure, any(map(_is_chinese, references)))(completion, references)


def tokens(text: str) -> list[str]:
    """Lower-case words; Chinese, Japanese and Korean characters one by one."""
    return _TOKENS.findall(text.lower())


def rouge_l(completion: str, reference: str) -> float:
    """F-measure of the longest common subsequence of tokens (Lin 2004), by rouge-score."""
    return float(_rouge().score(reference, completion)["rougeL"].fmeasure)


class _Tokenizer:
    def tokenize(self, text: str) -> list[str]:
        return tokens(text)


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise missing_dependency("rouge-score", "ROUGE", INSTALL) from None
    return RougeScorer(["rougeL"], tokenizer=_Tokenizer())  # its own tokenizer drops Chinese


@cache
def _sacrebleu(measure: Overlap, chinese: bool) -> Callable[[str, list[str]], float]:
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise missing_dependency("sacrebleu", measure.upper() if measure == "bleu" else "chrF", INSTALL) from None
    metric = CHRF() if measure == "chrf" else BLEU(tokenize="zh" if chinese else "13a", effective_order=True)
    return lambda completion, references: metric.sentence_score(completion, references).score / 100


def require_library(measure: Overlap) -> None:
    """Raise UserError if the library of a measure is not installed."""
    if measure == "rouge_l":
        _rouge()
    else:
        _sacrebleu(measure, False)


def _is_chinese(text: str) -> bool:
    return bool(re.search(r"[\u4e00-\u9fff]", text))
