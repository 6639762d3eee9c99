"""Patch files: what was put into a model, kept apart from the model, and put into another one."""

from sem_timm.persistence.load import load_patch
from sem_timm.persistence.save import save_patch

__all__ = ['load_patch', 'save_patch']
