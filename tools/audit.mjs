// Walk the rendered pages as readers do, on a desktop and on a telephone, light and dark, and report what is wrong.
//
//   node tools/audit.mjs FOLDER CHROMIUM [SCREENSHOTS]
//
// Prints one JSON line a visit: console errors, external and failed requests, horizontal overflow, accessibility
// violations (axe), and the gzipped weight of the first view. FOLDER is served on loopback by this program itself.
import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync } from "node:fs";
import { gzipSync } from "node:zlib";
import { createRequire } from "node:module";
import { extname, join, relative } from "node:path";

const require = createRequire(import.meta.url);
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const [folder, browserPath, screenshots] = process.argv.slice(2);
const TYPES = {
  ".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".json": "application/json",
  ".png": "image/png", ".woff2": "font/woff2", ".woff": "font/woff", ".ttf": "font/ttf", ".ico": "image/x-icon",
  ".ipynb": "application/x-ipynb+json",
};
const VIEWS = [
  ["desktop", { viewport: { width: 1440, height: 900 } }],
  ["phone", { viewport: { width: 390, height: 844 }, isMobile: true, hasTouch: true }],
];

const server = createServer(async (request, response) => {
  const path = decodeURIComponent(new URL(request.url, "http://x").pathname);
  try {
    const body = await readFile(join(folder, path.endsWith("/") ? path + "index.html" : path));
    response.writeHead(200, { "content-type": TYPES[extname(path)] || "application/octet-stream" }).end(body);
  } catch {
    response.writeHead(404).end();
  }
});
await new Promise((done) => server.listen(0, "127.0.0.1", done));
const base = `http://127.0.0.1:${server.address().port}`;

function pagesBelow(place) {
  return readdirSync(place).flatMap((name) => {
    const path = join(place, name);
    if (statSync(path).isDirectory()) return name === "_static" || name === "_sources" ? [] : pagesBelow(path);
    return name.endsWith(".html") ? [relative(folder, path).replaceAll("\\", "/")] : [];
  });
}

const options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
const browser = await chromium.launch({
  executablePath: browserPath, args: [...options, "--disable-component-update", "--disable-sync"],
});

async function visit(page, name, view, scheme) {
  const context = await browser.newContext({ ...view, colorScheme: scheme, reducedMotion: "reduce" });
  const tab = await context.newPage();
  const found = { page, view: name, scheme, console: [], external: [], failed: [], overflow: 0, axe: [], weight: 0 };
  tab.on("console", (message) => message.type() === "error" && found.console.push(message.text().slice(0, 200)));
  tab.on("pageerror", (error) => found.console.push(String(error).slice(0, 200)));
  tab.on("requestfailed", (request) => request.url().startsWith(base) && found.failed.push(request.url()));
  tab.on("response", async (response) => {
    if (response.status() >= 400) found.failed.push(`${response.status()} ${response.url()}`);
    const body = await response.body().catch(() => null);
    const packed = /\.(woff2?|png)$/.test(new URL(response.url()).pathname);
    if (body) found.weight += packed ? body.length : gzipSync(body).length;
  });
  await tab.route("**/*", (route) => {
    const url = route.request().url();
    if (url.startsWith(base) || url.startsWith("data:") || url.startsWith("blob:")) return route.continue();
    found.external.push(url.slice(0, 200));
    return route.abort();
  });
  await tab.goto(`${base}/${page}`, { waitUntil: "load" });
  await tab.waitForLoadState("networkidle");
  found.overflow = await tab.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  if (screenshots) {
    mkdirSync(screenshots, { recursive: true });
    await tab.screenshot({ path: join(screenshots, `${page.replace(/\W+/g, "-")}-${name}-${scheme}.png`) });
  }
  await tab.addScriptTag({ content: axe });
  found.axe = await tab.evaluate(async () => {
    const result = await axe.run(document, { resultTypes: ["violations"] });
    return result.violations.map((v) => `${v.id} (${v.impact}) × ${v.nodes.length}: ${v.nodes[0].html.slice(0, 160)}`);
  });
  await context.close();
  console.log(JSON.stringify(found));
}

const queue = pagesBelow(folder).sort().flatMap((page) =>
  VIEWS.flatMap(([name, view]) => ["light", "dark"].map((scheme) => [page, name, view, scheme])));
const workers = Array.from({ length: 2 }, async () => {
  while (queue.length) await visit(...queue.shift());
});
await Promise.all(workers);
await browser.close();
server.close();
