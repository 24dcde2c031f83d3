// Walk the rendered pages as readers do, on a desktop and on a telephone, light and dark, and report what is wrong.
//
//   node tools/audit.mjs FOLDER CHROMIUM [SCREENSHOTS | -] [PAGE …]
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

const [folder, browserPath, shots, ...chosen] = process.argv.slice(2);
const screenshots = shots === "-" ? undefined : shots;
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

// One context for each way of looking, so that what pages share is fetched once; the weight of a first view is taken
// in a context of its own, with nothing cached.
async function visit(context, page, name, scheme) {
  const tab = await context.newPage();
  const found = { page, view: name, scheme, console: [], external: [], failed: [], overflow: 0, axe: [] };
  tab.on("console", (message) => message.type() === "error" && found.console.push(message.text().slice(0, 200)));
  tab.on("pageerror", (error) => found.console.push(String(error).slice(0, 200)));
  tab.on("requestfailed", (request) => request.url().startsWith(base) && found.failed.push(request.url()));
  tab.on("response", (response) => response.status() >= 400 && found.failed.push(`${response.status()} ${response.url()}`));
  await tab.route(outside, (route) => {
    found.external.push(route.request().url().slice(0, 200));
    return route.abort();
  });
  await tab.goto(`${base}/${page}`, { waitUntil: "load" });
  await tab.waitForTimeout(150);
  found.overflow = await tab.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  if (screenshots) {
    mkdirSync(screenshots, { recursive: true });
    await tab.screenshot({ path: join(screenshots, `${page.replace(/\W+/g, "-")}-${name}-${scheme}.png`) });
  }
  await tab.evaluate(axe);
  found.axe = await tab.evaluate(async () => {
    const result = await axe.run(document, { resultTypes: ["violations"] });
    return result.violations.map((v) => `${v.id} (${v.impact}) × ${v.nodes.length}: ${v.nodes[0].html.slice(0, 160)}`);
  });
  await tab.close();
  return found;
}

const outside = (url) => !url.href.startsWith(base) && !["data:", "blob:"].includes(url.protocol);

async function weigh(page) {
  const context = await browser.newContext(VIEWS[0][1]);
  const tab = await context.newPage();
  let weight = 0;
  tab.on("response", async (response) => {
    const body = await response.body().catch(() => Buffer.alloc(0));
    const packed = /\.(woff2?|png)$/.test(new URL(response.url()).pathname);
    weight += packed ? body.length : gzipSync(body).length;
  });
  await tab.route(outside, (route) => route.abort());
  await tab.goto(`${base}/${page}`, { waitUntil: "networkidle" });
  await context.close();
  return weight;
}

const pages = chosen.length ? chosen : pagesBelow(folder).sort();
await Promise.all(["light", "dark"].map(async (scheme) => {
  const contexts = await Promise.all(
    VIEWS.map(([, view]) => browser.newContext({ ...view, colorScheme: scheme, reducedMotion: "reduce" })));
  for (const page of pages) {
    for (const [i, [name]] of VIEWS.entries()) {
      const found = await visit(contexts[i], page, name, scheme);
      if (name === "desktop" && scheme === "light") found.weight = await weigh(page);
      console.log(JSON.stringify(found));
    }
  }
}));
await browser.close();
server.close();
