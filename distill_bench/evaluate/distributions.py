"""Statistics of one value per clip against those of a reference, as means over clips.

Each function returns one entry per clip, (N,), whose mean is the statistic. The entries are its
linearisation (delta method): their spread is the sampling error of the statistic when clips are
resampled together with the reference's clips of the same index. A single entry has no meaning. If
`paired` is False, the reference counts as exact.
"""

from collections.abc import Sequence

import numpy as np

FEW_PROMPTS = 30  # with several clips each


def ratio_by_clip(values: np.ndarray, references: np.ndarray, paired: bool) -> np.ndarray:
    """Ratio of the means, mean(values) / mean(references).

    Pairs have the same prompt, whose share of the motion cancels in the ratio.
    """
    mean = references.mean()
    if not paired:
        return values / mean
    ratio = values.mean() / mean
    return ratio + (values - ratio * references) / mean


def wasserstein_by_clip(values: np.ndarray, references: np.ndarray, paired: bool) -> np.ndarray:
    """Wasserstein-1 distance of two sets of values, in their unit: the area between their CDFs.

    Kantorovich duality: it is mean(f(values)) - mean(f(references)) for the f whose slope is the
    sign of the difference of the CDFs. It is positive for finite sets of one distribution.
    """
    points = np.sort(np.concatenate([values, references]))
    below = [
        np.searchsorted(np.sort(x), points[:-1], side="right") / len(x)
        for x in (references, values)
    ]
    slope = np.sign(below[0] - below[1])
    potential = np.concatenate([[0.0], np.cumsum(slope * np.diff(points))])
    potential_values, potential_references = (
        np.interp(x, points, potential) for x in (values, references)
    )
    return potential_values - (potential_references if paired else potential_references.mean())


def spread_ratio_by_clip(values: np.ndarray, references: np.ndarray, paired: bool) -> np.ndarray:
    """Ratio of root mean squares of deviations, see `deviations`."""
    mean_square = (references**2).mean()
    ratio = np.sqrt((values**2).mean() / mean_square)
    if not ratio:
        return np.zeros_like(values)
    own = values**2 / (values**2).mean()
    return ratio * (1 + (own - (references**2 / mean_square if paired else 1)) / 2)


def same_prompt(prompts: Sequence[str]) -> list[list[int]]:
    """Indices of the clips of each prompt with several clips. Clips without a prompt are left out.

    Prompts are in the order of their first clips.
    """
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        if prompt:
            groups.setdefault(prompt, []).append(index)
    return [members for members in groups.values() if len(members) > 1]


def few_prompts(count: int) -> tuple[str, ...]:
    """Warning if few prompts have several clips, for a score over such prompts."""
    if count >= FEW_PROMPTS:
        return ()
    return (f"only {count} prompts have more than one clip",)


def deviations(values: np.ndarray, prompts: Sequence[str]) -> np.ndarray | None:
    """Deviations from the mean of each prompt's clips, scaled to be unbiased, (N,).

    The mean of their squares is the mean variance within prompts. Clips without a prompt ("") and
    prompts with one clip are left out: theirs is 0. None if no prompt has several clips.
    """
    _, group = np.unique(np.array(prompts), return_inverse=True)
    sizes = np.bincount(group)[group]
    means = (np.bincount(group, values) / np.bincount(group))[group]
    counted = (sizes > 1) & (np.array(prompts) != "")
    if not counted.any():
        return None
    factor = np.sqrt(sizes / np.maximum(sizes - 1, 1) * len(values) / counted.sum())
    return np.where(counted, (values - means) * factor, 0.0)
