"""Whole data sets on Ray Data: rows of masks and prompts → images and a table of what became of each row."""

from mogle_rt.batch.job import Summary, run

__all__ = ["Summary", "run"]
