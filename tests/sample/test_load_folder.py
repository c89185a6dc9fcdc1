"""Loading folders of clips. Broken folders are in evaluate/test_bad_clips.py."""

import numpy as np
from clip_folders import save_clip, write_manifest, write_sampled

from distill_bench.domain import controls
from distill_bench.sample.load_folder import load_clips


def test_a_gif_takes_the_exact_rate_of_the_other_files(tmp_path):
    frames, prompts = controls.rendered(2, 0)
    names = ["a.gif", "b.mp4"]
    for name, clip in zip(names, frames, strict=True):
        save_clip(tmp_path / name, clip)
    write_manifest(tmp_path, names, prompts)
    assert load_clips(tmp_path).fps == 8


def test_a_manifest_with_a_byte_order_mark_and_windows_line_ends_is_read(tmp_path):
    folder = write_sampled(tmp_path / "a")
    text = (folder / "manifest.jsonl").read_text()
    (folder / "manifest.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load_clips(folder).prompts == controls.rendered(12, 0)[1]


def test_clips_without_a_manifest_have_no_captions(tmp_path):
    for i, clip in enumerate(controls.rendered(3, 0)[0]):
        np.save(tmp_path / f"{i}.npy", clip)
    clips = load_clips(tmp_path)
    assert (clips.prompts, clips.seeds, clips.fps) == ([""] * 3, [0, 1, 2], 8)
