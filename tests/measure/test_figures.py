import numpy as np
import pytest
import torch
from PIL import Image

from hf_prune.errors import DataError
from hf_prune.measure.figures import MAX_BYTES, plot_latency_accuracy, plot_token_histogram
from hf_prune.measure.patch_figures import WASH, grey_out, mean_colours, plot_patches
from hf_prune.measure.report import LatencyStats, ModelRow

KEEP = np.array([[False, True, True, True]])
SOURCE = np.array([[-1, 0, 1, 2]])


def png(path):
    assert path.stat().st_size <= MAX_BYTES
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert 300 < picture.width < 2000
        assert 250 < picture.height < 2000
        return np.asarray(picture.convert("RGB")).astype(int)


def row(name, top1, median_ms):
    stats = LatencyStats(median_ms, 0.9 * median_ms, 1.2 * median_ms)
    return ModelRow(name, top1, 100, 0, 1000, 1e6, {8: stats})


def test_grey_out_changes_dropped_patches_and_no_others():
    image = np.random.default_rng(0).random((9, 8, 3)) * 0.5
    washed = grey_out(image, KEEP[0], (2, 2))
    assert (washed[:5, :4] > 0.8).all()
    np.testing.assert_array_equal(washed[5:], image[5:])
    np.testing.assert_array_equal(washed[:, 4:], image[:, 4:])


def test_patches_that_share_a_token_get_their_mean_colour_and_no_others():
    image = np.random.default_rng(0).random((8, 8, 3))
    painted = mean_colours(image, np.array([0, 5, 0, -1]), (2, 2))
    np.testing.assert_array_equal(painted[:4, 4:], image[:4, 4:])
    np.testing.assert_allclose(painted[:, :4], np.broadcast_to(image[:, :4].mean((0, 1)), (8, 4, 3)))
    np.testing.assert_array_equal(painted[4:, 4:], grey_out(image, np.zeros(4, bool), (2, 2))[4:, 4:])


def test_dropped_patch_is_struck_out_in_the_file_and_kept_ones_are_untouched(tmp_path):
    blue = torch.zeros(1, 3, 32, 32)
    blue[:, 2] = 1
    plot_patches(blue, [SOURCE], (2, 2), titles=["a $5 cat"], stage_names=["before block 1"], path=tmp_path / "a.png")
    pixels = png(tmp_path / "a.png")
    is_blue = (pixels == (0, 0, 255)).all(-1)
    top, bottom = np.flatnonzero(is_blue.any(1))[[0, -1]]
    left, right = np.flatnonzero(is_blue.any(0))[[0, -1]]
    side = bottom - top + 1
    original, stage = is_blue[top:, left:][:side, :side], is_blue[top:, right - side + 1 :][:side, :side]
    # A few dots along the edges belong to the frame and the outline.
    inner, far = slice(4, side // 2 - 4), slice(side // 2 + 4, side - 4)
    assert original[4:-4, 4:-4].all()
    assert not stage[inner, inner].any()
    assert stage[inner, far].all()
    assert stage[far, inner].all()
    assert stage[far, far].all()


def test_dropped_patch_shows_on_an_image_of_the_colour_of_the_wash(tmp_path):
    grey = np.full((1, 3, 32, 32), WASH)
    pictures = []
    for name, source in (("all", np.arange(4)[None]), ("three", SOURCE)):
        path = tmp_path / f"{name}.png"
        plot_patches(grey, [source], (2, 2), titles=["grey"], stage_names=["stage"], path=path)
        pictures.append(png(path))
    changed = (pictures[0] != pictures[1]).any(-1)
    assert changed[: changed.shape[0] // 2].sum() > 100


def test_photographs_still_fit_into_a_card(tmp_path):
    noise = np.random.default_rng(0).random((3, 3, 224, 224))
    sources = [np.tile(np.arange(196), (3, 1))] * 3
    path = tmp_path / "noise.png"
    plot_patches(noise, sources, (14, 14), titles=["a", "b", "c"], stage_names=["x", "y", "z"], path=path)
    png(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"images": np.zeros((1, 1, 8, 8))}, "`images`"),
        ({"images": np.zeros((0, 3, 8, 8))}, "`images`"),
        ({"grid": (3, 2)}, "`sources`"),
        ({"titles": []}, "`titles`"),
        ({"stage_names": ["one", "two"]}, "`stage_names`"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(tmp_path, change, named):
    given = {"images": np.zeros((1, 3, 8, 8)), "sources": [SOURCE], "grid": (2, 2), "titles": ["a"]}
    given |= {"stage_names": ["one"], "path": tmp_path / "never.png"} | change
    with pytest.raises(DataError, match=named):
        plot_patches(**given)
    assert not given["path"].exists()


def test_histogram_is_drawn_and_needs_images(tmp_path):
    kept = [np.array([50, 60, 64]), np.array([0, 9, 30])]
    plot_token_histogram(kept, 64, stage_names=["one", "two"], path=tmp_path / "tokens.png")
    assert len(np.unique(png(tmp_path / "tokens.png").reshape(-1, 3), axis=0)) > 10
    with pytest.raises(DataError, match="non-empty"):
        plot_token_histogram([np.array([])], 64, stage_names=["one"], path=tmp_path / "never.png")


@pytest.mark.parametrize("pruned", [row("pruned", 0.9, 11.0), row("pruned", 0.99, 31.0)])
def test_latency_against_accuracy_is_drawn(tmp_path, pruned):
    rows = [row("dense", 0.95, 20.0), pruned, row("random", 0.8, 11.0)]
    plot_latency_accuracy(rows, 8, tmp_path / "plot.png", target_ms=12.0)
    png(tmp_path / "plot.png")


def test_latency_plot_needs_two_models_timed_at_the_batch_size(tmp_path):
    with pytest.raises(DataError, match=r"batch size 1, got \{'dense': \[8\], 'pruned': \[8\]\}"):
        plot_latency_accuracy([row("dense", 0.9, 2.0), row("pruned", 0.9, 1.0)], 1, tmp_path / "never.png")
