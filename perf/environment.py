"""What a measurement ran on: GPU, driver, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import re
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent


class Environment(NamedTuple):
    gpu: str
    driver: str
    torch: str
    dsl: str
    commit: str

    @property
    def slug(self) -> str:
        """The GPU's name as a folder's."""
        return re.sub(r"[^a-z0-9.]+", "-", self.gpu.lower()).strip("-")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """SONICMOE_COMMIT, for a copy of the tree without its repository; else git's, marked if files differ from it."""
    given = os.environ.get("SONICMOE_COMMIT")
    if given:
        return given
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    # The ledger is written by the run itself and must not mark it.
    changed = _output("git", "status", "--porcelain", "--", ".", ":!perf/results")
    return f"{head}-dirty" if changed else head


def version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


@lru_cache
def describe(device: str) -> Environment:
    gpu, driver = "cpu", ""
    if device.startswith("cuda"):
        gpu = torch.cuda.get_device_name(device)
        listed = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = listed.splitlines()[0].strip() if listed else ""
    return Environment(gpu, driver, torch.__version__, version_of("nvidia-cutlass-dsl"), commit())


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
