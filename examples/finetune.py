"""Fine-tuning over the API: a small ResNet with SEM learns handwritten digits, in less than a minute on two cores."""

from __future__ import annotations

import sem_timm

options = sem_timm.FinetuneOptions(
    model='test_resnet',  # any model of timm
    operation='sem',
    operation_options={'reduction': 8},
    data='digits',  # or a folder of images
    epochs=8,
    new_lr_scale=2.0,  # what was put in learns twice as fast
    ema=0.99,
)

if __name__ == '__main__':  # worker processes and launchers import this file
    result = sem_timm.finetune(options)
    print(
        f'accuracy {result.before:.1%} before, {result.after:.1%} after {result.num_steps} steps; see {result.folder}'
    )
