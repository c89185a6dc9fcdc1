"""Decoupled DMD: matching and guidance as two terms, each at its own noise levels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distill_bench.method import Batch, Citation, Loss, Method, Nets, Preset, dmd_normaliser, toward
from distill_bench.noise import add_noise, guidance_at


@dataclass(frozen=True)
class DecoupledDMD(Method):
    """The guided reverse-KL gradient in two terms, each at its own noise levels.

    With g the run's guidance_scale, and x_c and x_u the teacher with and without the prompt, the
    gradient at x0 is the sum of

    - `matching`: (x0_fake - x_c) / n at the run's noise levels;
    - `augmentation`: -(g - 1) (x_c - x_u) / n at levels below the student's exit level, uniform in
      [0, exit level] and within the run's [sigma_min, sigma_max].

    n = mean |x0 - x_c| per sample, at each term's own draw. With one draw for both, the sum is
    DMD2's gradient except for n, which DMD2 takes from the guided prediction.

    Liu et al., 2025 (arXiv:2511.22677), eq. 8 and algorithm 1, setting "decoupled-hybrid". The
    paper's time t is 0 for noise and 1 for data, so its tau_CA > t are levels below the exit level.
    It has one constant weight in place of 1/n.
    """

    paper: ClassVar[Citation] = Citation(
        "2511.22677",
        "Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield",
        "Dongyang Liu, Peng Gao, David Liu, Ruoyi Du, Zhen Li, Qilong Wu, Xin Jin, Sihan Cao, "
        "Shifeng Zhang, Hongsheng Li, Steven Hoi",
        2025,
    )
    version: ClassVar[int] = 2
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            "arXiv:2511.22677, algorithm 1; section 4.3 trains SDXL as DMD2@8d8fa55",
            {"fake_score_updates": 5},
        )
    }

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        x0 = nets.rollout(batch)
        matching = self._matching(nets, batch, x0.detach())
        terms = {"matching": toward(x0, matching)}
        if nets.guidance_scale != 1:
            terms["augmentation"] = toward(x0, self._augmentation(nets, batch, x0.detach()))
        return Loss(terms, x0, {"score_gap": matching.abs().mean()})

    @torch.no_grad()
    def _matching(self, nets: Nets, batch: Batch, x0: Tensor) -> Tensor:
        sigma = batch.sigma("renoise/sigma")
        x_t = add_noise(x0, batch.noise("renoise/noise"), sigma)
        x_c = nets.unguided_teacher(x_t, sigma, batch.text)
        return (nets.fake_score(x_t, sigma, batch.text) - x_c) / dmd_normaliser(x0, x_c)

    @torch.no_grad()
    def _augmentation(self, nets: Nets, batch: Batch, x0: Tensor) -> Tensor:
        exit_level = nets.exit_sigma(batch)
        sigma = exit_level * batch.draws.uniform("augmentation/sigma")
        # an exit level below sigma_min is the bound that counts
        sigma = sigma.clamp(batch.sigma_min, batch.sigma_max).minimum(exit_level)
        x_t = add_noise(x0, batch.noise("augmentation/noise"), sigma)
        texts = torch.cat([batch.text, nets.null_text.expand_as(batch.text)])
        x_t, sigma = torch.cat([x_t, x_t]), torch.cat([sigma, sigma])
        x_c, x_u = nets.unguided_teacher(x_t, sigma, texts).chunk(2)
        scale = guidance_at(nets.guidance_scale, sigma.chunk(2)[0], x0)
        return -(scale - 1) * (x_c - x_u) / dmd_normaliser(x0, x_c)
