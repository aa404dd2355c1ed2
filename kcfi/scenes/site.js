// The map of a site (site.html): two maps that move as one, the right one cut off where the swipe is. A classic script, so
// that it can say what is missing where modules do not load (a page that was opened as a file).
"use strict";
const one = id => document.getElementById(id);
const absolute = name => new URL(name, document.baseURI).href;
const settings = JSON.parse(one("settings").textContent);
const WORLD = 2 * Math.PI * 6378137;  // m around the equator: what tile 0/0/0 of EPSG:3857 shows
const SIDE = settings.side;  // px of a tile
const NEAR = 4;  // px that a click may miss a polygon by
const ROOM = { top: 150, bottom: 50, left: 50, right: 50 };  // px around a change that is flown to; its text stands above it
const opened = {};  // name of a GeoTIFF -> its levels, from the finest

function complain(text) {
  one("problem").textContent = text;
  one("problem").hidden = false;
}

async function open(name) {  // as a whole, if the server does not give parts of a file
  const answer = await fetch(absolute(name), { headers: { Range: "bytes=0-0" } });
  if (!answer.ok) throw new Error(`${name} cannot be read (${answer.status})`);
  const parts = answer.status === 206;
  const tiff = parts ? await GeoTIFF.fromUrl(absolute(name)) : await GeoTIFF.fromBlob(await answer.blob());
  const images = await Promise.all(Array.from({ length: await tiff.getImageCount() }, (_, index) => tiff.getImage(index)));
  const [left, , right, top] = images[0].getBoundingBox();
  return images.map(image => ({ image, left, top, pixel: (right - left) / image.getWidth() }));
}

async function drawTile({ url }, { signal }) {  // of cog://NAME/ZOOM/COLUMN/ROW
  const [, name, zoom, x, y] = /^cog:\/\/(.+)\/(\d+)\/(\d+)\/(\d+)$/.exec(url);
  const span = WORLD / 2 ** zoom;
  opened[name] ??= open(name).catch(error => { delete opened[name]; throw error; });  // the next tile tries again
  const levels = await opened[name];
  const { image, left, top, pixel } = levels.findLast(level => level.pixel < 1.01 * span / SIDE) ?? levels[0];
  const [column, row, side] = [x * span - WORLD / 2 - left, y * span - WORLD / 2 + top, span].map(m => Math.round(m / pixel));
  const window = [column, row, column + side, row + side];
  const values = await image.readRasters({ window, width: SIDE, height: SIDE, interleave: true, signal });
  const tile = new ImageData(SIDE, SIDE);
  if (values.length === tile.data.length) tile.data.set(values);
  else for (const { value, colour } of settings.classes)
    values.forEach((pixel, index) => { if (pixel === value) tile.data.set([...colour, 255], 4 * index); });
  return { data: await createImageBitmap(tile) };
}

function style(shown) {  // of a map that shows a date
  const bounds = settings.bounds, sources = { changes: { type: "geojson", data: absolute("changes.geojson") } };
  const layers = [...settings.dates, "mask.tif"].map(name => {
    sources[name] = { type: "raster", tiles: [`cog://${name}/{z}/{x}/{y}`], tileSize: SIDE, maxzoom: settings.zoom, bounds };
    const paint = { "raster-fade-duration": 0, "raster-resampling": name === "mask.tif" ? "nearest" : "linear" };
    return { id: name, type: "raster", source: name, paint, layout: { visibility: name === shown ? "visible" : "none" } };
  });
  const colour = ["match", ["get", "class"], ...settings.classes.flatMap(one => [one.label, `rgb(${one.colour})`]), "#fff"];
  const inside = { "fill-color": colour, "fill-opacity": ["match", ["get", "kind"], "appeared", 0.25, 0.01] };
  layers.push({ id: "inside", type: "fill", source: "changes", paint: inside });
  for (const [kind, dashes] of Object.entries({ appeared: null, removed: [3, 1.5], changed: [1, 1.2] })) {
    const paint = { "line-color": colour, "line-width": 2, ...(dashes && { "line-dasharray": dashes }) };
    layers.push({ id: kind, type: "line", source: "changes", paint, filter: ["==", ["get", "kind"], kind] });
  }
  const yellow = { "line-color": "#fff200", "line-width": 4 };
  layers.push({ id: "chosen", type: "line", source: "changes", paint: yellow, filter: ["==", ["get", "id"], 0] });
  return { version: 8, sources, layers };
}

async function start() {
  const maplibre = await import(absolute("libraries/maplibre-gl.js"));
  maplibre.setWorkerUrl(absolute("libraries/maplibre-gl-worker.js"));
  maplibre.addProtocol("cog", drawTile);
  const fit = { padding: 16, maxZoom: settings.zoom + 1 };
  const maps = [["left", settings.dates[0]], ["right", settings.dates.at(-1)]].map(([side, shown]) => new maplibre.Map({
    container: `${side}-map`, style: style(shown), bounds: settings.bounds, fitBoundsOptions: fit, maxZoom: settings.zoom + 4,
    attributionControl: false, dragRotate: false, pitchWithRotate: false, touchPitch: false, renderWorldCopies: false,
    locale: { "Map.Title": `Map, date on the ${side}` },
  }));
  const [left, right] = maps, popup = new maplibre.Popup({ maxWidth: "300px", closeOnClick: false, focusAfterOpen: false });
  right.addControl(new maplibre.NavigationControl({ showCompass: false }), "top-right");
  right.addControl(new maplibre.ScaleControl(), "bottom-left");

  let moving = false;
  for (const [map, other] of [[left, right], [right, left]]) {
    map.touchZoomRotate.disableRotation();
    map.keyboard.disableRotation();
    map.on("move", () => {
      if (moving) return;
      moving = true;
      other.jumpTo({ center: map.getCenter(), zoom: map.getZoom() });
      moving = false;
    });
    map.on("movestart", () => one("maps").setAttribute("aria-busy", "true"));
    map.on("idle", () => one("maps").setAttribute("aria-busy", String(!maps.every(map => map.loaded()))));
    map.on("error", event => complain(event.error.message));
    map.on("click", ({ point: { x, y }, lngLat }) => {
      const [hit] = map.queryRenderedFeatures([[x - NEAR, y - NEAR], [x + NEAR, y + NEAR]], { layers: ["inside"] });
      choose(hit ? one(`change-${hit.properties.id}`) : null, lngLat);
    });
    for (const name of ["mouseenter", "mouseleave"])
      map.on(name, "inside", () => { map.getCanvas().style.cursor = name === "mouseenter" ? "pointer" : ""; });
  }

  function choose(row, place) {  // a change by its entry in the list, or none; without a place the map flies to it
    document.querySelectorAll(".chosen").forEach(element => element.classList.remove("chosen"));
    for (const map of maps) map.setFilter("chosen", ["==", ["get", "id"], Number(row?.dataset.id ?? 0)]);
    history.replaceState(null, "", row ? `#${row.id}` : location.pathname + location.search);
    popup.remove();
    if (!row) return;
    row.classList.add("chosen");
    const [west, , east, north] = JSON.parse(row.dataset.bounds);
    if (!place) {
      one("maps").scrollIntoView({ block: "nearest" });
      right.fitBounds(JSON.parse(row.dataset.bounds), { padding: ROOM, maxZoom: settings.zoom + 1 });
    } else one("list").scrollTo({ top: row.offsetTop - one("list").offsetTop });
    const content = document.createElement("div");
    content.append(...row.cloneNode(true).childNodes);
    popup.setLngLat(place ?? [(west + east) / 2, north]).setDOMContent(content).addTo(right);
  }

  function swipe() {
    one("divider").style.left = `${one("swipe").value}%`;
    right.getCanvas().style.clipPath = `inset(0 0 0 ${one("swipe").value}%)`;
  }

  function show(layers, visible, onto = maps) {
    for (const map of onto) for (const layer of layers) map.setLayoutProperty(layer, "visibility", visible ? "visible" : "none");
  }

  await Promise.all(maps.map(map => map.once("load")));
  swipe();
  one("swipe").addEventListener("input", swipe);
  one("divider").addEventListener("pointerdown", event => { one("divider").setPointerCapture(event.pointerId); event.preventDefault(); });
  one("divider").addEventListener("pointermove", event => {
    if (!one("divider").hasPointerCapture(event.pointerId)) return;
    const box = one("maps").getBoundingClientRect();
    one("swipe").value = 100 * (event.clientX - box.left) / box.width;
    swipe();
  });
  one("outlines").addEventListener("change", event => show(["inside", "appeared", "removed", "changed"], event.target.checked));
  one("mask").addEventListener("change", event => show(["mask.tif"], event.target.checked));
  ["left", "right"].forEach((side, index) => one(side)?.addEventListener("change", event => {
    show(settings.dates, false, [maps[index]]);
    show([settings.dates[event.target.value]], true, [maps[index]]);
  }));
  one("whole").addEventListener("click", () => right.fitBounds(settings.bounds, fit));
  document.addEventListener("keydown", event => { if (event.key === "Escape") choose(null); });
  document.querySelectorAll(".change").forEach(row => row.addEventListener("click", () => choose(row)));
  const linked = /^#change-\d+$/.test(location.hash) && one(location.hash.slice(1));
  if (linked) choose(linked);
}

start().catch(error => complain(
  location.protocol === "file:"
    ? "The map needs a web server: run `python -m http.server` in this folder, and open http://localhost:8000."
    : `The map cannot be drawn: ${error.message}. All changes are listed below.`
));
