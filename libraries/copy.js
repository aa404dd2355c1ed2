// Copies the libraries of the map, and the licences of all that is bundled in them, into kcfi/scenes/libraries.
// Run by `make libraries`, after `npm ci`.
import { copyFileSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url)), target = join(here, "..", "kcfi", "scenes", "libraries");
const files = {  // named .js: not every web server knows what .mjs is
  "maplibre-gl.js": "maplibre-gl/dist/maplibre-gl.mjs",
  "maplibre-gl-worker.js": "maplibre-gl/dist/maplibre-gl-worker.mjs",
  "maplibre-gl.css": "maplibre-gl/dist/maplibre-gl.css",
  "geotiff.js": "geotiff/dist-browser/geotiff.js",
};

const packages = Object.entries(JSON.parse(readFileSync(join(here, "package-lock.json"), "utf8")).packages);
const licences = packages.filter(([path]) => path).map(([path, { version, license }]) => {
  const folder = join(here, path), files = readdirSync(folder);
  const [own, readme] = [/^licen[cs]e/i, /^readme\.md$/i].map(name => files.find(file => name.test(file)));
  const read = name => readFileSync(join(folder, name), "utf8");
  const text = own ? read(own) : readme && /^#+ *licen[cs]/im.test(read(readme)) && read(readme).slice(read(readme).search(/^#+ *licen[cs]/im));
  if (!text) throw new Error(`${path} brings no text of its licence`);
  return `==== ${path.replace(/^.*node_modules\//, "")} ${version}, ${license} ====\n\n${text}`;
});

rmSync(target, { recursive: true, force: true });
mkdirSync(target, { recursive: true });
for (const [name, source] of Object.entries(files)) copyFileSync(join(here, "node_modules", source), join(target, name));
writeFileSync(join(target, "LICENSES.txt"), licences.join("\n"));  // last: with it the folder is complete
