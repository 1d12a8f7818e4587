"""placeholder"""
from __future__ import annotations
from pathlib import Path
from tests.checkpoints import Files

def write_sparse_checkpoint(folder: Path) -> Files:
    raise NotImplementedError
