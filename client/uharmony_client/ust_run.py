"""UST-RUN at one site or in one place: copy-paste, style mixing, guidance, the reliable queue.

    x_l    labelled patch;   x'_l the same, its low amplitudes mixed with another style (TP-RAM)
    x_u    unlabelled patch, weak view;   s_u its strong view;   y_u the teacher's label of x_u
    M      a random box
    student   s_u (1 - M) + x'_l M     x'_l (1 - M) + s_u M      labels mixed alike: x_ul, x_lu
    teacher   x_u (1 - M) + x_l M      x_l (1 - M) + x_u M       its labels where x_u shows: y_w,
                                                                 kept where sure and equal to y_u
    L      = L_sup(x_l) + lambda (L(x_ul) + L(x_lu) + lambda L(s_u, y_w))

The hardest unlabelled patch of the step before is one more sample of x_ul: with its label of then,
and one of the pasted patches in the box around both foregrounds. After Ma et al. 2024
(arXiv:2404.08951) and 2025 (arXiv:2505.24567), as published. Ours: the 3D form; styles that other
sites gave in place of the batch's own, and L_sup on x'_l at a site that has nothing to paste into;
that what is pasted beside the hardest may come from the queue (published: a labelled one alone); at
a site without labels the queue is what is pasted, and while it is empty nothing is learned: what a
teacher is sure of then is background.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from uharmony_client.objective import Carried, LocalData
from uharmony_client.pasted import Sample, Sources
from uharmony_client.semi_supervised import WithTeacher
from uharmony_model.presence import input_channels
from uharmony_model.study import Study
from uharmony_model.targets import to_masks, to_targets
from uharmony_model.unlabelled.amplitude import low_amplitude
from uharmony_model.unlabelled.copy_paste import draw_box, foreground_box, paste
from uharmony_model.unlabelled.masked_loss import masked_loss
from uharmony_model.unlabelled.pseudo_label import PseudoLabel, agreeing, known, pasted
from uharmony_model.unlabelled.reliable import ReliableQueue, hardness
from uharmony_model.unlabelled.study_style import half_width, style_floor
from uharmony_model.unlabelled.teacher import ramp_up

HARDEST = "hardest/"
QUEUED_DOMAINS = "queue/domains"  # one for each entry: the queue itself knows of none
DRAWN_FROM = "drawn-from"  # SHA-256 of the cases
AGE = "teacher-steps"
# The source forces hardness to 1 in the first 500 of 30,000 steps.
UNTRUSTED = 500 / 30_000


class UstRun(WithTeacher):
    """One step of UST-RUN; `styles (C, 2b+1, 2b+1, 2b+1)` are those that other sites gave."""

    def __init__(self, data: LocalData, study: Study, styles: Sequence[Tensor] = ()) -> None:
        super().__init__(data, study)
        self._styles = list(styles)
        self._size = study.training.patch
        self._queue: ReliableQueue | None = None
        self._queued_domains = torch.empty(0, dtype=torch.int64)
        self._hardest: Sample | None = None  # on the CPU
        self._age = 0  # steps that the teacher has followed here

    # --- labelled ------------------------------------------------------------------------------

    def labelled_loss(self, network: nn.Module, round_: int, step: int, *, drop: bool) -> Tensor:
        """L_sup on labelled patches; in mixed style where no copy-paste shows it."""
        image, label, domain = self.labelled(network, round_, step)
        if not (self.data.unlabelled and self.settings.copy_paste):
            image = self._mixed(network, image, round_, step)
        return self.supervised_on(network(image, domain, drop=drop), label)

    def _mixed(self, network: nn.Module, image: Tensor, round_: int, step: int) -> Tensor:
        """TP-RAM: with the styles that were given, or those of the unlabelled patches beside."""
        if self.settings.amplitude == "off":
            return image
        channels, floor = self.study.task.channels, style_floor(self.study.task)
        if self._styles:
            draw = self.draws(round_, step, "style")
            chosen = draw.integers(len(self._styles), size=len(image))
            style = torch.stack([self._styles[i] for i in chosen])
        elif self.data.unlabelled:
            other, _ = self.unlabelled(network, round_, step)
            style = low_amplitude(other[:, :channels], half_width(self.study), floor=floor)
        else:
            return image
        return self.in_style(image, style, round_, step, floor=floor)

    # --- unlabelled ----------------------------------------------------------------------------

    def unlabelled_loss(self, network: nn.Module, round_: int, step: int, *, drop: bool) -> Tensor:
        """L(x_ul) + L(x_lu) + lambda L(s_u, y_w)."""
        task, settings = self.study.task, self.settings
        image, domain = self.unlabelled(network, round_, step)
        strong = self.strong(image, round_, step)
        direct = self.taught(network, image, domain)
        sources = self._sources(network, round_, step) if settings.copy_paste else None
        guide, total = direct, torch.zeros((), device=image.device)
        if sources is not None:
            mask = self._boxes(len(image), round_, step).to(image.device)
            if settings.symmetric:
                of_ul = self.taught(network, paste(image, sources.image, mask), domain)
                of_lu = self.taught(network, paste(sources.image, image, mask), sources.domain)
                guide = agreeing(pasted(of_ul, of_lu, mask), direct, direct_certain=True)
            styled = self._mixed(network, sources.image, round_, step)
            into = Sample(paste(strong, styled, mask), pasted(direct, sources.truth, mask), domain)
            into = self._and_hardest(into, sources, round_, step)
            of, y_lu = paste(styled, strong, mask), pasted(sources.truth, direct, mask)
            total = masked_loss(network(into.image, into.domain, drop=drop), into.label, task)
            total = total + masked_loss(network(of, sources.domain, drop=drop), y_lu, task)
        elif settings.copy_paste and settings.queue:
            # Nothing reliable to paste yet: background alone is certain, and would be learned.
            guide = PseudoLabel(direct.label, torch.zeros_like(direct.certain))
        self.learned_from(guide.share)
        weight = settings.weight * ramp_up(self.progress(round_, step))
        loss = total + weight * masked_loss(network(strong, domain, drop=drop), guide, task)
        self._judge(network, image, domain, direct, round_, step)
        return loss

    def _sources(self, network: nn.Module, round_: int, step: int) -> Sources | None:
        """Labelled patches, up to half of them from the queue; at a site without labels all."""
        count, task = self.study.training.batch_size, self.study.task
        device = next(network.parameters()).device
        held = self._reliable() if self.settings.queue and not task.overlapping else None
        draw = self.draws(round_, step, "queue")
        if self.data.volumes:
            image, label, domain = self.labelled(network, round_, step)
            order = [] if held is None else draw.permutation(len(held))[: count // 2].tolist()
            if held is not None and order:
                image, label, domain = image.clone(), label.clone(), domain.clone()
                image[: len(order)] = held.images[order].to(device)
                label[: len(order)] = held.labels[order].to(device)
                domain[: len(order)] = self._queued_domains[order].to(device)
            return Sources(image, label, self._truth(label, from_queue=len(order)), domain)
        if held is None or not len(held):
            return None
        order = draw.integers(len(held), size=count).tolist()
        image, label = held.images[order].to(device), held.labels[order].to(device)
        domain = self._queued_domains[order].to(device)
        return Sources(image, label, known(label, task), domain)

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

    def _boxes(self, count: int, round_: int, step: int) -> Tensor:
        """M (B, D, H, W), a random box for each sample."""
        draws = [self.draws(round_, step, f"box-{sample}") for sample in range(count)]
        return torch.stack([draw_box(draw, self._size).mask(self._size) for draw in draws])

    def _and_hardest(self, samples: Sample, sources: Sources, round_: int, step: int) -> Sample:
        """One sample more: the hardest of the step before, foreground to foreground."""
        if self._hardest is None:
            return samples
        task, device = self.study.task, samples.image.device
        draw = self.draws(round_, step, "hardest")
        chosen = int(draw.integers(len(sources.image)))
        one = slice(chosen, chosen + 1)
        hard, label = self._hardest.to(device), sources.label[one]
        box = foreground_box(
            hard.label.masks(task)[0].any(0), to_targets(label, task)[0].any(0)
        ) or draw_box(draw, self._size)
        mask = box.mask(self._size)[None].to(device)
        truth = PseudoLabel(sources.truth.label[one], sources.truth.certain[one])
        target = pasted(hard.label, truth, mask)
        return Sample(
            torch.cat((samples.image, paste(hard.image, sources.image[one], mask))),
            PseudoLabel(
                torch.cat((samples.label.label, target.label)),
                torch.cat((samples.label.certain, target.certain)),
            ),
            torch.cat((samples.domain, hard.domain)),
        )

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
        if not (settings.queue or settings.hardest) or not settings.copy_paste:
            return
        with torch.no_grad():
            masks = to_masks(network(image, domain), task)
        hard = hardness(masks, direct.masks(task)).cpu()
        if self._age < self._apprenticeship:
            hard = torch.ones_like(hard)
        if settings.hardest:
            worst = int(hard.argmax())
            one = slice(worst, worst + 1)
            label = PseudoLabel(direct.label[one], direct.certain[one])
            self._hardest = Sample(image[one], label, domain[one]).to(torch.device("cpu"))
        if settings.queue and not task.overlapping:
            held, values = self._reliable(), direct.values(task).cpu()
            entering = [i for i, h in enumerate(hard.tolist()) if h < held.threshold]
            self._queue = held.offer(image.cpu(), values, hard, together=True)
            domains = torch.cat((self._queued_domains, domain.cpu()[entering]))
            self._queued_domains = domains[-held.capacity :]

    @property
    def _apprenticeship(self) -> float:
        """Steps at this site before anything is reliable: before, teacher and student are alike.

        Ours: counted here and not in the study, for a site that begins late; and a whole round at
        least where there are no labels. Such a site learns nothing while its queue is empty, so
        that in its first round they agree on whatever the weights it was given say.
        """
        training = self.study.training
        published = UNTRUSTED * training.rounds * training.local_steps
        return published if self.data.volumes else max(published, training.local_steps)

    def moved(self, network: nn.Module, round_: int, step: int) -> None:
        """Let the teacher follow, and grow older."""
        super().moved(network, round_, step)
        self._age += 1 if self.data.unlabelled else 0

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
        if self._age:
            found[AGE] = torch.tensor([self._age])
        if self._queue is not None:
            found |= {**self._queue.tensors(), QUEUED_DOMAINS: self._queued_domains}
        if self._hardest is not None:
            found |= {f"{HARDEST}{name}": v for name, v in self._hardest.tensors().items()}
        if self._queue is not None or self._hardest is not None:
            found[DRAWN_FROM] = self._drawn_from()
        return found

    def restore(self, carried: Carried) -> None:
        """Put them back; but for patches of cases, where these are others now: one was withdrawn.

        Raises:
            StoreError: the queue is damaged.
        """
        super().restore(carried)
        self._age = int(carried[AGE]) if AGE in carried else 0
        self._queue, self._hardest = None, None
        self._queued_domains = torch.empty(0, dtype=torch.int64)
        if not torch.equal(carried.get(DRAWN_FROM, torch.empty(0)), self._drawn_from()):
            return
        if QUEUED_DOMAINS in carried:
            self._queue = ReliableQueue.of(
                carried,
                input_channels(self.study.task),
                self._size,
                capacity=self.settings.queue_size,
                ceiling=self.settings.queue_threshold,
            )
            self._queued_domains = carried[QUEUED_DOMAINS]
        if f"{HARDEST}image" in carried:
            self._hardest = Sample.of(
                {k.removeprefix(HARDEST): v for k, v in carried.items() if k.startswith(HARDEST)}
            )

    def _drawn_from(self) -> Tensor:
        domains = self.data.unlabelled_domains if self.data.names else ()
        text = json.dumps(sorted(zip(domains, self.data.names, strict=True)))
        return torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
