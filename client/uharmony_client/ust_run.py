"""UST-RUN at one site or in one place: copy-paste, style mixing, guidance, the reliable queue.

    x_l    labelled patch, its low amplitudes mixed with another style (TP-RAM)
    x_u    unlabelled patch, weak view; y_u the teacher's label of it
    M      a random box
    x_ul = x_u (1 - M) + x_l M        x_lu = x_l (1 - M) + x_u M        labels mixed alike
    y_w  = the teacher's labels of x_ul and x_lu where the unlabelled image shows, kept where sure
           and equal to y_u
    L    = L_sup(x_l) + lambda (L(x_ul) + L(x_lu) + lambda L(strong x_u, y_w))

After Ma et al. 2024 (arXiv:2404.08951) and 2025 (arXiv:2505.24567). Ours: the 3D form; styles that
other sites gave in place of the batch's own; at a site without labels the reliable queue is what
is pasted, and while it is empty only the strong view is learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uharmony_client.objective import Carried, LocalData
from uharmony_client.semi_supervised import WithTeacher
from uharmony_model.presence import input_channels
from uharmony_model.study import Study
from uharmony_model.targets import to_masks, to_targets
from uharmony_model.task import Task
from uharmony_model.unlabelled.amplitude import (
    amplitude_half_width,
    low_amplitude,
    mix_amplitude,
    mixing_ratio,
)
from uharmony_model.unlabelled.copy_paste import draw_box, foreground_box, paste
from uharmony_model.unlabelled.masked_loss import masked_loss
from uharmony_model.unlabelled.pseudo_label import PseudoLabel, agreeing, known, pasted
from uharmony_model.unlabelled.reliable import ReliableQueue, hardness
from uharmony_model.unlabelled.teacher import ramp_up

HARDEST = "hardest/"
# The source forces hardness to 1 in the first 500 of 30,000 steps.
UNTRUSTED = 500 / 30_000


@dataclass(frozen=True)
class _Sources:
    """What is pasted: images (B, C, D, H, W), label values (B, D, H, W), the truth, domains."""

    image: Tensor
    label: Tensor
    truth: PseudoLabel
    domain: Tensor


class UstRun(WithTeacher):
    """One step of UST-RUN; `styles (C, 2b+1, 2b+1, 2b+1)` are those that other sites gave."""

    def __init__(self, data: LocalData, study: Study, styles: Sequence[Tensor] = ()) -> None:
        super().__init__(data, study)
        self._styles = list(styles)
        self._size = study.training.patch
        self._queue: ReliableQueue | None = None
        self._hardest: tuple[Tensor, Tensor] | None = None  # image (1, C, ...), domain (1,)

    # --- labelled ------------------------------------------------------------------------------

    def labelled_loss(self, network: nn.Module, round_: int, step: int, *, drop: bool) -> Tensor:
        """L_sup on labelled patches in mixed style."""
        image, label, domain = self._labelled_mixed(network, round_, step)
        return self.supervised_on(network(image, domain, drop=drop), label)

    def _labelled_mixed(
        self, network: nn.Module, round_: int, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        image, label, domain = self.labelled(network, round_, step)
        return self._mixed(network, image, round_, step), label, domain

    def _mixed(self, network: nn.Module, image: Tensor, round_: int, step: int) -> Tensor:
        """TP-RAM: with the styles that were given, or those of the unlabelled cases beside."""
        rule = self.settings.amplitude
        style = None if rule == "off" else self._style(network, round_, step, len(image))
        if style is None:
            return image
        progress = 1.0 if rule == "full" else self.progress(round_, step)
        ratio = mixing_ratio(self.draws(round_, step, "ratio"), progress, len(image))
        channels, floor = self.study.task.channels, style_floor(self.study.task)
        shown = image[:, :channels]
        changed = mix_amplitude(shown, style.to(image), ratio.to(image), floor=floor)
        return torch.cat((changed, image[:, channels:]), 1)

    def _style(self, network: nn.Module, round_: int, step: int, count: int) -> Tensor | None:
        if self._styles:
            draw = self.draws(round_, step, "style")
            return torch.stack(
                [self._styles[i] for i in draw.integers(len(self._styles), size=count)]
            )
        if not self.data.unlabelled or not self.data.volumes:
            return None
        image, _ = self.unlabelled(network, round_, step)
        width = half_width(self.study)
        floor = style_floor(self.study.task)
        return low_amplitude(image[:, : self.study.task.channels], width, floor=floor)

    # --- unlabelled ----------------------------------------------------------------------------

    def unlabelled_loss(self, network: nn.Module, round_: int, step: int, *, drop: bool) -> Tensor:
        """L(x_ul) + L(x_lu) + lambda L(strong x_u)."""
        task, settings = self.study.task, self.settings
        image, domain = self._with_hardest(*self.unlabelled(network, round_, step))
        direct = self.taught(network, image, domain)
        sources = self._sources(network, round_, step) if settings.copy_paste else None
        guide, total = direct, torch.zeros((), device=image.device)
        if sources is not None:
            mask = self._boxes(direct, sources, round_, step).to(image.device)
            x_ul, x_lu = paste(image, sources.image, mask), paste(sources.image, image, mask)
            y_ul, y_lu = pasted(direct, sources.truth, mask), pasted(sources.truth, direct, mask)
            total = masked_loss(network(x_ul, domain, drop=drop), y_ul, task)
            total = total + masked_loss(network(x_lu, sources.domain, drop=drop), y_lu, task)
            if settings.symmetric:
                of_ul = self.taught(network, x_ul, domain)
                of_lu = self.taught(network, x_lu, sources.domain)
                guide = agreeing(pasted(of_ul, of_lu, mask), direct, direct_certain=True)
        self.learned_from(guide.share)
        strong = network(self.strong(image, round_, step), domain, drop=drop)
        weight = settings.weight * ramp_up(self.progress(round_, step))
        self._judge(network, image, domain, direct, round_, step)
        return total + weight * masked_loss(strong, guide, task)

    def _sources(self, network: nn.Module, round_: int, step: int) -> _Sources | None:
        """Labelled patches, up to half of them from the queue; at a site without labels all."""
        count, task = self.study.training.batch_size, self.study.task
        device = next(network.parameters()).device
        held = self._reliable() if self.settings.queue and not task.overlapping else None
        draw = self.draws(round_, step, "queue")
        if self.data.volumes:
            image, label, domain = self._labelled_mixed(network, round_, step)
            half = count // 2 if held is not None else 0
            taken, labels = held.draw(draw, half) if held is not None else (image[:0], label[:0])
            if len(taken):
                image, label = image.clone(), label.clone()
                image[: len(taken)], label[: len(taken)] = taken.to(device), labels.to(device)
            truth = self._truth(label, from_queue=len(taken))
            return _Sources(image, label, truth, domain)
        if held is None or not len(held):
            return None
        order = [int(i) for i in draw.integers(len(held), size=count)]
        image, label = held.images[order].to(device), held.labels[order].to(device)
        # Whose domain a queued patch was is not kept; a site without labels mostly has one.
        domain = torch.full((count,), self.data.unlabelled_domains[0], device=device)
        return _Sources(image, label, known(label, task), domain)

    def _truth(self, label: Tensor, *, from_queue: int) -> PseudoLabel:
        """A person's label is certain where it can be: not where a class may hide in background."""
        truth = known(label, self.study.task)
        flags = self.data.annotated.to(label.device)
        if bool(flags.all()):
            return truth
        if self.study.task.overlapping:
            certain = truth.certain & flags.view(1, -1, 1, 1, 1)
        else:
            certain = truth.label > 0
            certain[:from_queue] = True
        return PseudoLabel(truth.label, certain)

    def _boxes(self, direct: PseudoLabel, sources: _Sources, round_: int, step: int) -> Tensor:
        """M (B, D, H, W): random; for the hardest sample the box around both foregrounds."""
        task, masks = self.study.task, []
        for sample in range(len(direct.label)):
            draw = self.draws(round_, step, f"box-{sample}")
            box = draw_box(draw, self._size)
            if self._hardest is not None and sample == len(direct.label) - 1:
                theirs = direct.masks(task)[sample].any(0).cpu()
                ours = to_targets(sources.label[sample : sample + 1], task)[0].any(0).cpu()
                box = foreground_box(ours, theirs) or box
            masks.append(box.mask(self._size))
        return torch.stack(masks)

    def _with_hardest(self, image: Tensor, domain: Tensor) -> tuple[Tensor, Tensor]:
        """The hardest patch of the step before takes the last place of the batch."""
        if self._hardest is None or not self.settings.hardest:
            return image, domain
        image, domain = image.clone(), domain.clone()
        image[-1:], domain[-1:] = self._hardest[0].to(image), self._hardest[1].to(domain)
        return image, domain

    def _judge(
        self,
        network: nn.Module,
        image: Tensor,
        domain: Tensor,
        direct: PseudoLabel,
        round_: int,
        step: int,
    ) -> None:
        """Offer what student and teacher agree on to the queue; remember what they do not."""
        settings, task = self.settings, self.study.task
        if not (settings.queue or settings.hardest):
            return
        with torch.no_grad():
            masks = to_masks(network(image, domain), task)
        hard = hardness(masks, direct.masks(task)).cpu()
        if self.progress(round_, step) < UNTRUSTED:
            hard = torch.ones_like(hard)
        if settings.hardest:
            worst = int(hard.argmax())
            self._hardest = (image[worst : worst + 1].cpu(), domain[worst : worst + 1].cpu())
        if settings.queue and not task.overlapping:
            values = direct.values(task).cpu()
            self._queue = self._reliable().offer(image.cpu(), values, hard, together=True)

    def _reliable(self) -> ReliableQueue:
        if self._queue is None:
            self._queue = ReliableQueue.empty(
                input_channels(self.study.task),
                self._size,
                capacity=self.settings.queue_size,
                ceiling=self.settings.queue_threshold,
            )
        return self._queue

    # --- what is carried -----------------------------------------------------------------------

    def carried(self) -> Carried:
        """Teacher, queue, and the hardest patch: patients' images, so they stay in the store."""
        found = dict(super().carried())
        if self._queue is not None:
            found |= self._queue.tensors()
        if self._hardest is not None:
            found |= {f"{HARDEST}image": self._hardest[0], f"{HARDEST}domain": self._hardest[1]}
        return found

    def restore(self, carried: Carried) -> None:
        """Put them back."""
        super().restore(carried)
        self._queue = self._hardest = None
        if any(name.startswith("queue/") for name in carried):
            self._queue = ReliableQueue.of(
                carried,
                input_channels(self.study.task),
                self._size,
                capacity=self.settings.queue_size,
                ceiling=self.settings.queue_threshold,
            )
        if f"{HARDEST}image" in carried:
            self._hardest = (carried[f"{HARDEST}image"], carried[f"{HARDEST}domain"])


def half_width(study: Study) -> int:
    """The half-width of the low-frequency box, in bins."""
    return study.unlabelled.half_width or amplitude_half_width(study.training.patch)


def style_floor(task: Task) -> float:
    """Below all means of a patch, so that its amplitude keeps the mean's sign."""
    return -4.0 if any(p.policy == "zscore" for p in task.intensity.values()) else -1.0
