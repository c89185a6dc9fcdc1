"""Parts of an assembled run: what a method sees, what the ledger counts, what each setting sets."""

import dataclasses
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from diffusers import WanTransformer3DModel
from network_variants import ADAPTER
from torch import distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill_bench.config.resolve import load_run, method_of, resolve
from distill_bench.draws import Draws
from distill_bench.method import Batch, Loss, Method, Nets
from distill_bench.networks.pipeline import load_pipeline, load_transformer, pipeline_of
from distill_bench.networks.sharding import is_sharded
from distill_bench.testing.runs import Runs
from distill_bench.testing.tiny import tiny_pipeline
from distill_bench.train.assemble import assemble, check_batch_size
from distill_bench.train.inputs import needs_of
from distill_bench.train.processes import OneProcess
from distill_bench.train.run import Run
from distill_bench.train.setup import build

CPU = torch.device("cpu")
GAUSSIAN = {"teacher": "gaussian", "data": None}
GAN = {"name": "dmd2", "gan": "fake_score", "discriminator_lr": 1e-3}


class Two(OneProcess):
    """Rank 0 of two ranks, of which the other would double every mean."""

    def __init__(self) -> None:
        super().__init__(CPU, world=2)

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


@pytest.fixture
def gaussian(tmp_path):
    """Assemble a run on the Gaussian teacher for some processes."""
    runs = Runs("dmd2", tmp_path)

    def make(processes: OneProcess | None = None, **fields) -> Run:
        config = load_run(runs.make(**GAUSSIAN, **fields))
        return assemble(config, load_pipeline("gaussian", CPU), processes or OneProcess(CPU), {})

    return make


def predict(run: Run, role: str) -> torch.Tensor:
    batch = run.batch("student")
    return getattr(run.nets, role)(batch.noise("x"), batch.sigma("s"), batch.text)


def test_a_method_sees_the_exit_level_guidance_and_modules_of_its_run(gaussian):
    run = gaussian(Two(), guidance_scale=2.5, nfe=3, shift=3.0, accumulation=2)
    nets, student = run.nets, run.nets.student
    assert nets.guidance_scale == 2.5
    assert nets.null_text.shape == (1, 1, 4)
    assert not nets.null_text.any()
    assert nets.modules is run.networks["modules"]
    assert nets.mean_over_ranks(torch.ones(3)).tolist() == [2, 2, 2]
    latents = torch.randn(2, 1, 4, 2, 2)
    assert torch.equal(nets.decode(latents), run.pipeline.decode_video(latents))
    levels, velocity = [], student.velocity

    def recorded(x_t, sigma, text):
        levels.append(sigma)
        return velocity(x_t, sigma, text)

    student.velocity = recorded
    exits = set()
    for run.student_updates in range(8):
        batch = run.batch("student")
        nets.rollout(batch)
        assert torch.equal(nets.exit_sigma(batch), levels[-1])
        exits.add(float(levels[-1][0]))
    assert len(exits) == 3


def test_passes_over_a_ranks_share_are_those_of_a_whole_batch_and_none_is_counted_before(gaussian):
    """Rank 0 of two has half of the samples; modules and FLOPs were measured with passes."""
    run = gaussian(Two(), method=GAN, batch_size=4)
    assert run.ledger.counts == {}
    assert len(run.batch("student").text) == 2
    for role in ("student", "fake_score", "unguided_teacher", "target"):
        predict(run, role)
    assert {role: row["forward"] for role, row in run.ledger.counts.items()} == {
        "student": 1,
        "fake_score": 1,
        "teacher": 1,
        "target": 1,
    }


def test_the_ledger_weighs_each_role_by_the_flops_of_a_prediction_for_one_sample(tmp_path):
    tiny_pipeline(small := tmp_path / "small")
    half = WanTransformer3DModel.from_config(load_transformer(small).config, num_layers=1)
    half.save_pretrained(small / "transformer")
    run = Runs("dmd2", tmp_path).build(student=str(small))
    batch = run.batch("student")
    inputs = batch.noise("x")[:1], batch.sigma("s")[:1], batch.text[:1]
    roles = {"student": "student", "fake_score": "fake_score", "teacher": "unguided_teacher"}
    assert run.ledger.flops.keys() == roles.keys()
    for role, name in roles.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            getattr(run.nets, name)(*inputs)
        assert run.ledger.flops[role] == counter.get_total_flops() > 6e4


@pytest.mark.parametrize(("forwards", "samples"), [("batched", [8]), ("sequential", [4, 4])])
def test_guidance_runs_in_one_forward_or_in_two(forwards, samples, gaussian):
    run, seen = gaussian(guidance_forwards=forwards), []
    run.nets.unguided_teacher.net.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    predict(run, "teacher")
    assert seen == samples


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_role_computes_in_the_runs_precision(precision, tmp_path):
    run = Runs("dmd2", tmp_path).build(precision=precision)
    dtypes = []
    for net in (*run.networks.values(), run.nets.unguided_teacher.net):
        for name, layer in net.named_modules():
            if name == "blocks.0.attn1.to_q":
                layer.register_forward_hook(lambda _layer, _inputs, y: dtypes.append(y.dtype))
    for role in ("student", "fake_score", "unguided_teacher", "target"):
        assert predict(run, role).dtype == torch.float32
    assert dtypes == [getattr(torch, precision)] * 4
    batch = run.batch("student")
    tokens = run.nets.student.features(batch.noise("x"), batch.sigma("s"), batch.text, 0.5)
    assert tokens.dtype == torch.float32


@pytest.mark.parametrize(("depth", "blocks"), [(0.0, 1), (0.3, 1), (0.5, 1), (0.8, 2), (1.0, 2)])
def test_features_are_those_after_at_least_one_block(depth, blocks, tmp_path):
    """And they cost their share of a forward, also in the backward."""
    run = Runs("dmd2", tmp_path).build()
    student, batch, outputs = run.nets.student, run.batch("student"), []
    for block in student.net.blocks:
        block.register_forward_hook(lambda *call: outputs.append(call[2]))
    tokens = student.features(batch.noise("x"), batch.sigma("s"), batch.text, depth)
    assert len(outputs) == blocks
    assert torch.equal(tokens, outputs[-1])
    tokens.sum().backward()
    assert run.ledger.counts["student"] == {
        "forward": blocks / 2,
        "input_backward": 0,
        "full_backward": blocks / 2,
    }
    student(batch.noise("x"), batch.sigma("s"), batch.text)
    assert len(outputs) == blocks + 2  # later forwards run whole


def test_a_backward_through_adapters_costs_one_to_the_input(tmp_path):
    """It computes no gradients of the base's weights."""
    run = Runs("dmd2", tmp_path).build(adapter=ADAPTER)
    run.update_student()
    assert run.ledger.counts["student"]["input_backward"] == 1
    assert run.ledger.counts["student"]["full_backward"] == 0


def test_compiled_runs_have_compiled_parts_in_every_role_and_the_flops_of_others(tmp_path):
    runs = Runs("dmd2", tmp_path)
    flops = []
    for setting in (False, True, "network"):
        run = runs.build(compile=setting)
        for role in (
            run.networks["student"],
            run.networks["fake_score"],
            run.nets.teacher.denoiser,
        ):
            net = getattr(role, "net", role)
            compiled = [part._compiled_call_impl is not None for part in (net, *net.blocks)]
            assert compiled == [setting == "network", setting is True, setting is True]
        flops.append(run.ledger.flops)
    assert flops[0] == flops[1] == flops[2]


@pytest.mark.parametrize("sharding", [False, True])
def test_several_processes_share_the_weights_of_every_role_if_asked_to(sharding, tmp_path):
    """In a process group of one rank, which takes itself for one of two."""
    run_dir = Runs("dmd2", tmp_path).make(sharding=sharding)
    config = load_run(run_dir)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        run = assemble(config, pipeline_of(config, CPU, run_dir.parent), Two(), {})
        roles = [*run.networks.values(), run.nets.unguided_teacher.net]
        assert {is_sharded(p) for net in roles for p in net.parameters()} == {sharding}
    finally:
        dist.destroy_process_group()


def test_a_run_is_built_on_its_device_with_its_embeddings_in_the_store(tmp_path):
    run_dir = Runs("dmd2", tmp_path).make()
    run = build(load_run(run_dir), run_dir.parent)
    assert run.pipeline.device == run.processes.device == CPU
    assert list((run_dir.parent / "embeddings").rglob("*.safetensors"))


def test_one_process_shards_nothing(tmp_path):
    run = Runs("dmd2", tmp_path).build(sharding=True)
    assert not any(is_sharded(p) for net in run.networks.values() for p in net.parameters())
    assert not torch.distributed.is_initialized()


def test_the_average_of_adapters_is_a_network_of_its_own(tmp_path):
    run = Runs("dmd2", tmp_path).build(adapter=ADAPTER, ema=0.75, student_lr=1e-2)
    start = {name: p.detach().clone() for name, p in run.trained["student"].named_parameters()}
    student, average = predict(run, "student"), predict(run, "target")
    torch.testing.assert_close(student, average)
    run.update_student()
    run.after_student_update()
    moved = dict(run.trained["student"].named_parameters())
    assert any(not torch.equal(p, start[name]) for name, p in moved.items())
    for name, p in moved.items():
        torch.testing.assert_close(run.average.sampled()[name], 0.75 * start[name] + 0.25 * p)
    assert run.average.laid_over is None
    assert not torch.allclose(predict(run, "target"), average)
    assert not torch.allclose(predict(run, "target"), predict(run, "student"))
    plain = Runs("dmd2", tmp_path, "plain").build(adapter=ADAPTER, ema=None)
    plain.update_student()
    torch.testing.assert_close(predict(plain, "target"), predict(plain, "student"))


def test_modules_start_from_the_seed_alone(gaussian):
    def head(seed: int) -> list[torch.Tensor]:
        return list(gaussian(method=GAN, seed=seed).networks["modules"]["head"].parameters())

    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = head(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    assert all(map(torch.equal, first, head(1)))
    assert not torch.equal(first[2], head(2)[2])


@dataclass(frozen=True)
class Modules(Method):
    """A method with modules, whose run trains no fake score."""

    paper = "none"
    has_fake_score = False

    def student_loss(self, nets: Nets, batch: Batch) -> Loss:
        return Loss({"size": nets.rollout(batch).square().mean()})

    def modules(self, feature_width: int) -> dict[str, nn.Module]:
        return {"head": nn.Linear(feature_width, 1)}


def test_modules_that_no_phase_would_train_are_refused(gaussian, tmp_path):
    config = gaussian(fake_score="exact").config
    pipeline = load_pipeline("gaussian", CPU)
    assert config.fake_score_updates is None
    assert assemble(config, pipeline, OneProcess(CPU), {}).fake_score is None
    with pytest.raises(ValueError, match="dmd2 has modules of its own"):
        assemble(config, pipeline, OneProcess(CPU), {}, method=Modules())


def test_a_given_method_and_its_draws_replace_those_of_the_config(tmp_path):
    class Counted(Draws):
        pass

    run_dir = Runs("dmd2", tmp_path).make(**GAUSSIAN)
    config = load_run(run_dir)
    other = dataclasses.replace(method_of(config), gan_weight=0.5)
    run = build(config, run_dir.parent, other, Counted)
    assert run.method is other
    assert type(run.batch("student").draws) is Counted
    plain = build(config, run_dir.parent)
    assert plain.method == method_of(config)
    assert type(plain.batch("student").draws) is Draws


@pytest.mark.parametrize(
    ("method", "exit_step", "of_student", "of_fake_score"),
    [
        ("dmd2", "random", {0, 1, 2}, {0, 1, 2}),
        ("dp_dmd", "random", {1, 2}, {0, 1, 2}),
        ("dp_dmd", "last", {2}, {2}),
    ],
)
def test_exits_are_equally_likely_from_the_first_that_the_method_allows(
    method, exit_step, of_student, of_fake_score, gaussian
):
    """In the student's phase; every rank and micro-batch has the same exit."""
    run = gaussian(method=method, exit_step=exit_step, nfe=3, accumulation=2)
    for phase, possible in (("student", of_student), ("fake_score/0", of_fake_score)):
        counts = Counter()
        for update in range(150):
            batches = [run.batches.batch(update, phase, micro) for micro in range(2)]
            (step,) = {run.student_input.exit_step.step(batch) for batch in batches}
            counts[step] += 1
        assert counts.keys() == possible
        assert max(counts.values()) < 1.25 * 150 / len(possible)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 2), (4, 1), (1, 4)])
def test_micro_batches_of_the_ranks_are_the_parts_of_one_batch(world, accumulation, gaussian):
    run = gaussian(batch_size=8, accumulation=accumulation)
    drawn, whole = {}, run.batches.drawn(3, "student", range(8))
    for rank in range(world):
        processes = OneProcess(CPU, world)
        processes.rank = rank
        batches = dataclasses.replace(run.batches, processes=processes)
        for micro in range(accumulation):
            batch = batches.batch(3, "student", micro)
            assert len(batch.text) == 8 // (world * accumulation)
            for place, index in enumerate(batch.draws.indices):
                drawn[index] = batch.text[place], batch.noise("n")[place], batch.sigma("s")[place]
    assert sorted(drawn) == list(range(8))
    far = dataclasses.replace(run.batches, processes=OneProcess(torch.device("meta")))
    assert far.drawn(3, "student", range(8)).noise("n").device.type == "meta"
    for index, values in drawn.items():
        expected = whole.text[index], whole.noise("n")[index], whole.sigma("s")[index]
        assert all(map(torch.equal, values, expected))


def test_a_run_uses_the_threads_of_its_config(tmp_path):
    before = torch.get_num_threads()
    try:
        Runs("dmd2", tmp_path).build(**GAUSSIAN, threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("batch", "world", "accumulation", "shared"),
    [(8, 2, 4, True), (8, 4, 2, True), (4, 2, 4, False), (6, 4, 1, False), (1, 1, 1, True)],
)
def test_ranks_share_a_batch_equally_or_not_at_all(batch, world, accumulation, shared, gaussian):
    config = gaussian().config.model_copy(
        update={"batch_size": batch, "accumulation": accumulation}
    )
    if shared:
        check_batch_size(config, world)
    else:
        with pytest.raises(ValueError, match=f"a multiple of .* = {world} x {accumulation}"):
            check_batch_size(config, world)


def test_a_batch_that_can_not_be_shared_is_refused_before_any_work(gaussian, tmp_path):
    run = gaussian()
    odd = run.config.model_copy(update={"batch_size": 3, "accumulation": 2})
    with pytest.raises(ValueError, match="batch_size 3 must be a multiple of"):
        assemble(odd, run.pipeline, OneProcess(CPU), {})
    with pytest.raises(ValueError, match="batch_size 3 must be a multiple of"):
        build(odd.model_copy(update={"teacher": "no folder"}), tmp_path)


def test_only_a_method_with_a_fake_score_sees_the_exact_one(gaussian):
    """Which signals compare with a trained one; a run without either has none."""
    trained, exact = gaussian(), gaussian(fake_score="exact")
    assert trained.nets.fake_score.net is trained.networks["fake_score"]
    assert exact.nets.fake_score is exact.exact_fake_score is not None
    assert gaussian(method="consistency").nets.fake_score is None


@pytest.mark.parametrize("fake_score", ["exact", "trained"])
def test_the_exact_fake_score_of_noised_data_is_that_of_the_runs_data(fake_score, tmp_path):
    fields = GAUSSIAN | {"student_input": "real_data", "fake_score": fake_score}
    run = Runs("dmd2", tmp_path).build(**fields)
    assert torch.equal(
        run.exact_fake_score.samples.x0, run.student_input.data.every()["x0"].flatten(1)
    )


def test_extra_data_are_needed_for_real_inputs_and_by_methods_alone():
    for method, needs in ((GAN, {"real_latents"}), ("dmd", {"ode_pairs"}), ("sgmd", set())):
        for student_input in ("rollout", "real_data"):
            config = resolve(GAUSSIAN | {"method": method, "student_input": student_input})
            own = {"real_latents"} if student_input == "real_data" else set()
            assert needs_of(config) == needs | own


def test_a_batch_that_is_asked_twice_for_its_rows_draws_them_once(tmp_path):
    runs = Runs("sgmd", tmp_path)
    run = runs.build(**GAUSSIAN, student_input="real_data", batch_size=8)
    asked = []

    def rows(draws):
        asked.append(draws.student_update)
        return run.batches.extras["real_latents"](draws)

    batches = dataclasses.replace(run.batches, extras={"real_latents": rows})
    first, second = batches.batch(0, "student", 0), batches.batch(1, "student", 0)
    for batch in (first, second):
        assert torch.equal(batch.text, batch.extra("real_latents")["text"])
        assert batch.extra("real_latents") is batch.extra("real_latents")
    assert asked == [0, 1]
    assert not torch.equal(first.extra("real_latents")["x0"], second.extra("real_latents")["x0"])
