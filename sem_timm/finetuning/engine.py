"""The loop: updates, measurements, checkpoints and logs, in one process or several."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from sem_timm.errors import OptionError
from sem_timm.finetuning.checkpoints import Checkpoints, State
from sem_timm.finetuning.errors import DivergedError, StoppedError
from sem_timm.finetuning.evaluation import evaluate
from sem_timm.finetuning.groups import offending_groups
from sem_timm.finetuning.loading import Batch
from sem_timm.finetuning.options import FinetuneOptions
from sem_timm.finetuning.parts import Parts
from sem_timm.finetuning.progress import Display
from sem_timm.finetuning.stopping import StopRequest


class Trainer:
    """Trains the parts of a run from a state to the end.

    Args:
        options: Those of the run.
        parts: Model, optimizer, loaders and so on, with the tensors that belong to the state.
        state: How far the run is.
        run: Its folder.
        stop: Whether a signal asked to stop.
        display: What a person sees.
    """

    def __init__(
        self,
        options: FinetuneOptions,
        parts: Parts,
        state: State,
        run: Path,
        stop: StopRequest,
        display: Display,
    ) -> None:
        self.options = options
        self.parts = parts
        self.accelerator = parts.accelerator
        self.state = state
        self.run = run
        self.checkpoints = Checkpoints(run, options.keep)
        self.stop = stop
        self.display = display
        self.updates_per_epoch = parts.training.num_updates
        self.total = options.epochs * self.updates_per_epoch
        self._saved = self._progress() if state.before is not None else None

    def train(self) -> None:
        """Trains to the end.

        Raises:
            StoppedError: If a signal asked to stop; the state is saved then.
            DivergedError: If loss or gradient is not finite any more.
            SemTimmError: DataError or WriteError.
        """
        if self.state.before is None:
            self.state.before = self._measure()['accuracy']
            self.display.say(f'accuracy before: {self.state.before:.2%}')
            self._save()
        while True:
            if self._is_unmeasured():
                self._finish_epoch()
            if self.state.step >= self.total:
                break
            self._train_epoch()
        self._finish_logs()

    def _is_unmeasured(self) -> bool:
        step = self.state.step
        measured = self.state.history[-1]['step'] if self.state.history else 0
        epoch, rest = divmod(step, self.updates_per_epoch)
        is_due = epoch % self.options.measure_every == 0 or step >= self.total
        return step > measured and rest == 0 and is_due

    def _train_epoch(self) -> None:
        epoch, start = divmod(self.state.step, self.updates_per_epoch)
        batches = self.parts.training.parts(epoch, start)
        self.parts.freezing.set_training_mode(self.parts.model)
        for _ in range(start, self.updates_per_epoch):
            if self.parts.freezing.advance(self.state.step / self.updates_per_epoch):
                self.parts.wrap_again()  # what gathers gradients knows only what required them when it was made
                self.parts.freezing.set_training_mode(self.parts.model)
            self.parts.scheduler.step_update(self.state.step)
            began = time.perf_counter()
            values = self._update(batches)
            self.state.step += 1
            values['train/images_per_second'] = self.options.batch_size / (time.perf_counter() - began)
            self.accelerator.log({'train/epoch': epoch, **values}, step=self.state.step)
            self.display.update(self.state.step, epoch, values)
            every = self.options.checkpoint_every or self.updates_per_epoch
            if self.state.step % every == 0 and not self._is_unmeasured():  # else a measurement comes first
                self._save()
            self._stop_if_asked()

    def _update(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Computes and applies the gradient of one batch of all processes."""
        parts, accelerator = self.parts, self.accelerator
        loss = torch.zeros((), device=accelerator.device)
        for part in range(self.options.accumulate):
            images, labels = next(batches)
            is_last = part + 1 == self.options.accumulate
            with nullcontext() if is_last else accelerator.no_sync(parts.model):
                part_loss = self._loss(images, labels) / self.options.accumulate
                accelerator.backward(part_loss)
            loss += part_loss.detach()
        mean = float(accelerator.reduce(loss, 'mean'))
        if not torch.isfinite(torch.tensor(mean)):
            raise self._diverged(f'the loss is {mean}')
        norm = accelerator.clip_grad_norm_(parts.model.parameters(), self.options.clip or float('inf'))
        length = float(norm) if norm is not None else 0.0
        if accelerator.scaler is None and not torch.isfinite(torch.tensor(length)):
            raise self._diverged(f'the norm of the gradient is {length}')
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        if parts.average is not None:
            parts.average.update(parts.bare_model, step=self.state.step + 1)
        return {'train/loss': mean, 'train/learning_rate': parts.learning_rate(), 'train/gradient_norm': length}

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        parts = self.parts
        if parts.mixup is not None:
            images, labels = parts.mixup(images, labels)
        try:
            with self.accelerator.autocast():
                logits = parts.model(parts.in_layout(images))
        except ValueError as error:
            if 'more than 1 value per channel' not in str(error):
                raise
            raise OptionError(
                'a batch norm learns nothing from one number per channel, as one image of this size gives it. Give a '
                'larger --batch-size or --image-size.'
            ) from error
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits  # of models with auxiliary heads
        loss: Tensor = parts.loss(logits.float(), labels)
        return loss

    def _diverged(self, what: str) -> DivergedError:
        """The error that names step and parameter groups; the update was not applied."""
        model, optimizer = self.parts.bare_model, self.parts.optimizer
        where = 'with weights that are not finite'
        groups = offending_groups(model, optimizer, gradients=False)
        if not groups:
            where = 'with gradients that are not finite'
            groups = offending_groups(model, optimizer, gradients=True)
        last = self.checkpoints.all()
        return DivergedError(
            f'{what} at step {self.state.step + 1}',
            f'Parameter groups {where}: {"; ".join(groups) or "none"}. '
            'Go on with a lower --lr or --new-lr-scale, or --clip 1, as another run than the one that was begun: '
            f'--resume {last[-1] if last else "none"} --lr {self.options.lr / 10:g}.',
        )

    def _measure(self) -> dict[str, float]:
        """Accuracy and loss of the averaged weights where there are some; or stops."""
        parts = self.parts
        values = evaluate(
            self.accelerator,
            parts.measured_model(),
            parts.validation,
            parts.in_layout,
            lambda: self._agreed_signal() > 0,
        )
        if values is None:
            raise self._stopped()
        return values

    def _finish_epoch(self) -> None:
        values = self._measure()
        epoch = self.state.step // self.updates_per_epoch
        self.state.history.append({'step': self.state.step, 'epoch': epoch, **values})
        row = {'validation/epoch': epoch, **{f'validation/{name}': values[name] for name in ('accuracy', 'loss')}}
        self.accelerator.log(row, step=self.state.step)
        self.display.say(
            f'epoch {epoch}/{self.options.epochs}: accuracy {values["accuracy"]:.2%}, loss {values["loss"]:.4f}'
        )
        every, is_end = self.options.checkpoint_every, self.state.step >= self.total
        if not every or self.state.step % every == 0 or is_end or self.state.best is self.state.history[-1]:
            self._save()
        self._stop_if_asked()

    def _save(self) -> None:
        if self._saved != self._progress():
            self.state.bad_images = sorted({*self.state.bad_images, *self.parts.data.bad_images()})
            self.checkpoints.save(self.accelerator, self.state)
            if self.state.step == 0:
                # torch saves a sharded optimizer that has no state yet by a step of nothing, which Adam would count.
                self.parts.optimizer.state.clear()
            self._saved = self._progress()

    def _progress(self) -> tuple[int, int]:
        return self.state.step, len(self.state.history)

    def _finish_logs(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _agreed_signal(self) -> int:
        """The signal that any process got, or 0."""
        own = self.stop.signal_number or 0
        if self.accelerator.num_processes == 1:
            return own
        counts = torch.tensor([own == signal.SIGINT, own == signal.SIGTERM], device=self.accelerator.device)
        interrupted, terminated = self.accelerator.reduce(counts.float(), 'sum').tolist()
        return signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0

    def _stop_if_asked(self) -> None:
        is_end = self.state.step >= self.total and not self._is_unmeasured()
        if not is_end and (self._agreed_signal() or self.state.step == self.options.stop_at):
            raise self._stopped()

    def _stopped(self) -> StoppedError:
        number = self._agreed_signal() or signal.SIGTERM
        if self.state.before is None:
            return StoppedError(number, 'before the first step; nothing was done yet')
        self._save()
        self._finish_logs()
        way = f'it goes on with: sem-timm finetune --resume {self.run}'
        return StoppedError(number, f'after step {self.state.step}, which is saved; {way}')
