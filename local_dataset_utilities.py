"""Texts and labels of a run, for other programs: ``load_texts``, ``prefetch_texts`` and ``tokenize``.

The public face of ``finetuning/data/loading.py``.
"""

from finetuning.data.loading import load_texts, prefetch_texts, tokenize

__all__ = ["load_texts", "prefetch_texts", "tokenize"]
