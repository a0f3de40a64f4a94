"""Meshes stand where the field stands, true north along +y; videos and images are whole files."""

import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh

from gps_guidance.lift import export
from gps_guidance.lift.cameras import bearing_from_c2w

PISA = (43.722952, 10.396597)


class BoxField(torch.nn.Module):
    """Density 10 in an axis-aligned box, its left part red and its right part blue."""

    def __init__(self, low, high, split_x=0.0, radius=1.0, **settings):
        super().__init__()
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))
        self.split_x = split_x
        self.cfg = SimpleNamespace(**{"radius": radius, "isosurface_resolution": 41,
                                      "isosurface_threshold": 5.0, **settings})

    def forward_density(self, points):
        inside = ((points > self.low) & (points < self.high)).all(-1, keepdim=True)
        return 10.0 * inside.float()

    def forward(self, points, output_normal=False):
        red = (points[..., :1] < self.split_x).float()
        rgb = torch.cat([red, torch.zeros_like(red), 1 - red], dim=-1)
        return {"density": self.forward_density(points), "features": (rgb - 0.5) * 40}


def north_east_box(**settings):
    """Its faces lie halfway between nodes, where marching cubes finds them exactly."""
    return BoxField([0.225, 0.425, -0.875], [0.475, 0.775, 0.075], 0.35, **settings)


def test_a_box_in_the_north_east_lands_at_plus_x_plus_y():
    mesh = export.extract_mesh(north_east_box())
    assert mesh.bounds[0] == pytest.approx([0.225, 0.425, -0.875], abs=1e-6)
    assert mesh.bounds[1] == pytest.approx([0.475, 0.775, 0.075], abs=1e-6)
    assert mesh.is_watertight
    # positive: faces look outward; marching cubes cuts the edges off
    assert mesh.volume == pytest.approx(0.25 * 0.35 * 0.95, rel=0.05)


def test_vertex_colours_are_the_fields():
    mesh = export.extract_mesh(north_east_box())
    west = mesh.vertices[:, 0] < 0.3
    east = mesh.vertices[:, 0] > 0.4
    assert (mesh.visual.vertex_colors[west] == [255, 0, 0, 255]).all()
    assert (mesh.visual.vertex_colors[east] == [0, 0, 255, 255]).all()


@pytest.mark.parametrize("offset", [0.0, 30.0, -90.0, 180.0])
def test_the_mesh_turns_to_true_north_as_the_cameras_do(offset):
    """A camera on the field's axis has some bearing; the same point of the mesh has it too."""
    turn = export.rotation_to_true_north(offset)
    for azimuth in (0.0, 70.0, 200.0):
        point = np.array([np.cos(np.radians(azimuth)), np.sin(np.radians(azimuth)), 0.3])
        c2w = torch.eye(4, dtype=torch.float64)[None]
        c2w[0, :3, 3] = torch.from_numpy(point)
        bearing = float(bearing_from_c2w(c2w, offset)[0])
        east, north, up = turn @ point
        difference = np.degrees(np.arctan2(east, north)) - bearing
        assert (difference + 180) % 360 - 180 == pytest.approx(0.0, abs=1e-6)
        assert up == 0.3


def test_a_surface_that_leaves_the_box_is_closed():
    mesh = export.extract_mesh(BoxField([-2.0, -2.0, -2.0], [2.0, 2.0, 0.0]))
    assert mesh.is_watertight
    assert mesh.bounds[0] == pytest.approx([-1, -1, -1])
    assert mesh.bounds[1] == pytest.approx([1, 1, 0], abs=0.05)


def test_specks_are_removed_and_large_parts_stay():
    class TwoBoxes(BoxField):
        def forward_density(self, points):
            speck = (points - 0.9).norm(dim=-1, keepdim=True) < 0.03
            return super().forward_density(points) + 10.0 * speck

    field = TwoBoxes([-0.5, -0.5, -0.5], [0.5, 0.5, 0.5],
                     isosurface_outlier_n_faces_threshold=0.01)
    assert export.extract_mesh(field).bounds[1].max() < 0.6
    field.cfg.isosurface_remove_outliers = False
    assert export.extract_mesh(field).bounds[1].max() > 0.8


def test_a_threshold_outside_the_field_is_refused_and_auto_is_the_mean():
    with pytest.raises(ValueError, match="no surface at density 20: it spans 0 to 10"):
        export.extract_mesh(north_east_box(isosurface_threshold=20.0))
    volume = np.zeros((3, 3, 3), np.float32)
    volume[1, 1, 1], volume[1, 1, 2] = 2.0, 4.0
    assert export.iso_level(volume, "auto") == 3.0
    with pytest.raises(ValueError, match="no surface"):
        export.iso_level(np.zeros((3, 3, 3), np.float32), "auto")


def glb_scene(path):
    data = path.read_bytes()
    length = struct.unpack("<I", data[12:16])[0]
    tree = json.loads(data[20:20 + length])
    return tree["scenes"][tree.get("scene", 0)]


def test_glb_says_where_it_stands(tmp_path):
    place = export.Placement("Leaning Tower of Pisa", PISA)
    path = export.write_mesh(export.extract_mesh(north_east_box(), placement=place),
                             tmp_path / "mesh.glb")
    extras = glb_scene(path)["extras"]
    assert extras["up"] == "+z" and extras["north"] == "+y" and extras["east"] == "+x"
    assert (extras["center_lat_deg"], extras["center_lon_deg"]) == PISA
    assert extras["landmark"] == "Leaning Tower of Pisa"
    back = trimesh.load(path, force="mesh")
    assert back.bounds[0] == pytest.approx([0.225, 0.425, -0.875], abs=1e-5)
    assert len(np.unique(back.visual.vertex_colors, axis=0)) >= 2


def test_obj_keeps_colours_and_the_placement(tmp_path):
    place = export.Placement("Leaning Tower of Pisa", PISA)
    path = export.write_mesh(export.extract_mesh(north_east_box(), placement=place),
                             tmp_path / "mesh.obj")
    text = path.read_text()
    assert text.startswith("#") and "center_lat_deg: 43.722952" in text.splitlines()[0]
    assert len(next(line for line in text.splitlines() if line.startswith("v ")).split()) == 7
    with pytest.raises(ValueError, match=".glb or .obj"):
        export.write_mesh(trimesh.creation.box(), tmp_path / "mesh.stl")


def test_video_of_odd_size_has_every_frame(tmp_path):
    import imageio.v2 as imageio

    frames = [np.full((9, 15, 3), shade, np.uint8) for shade in (0, 120, 240)]
    path = export.write_video(iter(frames), tmp_path / "turn.mp4", fps=10)
    back = imageio.mimread(path, memtest=False)
    assert len(back) == 3 and back[0].shape == (10, 16, 3)
    assert [float(frame.mean()) for frame in back] == pytest.approx([0, 120, 240], abs=12)
    with pytest.raises(ValueError, match="no frame"):
        export.write_video([], tmp_path / "none.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["turn.mp4"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError), export.staged(path) as stage:
        stage.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with export.staged(path) as stage:
        stage.write_text("new")
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_images_round_and_join(tmp_path):
    assert export.to_uint8(torch.tensor([[[0.0], [0.5], [2.0]]])).tolist() == [
        [[0] * 3, [128] * 3, [255] * 3]]
    joined = export.side_by_side([torch.zeros(2, 3, 3), torch.ones(2, 4, 1)])
    assert joined.shape == (2, 7, 3) and joined[:, 3:].min() == 255
    grid = export.image_grid([np.full((2, 2, 3), i, np.uint8) for i in range(3)], columns=2)
    assert grid[:, :, 0].tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 255, 255]] * 2
    assert (export.read_png(export.write_png(tmp_path / "x" / "a.png", grid)) == grid).all()
