"""Loading folders of clips. Broken folders are in evaluate/test_bad_clips.py."""

import json

import numpy as np
from clip_folders import save_clip, write_manifest, write_sampled

from distill_bench.domain import controls
from distill_bench.sample.load_folder import load_clips, unscored


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


SEPARATORS = "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def test_only_a_line_feed_ends_a_line_of_a_manifest(tmp_path):
    folder = write_sampled(tmp_path / "a")
    lines = [json.loads(text) for text in (folder / "manifest.jsonl").read_text().split("\n")[:-1]]
    prompts = [f"a{SEPARATORS}{line['prompt']}" for line in lines]
    texts = [
        json.dumps(line | {"prompt": prompt}, ensure_ascii=False)
        for line, prompt in zip(lines, prompts, strict=True)
    ]
    (folder / "manifest.jsonl").write_bytes("\r\n".join(texts).encode())
    assert load_clips(folder).prompts == prompts


def test_every_entry_of_a_folder_that_is_not_scored_is_named(tmp_path):
    frames, prompts = controls.rendered(2, 0)
    for name, clip in zip(("a.MP4", "b.avi"), frames, strict=True):
        save_clip(tmp_path / name, clip)
    for name in ("notes.txt", "frame.png", "._a.MP4", ".DS_Store"):
        (tmp_path / name).write_text("no clip")
    (tmp_path / "c.mp4").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    for written in (False, True):
        if written:
            write_manifest(tmp_path, ["a.MP4", "b.avi"], prompts)
        assert len(load_clips(tmp_path).frames) == 2
        assert unscored(tmp_path) == (
            f"{tmp_path}: 5 entries not scored: .DS_Store, ._a.MP4, c.mp4/, frame.png, notes.txt"
        )


def test_entries_beside_clips_of_a_sub_folder_are_named(tmp_path):
    """A manifest that names some clips of a sub-folder must not hide its other clips."""
    frames, prompts = controls.rendered(2, 0)
    for name in ("new/a.npy", "new/b.npy", "new/c.npy", "new/more/d.npy", "old/e.npy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_clip(tmp_path / name, frames[0])
    write_manifest(tmp_path, ["new/a.npy", "new/more/../b.npy"], prompts)
    assert len(load_clips(tmp_path).frames) == 2
    assert unscored(tmp_path) == f"{tmp_path}: 3 entries not scored: new/c.npy, new/more/, old/"


def test_a_sampled_folder_names_clips_beside_its_array(tmp_path):
    folder = write_sampled(tmp_path / "a")
    assert unscored(folder) is None
    save_clip(folder / "extra.npy", controls.rendered(1, 0)[0][0])
    assert unscored(folder) == f"{folder}: 1 entry not scored: extra.npy"


def test_clips_without_a_manifest_have_no_captions(tmp_path):
    for i, clip in enumerate(controls.rendered(3, 0)[0]):
        np.save(tmp_path / f"{i}.npy", clip)
    clips = load_clips(tmp_path)
    assert (clips.prompts, clips.seeds, clips.fps) == ([""] * 3, [0, 1, 2], 8)


def test_keys_of_a_manifest_that_nothing_reads_are_named_once_with_their_number(tmp_path, capsys):
    for name, clip in zip("ab", controls.rendered(2, 0)[0], strict=True):
        save_clip(tmp_path / f"{name}.mp4", clip)
    entries = [{"file": f"{name}.mp4", "prompt": name, "frame_rate": 24} for name in "ab"]
    entries[0]["note"] = "x"
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (tmp_path / "manifest.jsonl").write_text(lines)
    for _ in range(2):
        assert load_clips(tmp_path).prompts == ["a", "b"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "keys that are not used: 'frame_rate' (2 times), 'note' (1 times); "
        "known: file, prompt, seed, fps"
    )
