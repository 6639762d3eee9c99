"""Runs in processes of their own, through the real entry point."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}


def arguments(data: Path | str, run: Path, *given: str) -> list[str]:
    """The command line of a small run."""
    small = [
        'finetune',
        'test_resnet',
        '--no-pretrained',
        '--image-size=16',
        '--batch-size=8',
        '--trackers=none',
        '--cpu',
    ]
    return [sys.executable, '-m', 'sem_timm', *small, '--data', str(data), '--output', str(run), *given]


def resume(run: Path, *given: str) -> list[str]:
    """The command line that continues a run."""
    return [sys.executable, '-m', 'sem_timm', 'finetune', '--resume', str(run), *given]


def start(command: list[str]) -> subprocess.Popen[str]:
    """Starts a command in a process group of its own, which hears Ctrl-C: what runs in the background may be deaf."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)


def finish(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=300)


def wait_for_rows(process: subprocess.Popen[str], file: Path, count: int) -> None:
    """Waits until a CSV file has so many rows."""
    deadline = time.monotonic() + 120
    while not file.exists() or len(file.read_text().splitlines()) <= count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, file
        time.sleep(0.02)
