"""The GIF of a trained agent."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import gif
from sb3_algd.zoo import TRAINED_AGENTS


def test_an_episode_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = TRAINED_AGENTS / "algd" / "TwoModes-v0_1" / "TwoModes-v0.zip"
    path = tmp_path / "episode.gif"
    gif.main(["--env", "TwoModes-v0", "--model", str(model), "--every", "5", "-o", str(path)])
    assert "episode.gif: 20 frames" in capsys.readouterr().out
    with Image.open(path) as image:
        assert image.n_frames == 20
        assert image.size == (320, 160 + gif.CAPTION_HEIGHT)


def test_a_large_one_is_made_smaller() -> None:
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(256, size=(120, 160, 3), dtype=np.uint8)) for _ in range(5)]
    assert len(gif.encode(frames, 10)) > 30_000
    assert 5_000 < len(gif.shrunk(frames, 10, 30_000)) <= 30_000


def test_the_caption_turns_red_where_something_costs() -> None:
    grey = np.full((40, 300, 3), 128, np.uint8)
    quiet, alarm = (np.asarray(gif.caption(grey, "cost", alarm)) for alarm in (False, True))
    assert not np.array_equal(quiet[: gif.CAPTION_HEIGHT], alarm[: gif.CAPTION_HEIGHT])
    assert np.array_equal(quiet[gif.CAPTION_HEIGHT :], grey)
