"""What a run writes down: CSV files, and any of accelerate's trackers."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, filter_trackers, on_main_process

from sem_timm.finetuning.files import explained, write_whole


class CsvTracker(GeneralTracker):
    """Writes values named ``kind/name`` as columns of ``kind.csv``, one row for each step, at once to the disk.

    Numbers are written with all their digits, so that two runs can be compared exactly.

    Args:
        folder: Where the files go.
        step: The step at which a run goes on; rows after it are of a part that is done again, and are dropped.
    """

    name = 'csv'
    requires_logging_directory = False

    def __init__(self, folder: Path, step: int = 0) -> None:
        super().__init__()
        self.folder = folder
        self.step = step

    @on_main_process
    def start(self) -> None:
        """Drops the rows that are done again."""
        for file in self.folder.glob('*.csv'):
            self._cut(file)

    def _cut(self, file: Path) -> None:
        with file.open(newline='', encoding='utf-8') as stream:
            rows = list(csv.reader(stream))
        # A process that was killed may have left half a row.
        kept = [row for row in rows[1:] if len(row) == len(rows[0]) and int(row[0]) <= self.step]

        def write(path: Path) -> None:
            with path.open('w', newline='', encoding='utf-8') as stream:
                csv.writer(stream).writerows([*rows[:1], *kept])

        write_whole(file, write)

    @property
    def tracker(self) -> Path:
        """The folder."""
        return self.folder

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Does nothing: the options are in a file of their own."""

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Appends one row to the file of each kind among the values."""
        for kind in dict.fromkeys(name.split('/')[0] for name in values):
            row = {name.split('/')[1]: value for name, value in values.items() if name.startswith(f'{kind}/')}
            file = self.folder / f'{kind}.csv'
            with explained(file):
                is_new = not file.exists()
                with file.open('a', newline='', encoding='utf-8') as stream:
                    writer = csv.writer(stream)
                    if is_new:
                        writer.writerow(['step', *row])
                    writer.writerow([step, *row.values()])


def start_logs(accelerator: Accelerator, folder: Path, trackers: tuple[str, ...], step: int) -> None:
    """Starts the CSV files and the trackers with the given names."""
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.log_with = filter_trackers([CsvTracker(folder, step), *trackers], str(folder))
    # TensorBoard hides what an earlier process wrote of the part that is done again.
    options: dict[str, Any] = {'tensorboard': {'purge_step': step + 1}}
    with explained(folder):
        accelerator.init_trackers('tensorboard', init_kwargs=options)
