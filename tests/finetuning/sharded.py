"""Run by two processes: shards a patched model with torch's FSDP2, and puts it together again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import timm
import torch

import sem_timm
from sem_timm.finetuning.sharding import whole_state
from tests.versions import fully_shard


def main() -> None:
    torch.distributed.init_process_group('gloo')
    torch.manual_seed(0)
    model = sem_timm.patch_model(timm.create_model('test_resnet', num_classes=10))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mesh = torch.distributed.init_device_mesh('cpu', (2,))
    fully_shard(model.get_submodule('layer1.0'), mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert any(not torch.equal(p.to_local(), expected[n]) for n, p in model.named_parameters()), 'nothing is sharded'
    accelerator: Any = SimpleNamespace(is_fsdp2=True)
    found = whole_state(accelerator, model)
    assert list(found) == list(expected)
    assert all(type(tensor) is torch.Tensor and torch.equal(tensor, expected[n]) for n, tensor in found.items())
    whole = sem_timm.patch_model(timm.create_model('test_resnet', num_classes=10))
    whole.load_state_dict(found)
    print('whole')
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main()
