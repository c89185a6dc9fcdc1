"""Prompts and seeds of a protocol's clips."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from runs import TINY_RUN

from distill_bench.config.errors import ConfigError
from distill_bench.config.protocol import protocol_hash
from distill_bench.config.resolve import resolve
from distill_bench.config.schema import ProtocolConfig
from distill_bench.draws import generator
from distill_bench.sample.sampler import protocol_order, protocol_seeds

PROMPTS = ["a red circle", "a blue square moving left", "a circle moving right"]


def prompts_file(path: Path, seeds: list[int | None], prompts: list[str] = PROMPTS) -> str:
    entries = [
        {"prompt": prompt} | ({} if seed is None else {"seed": seed})
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    path.write_text(json.dumps(entries))
    return str(path)


@pytest.mark.parametrize(("clips_per_prompt", "distinct"), [(1, 20), (2, 10), (5, 4), (7, 3)])
def test_clips_are_spread_evenly_over_as_few_prompts_as_they_need(clips_per_prompt, distinct):
    """Clip i has prompt i modulo the number of prompts, in an order drawn from the seed."""
    protocol = ProtocolConfig(clips=20, clips_per_prompt=clips_per_prompt)
    order, repeats = protocol_order(50, protocol)
    counts = Counter(order)
    assert len(order) == len(set(zip(order, repeats, strict=True))) == 20
    assert len(counts) == distinct == math.ceil(20 / clips_per_prompt)
    assert max(counts.values()) == clips_per_prompt
    drawn = torch.randperm(50, generator=generator("protocol", protocol.seed)).tolist()
    assert order == [drawn[i % distinct] for i in range(20)]


def test_two_clips_per_prompt_is_the_protocol_without_the_key():
    plain = resolve({"method": "dmd2"})
    two, five = (resolve({"method": "dmd2", "protocol": {"clips_per_prompt": n}}) for n in (2, 5))
    assert protocol_hash(two) == protocol_hash(plain) != protocol_hash(five)


def test_a_prompts_seed_gives_the_seeds_of_its_clips(tiny_wan, tmp_path):
    """Clip number k of a prompt with seed s has seed s + k; other clips keep the protocol's."""
    keys = TINY_RUN | {"method": "dmd2", "teacher": str(tiny_wan)}
    keys |= {"protocol": {"clips": 6, "clips_per_prompt": 2, "seed": 100}}
    path = prompts_file(tmp_path / "seeds.json", [7, None, 40])
    config = resolve(keys | {"prompts": path})
    order, repeats = protocol_order(3, config.protocol)
    seeds = protocol_seeds(config, order, repeats)
    clips = list(zip(order, seeds, strict=True))
    assert {seed for prompt, seed in clips if prompt == 0} == {7, 8}
    assert {seed for prompt, seed in clips if prompt == 2} == {40, 41}
    assert all(seed == 100 + i for i, (prompt, seed) in enumerate(clips) if prompt == 1)
    plain = resolve(keys | {"prompts": prompts_file(tmp_path / "plain.json", [None] * 3)})
    assert protocol_seeds(plain, order, repeats) == list(range(100, 106))


def test_seeds_are_part_of_the_hash_of_prompts_only_if_there_are_any(tiny_wan, tmp_path):
    keys = TINY_RUN | {"method": "dmd2", "teacher": str(tiny_wan)}
    lines = tmp_path / "p.txt"
    lines.write_text("\n".join(PROMPTS))
    plain, seeded, other = (
        resolve(keys | {"prompts": prompts_file(tmp_path / f"{i}.json", seeds)})
        for i, seeds in enumerate(([None] * 3, [1, 2, 3], [1, 2, 4]))
    )
    assert resolve(keys | {"prompts": str(lines)}).prompts_hash == plain.prompts_hash
    assert len({protocol_hash(config) for config in (plain, seeded, other)}) == 3


@pytest.mark.parametrize("seeds", [[5, 5], [5, 6]])
def test_seeds_that_would_give_a_clip_twice_are_refused(seeds, tiny_wan, tmp_path):
    """Two entries of one prompt, two clips each."""
    path = prompts_file(tmp_path / "p.json", seeds, ["a red circle"] * 2)
    keys = TINY_RUN | {"teacher": str(tiny_wan), "prompts": path}
    keys |= {"protocol": {"clips": 4, "clips_per_prompt": 2}}
    with pytest.raises(ConfigError, match=f"has the seeds 5 and {seeds[1]}, but gives 2 clips"):
        resolve(keys)
    prompts_file(tmp_path / "p.json", [5, 7], ["a red circle"] * 2)
    assert resolve(keys).prompts_hash
