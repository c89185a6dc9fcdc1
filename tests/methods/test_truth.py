"""Every objective against formulas written here from the papers, on shared random tensors in float64, and against closed forms.

With D = x0_fake - x0_teacher, r = x0 - x0_fake, J and J_T = (1 - sigma) d/dx_t of fake score and teacher, N elements and
n = mean |x0 - x0_teacher| per sample, a reference is a function of these; Jacobians are written out by `torch.func.jacrev`.
"""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from distill_bench.domain.gaussian import gaussian_velocity
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
from distill_bench.testing.gradient import student_gradient

B, SHAPE = 4, (2, 2, 2, 2)
D = 16
LEVELS = torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.float64)


def smooth_net(seed: int):
    """A nonlinear denoiser with a dense Jacobian that depends on noise level and text."""
    g = torch.Generator().manual_seed(seed)
    mix, out = (torch.randn(D, D, generator=g, dtype=torch.float64) / 4 for _ in range(2))

    def net(x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        flat = x_t.reshape(len(x_t), -1)
        return (flat + torch.tanh(flat @ mix + sigma[:, None] + text[:, 0, :1]) @ out).reshape(
            x_t.shape
        )

    return net


@dataclasses.dataclass
class Setting:
    """Draws, networks, their predictions and Jacobians."""

    def __post_init__(self):
        g = torch.Generator().manual_seed(0)
        self.x0, self.noise = (
            torch.randn(B, *SHAPE, generator=g, dtype=torch.float64) for _ in range(2)
        )
        self.text = torch.randn(B, 1, 3, generator=g, dtype=torch.float64)
        self.null_text = torch.zeros(1, 1, 3, dtype=torch.float64)
        self.sigma = LEVELS
        self.fake_net, self.teacher_net = smooth_net(1), smooth_net(2)
        self.s = self.sigma.reshape(-1, 1, 1, 1, 1)
        self.x_t = (1 - self.s) * self.x0 + self.s * self.noise
        self.fake, self.teacher = (
            net(self.x_t, self.sigma, self.text) for net in (self.fake_net, self.teacher_net)
        )
        self.gap = self.fake - self.teacher
        self.n = (self.x0 - self.teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)

    def pulled_back(self, net, cotangent: Tensor) -> Tensor:
        """J^T cotangent, row by row, by writing the Jacobian out."""
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

    def gradient(self, method, **others) -> Tensor:
        return student_gradient(
            method,
            self.x0,
            self.noise,
            self.sigma,
            self.fake_net,
            self.teacher_net,
            self.text,
            self.null_text,
            **others,
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
    "fisher, not stopped": (
        GradientTemplate("0", "1/n", "0", teacher_stop_gradient=False),
        lambda k: k.template(0, 1 / k.n, 0, -k.gap / k.n),
    ),
}


@pytest.mark.parametrize("row", REFERENCES)
def test_the_gradient_at_x0_is_the_formulas(row, setting):
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
def test_a_line_of_yaml_is_each_member_of_the_family(template, method, setting):
    torch.testing.assert_close(
        setting.gradient(template), setting.gradient(method), rtol=1e-9, atol=1e-13
    )


def distance(k: Setting, prediction: Tensor, goal: Tensor, weight: Tensor | float) -> Tensor:
    """Half the weighted mean of squares."""
    return (0.5 * weight * (prediction - goal).square()).mean()


def sid_loss(k: Setting, x0: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """As its authors write it."""
    return ((real - fake) * ((real - x0) - alpha * (real - fake)) / k.n).mean()


# What each method minimises, as a function of x0 and of both predictions there; what is stopped is the setting's own.
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
def test_every_row_agrees_with_finite_differences_of_its_objective(row, setting):
    """No autograd on this side: central differences, n and all that is stopped held fixed."""
    k, (method, objective) = setting, OBJECTIVES[row]

    def loss(x0: Tensor) -> Tensor:
        x_t = (1 - k.s) * x0 + k.s * k.noise
        return objective(
            k, x0, k.teacher_net(x_t, k.sigma, k.text), k.fake_net(x_t, k.sigma, k.text)
        )

    gradient = k.gradient(method).flatten()
    for index in range(0, k.x0.numel(), 5):
        bump = torch.zeros(k.x0.numel(), dtype=torch.float64)
        bump[index] = 1e-6
        slope = (
            loss(k.x0 + bump.reshape(k.x0.shape)) - loss(k.x0 - bump.reshape(k.x0.shape))
        ) / 2e-6
        torch.testing.assert_close(
            gradient[index], slope, rtol=1e-5, atol=1e-7 * float(gradient.abs().max())
        )


def head_of(method, width: int) -> torch.nn.Module:
    """The head that `student_gradient` builds."""
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
    """The weight of each sample at the first update, (B, 1, 1, 1, 1)."""
    ratio = head_of(method, 2)(tokens(k.teacher)).exp().clamp(0.1, 20)
    h = F_WEIGHTS[method.divergence](ratio / (0.9 + 0.1 * ratio + 1e-6))
    return (h / (h.mean() + 1e-6)).reshape(-1, 1, 1, 1, 1).detach()


@pytest.mark.parametrize("divergence", F_WEIGHTS)
def test_f_distill_weights_the_gradient_of_dmd2_by_its_divergence(divergence, setting):
    """h of the ratio over the moving average of its bin: begins at 1, decay 0.9, each of the four samples in a bin of its own."""
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
    """At the given draw for both terms; without guidance it is DMD2, and matching costs what DMD2 does."""
    k, g = setting, 3.0
    null = k.teacher_net(k.x_t, k.sigma, k.null_text.expand_as(k.text))
    reference = (k.gap - (g - 1) * (k.teacher - null)) / k.n / k.x0.numel()
    torch.testing.assert_close(
        k.gradient(DecoupledDMD(), guidance_scale=g), reference, rtol=1e-9, atol=1e-13
    )
    torch.testing.assert_close(
        k.gradient(DecoupledDMD()), k.gradient(DMD2()), rtol=1e-9, atol=1e-13
    )


def test_consistency_pulls_the_prediction_to_the_target_one_euler_step_on(setting):
    """Levels snap up to the grid of 4: s = (floor(4 sigma) + 1) / 4, r = s - 1/4; the target there is the teacher."""
    k, steps = setting, 4
    upper = ((k.sigma * steps).floor() + 1) / steps
    s, lower = upper.reshape(-1, 1, 1, 1, 1), upper - 1 / steps
    x_t = (1 - s) * k.x0 + s * k.noise
    euler = x_t - (1 / steps) * (x_t - k.teacher_net(x_t, upper, k.text)) / s
    reference = (k.x0 - k.teacher_net(euler, lower, k.text)) * steps / k.x0.numel()
    torch.testing.assert_close(
        k.gradient(Consistency(steps=steps)), reference, rtol=1e-9, atol=1e-13
    )
    c = (
        0.00054 * D**0.5
    )  # pseudo-Huber: the same direction over sqrt(|error|^2 + c^2), a sample at a time
    size = (reference * k.x0.numel() / steps).square().sum(dim=(1, 2, 3, 4), keepdim=True)
    huber = k.gradient(Consistency(steps=steps, distance="pseudo_huber"))
    torch.testing.assert_close(huber, reference / (size + c**2).sqrt(), rtol=1e-9, atol=1e-13)


def test_guidance_of_one_is_none_and_two_doubles_the_difference(setting):
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


def test_a_coefficient_is_arithmetic_and_nothing_else():
    assert coefficient("(1 - sigma)**2 / -n", 2.0, 0.5) == pytest.approx(-0.125)
    for wrong in ("__import__('os')", "n.x", "m", "1 if n else 2", "n +"):
        with pytest.raises(ValueError, match="coefficient"):
            GradientTemplate(a=wrong)


# --- closed forms: a linear student of Gaussian data, exact scores, expectations that are exact ---


@dataclasses.dataclass
class Gaussians:
    """x0 = mean + scale z against N(target_mean, target_scale target_scale^T) in d dimensions, at one noise level."""

    sigma: float
    at_optimum: bool = False
    d: int = 3

    def __post_init__(self):
        g = torch.Generator().manual_seed(5)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
        self.target_mean, self.target_scale = (
            draw(self.d),
            draw(self.d, self.d) / 2 + torch.eye(self.d, dtype=torch.float64),
        )
        self.mean, self.scale = (
            draw(self.d),
            draw(self.d, self.d) / 2 + torch.eye(self.d, dtype=torch.float64),
        )
        if self.at_optimum:
            self.mean, self.scale = self.target_mean, self.target_scale

    def points(self) -> tuple[Tensor, Tensor]:
        """z and noise whose average is the expectation of every polynomial of degree three: 4 d points on the axes."""
        axes = (2 * self.d) ** 0.5 * torch.eye(2 * self.d, dtype=torch.float64)
        both = torch.cat([axes, -axes])
        return both[:, : self.d], both[:, self.d :]

    def denoiser(self, mean: Tensor, scale: Tensor):
        def predict(x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
            flat = x_t.flatten(1)
            velocity = gaussian_velocity(flat, sigma, mean.expand_as(flat), scale @ scale.T)
            return (flat - sigma[:, None] * velocity).reshape(x_t.shape)

        return predict

    def expected_gradient(self, method) -> tuple[Tensor, Tensor]:
        """E[g] and E[g z^T]: derivatives with respect to the student's mean and scale."""
        z, noise = self.points()
        x0 = (self.mean + z @ self.scale.T).reshape(-1, self.d, 1, 1, 1)
        gradient = (
            student_gradient(
                method,
                x0,
                noise.reshape(x0.shape),
                torch.full((len(x0),), self.sigma, dtype=torch.float64),
                self.denoiser(self.mean, self.scale),
                self.denoiser(self.target_mean, self.target_scale),
            ).flatten(1)
            * self.d
        )
        return gradient.sum(0), gradient.T @ z  # the loss is a mean over samples already

    def kl(self, mean: Tensor, scale: Tensor) -> Tensor:
        """KL of the noisy student from the noisy target."""
        s, eye = self.sigma, torch.eye(self.d, dtype=torch.float64)
        p, q = ((1 - s) ** 2 * a @ a.T + s**2 * eye for a in (scale, self.target_scale))
        away = (1 - s) * (mean - self.target_mean)
        ratio = torch.linalg.slogdet(q)[1] - torch.linalg.slogdet(p)[1]
        return 0.5 * (
            torch.trace(torch.linalg.solve(q, p))
            - self.d
            + away @ torch.linalg.solve(q, away)
            + ratio
        )

    def affine(self, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """P, q of the exact denoiser P x_t + q."""
        s, covariance = self.sigma, scale @ scale.T
        noisy = (1 - s) ** 2 * covariance + s**2 * torch.eye(self.d, dtype=torch.float64)
        p = (1 - s) * covariance @ torch.linalg.inv(noisy)
        return p, mean - (1 - s) * p @ mean


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_the_expected_gradient_of_dmd_is_that_of_the_reverse_kl_times_its_weight(sigma):
    """Score differences are (1 - s)/s^2 D and dx_t/dx0 = 1 - s: the gradient of KL at level s is (1 - s)^2/s^2 E[D dx0]."""
    k = Gaussians(sigma)
    mean, scale = (x.clone().requires_grad_() for x in (k.mean, k.scale))
    of_mean, of_scale = torch.autograd.grad(k.kl(mean, scale), (mean, scale))
    weight = (1 - sigma) ** 2 / sigma**2
    found_mean, found_scale = k.expected_gradient(GradientTemplate("1", normaliser="none"))
    torch.testing.assert_close(weight * found_mean, of_mean, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(weight * found_scale, of_scale, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_tsg_fisher_is_the_derivative_of_the_fisher_term_and_the_residual_of_sgmd_averages_to_zero(
    sigma,
):
    """c/2 E|P_f x_t + q_f - sg(x0_teacher)|^2 by the input of an exact fake score, in closed form; E[r | x_t] = 0."""
    k = Gaussians(sigma)
    (p, q), (p_t, q_t) = k.affine(k.mean, k.scale), k.affine(k.target_mean, k.target_scale)
    c = (1 - sigma) ** 2 / sigma**4
    of_mean = c * (1 - sigma) * p.T @ ((p - p_t) @ k.mean * (1 - sigma) + q - q_t)
    of_scale = c * (1 - sigma) ** 2 * p.T @ (p - p_t) @ k.scale
    for found, expected in zip(
        k.expected_gradient(TSGFisher("c_t")), (of_mean, of_scale), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(c))
    sgmd_mean, sgmd_scale = k.expected_gradient(SGMD("c_t", "x0"))
    torch.testing.assert_close(sgmd_mean, of_mean, rtol=1e-9, atol=1e-9 * float(c))
    # x0 in r is stopped but stays correlated with z: along a scale the residual pulls by lam (1 - s) P^T E[r z^T]
    pull = 0.1 * (1 - sigma) * p.T @ (k.scale - (1 - sigma) * p @ k.scale)
    torch.testing.assert_close(sgmd_scale, of_scale + pull, rtol=1e-9, atol=1e-9 * float(c))


STOPPED = {  # weight of (T - x0) that is left where the teacher's Jacobian is stopped, or x0 is
    SGMD(): lambda s, n: 0.1 / s,
    SGMD("c_t", "x0"): lambda s, n: 0.1,
    TSGSIM(): lambda s, n: 1 / n,
}
AT_OPTIMUM = [
    DMD2(),
    DMD(),
    IDA(),
    FDistill(gan_weight=0.0),
    TSGFisher(),
    TSGFisher("c_t"),
    SiD(1.2),
    DecoupledDMD(),
    *STOPPED,
]


@pytest.mark.parametrize("method", AT_OPTIMUM, ids=lambda m: type(m).__name__)
def test_at_the_optimum_every_expected_gradient_vanishes(method):
    """Along the mean for all of them. Along the scale SGMD and TSG-SIM keep the pull of their residual, E[lam J^T r z^T].

    SiD has the same residual, and the teacher's Jacobian that cancels it.
    """
    k = Gaussians(0.5, at_optimum=True)
    mean, scale = k.expected_gradient(method)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)
    left = torch.zeros_like(scale)
    if method in STOPPED:
        (p, q), (z, noise) = k.affine(k.mean, k.scale), k.points()
        x0 = k.mean + z @ k.scale.T
        residual = x0 - ((0.5 * x0 + 0.5 * noise) @ p.T + q)
        weight = STOPPED[method](0.5, residual.abs().mean(1, keepdim=True))
        left = (weight * residual @ (0.5 * p)).T @ z / len(z)
        assert left.abs().max() > 1e-3
    torch.testing.assert_close(scale, left, rtol=1e-7, atol=1e-12)
