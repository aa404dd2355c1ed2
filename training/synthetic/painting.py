"""Painting of synthetic scenes: one date of a layout under its own light, season, trees, shadows, cars and noise."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageEnhance, ImageFilter
from scipy import ndimage

from kcfi.training.synthetic.layout import (
    MARGIN,
    SUPERSAMPLING,
    Building,
    Frame,
    GroundKind,
    Layout,
    ObjectKind,
    Polygon,
    Shapes,
    SyntheticSettings,
    xy,
)
from kcfi.training.synthetic.textures import NOISE_SIZE, Array, Materials, TextureKind, crop_noise, noise_fields


@dataclass(frozen=True)
class Look:
    """How a date looks. Each field is one irrelevant change, named like its switch in `SyntheticSettings`.

    Attributes:
        light: Brightness, contrast, gamma, saturation, haze (grey level of black), and the gains of red, green, blue.
        season: Gains of red, green and blue of low vegetation, then of trees.
        trees: Seed of the jitter of single trees.
        shadows: Direction to the sun (radians in the image) and length of a villa's shadow in px.
        cars: Seed of the cars.
        noise: Seed and deviation (grey levels) of the sensor noise.
        blur: Deviation of the blur in px.
        shift: Displacement in px; (0, 0) at the after date.
        ground: Seed of the patches and of the state of empty lots.
    """

    light: tuple[float, ...]
    season: tuple[float, ...]
    trees: int
    shadows: tuple[float, float]
    cars: int
    noise: tuple[int, float]
    blur: float
    shift: tuple[float, float]
    ground: int


def _draw_look(rng: np.random.Generator) -> Look:
    """Draw one date's look, without shift."""
    dry = rng.uniform(-1, 1)  # -1 lush, 1 dry
    seeds = rng.integers(0, 2**31, 4).tolist()
    return Look(
        light=(
            rng.uniform(0.5, 1.2),
            rng.uniform(0.75, 1.4),
            rng.uniform(0.75, 1.3),
            rng.uniform(0.4, 1.3),
            max(0.0, rng.uniform(-20, 35)),
            *rng.uniform(0.93, 1.07, 3).tolist(),
        ),
        season=(1 + 0.1 * dry, 1 - 0.03 * dry, 1 - 0.03 * dry, 1 + 0.1 * dry, 1.0, 1 + 0.03 * dry),
        trees=seeds[0],
        shadows=(rng.uniform(0.12, 0.88) * math.pi, rng.uniform(3, 9)),  # the sun stands in the south, image bottom
        cars=seeds[1],
        noise=(seeds[2], rng.uniform(1.0, 5.0)),
        blur=float(rng.choice([0.0, rng.uniform(0.3, 1.2)])),
        shift=(0.0, 0.0),
        ground=seeds[3],
    )


def draw_looks(rng: np.random.Generator, settings: SyntheticSettings) -> tuple[Look, Look]:
    """Draw the looks of both dates; what is switched off in the settings is taken from the after date."""
    before, after = _draw_look(rng), _draw_look(rng)
    dx, dy = rng.uniform(-settings.max_shift, settings.max_shift, 2).tolist()
    before = replace(before, shift=(dx, dy))
    off = [field.name for field in fields(Look) if not getattr(settings, field.name)]
    return replace(before, **{name: getattr(after, name) for name in off}), after


@dataclass(frozen=True)
class _Crowns:
    """A cached wood of NOISE_SIZE px on a side in which every tree may be kept or left out.

    Attributes:
        owner: Index of the tree whose crown covers a pixel.
        height: 1 at the middle of the crown, 0 at its edge, below 0 outside.
        light: Brightness of the leaves under a high sun, 1 on average; every tree has its own green.
        slope: Gradient of the crowns' surface, (2, NOISE_SIZE, NOISE_SIZE): x, y.
        x: Centre of each crown.
        y: Centre of each crown.
        radius: Radius of each crown in px.
        rank: In [0, 1]: a tree is kept where the woodedness exceeds its rank.
    """

    owner: NDArray[np.int64]
    height: Array
    light: Array
    slope: Array
    x: NDArray[np.int64]
    y: NDArray[np.int64]
    radius: Array
    rank: Array


@lru_cache(maxsize=1)
def _crowns() -> _Crowns:
    rng = np.random.default_rng(1)
    spacing = 10
    grid = np.stack(np.meshgrid(*[np.arange(0, NOISE_SIZE, spacing)] * 2), -1).reshape(-1, 2)
    centres = (grid + rng.integers(0, spacing, grid.shape)).clip(0, NOISE_SIZE - 1)
    radius = rng.uniform(2.8, 6.5, len(grid)) + 5 * rng.random(len(grid)) ** 5
    owner = np.zeros((NOISE_SIZE, NOISE_SIZE), np.int64)
    height = np.full((NOISE_SIZE, NOISE_SIZE), -1.0, np.float32)
    rough = 1 + 0.22 * noise_fields()["clumps"]
    for i, ((x, y), r) in enumerate(zip(centres.tolist(), radius.tolist(), strict=True)):
        reach = int(r * 1.6) + 1
        rows, columns = slice(max(0, y - reach), y + reach + 1), slice(max(0, x - reach), x + reach + 1)
        v, u = np.mgrid[rows, columns][:, : NOISE_SIZE - rows.start, : NOISE_SIZE - columns.start]
        dome = 1 - ((u - x) ** 2 + (v - y) ** 2) / r**2 * rough[rows, columns][: v.shape[0], : v.shape[1]] ** 2
        higher = dome > height[rows, columns]
        owner[rows, columns][higher] = i
        height[rows, columns][higher] = dome[higher]
    relief = ndimage.gaussian_filter(height.clip(0), 0.7) * 5 + 0.35 * noise_fields()["clumps"]
    slope = np.stack([np.gradient(relief, axis=1), np.gradient(relief, axis=0)]).astype(np.float32)
    crowd = noise_fields()["blobs"][centres[:, 1], centres[:, 0]] + 0.5 * rng.standard_normal(
        len(grid)
    )  # trees grow in groups
    rank = crowd.argsort().argsort() / len(grid)
    light = ((0.85 + 0.3 * rng.random(len(grid)))[owner] * (0.8 + 0.25 * height)).astype(np.float32)
    return _Crowns(
        owner, height, light, slope, centres[:, 0], centres[:, 1], radius.astype(np.float32), rank.astype(np.float32)
    )


@dataclass
class Window:
    """Where a scene's random fields are cut from the cached ones, the same at both dates."""

    crowns: tuple[slice, slice]  # rows, columns
    edges: Array


def draw_window(rng: np.random.Generator, canvas: int) -> Window:
    """Choose the windows of a scene."""
    x, y = rng.integers(0, NOISE_SIZE - canvas, 2).tolist()
    return Window((slice(y, y + canvas), slice(x, x + canvas)), crop_noise("clumps", canvas, rng))


def _mask(alpha: Array) -> Image.Image:
    """An alpha field in [0, 1] as a PIL mask."""
    return Image.fromarray((alpha.clip(0, 1) * 255).astype(np.uint8))


def _alpha(mask: Image.Image) -> Array:
    return np.asarray(mask, np.float32) / np.float32(255)


def _site(layout: Layout, window: Window) -> Array:
    """Alpha of the ground around all changing objects, with a ragged edge."""
    shapes = Shapes(layout.canvas)
    for road in layout.roads:
        if road.changing:
            shapes.road(road, 12)
    for building in layout.buildings:
        if building.changing:
            b = building.bounds
            shapes.polygon(building.lot)
            shapes.polygon(building.frame.box(b.u0 - 9, b.u1 + 9, b.v0 - 9, b.v1 + 9))
    soft = _alpha(
        shapes.image.reduce(8).filter(ImageFilter.BoxBlur(1)).resize((layout.canvas,) * 2, Image.Resampling.BILINEAR)
    )
    return ((soft - 0.5 + 0.12 * window.edges) * 8 + 0.5).clip(0, 1)


def _ground_layers(layout: Layout, state: int, look: Look, window: Window) -> list[tuple[GroundKind, Array]]:
    """What covers the ground below roads, buildings and trees, from the bottom up, with alphas (canvas, canvas)."""
    rng = np.random.default_rng(look.ground)
    canvas = layout.canvas
    patches = crop_noise("blobs", canvas, rng)
    threshold = rng.uniform(0.7, 2.0)
    layers: list[tuple[GroundKind, Array]] = [(layout.patches, ((patches - threshold) * 3).clip(0, 1))]
    if state == 0 and layout.site == "soil":
        layers.append(("soil", _site(layout, window)))
    gardens, sites = Shapes(canvas), Shapes(canvas)
    for building in layout.present_buildings(state):
        if building.kind == "villa" and building.road >= 0:
            gardens.polygon(building.lot)
    for lot in layout.empty_lots:
        (sites if rng.random() < 0.6 else gardens).polygon(lot)
    ragged = 0.25 * window.edges
    for kind, shapes in ((layout.garden, gardens), ("soil", sites)):
        if shapes.image.getbbox():
            alpha = _alpha(shapes.smooth())
            layers.append((kind, (alpha * (0.9 + ragged)).clip(0, 1)))
    return layers


def _trees(layout: Layout, state: int, look: Look, window: Window) -> Array:
    """Alpha of the crowns, (canvas, canvas). Trees keep off what is built."""
    canvas, crowns = layout.canvas, _crowns()
    built, lots = Shapes(canvas), Shapes(canvas)
    for road in layout.present_roads(state):
        built.road(road, 2)
    for building in layout.present_buildings(state):
        for polygon in building.footprint():
            built.polygon(polygon)
        if building.driveway is not None:
            built.polygon(building.driveway)
        (lots if building.kind == "villa" else built).polygon(building.lot)
    for lot in layout.empty_lots:
        lots.polygon(lot)
    if layout.pond is not None:
        built.polygon(layout.pond)
    wooded = layout.woodedness
    if state == 0 and layout.site != "ground":
        wooded = np.where(_site(layout, window) > 0.5, np.float32(0.97 if layout.site == "woods" else 0.02), wooded)
    wooded = np.where(lots.sharp() > 0, np.minimum(wooded, 0.14), wooded)
    coarse = np.asarray(built.image)[:: 2 * SUPERSAMPLING, :: 2 * SUPERSAMPLING]
    clearance = 2 * ndimage.distance_transform_edt(coarse == 0)

    x, y = crowns.x - window.crowns[1].start, crowns.y - window.crowns[0].start
    near = np.flatnonzero((x > -12) & (x < canvas + 12) & (y > -12) & (y < canvas + 12))
    x, y = x[near].clip(0, canvas - 1), y[near].clip(0, canvas - 1)
    rng = np.random.default_rng(look.trees)
    density = wooded[y, x] * rng.uniform(0.75, 1.25, len(near))
    kept = (density > crowns.rank[near]) & (clearance[y // 2, x // 2] >= 0.6 * crowns.radius[near])
    edge = np.ones(len(crowns.rank), np.float32)  # height at which a crown ends: 0 = full grown, 1 = no tree
    edge[near] = np.where(kept, rng.uniform(0, 0.22, len(near)), 1)
    rows, columns = window.crowns
    return ((crowns.height[rows, columns] - edge[crowns.owner[rows, columns]]) * 4).clip(0, 1)


@dataclass(frozen=True)
class Cover:
    """What covers the ground at one date, all alphas (canvas, canvas).

    Attributes:
        layers: Kinds of ground over `Layout.ground`, from the bottom up.
        trees: Alpha of the crowns.
    """

    layers: list[tuple[GroundKind, Array]]
    trees: Array


def draw_cover(layout: Layout, state: int, look: Look, window: Window) -> Cover:
    """Ground and trees of one date."""
    return Cover(_ground_layers(layout, state, look, window), _trees(layout, state, look, window))


def _scaled(image: Image.Image, gains: Sequence[float] | NDArray[np.float64]) -> Image.Image:
    """Multiply the three channels of an RGB image by their gains."""
    ramp = np.arange(256)
    return image.point(np.concatenate([ramp * gain for gain in gains]).clip(0, 255).astype(np.uint8).tolist())


class Painter:
    """Paints the dates of one scene: textures are drawn once, so that both dates show the same place."""

    def __init__(self, layout: Layout, window: Window, materials: Materials, rng: np.random.Generator) -> None:
        self.layout, self.window, self.materials = layout, window, materials
        self.seed = int(rng.integers(2**31))
        self.textures: dict[TextureKind, Image.Image] = {}

    def texture(self, kind: TextureKind) -> Image.Image:
        """The scene's texture of a kind; a texture has its own seed, so that no other one moves it."""
        if kind not in self.textures:
            rng = np.random.default_rng((self.seed, get_args(TextureKind).index(kind)))
            self.textures[kind] = self.materials.texture(kind, self.layout.canvas, rng)
        return self.textures[kind]

    def vegetation(self, kind: TextureKind, look: Look) -> Image.Image:
        """A texture in the colour of the season (soil keeps its own)."""
        if kind == "soil":
            return self.texture(kind)
        return _scaled(self.texture(kind), look.season[3:] if kind == "woods" else look.season[:3])

    def paint(self, state: int, look: Look, cover: Cover) -> Image.Image:
        """The image of one date, (image_size, image_size)."""
        layout, trees = self.layout, cover.trees
        picture = self.vegetation(layout.ground, look).copy()
        for kind, alpha in cover.layers:
            picture.paste(self.vegetation(kind, look), mask=_mask(alpha))
        self._paint_paved(picture, state, look)
        self._paint_details(picture, state, look)
        buildings = layout.present_buildings(state)
        roofs = {kind: _footprints(layout.canvas, [b for b in buildings if b.kind == kind]) for kind in ROOFS}
        self._paint_shadows(picture, look, trees, list(roofs.values()))
        self._paint_roofs(picture, buildings, roofs, look)
        self._paint_trees(picture, look, trees)  # crowns hang over eaves and roads
        return photograph(picture, look)

    def _paint_paved(self, picture: Image.Image, state: int, look: Look) -> None:
        """Water, roads with curbs, driveways and parking lots."""
        layout = self.layout
        shapes: dict[TextureKind, Shapes] = {
            kind: Shapes(layout.canvas) for kind in ("water", "dirt", "parking", "concrete", "asphalt")
        }
        islands = Shapes(layout.canvas)
        if layout.pond is not None:
            shapes["water"].polygon(layout.pond)
        roads = layout.present_roads(state)
        for road in roads:
            shapes["dirt" if road.dirt else "asphalt"].road(road)
            if not road.dirt:
                shapes["concrete"].road(road, 1.5)
        for building in layout.present_buildings(state):
            if building.driveway is not None:
                shapes["concrete"].polygon(building.driveway)
            if building.kind == "large building":
                shapes["parking"].polygon(building.lot)
        islands.islands(roads, 255)
        for kind, drawn in shapes.items():
            if drawn.image.getbbox():
                picture.paste(self.texture(kind), mask=drawn.smooth())
        if islands.image.getbbox():
            picture.paste(self.vegetation("grass", look), mask=islands.smooth())

    def _paint_details(self, picture: Image.Image, state: int, look: Look) -> None:
        """Road markings, fences, parking bays, pools and cars."""
        layout = self.layout
        colours = Shapes(layout.canvas, "RGB")
        mask = Shapes(layout.canvas)
        cars = np.random.default_rng(look.cars)

        def both(points: Polygon, colour: tuple[int, int, int], opacity: int = 255) -> None:
            colours.polygon(points, colour)
            mask.polygon(points, opacity)

        def car(frame: Frame, u: float, v: float) -> None:
            body = _CAR_COLOURS[int(cars.integers(len(_CAR_COLOURS)))]
            half = cars.uniform(4.0, 5.2)
            both(frame.box(u - 2.1, u + 2.1, v - half, v + half), body)
            both(frame.box(u - 1.7, u + 1.7, v - 0.45 * half, v - 0.1 * half), (40, 44, 50))

        for road in layout.present_roads(state):
            if road.dirt:
                continue
            if road.width > 18:
                for at in range(0, len(road.points) - 2, 4):
                    colours.line(road.points[at : at + 3], (214, 206, 170), 0.7)
                    mask.line(road.points[at : at + 3], 200, 0.7)
            for at in np.flatnonzero(cars.random(len(road.points)) < 0.018).tolist():
                frame = Frame(*xy(road.points[at]), road.headings[at] + math.pi / 2)
                car(frame, cars.choice([-1, 1]) * (road.width / 2 - 3.4), 0)
        for building in layout.present_buildings(state):
            if building.kind == "villa":
                self._paint_garden(colours, mask, building)
                if building.driveway is not None and cars.random() < 0.4:
                    middle = building.driveway.mean(0)
                    car(Frame(*xy(middle), building.frame.angle), cars.uniform(-1, 1), cars.uniform(-2, 2))
                continue
            frame, lot = building.frame, building.frame.local(building.lot)
            (u0, v0), (u1, v1) = lot[0].tolist(), lot[2].tolist()
            rows = [v0 + 7] if building.bounds.v0 - v0 > 12 else []
            rows += [building.bounds.v0 - 7] if building.bounds.v0 - v0 > 24 else []
            rows += np.arange(v0 + 24, building.bounds.v0 - 30, 17).tolist()
            rows += [v1 - 6] if v1 - building.bounds.v1 > 12 else []
            busy = cars.uniform(0.1, 0.7)
            for v in rows:
                for u in np.arange(u0 + 4, u1 - 8, 6):
                    both(frame.box(u - 0.3, u + 0.3, v - 5, v + 5), (215, 215, 210), 190)
                    if cars.random() < busy:
                        car(frame, u + 3, v)
        picture.paste(colours.smooth(), mask=mask.smooth())

    def _paint_garden(self, colours: Shapes, mask: Shapes, villa: Building) -> None:
        if villa.pool is not None:
            colours.polygon(villa.pool, (96, 170, 190))
            mask.polygon(villa.pool, 255)
        if villa.road >= 0 and villa.hip != 0.55:
            fence = villa.lot[[1, 2, 3, 0]].copy()  # along the back, half way down the sides
            fence[0], fence[3] = (fence[0] + fence[1]) / 2, (fence[2] + fence[3]) / 2
            colours.line(fence, (62, 54, 46), 1)
            mask.line(fence, 170, 1)

    def _paint_shadows(self, picture: Image.Image, look: Look, trees: Array, roofs: Sequence[Image.Image]) -> None:
        """Darken what the buildings and the crowns hide from the sun."""
        direction, length = look.shadows
        casting = trees
        for roof in roofs:
            casting = np.maximum(casting, _alpha(roof))
        shade = np.zeros_like(trees)
        for step in (0.3, 0.65, 1.0):
            dx, dy = (round(-way(direction) * length * step) for way in (math.cos, math.sin))
            shade = np.maximum(shade, _moved(casting, dx, dy))
        picture.paste((22, 26, 38), mask=_mask(shade * 0.62))

    def _paint_trees(self, picture: Image.Image, look: Look, trees: Array) -> None:
        if not trees.any():
            return
        rows, columns = self.window.crowns
        crowns = _crowns()
        direction = look.shadows[0]
        east, south = np.float32(-0.32 * math.cos(direction)), np.float32(-0.32 * math.sin(direction))
        slope = crowns.slope[:, rows, columns]
        light = crowns.light[rows, columns] + east * slope[0] + south * slope[1]  # slopes that face the sun are bright
        leaves = _lit(self.vegetation("woods", look), (light * 128).clip(38, 255).astype(np.uint16)[..., None])
        picture.paste(leaves, mask=_mask(trees))

    def _paint_roofs(
        self, picture: Image.Image, buildings: list[Building], roofs: dict[ObjectKind, Image.Image], look: Look
    ) -> None:
        if not buildings:
            return
        shading = Shapes(self.layout.canvas, "RGB", (128, 128, 128))  # gain of the texture x 128
        for building in buildings:
            for polygon, light in _facets(building, look.shadows[0]):
                shading.polygon(polygon, tuple(min(255, round(128 * light * gain)) for gain in building.tint))
        texture = self.texture("villa roof").copy()
        if roofs["large building"].getbbox():
            texture.paste(self.texture("large roof"), mask=roofs["large building"])
        for index, building in enumerate(self.layout.buildings):  # those that are not there are not covered either
            rng = np.random.default_rng((self.seed, len(get_args(TextureKind)), index))
            roof = self.materials.roof(ROOFS[building.kind], rng)
            if roof is not None and rng.random() < REAL_ROOFS:
                _lay_roof(texture, roof, building)
        covered = ImageChops.lighter(roofs["villa"], roofs["large building"])
        picture.paste(_lit(texture, np.asarray(shading.smooth(), np.uint16)), mask=covered)


def _lay_roof(texture: Image.Image, roof: Image.Image, building: Building) -> None:
    """Stretch a roof over the bounds of a building, long side along long side."""
    bounds, frame = building.bounds, building.frame
    width, height = bounds.u1 - bounds.u0, bounds.v1 - bounds.v0
    if (roof.width > roof.height) != (width > height):
        roof = roof.transpose(Image.Transpose.ROTATE_90)
    corners = frame.box(bounds.u0, bounds.u1, bounds.v0, bounds.v1)
    (x0, y0), (x1, y1) = np.floor(corners.min(0)).astype(int).tolist(), np.ceil(corners.max(0)).astype(int).tolist()
    cos, sin = math.cos(frame.angle), math.sin(frame.angle)
    across, down = roof.width / width, roof.height / height
    x, y = x0 - frame.x, y0 - frame.y  # of the pasted box's corner, from the origin of the building's frame
    to_roof = (
        *(across * cos, across * sin, across * (x * cos + y * sin - bounds.u0)),
        *(-down * sin, down * cos, down * (y * cos - x * sin - bounds.v0)),
    )
    laid = roof.transform((x1 - x0, y1 - y0), Image.Transform.AFFINE, to_roof, Image.Resampling.BILINEAR)
    texture.paste(laid.convert("RGB"), (x0, y0), laid.getchannel("A"))


def _lit(texture: Image.Image, light: NDArray[np.uint16]) -> Image.Image:
    """A texture under light: gain x 128, (H, W, 1) or (H, W, 3)."""
    return Image.fromarray(np.minimum((np.asarray(texture) * light) >> 7, 255).astype(np.uint8))


ROOFS: dict[ObjectKind, TextureKind] = {"villa": "villa roof", "large building": "large roof"}


def _footprints(canvas: int, buildings: list[Building]) -> Image.Image:
    """Mask of the ground that buildings cover."""
    shapes = Shapes(canvas)
    for building in buildings:
        for polygon in building.footprint():
            shapes.polygon(polygon)
    return shapes.smooth()


REAL_ROOFS = 0.6  # of the buildings, where the materials have roofs; the others keep the drawn, hipped ones

_CAR_COLOURS = (
    (225, 225, 225),
    (196, 198, 200),
    (60, 62, 66),
    (34, 36, 40),
    (120, 36, 34),
    (52, 70, 112),
    (140, 140, 138),
)


def _moved(field: Array, dx: int, dy: int) -> Array:
    """A field displaced by whole pixels; 0 enters at the border."""
    moved = np.zeros_like(field)
    height, width = field.shape
    moved[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = field[
        max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)
    ]
    return moved


def _facets(building: Building, sun: float) -> Iterator[tuple[Polygon, float]]:
    """The faces of a building's roofs with their light (1 = flat ground), wings first."""
    frame = building.frame

    def light(u: float, v: float, steep: float = 0.34) -> float:
        """Light on a slope that falls towards (u, v)."""
        towards = frame.angle + math.atan2(v, u)
        return 1 + steep * math.cos(towards - sun)

    for box in building.boxes[::-1]:
        u0, u1, v0, v1 = box.u0, box.u1, box.v0, box.v1
        if building.hip < 0:  # flat, with a parapet and machines
            yield frame.box(u0, u1, v0, v1), 1.12
            yield frame.box(u0 + 1.5, u1 - 1.5, v0 + 1.5, v1 - 1.5), 1.0
            for step in range(3):
                u = u0 + (u1 - u0) * (0.2 + 0.27 * step)
                v = v0 + (v1 - v0) * (0.35 + 0.13 * ((step * 7) % 3))
                yield frame.box(u, u + 3, v, v + 2.4), 0.62
                yield frame.box(u + 1, u + 3.6, v - 0.6, v + 1.6), 1.18
            continue
        steep = 0.34 if building.kind == "villa" else 0.1
        run = building.hip * min(u1 - u0, v1 - v0) / 2  # from the gable to the end of the ridge
        if u1 - u0 >= v1 - v0:
            a, b = (u0 + run, (v0 + v1) / 2), (u1 - run, (v0 + v1) / 2)
            yield frame.place((u0, v0), (u1, v0), b, a), light(0, -1, steep)
            yield frame.place((u0, v1), (u1, v1), b, a), light(0, 1, steep)
            ends = [((u0, v0), (u0, v1), a, -1.0), ((u1, v0), (u1, v1), b, 1.0)]
            faces = [(frame.place(p, q, top), light(way, 0, steep)) for p, q, top, way in ends]
        else:
            a, b = ((u0 + u1) / 2, v0 + run), ((u0 + u1) / 2, v1 - run)
            yield frame.place((u0, v0), (u0, v1), b, a), light(-1, 0, steep)
            yield frame.place((u1, v0), (u1, v1), b, a), light(1, 0, steep)
            ends = [((u0, v0), (u1, v0), a, -1.0), ((u0, v1), (u1, v1), b, 1.0)]
            faces = [(frame.place(p, q, top), light(0, way, steep)) for p, q, top, way in ends]
        if run:
            yield from faces


def photograph(picture: Image.Image, look: Look) -> Image.Image:
    """Photograph a painted canvas: registration shift, light, blur, noise; returns the image without its margin."""
    size = picture.width - 2 * MARGIN
    x, y = MARGIN - look.shift[0], MARGIN - look.shift[1]
    box = (x, y, x + size, y + size)
    if look.shift == (0, 0):
        picture = picture.crop(box)
    else:
        picture = picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
    brightness, contrast, gamma, saturation, haze, *gains = look.light
    ramp = (np.arange(256) / 255) ** gamma
    ramp = haze + (255 - haze) * brightness * (0.42 + contrast * (ramp - 0.42)).clip(min=0)
    curve = np.concatenate([ramp * gain for gain in gains]).clip(0, 255).astype(np.uint8)
    picture = ImageEnhance.Color(picture.point(curve.tolist())).enhance(saturation)
    if look.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(look.blur))
    seed, strength = look.noise
    rng = np.random.default_rng(seed)
    grain = Image.fromarray((crop_noise("fine", size, rng) * strength + 128).clip(0, 255).astype(np.uint8))
    return ImageChops.add(picture, Image.merge("RGB", [grain] * 3), offset=-128)
