"""Layout of a synthetic scene: roads, villas, large buildings and woods of a place at 0.5 m/px, some of them changing.

Coordinates are pixels of a canvas that is the image plus `MARGIN` on each side, x to the right and y down. In a
building's own frame u runs along its front and v from the front (street side) to the back.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from kcfi.processing import InputError
from kcfi.training.synthetic.textures import Array, crop_noise

MARGIN = 4  # px drawn around the image, so that the registration shift never shows a border
SUPERSAMPLING = 2  # shapes are rasterised at this multiple and averaged down: smooth edges

Polygon = NDArray[np.float64]
GroundKind = Literal["grass", "field", "soil"]
ObjectKind = Literal["road", "villa", "large building"]


@dataclass(frozen=True)
class SyntheticSettings:
    """What may change in a pair. Every switch is on by default.

    Relevant changes reach mask and captions. Irrelevant ones are drawn in every pair; one that is switched off is
    shared by both dates (same light, same trees, ...).

    Attributes:
        image_size: Side of the images in pixels, at 0.5 m/px. 64 to 512.
        villas_appear: Villas may be built.
        villas_removed: Villas may be removed.
        large_buildings_appear: Large buildings may be built.
        large_buildings_removed: Large buildings may be removed.
        roads_appear: Roads may be built.
        roads_removed: Roads may be removed.
        light: Brightness, contrast, gamma, tint and saturation differ between the dates.
        season: The colour of the vegetation differs.
        trees: Single trees grow, appear or vanish.
        shadows: Direction of the sun and length of the shadows differ.
        cars: Cars move.
        noise: Sensor noise differs in strength and pattern.
        blur: Sharpness differs.
        shift: The before image is displaced by up to `max_shift` px; the mask is in the frame of the after image.
        ground: Patches of soil, grass and field come and go without any building.
        max_shift: Largest displacement along each axis, in pixels. 0 to 4.
    """

    image_size: int = 256
    villas_appear: bool = True
    villas_removed: bool = True
    large_buildings_appear: bool = True
    large_buildings_removed: bool = True
    roads_appear: bool = True
    roads_removed: bool = True
    light: bool = True
    season: bool = True
    trees: bool = True
    shadows: bool = True
    cars: bool = True
    noise: bool = True
    blur: bool = True
    shift: bool = True
    ground: bool = True
    max_shift: float = 2.0

    def __post_init__(self) -> None:
        if not 64 <= self.image_size <= 512:
            raise InputError(f"SyntheticSettings.image_size is {self.image_size}: choose 64 to 512 pixels")
        if not 0 <= self.max_shift <= MARGIN:
            raise InputError(f"SyntheticSettings.max_shift is {self.max_shift}: choose 0 to {MARGIN} pixels")

    def allows(self, kind: "ObjectKind", appears: bool) -> bool:
        """Whether objects of a kind may appear (True) or be removed (False)."""
        allowed = {
            ("villa", True): self.villas_appear,
            ("villa", False): self.villas_removed,
            ("large building", True): self.large_buildings_appear,
            ("large building", False): self.large_buildings_removed,
            ("road", True): self.roads_appear,
            ("road", False): self.roads_removed,
        }
        return allowed[kind, appears]

    def scenarios(self) -> list[tuple["Scenario", bool]]:
        """The scenarios that the relevant switches allow, each with True for appear and False for removed."""
        both = [(scenario, appears) for appears in (True, False) for scenario in SCENARIOS]
        return [(scenario, way) for scenario, way in both if all(self.allows(kind, way) for kind in scenario.kinds)]


@dataclass(frozen=True)
class Scenario:
    """A kind of relevant change: which objects change together, and how often it is drawn (relative weight)."""

    kinds: tuple[ObjectKind, ...]
    weight: float


# Houses along a new road and houses along an old one are LEVIR-CC's most frequent changes.
SCENARIOS = (
    Scenario(("road", "villa"), 0.34),
    Scenario(("villa",), 0.30),
    Scenario(("large building",), 0.16),
    Scenario(("road",), 0.11),
    Scenario(("road", "large building"), 0.09),
)
REMOVED_WEIGHT = 0.15  # how often a change is a removal, relative to the same change as an appearance


def xy(point: Polygon) -> tuple[float, float]:
    """A point (2,) as two floats."""
    return float(point[0]), float(point[1])


@dataclass(frozen=True)
class Disc:
    """A round place of a road (roundabout, end of a cul-de-sac) with an island of grass (radius 0 = none)."""

    x: float
    y: float
    radius: float
    island: float


@dataclass(frozen=True)
class Road:
    """A road: its centre line (N, 2) in steps of `ROAD_STEP` px, its heading at each point, its width in px."""

    points: Polygon
    headings: NDArray[np.float64]
    width: float
    dirt: bool
    discs: tuple[Disc, ...]
    changing: bool

    def outline(self, width: float) -> Polygon:
        """The strip of the given width along the centre line, as a polygon (2N, 2)."""
        normal = np.stack([-np.sin(self.headings), np.cos(self.headings)], -1) * (width / 2)
        return np.concatenate([self.points + normal, (self.points - normal)[::-1]])


@dataclass(frozen=True)
class Frame:
    """A place and a direction: local (u, v) to canvas (x, y). u points along `angle`, v a quarter turn clockwise."""

    x: float
    y: float
    angle: float

    def box(self, u0: float, u1: float, v0: float, v1: float) -> Polygon:
        """Corners of a box given in local coordinates, (4, 2) on the canvas."""
        return self.place((u0, v0), (u1, v0), (u1, v1), (u0, v1))

    def place(self, *points: tuple[float, float]) -> Polygon:
        """Local points as canvas points, (N, 2)."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return np.array([(self.x + u * cos - v * sin, self.y + u * sin + v * cos) for u, v in points])

    def local(self, points: Polygon) -> Polygon:
        """Canvas points (N, 2) as local points (N, 2)."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        shifted = points - (self.x, self.y)
        return np.stack([shifted @ (cos, sin), shifted @ (-sin, cos)], -1)


@dataclass(frozen=True)
class Box:
    """A rectangle in a building's frame."""

    u0: float
    u1: float
    v0: float
    v1: float


@dataclass(frozen=True)
class Building:
    """A villa or a large building.

    Attributes:
        kind: "villa" or "large building".
        frame: Centre and direction of its bounding box.
        bounds: Bounding box of its footprint, which is the union of `boxes`.
        boxes: Main part and wings, each under its own roof.
        hip: 1 = hipped roof, 0 = gable.
        tint: Gain of the roof texture per channel.
        lot: The ground that belongs to it: garden or parking.
        driveway: Concrete from the front to the road, or None.
        pool: A swimming pool in the garden, or None.
        road: Index of the road it stands along, -1 for none.
        side: 1 or -1, the side of that road.
        changing: Whether it comes or goes between the states.
        parking: Whether its lot is large enough for parked cars.
    """

    kind: ObjectKind
    frame: Frame
    bounds: Box
    boxes: tuple[Box, ...]
    hip: float
    tint: tuple[float, float, float]
    lot: Polygon
    driveway: Polygon | None
    pool: Polygon | None
    road: int
    side: int
    changing: bool
    parking: bool = False

    def footprint(self) -> list[Polygon]:
        """The polygons whose union the building covers."""
        return [self.frame.box(b.u0, b.u1, b.v0, b.v1) for b in self.boxes]


@dataclass(frozen=True)
class Layout:
    """Everything that stands at a place, in both states.

    Attributes:
        canvas: Side of the canvas in px.
        roads: Static ones first.
        buildings: Villas and large buildings.
        empty_lots: Building sites along roads on which nothing is ever built.
        ground: The kind that covers the place.
        patches: The kind of its patches.
        site: What covers the ground of changing objects in state 0.
        garden: What the lots of villas are covered with.
        woodedness: Share of ground under trees, (canvas, canvas).
        pond: A polygon of water, or None.
        appears: True if the changing objects are built, False if they are removed.
    """

    canvas: int
    roads: tuple[Road, ...]
    buildings: tuple[Building, ...]
    empty_lots: tuple[Polygon, ...]
    ground: GroundKind
    patches: GroundKind
    site: Literal["soil", "woods", "ground"]
    garden: GroundKind
    woodedness: Array
    pond: Polygon | None
    appears: bool

    def present_roads(self, state: int) -> list[Road]:
        """Roads that exist in a state."""
        return [road for road in self.roads if state or not road.changing]

    def present_buildings(self, state: int) -> list[Building]:
        """Buildings that exist in a state."""
        return [building for building in self.buildings if state or not building.changing]


ROAD_STEP = 4.0


def _draw_road(
    rng: np.random.Generator,
    start: tuple[float, float],
    heading: float,
    behind: float,
    ahead: float,
    changing: bool,
    bend: float,
) -> Road:
    """A road through `start`, `behind` and `ahead` px long on its two sides, of constant curvature `bend` (1/px)."""
    steps = np.arange(-int(behind / ROAD_STEP), int(ahead / ROAD_STEP) + 1, dtype=np.float64)
    headings = heading + bend * ROAD_STEP * steps
    moves = np.stack([np.cos(headings), np.sin(headings)], -1) * ROAD_STEP
    points: Polygon = np.cumsum(moves, 0)
    points += np.array(start) - points[int(behind / ROAD_STEP)]
    dirt = rng.random() < 0.12
    width = rng.uniform(9, 14) if dirt else rng.uniform(14, 21)
    return Road(points, headings, width, dirt, (), changing)


def _draw_roads(rng: np.random.Generator, canvas: int, static: int, changing: int) -> tuple[Road, ...]:
    """The network: a first road across the canvas, the others branch off it or cross it."""
    roads: list[Road] = []
    for index in range(static + changing):
        is_changing = index >= static
        bend = float(rng.choice([0, 0, rng.uniform(-0.006, 0.006)]))
        if not roads:
            start = tuple(rng.uniform(0.2, 0.8, 2) * canvas)
            heading = rng.uniform(0, math.pi)
            roads.append(_draw_road(rng, start, heading, 1.6 * canvas, 1.6 * canvas, is_changing, bend))
            continue
        main = roads[0]
        inside = np.flatnonzero(((main.points > 0.1 * canvas) & (main.points < 0.9 * canvas)).all(-1))
        if not len(inside):
            continue
        at = int(rng.choice(inside))
        x, y = main.points[at].tolist()
        heading = main.headings[at] + rng.choice([-1, 1]) * math.pi / 2 + rng.normal(0, 0.12)
        behind = 1.6 * canvas if rng.random() < 0.3 else 0.0  # a crossing, or a branch
        ends = not behind and rng.random() < 0.4
        ahead = rng.uniform(0.35, 0.7) * canvas if ends else 1.6 * canvas
        road = _draw_road(rng, (x, y), heading, behind, ahead, is_changing, bend)
        discs = []
        if ends and not road.dirt:
            radius = rng.uniform(15, 21)
            discs.append(Disc(*xy(road.points[-1]), radius, 0.4 * radius if radius > 19 else 0))
        if behind and not road.dirt and rng.random() < 0.3 and not (is_changing and not main.changing):
            discs.append(Disc(x, y, rng.uniform(24, 30), 11))
        roads.append(replace(road, discs=tuple(discs)))
    return tuple(roads)


@dataclass
class _Plot:
    """The ground taken so far: roads as points with a half width, buildings as boxes in frames."""

    roads: tuple[Road, ...]
    boxes: list[tuple[Frame, Box]]

    def __post_init__(self) -> None:
        points = [road.points for road in self.roads] + [
            np.array([[disc.x, disc.y]]) for road in self.roads for disc in road.discs
        ]
        reach = [np.full(len(road.points), road.width / 2 + 4) for road in self.roads] + [
            np.array([disc.radius + 4]) for road in self.roads for disc in road.discs
        ]
        self.points = np.concatenate(points) if points else np.zeros((0, 2))
        self.reach = np.concatenate(reach) if reach else np.zeros(0)

    def free(self, frame: Frame, box: Box, gap: float) -> bool:
        """Whether a box keeps off the roads, and `gap` px away from the other boxes."""
        local = frame.local(self.points)
        off = np.maximum(np.maximum(box.u0 - local[:, 0], local[:, 0] - box.u1), 0)
        away = np.maximum(np.maximum(box.v0 - local[:, 1], local[:, 1] - box.v1), 0)
        if (off * off + away * away < self.reach**2).any():
            return False
        reach = _reach(box) + gap
        return not any(
            math.hypot(frame.x - other.x, frame.y - other.y) < reach + _reach(other_box)
            and _boxes_overlap(frame, box, other, other_box, gap)
            for other, other_box in self.boxes
        )


def _reach(box: Box) -> float:
    """Distance of a box's farthest corner from the origin of its frame."""
    return math.hypot(max(-box.u0, box.u1), max(-box.v0, box.v1))


def _boxes_overlap(frame: Frame, box: Box, other: Frame, other_box: Box, gap: float) -> bool:
    """Separating axis test of two rectangles, the first one widened by `gap` px."""
    mine = frame.box(box.u0 - gap, box.u1 + gap, box.v0 - gap, box.v1 + gap)
    theirs = other.box(other_box.u0, other_box.u1, other_box.v0, other_box.v1)
    angles = np.array([frame.angle, frame.angle + math.pi / 2, other.angle, other.angle + math.pi / 2])
    axes = np.stack([np.cos(angles), np.sin(angles)])
    a, b = mine @ axes, theirs @ axes
    return bool(((a.max(0) >= b.min(0)) & (b.max(0) >= a.min(0))).all())


def _draw_villa(
    rng: np.random.Generator, frame: Frame, lot_width: float, edge: float, road: int, side: int
) -> Building:
    """A villa of 10 to 16 m with a garage wing, driveway and garden.

    Args:
        rng: Source of chance.
        frame: Middle of the main part; v points away from the road.
        lot_width: Width of the garden in px.
        edge: Distance from the middle to the edge of the road in px.
        road: Index of the road, -1 for none.
        side: Side of the road.
    """
    half_width, half_depth = rng.uniform(10, min(18, lot_width / 2 - 2)), rng.uniform(9, 17)
    boxes = [Box(-half_width, half_width, -half_depth, half_depth)]
    left = rng.choice([-1, 1])
    if rng.random() < 0.75:  # garage in front
        wing = rng.uniform(0.42, 0.6) * half_width
        middle = left * (half_width - wing)
        boxes.append(Box(middle - wing, middle + wing, -half_depth - rng.uniform(3, 7), 0))
    if rng.random() < 0.4:  # a room behind
        wing = rng.uniform(0.4, 0.6) * half_width
        middle = -left * (half_width - wing)
        boxes.append(Box(middle - wing, middle + wing, 0, half_depth + rng.uniform(3, 6)))
    bounds = Box(-half_width, half_width, min(b.v0 for b in boxes), max(b.v1 for b in boxes))
    garage = left * half_width * 0.5
    back = bounds.v1 + rng.uniform(10, 24)
    pool = None
    if rng.random() < 0.06:
        turn = np.linspace(0, 2 * math.pi, 12, endpoint=False)
        u, v = rng.uniform(-8, 8), bounds.v1 + 6
        pool = frame.place(*zip((u + 5 * np.cos(turn)).tolist(), (v + 3 * np.sin(turn)).tolist(), strict=True))
    return Building(
        kind="villa",
        frame=frame,
        bounds=bounds,
        boxes=tuple(boxes),
        hip=float(rng.choice([1.0, 1.0, 1.0, 0.55, 0.0])),
        tint=tuple((rng.uniform(0.6, 1.4) * rng.uniform(0.92, 1.08, 3)).tolist()),
        lot=frame.box(-lot_width / 2, lot_width / 2, -edge + 1, back),
        driveway=frame.box(garage - 4, garage + 4, -edge, -half_depth) if road >= 0 else None,
        pool=pool,
        road=road,
        side=side,
        changing=False,
    )


def _draw_row(
    rng: np.random.Generator, road: Road, index: int, side: int, plot: _Plot, canvas: int
) -> tuple[list[Building], list[Polygon]]:
    """Villas and empty lots along one side of a road."""
    villas, empty = [], []
    lot_width, gappy = rng.uniform(27, 46), rng.choice([0.0, 0.12, 0.5])
    position = rng.uniform(0, lot_width)
    length = (len(road.points) - 1) * ROAD_STEP
    while position < length:
        at = int(position / ROAD_STEP)
        position += lot_width
        x, y = road.points[at]
        if not (-30 < x < canvas + 30 and -30 < y < canvas + 30):
            continue
        edge = rng.uniform(26, 31)
        away = road.width / 2 + edge
        heading = road.headings[at]
        frame = Frame(x - side * away * math.sin(heading), y + side * away * math.cos(heading), heading)
        if side < 0:  # v must point away from the road
            frame = replace(frame, angle=heading + math.pi)
        frame = replace(frame, angle=frame.angle + rng.normal(0, 0.03))
        villa = _draw_villa(rng, frame, lot_width, edge, index, side)
        if not plot.free(frame, villa.bounds, 4.5):
            continue
        if rng.random() < gappy:
            empty.append(villa.lot)
            continue
        plot.boxes.append((frame, villa.bounds))
        villas.append(villa)
    return villas, empty


def _draw_large_building(rng: np.random.Generator, plot: _Plot, canvas: int) -> Building | None:
    """A flat or low roof of 25 to 70 m with a parking lot, somewhere free; None if there is no such place."""
    for _ in range(25):
        # halls, and blocks of flats, which are long and narrow
        hall = rng.random() < 0.75
        half_width, half_depth = rng.uniform(26, 75), rng.uniform(20, 55) if hall else rng.uniform(9, 14)
        x, y = rng.uniform(0.08, 0.92, 2) * canvas
        road, angle = -1, rng.uniform(0, 2 * math.pi)
        if plot.roads:
            distances = [float(np.hypot(*(r.points - (x, y)).T).min()) for r in plot.roads]
            nearest = plot.roads[int(np.argmin(distances))]
            at = int(np.argmin(np.hypot(*(nearest.points - (x, y)).T)))
            offset = Frame(*xy(nearest.points[at]), nearest.headings[at]).local(np.array([[x, y]]))[0, 1]
            angle = nearest.headings[at] + (math.pi if offset < 0 else 0)  # the front looks at the road
            if min(distances) < half_depth + nearest.width / 2 + 45:
                road = int(np.argmin(distances))
        frame = Frame(x, y, angle)
        main = Box(-half_width, half_width, -half_depth, half_depth)
        if not plot.free(frame, main, 8):
            continue
        front, back = rng.uniform(14, 34) if rng.random() < 0.6 else rng.uniform(34, 110), rng.uniform(4, 16)
        parking = Box(-half_width - 5, half_width + 5, -half_depth - front, half_depth + back)
        cars = plot.free(frame, parking, 2)
        if not cars:
            parking = Box(-half_width - 3, half_width + 3, -half_depth - 3, half_depth + 3)
        boxes = [main]
        form = rng.random()
        if form < 0.3:  # an L: cut a corner by replacing the front half with a narrower wing
            cut = rng.uniform(-0.3, 0.3) * half_width
            boxes = [Box(-half_width, half_width, 0, half_depth), Box(-half_width, cut, -half_depth, 0)]
        elif form < 0.4 and hall:  # a U: two wings around a courtyard
            wing = rng.uniform(0.3, 0.45) * half_width
            boxes = [Box(-half_width, half_width, half_depth - 2 * wing, half_depth)]
            boxes += [Box(u, u + wing, -half_depth, half_depth) for u in (-half_width, half_width - wing)]
        plot.boxes.append((frame, parking))
        return Building(
            kind="large building",
            frame=frame,
            bounds=main,
            boxes=tuple(boxes),
            hip=float(rng.choice([-1.0, -1.0, 0.0])),  # -1 = flat
            tint=tuple((rng.uniform(0.75, 1.15) * rng.uniform(0.94, 1.06, 3)).tolist()),
            lot=frame.box(parking.u0, parking.u1, parking.v0, parking.v1),
            driveway=None,
            pool=None,
            road=road,
            side=0,
            changing=False,
            parking=cars,
        )
    return None


def draw_layout(rng: np.random.Generator, settings: SyntheticSettings) -> Layout:
    """Draw a place: step 1 of the module's description."""
    canvas = settings.image_size + 2 * MARGIN
    choices = settings.scenarios() or [(scenario, True) for scenario in SCENARIOS]
    weights = np.array([scenario.weight * (1 if appears else REMOVED_WEIGHT) for scenario, appears in choices])
    scenario, appears = choices[int(rng.choice(len(choices), p=weights / weights.sum()))]

    changing_roads = int(rng.choice([1, 1, 1, 2])) if "road" in scenario.kinds else 0
    static_roads = int(rng.choice([0, 1, 1, 2])) if changing_roads else int(rng.choice([0, 1, 1, 1, 2, 2]))
    roads = _draw_roads(rng, canvas, static_roads, changing_roads)
    plot = _Plot(roads, [])

    large: list[Building] = []
    number = int(rng.choice([1, 1, 1, 2])) if "large building" in scenario.kinds else 0
    for _ in range(number):
        building = _draw_large_building(rng, plot, canvas)
        large += [replace(building, changing=True)] if building else []
    if rng.random() < 0.12:
        building = _draw_large_building(rng, plot, canvas)
        large += [building] if building else []

    villas: list[Building] = []
    empty: list[Polygon] = []
    for index, road in enumerate(roads):
        if road.changing and "villa" not in scenario.kinds:
            continue
        wanted = road.changing or scenario.kinds == ("villa",)
        if not wanted and rng.random() < 0.45:
            continue
        for side in [(1, -1), (1, -1), (1, -1), (1,), (-1,)][int(rng.integers(5))]:
            row, lots = _draw_row(rng, road, index, side, plot, canvas)
            villas += [replace(villa, changing=road.changing) for villa in row]
            empty += [] if road.changing else lots
    for _ in range(int(rng.choice([0, 0, 1, 2])) if roads else 2):  # lone houses away from the roads
        frame = Frame(*xy(rng.uniform(0.1, 0.9, 2) * canvas), rng.uniform(0, 2 * math.pi))
        villa = _draw_villa(rng, frame, 40, 26, -1, 0)
        if plot.free(frame, villa.bounds, 8):
            plot.boxes.append((frame, villa.bounds))
            villas.append(villa)
    if scenario.kinds == ("villa",):
        villas = _choose_changing(rng, villas, canvas)

    ground: GroundKind = rng.choice(["grass", "field", "field", "soil"])
    smooth = crop_noise("smooth", canvas, rng)
    woods = rng.choice([0.02, 0.06, 0.15, 0.4, 0.75], p=[0.25, 0.25, 0.2, 0.15, 0.15])
    pond = None
    if rng.random() < 0.08:
        frame = Frame(*xy(rng.uniform(0, 1, 2) * canvas), 0.0)
        radius = rng.uniform(20, 45)
        if plot.free(frame, Box(-radius, radius, -radius, radius), 4):
            turn = np.linspace(0, 2 * math.pi, 24, endpoint=False)
            wave = radius * (0.8 + 0.15 * np.sin(2 * turn + rng.uniform(0, 6)) + 0.05 * np.sin(5 * turn))
            pond = np.stack([frame.x + wave * np.cos(turn), frame.y + wave * np.sin(turn)], -1)
    return Layout(
        canvas=canvas,
        roads=roads,
        buildings=tuple(villas + large),
        empty_lots=tuple(empty),
        ground=ground,
        patches=rng.choice([kind for kind in ("grass", "field", "soil") if kind != ground]),
        site=rng.choice(["soil", "woods", "ground"], p=[0.45, 0.3, 0.25]),
        garden=rng.choice(["grass", "grass", "grass", "field", "soil"]),
        woodedness=(woods * (1 + 0.7 * smooth)).clip(0, 1).astype(np.float32),
        pond=pond,
        appears=appears,
    )


def _choose_changing(rng: np.random.Generator, villas: list[Building], canvas: int) -> list[Building]:
    """Mark some of the villas in view as changing: all, a run of neighbours, or each by chance."""
    seen = [i for i, v in enumerate(villas) if 0 < v.frame.x < canvas and 0 < v.frame.y < canvas]
    if not seen:
        return villas
    mode = rng.random()
    if mode < 0.3:
        chosen = set(seen)
    elif mode < 0.75:
        first = int(rng.integers(len(seen)))
        chosen = set(seen[first : first + int(rng.integers(1, 5))])
    else:
        chosen = {i for i in seen if rng.random() < 0.5} or {seen[0]}
    return [replace(villa, changing=i in chosen) for i, villa in enumerate(villas)]


MIN_VISIBLE = {"villa": 160, "large building": 700, "road": 500}  # px that a changed object must show
MIN_VISIBLE_SHARE = 0.4  # of a building's footprint


class Shapes:
    """Polygons of a canvas, drawn `SUPERSAMPLING` times too large."""

    def __init__(self, canvas: int, mode: str = "L", background: Any = 0) -> None:
        self.image = Image.new(mode, (canvas * SUPERSAMPLING,) * 2, background)
        self.draw = ImageDraw.Draw(self.image)

    def polygon(self, points: Polygon, fill: Any = 255) -> None:
        """Fill a polygon (N, 2)."""
        self.draw.polygon((points * SUPERSAMPLING).ravel().tolist(), fill)

    def line(self, points: Polygon, fill: Any, width: float) -> None:
        """Draw a line through points (N, 2), `width` px wide."""
        self.draw.line((points * SUPERSAMPLING).ravel().tolist(), fill, round(width * SUPERSAMPLING))

    def disc(self, x: float, y: float, radius: float, fill: Any = 255) -> None:
        """Fill a circle."""
        box = (np.array([x - radius, y - radius, x + radius, y + radius]) * SUPERSAMPLING).tolist()
        self.draw.ellipse(box, fill)

    def road(self, road: Road, widen: float = 0.0, fill: Any = 255) -> None:
        """Fill a road with its discs, `widen` px wider on each side; islands are filled too."""
        self.polygon(road.outline(road.width + 2 * widen), fill)
        for disc in road.discs:
            self.disc(disc.x, disc.y, disc.radius + widen, fill)

    def islands(self, roads: Sequence[Road], fill: Any) -> None:
        """Fill the islands of roads."""
        for disc in (disc for road in roads for disc in road.discs if disc.island):
            self.disc(disc.x, disc.y, disc.island, fill)

    def smooth(self) -> Image.Image:
        """The shapes at the size of the canvas, with smooth edges."""
        return self.image.reduce(SUPERSAMPLING)

    def sharp(self) -> NDArray[np.uint8]:
        """The values at the size of the canvas, never mixed."""
        return np.asarray(self.image)[::SUPERSAMPLING, ::SUPERSAMPLING]


def crop(values: NDArray[Any]) -> NDArray[Any]:
    """The image's part of a canvas."""
    return values[MARGIN:-MARGIN, MARGIN:-MARGIN]


def changing_objects(layout: Layout) -> NDArray[np.uint8]:
    """Pixels of the changing objects, (H, W): 0 = none, i + 1 = `layout.buildings[i]`, 255 - i = `layout.roads[i]`."""
    shapes = Shapes(layout.canvas)
    for i, road in enumerate(layout.roads):
        if road.changing:
            shapes.road(road, fill=255 - i)
    for road in layout.present_roads(0):  # where an old road runs, no new one appears
        shapes.road(road, fill=0)
    shapes.islands(layout.roads, 0)
    for i, building in enumerate(layout.buildings):
        if building.changing:
            for polygon in building.footprint():
                shapes.polygon(polygon, i + 1)
    return crop(shapes.sharp())


def drop_hardly_visible(layout: Layout) -> Layout | None:
    """Remove changing buildings that the border cuts to a remnant; None if no visible change is left."""
    objects = changing_objects(layout)
    visible = np.bincount(objects.ravel(), minlength=256)
    if any(road.changing and visible[255 - i] < MIN_VISIBLE["road"] for i, road in enumerate(layout.roads)):
        return None
    whole = [sum((b.u1 - b.u0) * (b.v1 - b.v0) for b in building.boxes) for building in layout.buildings]
    kept = tuple(
        building
        for i, building in enumerate(layout.buildings)
        if not building.changing or visible[i + 1] >= max(MIN_VISIBLE[building.kind], MIN_VISIBLE_SHARE * whole[i])
    )
    wanted = {b.kind for b in layout.buildings if b.changing}
    if wanted != {b.kind for b in kept if b.changing}:
        return None
    return replace(layout, buildings=kept) if visible[1:].any() else None
