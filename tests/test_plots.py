"""Image grids: what they show, what they refuse, and that figures can be stored and do not stay open."""

import matplotlib.image
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from ebm_ppl import plots
from ebm_ppl.diagnostics import to_datatree
from ebm_ppl.sampling import Draws


def pictures(figure):
    """The arrays that a figure shows, in the order of its axes."""
    return [np.asarray(image.get_array(), float) for axes in figure.axes for image in axes.get_images()]


def stack(count, *, value=0.0, height=4, width=3):
    return np.full((count, height, width), value)


def run(position, potential=None, **groups):
    """A tree of draws at the given positions, as if some kernel had made them."""
    shape = position.shape[:2]
    energy = 0.5 * (position.reshape(*shape, -1) ** 2).sum(axis=-1) if potential is None else potential
    zeros = np.zeros(shape, int)
    draws = Draws(position, energy, np.ones(shape), zeros > 0, zeros + 1, np.zeros(shape), zeros, zeros, {})
    return to_datatree(draws, **groups)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (6, 3, 2), (7, 3, 3), (2, 5, 1)])
def test_grid_has_a_cell_per_image_and_gutters_between(count, columns, rows):
    figure = plots.image_grid(stack(count), columns=columns)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 1
    (picture,) = pictures(figure)
    assert picture.shape[:2] == (rows * 5 - 1, columns * 4 - 1)


def test_grid_puts_every_image_where_it_belongs():
    images = np.random.default_rng(0).uniform(-1.0, 1.0, size=(5, 4, 3))
    (picture,) = pictures(plots.image_grid(images, columns=3))
    for index, image in enumerate(images):
        row, column = divmod(index, 3)
        cell = picture[row * 5 : row * 5 + 4, column * 4 : column * 4 + 3]
        for channel in range(3):
            np.testing.assert_allclose(cell[..., channel], (image + 1.0) / 2.0, atol=1e-6)


def test_grid_maps_vmin_to_black_and_vmax_to_white_and_clips():
    images = np.array([0.0, 5.0, 10.0, -3.0, 99.0])[:, None, None] * np.ones((1, 2, 2))
    (picture,) = pictures(plots.image_grid(images, columns=5, vmin=0.0, vmax=10.0))
    np.testing.assert_allclose(picture[0, ::3, 0], [0.0, 0.5, 1.0, 0.0, 1.0], atol=1e-6)


def test_missing_pixels_are_no_shade_of_grey():
    images = stack(2)
    images[1, 0, 0] = np.nan
    (picture,) = pictures(plots.image_grid(images, columns=2))
    assert np.ptp(picture[0, 4]) > 0.1
    assert np.ptp(picture[0, 0]) == 0.0


def test_grid_title():
    assert plots.image_grid(stack(2), title="digits").axes[0].get_title() == "digits"
    assert plots.image_grid(stack(2)).axes[0].get_title() == ""


@pytest.mark.parametrize("images", [np.zeros(()), np.zeros((4, 3)), np.zeros((0, 4, 3)), np.zeros((2, 0, 3))])
def test_what_is_not_a_stack_of_images_is_refused(images):
    for name, draw in (
        ("images", lambda: plots.image_grid(images)),
        ("data", lambda: plots.inpainting(images, stack(2), {"a": stack(2)})),
        ("negatives", lambda: plots.inpainting(stack(2), images, {"a": stack(2)})),
        (r"rows\['b'\]", lambda: plots.inpainting(stack(2), stack(2), {"a": stack(2), "b": images})),
    ):
        with pytest.raises(ValueError, match=name + r": got shape .*, expected \(image, height, width\)"):
            draw()


@pytest.mark.parametrize(("columns", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_columns_must_be_a_positive_number(columns, error):
    with pytest.raises(error, match="columns: got"):
        plots.image_grid(stack(2), columns=columns)
    with pytest.raises(error, match="columns: got"):
        plots.inpainting(stack(2), stack(2), {"a": stack(2)}, columns=columns)


def test_inpainting_has_two_grids_and_a_labelled_strip_per_row():
    rows = {"truth": stack(20, value=1.0), "masked": stack(20, value=np.nan), "filled in": stack(20, value=-1.0)}
    figure = plots.inpainting(stack(30), stack(30), rows, columns=6)
    assert len(figure.axes) == 5
    data, negatives, *strips = pictures(figure)
    assert data.shape == negatives.shape
    assert all(strip.shape[:2] == (4, 6 * 4 - 1) for strip in strips)
    assert [float(strip[0, 0, 0]) for strip in strips][::2] == [1.0, 0.0]
    labels = [text.get_text() for axes in figure.axes[2:] for text in axes.texts]
    assert labels == list(rows)
    assert figure.axes[0].get_title() == "data"
    assert "negatives" in figure.axes[1].get_title()


def test_inpainting_without_rows_is_refused():
    with pytest.raises(ValueError, match="rows: got none"):
        plots.inpainting(stack(2), stack(2), {})


def test_grid_of_a_tree_shows_the_last_draw_of_every_chain():
    position = np.random.default_rng(0).uniform(-1.0, 1.0, size=(6, 5, 4, 3))
    expected = pictures(plots.image_grid(position[:, -1], columns=3))[0]
    np.testing.assert_array_equal(pictures(plots.image_grid(run(position), columns=3))[0], expected)
    flat = run(position.reshape(6, 5, 12))
    np.testing.assert_array_equal(pictures(plots.image_grid(flat, columns=3, shape=(4, 3)))[0], expected)
    for shape in (None, (5, 3)):
        with pytest.raises(ValueError, match=r"images: got shape \(6, 12\), expected \(image, height, width\)"):
            plots.image_grid(flat, shape=shape)
    with pytest.raises(ValueError, match=r"group: got 'posterior', expected one of .*from_blackjax"):
        plots.image_grid(flat, group="posterior")


def test_no_figure_stays_open():
    """Otherwise a notebook shows each twice, and matplotlib warns at the twentieth."""
    before = pyplot.get_fignums()
    plots.image_grid(stack(2))
    plots.inpainting(stack(2), stack(2), {"a": stack(2)})
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_figures_can_be_stored(tmp_path, suffix):
    figures = {
        "grid": plots.image_grid(np.random.default_rng(0).uniform(-1.0, 1.0, size=(7, 4, 3)), title="t"),
        "inpainting": plots.inpainting(stack(20), stack(20), {"a": stack(12), "b": stack(3, value=np.nan)}),
    }
    for name, figure in figures.items():
        path = tmp_path / f"{name}.{suffix}"
        figure.savefig(path)
        assert path.stat().st_size > 1000
        if suffix == "png":
            assert np.ptp(matplotlib.image.imread(path)[..., :3]) > 0.5
