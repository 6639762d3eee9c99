"""Whether a call is of a case that was read, where that depends on what children return: tried on a weightless copy.

Of a forward such as

    x = self.conv(x)
    return self.pad(x) if x.shape[2] % 7 else x

no size of an argument tells the way. Checked when the child was called, half of the work would be done, and not to be
done again: batch norms would count twice. So the forward runs on the meta device first, once for each form of a call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sem_timm.errors import GuardError
from sem_timm.meta.probing import Call
from sem_timm.meta.skeleton import dtype_of, on_meta, weightless
from sem_timm.random_state import preserved_random_state
from sem_timm.surgery.aliasing import tensors_in
from sem_timm.surgery.arguments import bind, forward_signature
from sem_timm.surgery.structure import call_key

# What came of it, by the forward and the form of the call; as many as a model meets sizes of images.
_TRIED: WeakKeyDictionary[nn.Module, dict[Hashable, bool]] = WeakKeyDictionary()
_KEPT = 1024


def tried(fits: Callable[..., bool], forward: Callable[..., Any]) -> Callable[..., bool]:
    """A question for the case of a forward that also runs it on a weightless copy, unless a compiler asks."""

    @functools.wraps(fits)
    def fits_and_runs(module: nn.Module, *args: Any, **kwargs: Any) -> bool:
        if not fits(module, *args, **kwargs):
            return False
        # A compiler follows the checks in the code itself; and on a copy this is the run that tells.
        if torch.compiler.is_compiling() or module.__dict__.get(ON_TRIAL):
            return True
        key = (forward, call_key(bind(forward_signature(type(module)), Call(args, kwargs, None)), shapes=True))
        known = _TRIED.setdefault(module, {})
        if key not in known:
            if len(known) >= _KEPT:
                known.clear()
            known[key] = _runs(module, forward, args, kwargs)
        return known[key]

    return fits_and_runs


# Marks the copy that a forward is tried on.
ON_TRIAL = '_surgery_on_trial'


def _runs(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    with torch.inference_mode(False), torch.no_grad(), preserved_random_state(on_gpus=False):
        copy = weightless(module)
        copy.__dict__[ON_TRIAL] = True
        # Under autocast an input may be narrower than the weights; sizes are the same.
        twins = {tensor: on_meta(tensor, dtype_of(copy)) for tensor in {*tensors_in((args, kwargs))}}
        given, named = tree_map_only(Tensor, twins.__getitem__, (args, kwargs))
        try:
            forward(copy, *given, **named)
        except GuardError:
            return False
        except Exception:  # what stops it on the copy will be said of the model itself
            return True
    return True
