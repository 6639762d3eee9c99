"""The table of architectures whose self-attention can be replaced, against live plans."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import sem_timm
from sem_timm.registry.table import AttentionTable, read_table, write_table
from sem_timm.registry.variant_operation import VariantOperation
from tests.registry.models import BASES
from tests.thorough import first_of_each

# Every form of attention that decides otherwise, and architectures without any.
SAMPLE = {
    'vit_tiny_patch16_224': (12, 12),
    'swin_tiny_patch4_window7_224': (12, 12),
    'levit_128s': (11, 9),
    'pvt_v2_b0': (8, 8),
    'crossvit_tiny_240': (15, 15),
    'gcvit_xxtiny': (6, 0),
    'halonet26t': (3, 0),
    'cait_xxs24_224': (0, 24),
    'convit_tiny': (2, 12),
    'xcit_nano_12_p16_224': (0, 12),
    'volo_d1_224': (14, 0),
    'resnet50': (0, 0),
    'convnext_tiny': (0, 0),
    'mixer_s32_224': (0, 0),
}


def replaced(architecture: str) -> tuple[bool, bool]:
    external, eamlp = SAMPLE[architecture]
    return external > 0, eamlp > 0


@pytest.mark.parametrize('architecture', first_of_each(SAMPLE, replaced))
def test_table_says_what_a_plan_finds(architecture: str) -> None:
    table = read_table()
    with torch.device('meta'):
        model = timm.create_model(architecture)
    counted = []
    for operation in ('external', 'eamlp'):
        try:
            count = len(sem_timm.plan_model(model, operation))
        except sem_timm.RefusedError:
            count = 0
        assert table.count(architecture, VariantOperation(operation)) == count
        counted.append(count)
    assert tuple(counted) == SAMPLE[architecture]


def test_table_knows_every_architecture_of_its_timm() -> None:
    table = read_table()
    if table.timm == timm.__version__:
        assert list(table.sites) == BASES
    assert len(table.sites) >= 1371
    external, eamlp, monarch = zip(*table.sites.values(), strict=True)
    assert sum(count > 0 for count in external) >= 618 and sum(external) >= 11_834
    assert sum(count > 0 for count in eamlp) >= 481
    # Where 'monarch' loses nothing, it goes to places of cores.
    assert all(close <= all_sites for close, all_sites in zip(monarch, external))


def test_table_counts_the_sites_of_all_cores_alike() -> None:
    table = AttentionTable('1.0', {'both': [3, 2, 1], 'whole': [0, 2, 0]})
    assert [table.count('both', VariantOperation(name)) for name in ('external', 'efficient', 'halo', 'eamlp')] == [
        3,
        3,
        3,
        2,
    ]
    assert [table.count('whole', VariantOperation(name)) for name in ('external', 'eamlp')] == [0, 2]
    assert table.count('unknown', VariantOperation('external')) is None


def test_table_is_written_as_it_is_read(tmp_path: Path) -> None:
    table = AttentionTable('1.0', {'one': [3, 2, 0], 'other': [0, 12, 0]})
    write_table(table, tmp_path / 'table.json')
    assert read_table(tmp_path / 'table.json') == table
    assert '"one": [3, 2, 0],\n' in (tmp_path / 'table.json').read_text()
    shipped = Path(sem_timm.__file__).parent / 'registry' / 'attention_sites.json'
    write_table(read_table(), tmp_path / 'table.json')
    assert (tmp_path / 'table.json').read_bytes() == shipped.read_bytes()
