"""Gradient of every objective against its formula and against finite differences, in float64.

The formulas are written here from the papers. With D = x0_fake - x0_teacher, r = x0 - x0_fake,
J and J_T = (1 - sigma) d/dx_t of the fake score and of the teacher, N elements and
n = mean |x0 - x0_teacher| per sample, each gradient is a function of these. `torch.func.jacrev`
writes the Jacobians out.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from distill_bench.methods.consistency import Consistency
from distill_bench.methods.decoupled_dmd import DecoupledDMD
from distill_bench.methods.dmd import DMD
from distill_bench.methods.dmd2 import DMD2
from distill_bench.methods.dp_dmd import DPDMD
from distill_bench.methods.f_distill import FDistill
from distill_bench.methods.gradient_template import GradientTemplate, coefficient
from distill_bench.methods.ida import IDA
from distill_bench.methods.sgmd import SGMD
from distill_bench.methods.sid import SiD
from distill_bench.methods.tsg_fisher import TSGFisher
from distill_bench.methods.tsg_sim import TSGSIM
from distill_bench.noise import GuidanceByLevel
from distill_bench.testing.gradient import student_gradient

B, SHAPE = 4, (2, 2, 2, 2)
D = 16
LEVELS = torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.float64)


def smooth_net(seed: int):
    """Nonlinear denoiser with a dense Jacobian that depends on noise level and text."""
    generator = torch.Generator().manual_seed(seed)
    mix, out = torch.randn(2, D, D, generator=generator, dtype=torch.float64) / 4

    def net(x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        flat = x_t.reshape(len(x_t), -1)
        hidden = torch.tanh(flat @ mix + sigma[:, None] + text[:, 0, :1])
        return (flat + hidden @ out).reshape(x_t.shape)

    return net


class Setting:
    """Shared draws, the networks of fake score and teacher, their predictions and Jacobians."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x0, self.noise = torch.randn(2, B, *SHAPE, generator=generator, dtype=torch.float64)
        self.text = torch.randn(B, 1, 3, generator=generator, dtype=torch.float64)
        self.null_text = torch.zeros(1, 1, 3, dtype=torch.float64)
        self.sigma = LEVELS
        self.s = self.sigma.reshape(-1, 1, 1, 1, 1)
        self.x_t = (1 - self.s) * self.x0 + self.s * self.noise
        self.fake_net = smooth_net(1)
        self.teacher_net = smooth_net(2)
        self.fake = self.fake_net(self.x_t, self.sigma, self.text)
        self.teacher = self.teacher_net(self.x_t, self.sigma, self.text)
        self.gap = self.fake - self.teacher
        self.n = (self.x0 - self.teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)

    def pulled_back(self, net, cotangent: Tensor) -> Tensor:
        """J^T cotangent, sample by sample, with the Jacobian written out."""
        rows = []
        for i in range(B):
            jacobian = torch.func.jacrev(
                lambda x, i=i: net(x[None], self.sigma[i : i + 1], self.text[i : i + 1])[0]
            )(self.x_t[i])
            rows.append((1 - self.sigma[i]) * jacobian.reshape(D, D).T @ cotangent[i].flatten())
        return torch.stack(rows).reshape(self.x0.shape)

    def template(self, a, b, lam, teacher=None) -> Tensor:
        """(a D + J^T (b D + lam r) [+ J_T^T teacher]) / N."""
        gradient = a * self.gap + self.pulled_back(
            self.fake_net, b * self.gap + lam * (self.x0 - self.fake)
        )
        if teacher is not None:
            gradient = gradient + self.pulled_back(self.teacher_net, teacher)
        return gradient / self.x0.numel()

    def gradient(self, method, **options) -> Tensor:
        return student_gradient(
            method,
            self.x0,
            self.noise,
            self.sigma,
            self.fake_net,
            self.teacher_net,
            self.text,
            self.null_text,
            **options,
        )


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


def c_t(k: Setting) -> Tensor:
    return (1 - k.s) ** 2 / k.s**4


REFERENCES = {
    "dmd": (DMD(), lambda k: k.template(1 / k.n, 0, 0)),
    "dmd2": (DMD2(), lambda k: k.template(1 / k.n, 0, 0)),
    "ida": (IDA(), lambda k: k.template(1 / k.n, 0, 0)),
    "dp_dmd": (DPDMD(), lambda k: k.template(1 / k.n, 0, 0)),
    "tsg_fisher": (TSGFisher(), lambda k: k.template(0, 1 / (k.n + 1e-8), 0)),
    "tsg_fisher paper": (TSGFisher("c_t"), lambda k: k.template(0, c_t(k), 0)),
    "sgmd official": (SGMD(), lambda k: k.template(0, 1 / (k.n + 1e-8), 0.1 / k.s)),
    "sgmd paper": (SGMD("c_t", "x0", "x0"), lambda k: k.template(0, c_t(k), 0.1)),
    "sgmd batchnorm": (
        SGMD("c_t_batchnorm", "x0"),
        lambda k: k.template(0, c_t(k) / c_t(k).mean(), 0.1),
    ),
    "tsg_sim": (TSGSIM(), lambda k: k.template(1 / k.n, -1 / k.n, 1 / k.n)),
    "tsg_sim 1.2": (TSGSIM(1.2), lambda k: k.template(1 / k.n, (1 - 2.4) / k.n, 1 / k.n)),
    "sid": (
        SiD(1.0),
        lambda k: k.template(1 / k.n, -1 / k.n, 1 / k.n, ((k.teacher - k.x0) + k.gap) / k.n),
    ),
    "sid paper": (
        SiD(1.2),
        lambda k: k.template(
            1 / k.n, (1 - 2.4) / k.n, 1 / k.n, ((k.teacher - k.x0) - (1 - 2.4) * k.gap) / k.n
        ),
    ),
    "fastvideo": (GradientTemplate(normaliser="batch"), lambda k: k.template(1 / k.n.mean(), 0, 0)),
    "epsilon": (GradientTemplate(epsilon=0.5), lambda k: k.template(1 / (k.n + 0.5), 0, 0)),
    "no normaliser": (
        GradientTemplate("n", normaliser="none", epsilon=0.5),
        lambda k: k.template(1.5, 0, 0),
    ),
    "fisher, not stopped": (
        GradientTemplate("0", "1/n", "0", teacher_stop_gradient=False),
        lambda k: k.template(0, 1 / k.n, 0, -k.gap / k.n),
    ),
}


@pytest.mark.parametrize("row", REFERENCES)
def test_the_gradient_at_x0_equals_the_formula(row, setting):
    method, reference = REFERENCES[row]
    gradient = setting.gradient(method)
    assert gradient.dtype == torch.float64
    torch.testing.assert_close(gradient, reference(setting), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("template", "method"),
    [
        (GradientTemplate(), DMD2()),
        (GradientTemplate("0", "1/(n + 1e-8)"), TSGFisher()),
        (GradientTemplate("0", "(1-sigma)**2/sigma**4"), TSGFisher("c_t")),
        (GradientTemplate("0", "1/(n + 1e-8)", "0.1/sigma"), SGMD()),
        (GradientTemplate("0", "(1 - sigma)**2 / sigma**4", "0.1"), SGMD("c_t", "x0")),
        (GradientTemplate("1/n", "-1/n", "1/n"), TSGSIM()),
        (GradientTemplate("1/n", "(1 - 2*1.2)/n", "1/n", teacher_stop_gradient=False), SiD(1.2)),
    ],
    ids=str,
)
def test_the_gradient_template_reproduces_each_member_of_the_family(template, method, setting):
    torch.testing.assert_close(
        setting.gradient(template), setting.gradient(method), rtol=1e-9, atol=1e-13
    )


def distance(k: Setting, prediction: Tensor, goal: Tensor, weight: Tensor | float) -> Tensor:
    """Half the weighted mean of squares."""
    return (0.5 * weight * (prediction - goal).square()).mean()


def sid_loss(k: Setting, x0: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """Loss of SiD as its authors write it (Zhou et al., 2024)."""
    return ((real - fake) * ((real - x0) - alpha * (real - fake)) / k.n).mean()


# Objective of each method as a function of x0 and of both predictions there. Detached quantities
# are those of the setting.
OBJECTIVES = {
    "dmd2": (DMD2(), lambda k, x0, real, fake: distance(k, x0, k.x0 - k.gap / k.n, 1)),
    "tsg_fisher": (
        TSGFisher(),
        lambda k, x0, real, fake: distance(k, fake, k.teacher, 1 / (k.n + 1e-8)),
    ),
    "tsg_fisher paper": (
        TSGFisher("c_t"),
        lambda k, x0, real, fake: distance(k, fake, k.teacher, c_t(k)),
    ),
    "sgmd official": (
        SGMD(),
        lambda k, x0, real, fake: (
            distance(k, fake, k.teacher, 1 / (k.n + 1e-8)) - distance(k, fake, k.x0, 0.1 / k.s)
        ),
    ),
    "sgmd paper": (
        SGMD("c_t", "x0", "x0"),
        lambda k, x0, real, fake: (
            distance(k, fake, k.teacher, c_t(k)) - distance(k, fake, k.x0, 0.1)
        ),
    ),
    "tsg_sim": (TSGSIM(), lambda k, x0, real, fake: sid_loss(k, x0, k.teacher, fake, 1.0)),
    "sid": (SiD(1.2), lambda k, x0, real, fake: sid_loss(k, x0, real, fake, 1.2)),
    "f_distill": (
        FDistill("jeffreys", gan_weight=0.0),
        lambda k, x0, real, fake: distance(
            k, x0, k.x0 - h_of(FDistill("jeffreys"), k) * k.gap / k.n, 1
        ),
    ),
    "fisher, not stopped": (
        GradientTemplate("0", "1/n", "0", teacher_stop_gradient=False),
        lambda k, x0, real, fake: distance(k, fake, real, 1 / k.n),
    ),
}


@pytest.mark.parametrize("row", OBJECTIVES)
def test_the_gradient_agrees_with_finite_differences_of_the_objective(row, setting):
    """Central differences without autograd; n and everything detached are held fixed."""
    k, (method, objective) = setting, OBJECTIVES[row]

    def loss(x0: Tensor) -> Tensor:
        x_t = (1 - k.s) * x0 + k.s * k.noise
        x0_teacher = k.teacher_net(x_t, k.sigma, k.text)
        x0_fake = k.fake_net(x_t, k.sigma, k.text)
        return objective(k, x0, x0_teacher, x0_fake)

    gradient = k.gradient(method).flatten()
    for index in range(0, k.x0.numel(), 5):
        step = torch.zeros(k.x0.numel(), dtype=torch.float64)
        step[index] = 1e-6
        step = step.reshape(k.x0.shape)
        slope = (loss(k.x0 + step) - loss(k.x0 - step)) / 2e-6
        smallest = 1e-7 * float(gradient.abs().max())
        torch.testing.assert_close(gradient[index], slope, rtol=1e-5, atol=smallest)


def head_of(method, width: int) -> torch.nn.Module:
    """Discriminator head with the weights that `student_gradient` draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return method.modules(width)["head"].double()


def tokens(prediction: Tensor) -> Tensor:
    return prediction.flatten(2).transpose(1, 2)


F_WEIGHTS = {
    "reverse_kl": lambda r: r**0,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: r / (1 + r),
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
    "squared_hellinger": lambda r: r.sqrt(),
    "jeffreys": lambda r: 1 + r,
}


def h_of(method: FDistill, k: Setting) -> Tensor:
    """Weight of each sample at the first update, (B, 1, 1, 1, 1)."""
    ratio = head_of(method, 2)(tokens(k.teacher)).exp().clamp(0.1, 20)
    h = F_WEIGHTS[method.divergence](ratio / (0.9 + 0.1 * ratio + 1e-6))
    return (h / (h.mean() + 1e-6)).reshape(-1, 1, 1, 1, 1).detach()


@pytest.mark.parametrize("divergence", F_WEIGHTS)
def test_f_distill_weights_the_gradient_of_dmd2_by_its_divergence(divergence, setting):
    """h is a function of the density ratio over the moving average of its bin.

    The average starts at 1 and decays by 0.9; each of the four samples has a bin of its own.
    """
    k, method = setting, FDistill(divergence, gan_weight=0.0)
    torch.testing.assert_close(
        k.gradient(method), h_of(method, k) * k.template(1 / k.n, 0, 0), rtol=1e-9, atol=1e-13
    )


@pytest.mark.parametrize("gan", ["fake_score", "teacher"])
def test_the_gan_term_reaches_x0_through_the_features_alone(gan, setting):
    k, method = setting, DMD2(gan=gan, gan_weight=0.3)
    x0 = k.x0.clone().requires_grad_()
    net = k.fake_net if gan == "fake_score" else k.teacher_net
    logit = head_of(method, 2)(tokens(net((1 - k.s) * x0 + k.s * k.noise, k.sigma, k.text)))
    (reference,) = torch.autograd.grad(0.3 * softplus(-logit).mean(), x0)
    torch.testing.assert_close(
        k.gradient(method), k.template(1 / k.n, 0, 0) + reference, rtol=1e-9, atol=1e-13
    )


def test_decoupled_dmd_is_matching_plus_guidance(setting):
    """Both terms use the given draw; without guidance the method is DMD2."""
    k, g = setting, 3.0
    null = k.teacher_net(k.x_t, k.sigma, k.null_text.expand_as(k.text))
    reference = (k.gap - (g - 1) * (k.teacher - null)) / k.n / k.x0.numel()
    torch.testing.assert_close(
        k.gradient(DecoupledDMD(), guidance_scale=g), reference, rtol=1e-9, atol=1e-13
    )
    torch.testing.assert_close(
        k.gradient(DecoupledDMD()), k.gradient(DMD2()), rtol=1e-9, atol=1e-13
    )


def test_the_guidance_term_of_decoupled_dmd_has_the_scale_of_each_samples_level(setting):
    """Of a teacher with two experts."""
    k = setting
    scale = GuidanceByLevel(high_noise=4.0, low_noise=2.0, boundary=float(k.sigma.median()))
    g = torch.where(k.sigma >= k.sigma.median(), 4.0, 2.0).reshape(-1, 1, 1, 1, 1)
    assert len(g.unique()) == 2
    null = k.teacher_net(k.x_t, k.sigma, k.null_text.expand_as(k.text))
    reference = (k.gap - (g - 1) * (k.teacher - null)) / k.n / k.x0.numel()
    torch.testing.assert_close(
        k.gradient(DecoupledDMD(), guidance_scale=scale), reference, rtol=1e-9, atol=1e-13
    )


def differentiable(net):
    """The net with a prediction at which a loss can be differentiated."""
    return lambda *inputs: net(*inputs).requires_grad_(torch.is_grad_enabled())


def test_consistency_pulls_the_prediction_to_the_target_one_euler_step_on(setting):
    """Levels are rounded up to a grid of four: s = (floor(4 sigma) + 1) / 4, target at s - 1/4."""
    k, steps = setting, 4
    upper = ((k.sigma * steps).floor() + 1) / steps
    s, lower = upper.reshape(-1, 1, 1, 1, 1), upper - 1 / steps
    x_t = (1 - s) * k.x0 + s * k.noise
    euler = x_t - (1 / steps) * (x_t - k.teacher_net(x_t, upper, k.text)) / s
    reference = (k.x0 - k.teacher_net(euler, lower, k.text)) * steps / k.x0.numel()
    torch.testing.assert_close(
        k.gradient(Consistency(steps=steps)), reference, rtol=1e-9, atol=1e-13
    )
    # Song et al.'s weight is 1, and FastGen's target is the student
    paper = k.gradient(Consistency(steps=steps, weight="one"))
    torch.testing.assert_close(paper, reference / steps, rtol=1e-9, atol=1e-13)
    own = (k.fake_net(x_t, upper, k.text) - k.fake_net(euler, lower, k.text)).detach()
    student = k.gradient(
        Consistency(steps=steps, target="student"), student=differentiable(k.fake_net)
    )
    torch.testing.assert_close(student, own * steps / k.x0.numel(), rtol=1e-9, atol=1e-13)
    # pseudo-Huber: the same direction over sqrt(|error|^2 + c^2), per sample
    c = 0.00054 * D**0.5
    size = (reference * k.x0.numel() / steps).square().sum(dim=(1, 2, 3, 4), keepdim=True)
    huber = k.gradient(Consistency(steps=steps, distance="pseudo_huber"))
    torch.testing.assert_close(huber, reference / (size + c**2).sqrt(), rtol=1e-9, atol=1e-13)


def test_guidance_scale_one_is_no_guidance_and_two_doubles_the_difference(setting):
    k = setting
    torch.testing.assert_close(
        k.gradient(DMD2(), guidance_scale=1.0), k.gradient(DMD2()), rtol=0, atol=0
    )
    null = k.teacher_net(k.x_t, k.sigma, k.null_text.expand_as(k.text))
    guided = null + 2 * (k.teacher - null)
    n = (k.x0 - guided).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    reference = (k.fake - guided) / n / k.x0.numel()
    torch.testing.assert_close(
        k.gradient(DMD2(), guidance_scale=2.0), reference, rtol=1e-9, atol=1e-13
    )


def test_a_coefficient_is_arithmetic_only():
    assert coefficient("(1 - sigma)**2 / -n", 2.0, 0.5) == pytest.approx(-0.125)
    for wrong in ("__import__('os')", "n.x", "m", "1 if n else 2", "n +"):
        with pytest.raises(ValueError, match="coefficient"):
            GradientTemplate(a=wrong)
