"""VideoAlign's rewards: visual quality, motion quality and alignment with the text."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from distill_bench.evaluate.video_reward import load_video_reward, rewards
from distill_bench.evaluator import (
    Citation,
    Clips,
    Evaluator,
    Score,
    mean_score,
    reason_without_captions,
)

WEIGHTS = "DISTILL_BENCH_VIDEOALIGN"  # environment variable: the default of `weights`
BASE = "DISTILL_BENCH_QWEN2_VL"  # environment variable: the default of `base`
SOURCE = (
    f"set videoalign.weights or {WEIGHTS} to a folder of huggingface.co/KwaiVGI/VideoReward, and "
    f"videoalign.base or {BASE} to one of huggingface.co/Qwen/Qwen2-VL-2B-Instruct"
)
TITLES = {  # by column, in the order of the rewards
    "videoalign_visual": "VideoAlign visual quality",
    "videoalign_motion": "VideoAlign motion quality",
    "videoalign_text": "VideoAlign text alignment",
}


@dataclass(frozen=True)
class VideoAlign(Evaluator):
    """Rewards of VideoReward, a Qwen2-VL-2B trained on human preferences between videos.

    They are the model's own numbers, as SGMD's tables have them (about 4 for motion, 8 for visual
    quality and 19 for the sum). VideoAlign's `use_norm` shifts and scales them, in the same order.
    """

    paper: ClassVar[Citation] = Citation(
        "2501.13918",
        "Improving Video Generation with Human Feedback",
        "Jie Liu, Gongye Liu, Jiajun Liang, Ziyang Yuan, Xiaokun Liu, Mingwu Zheng, Xiele Wu, "
        "Qiulin Wang, Wenyu Qin, Menghan Xia, Xintao Wang, Xiaohong Liu, Fei Yang, Pengfei Wan, "
        "Di Zhang, Kun Gai, Yujiu Yang, Wanli Ouyang",
        2025,
    )
    version: ClassVar[int] = 1
    only_if_named: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = (*TITLES, "videoalign_total")

    weights: str = field(default_factory=lambda: os.environ.get(WEIGHTS, ""))
    base: str = field(default_factory=lambda: os.environ.get(BASE, ""))

    def reason_to_skip(self, clips: Clips) -> str | None:
        if not self.weights or not self.base:
            return SOURCE
        reason = reason_without_captions(clips)
        if reason is not None:
            return reason
        load_video_reward(self.weights, self.base)  # raises if it does not load
        return None

    def extractors(self, clips: Clips) -> frozenset[str]:
        return frozenset({load_video_reward(self.weights, self.base)[1]})

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        net, name = load_video_reward(self.weights, self.base)
        values = rewards(net, name, clips).double()
        scores = [
            mean_score(
                column,
                values[:, index].numpy(),
                title,
                better="higher",
                headline=column != "videoalign_text",
                extractor=name,
            )
            for index, (column, title) in enumerate(TITLES.items())
        ]
        total = values.sum(1).numpy()
        fields = {"better": "higher", "extractor": name}
        return [*scores, mean_score("videoalign_total", total, "VideoAlign, sum", **fields)]
