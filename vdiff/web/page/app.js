// The page: fields, grids of images, and the choice of who draws. Both back ends have `note` and `draw(model, want)`.

import { missing, openBrowser } from "./browser.js";
import { ask, openServer } from "./server.js";

const byId = (id) => document.getElementById(id);
const say = (text, failed = false) => {
  byId("status").textContent = text;
  byId("status").classList.toggle("failed", failed);
};
const progress = (part) => { byId("loaded").value = part; };
const steps = (number) => `${number} ${number === 1 ? "step" : "steps"}`;
const MAX_SEED = (1n << 64n) - 1n, CELL = 96, GAP = 4;

/** The first `count` images of a sheet without gaps, enlarged without smoothing to cells of about `CELL` pixels. */
function show(canvas, { sheet, columns }, [, height, width], count) {
  const scale = Math.max(1, Math.round(CELL / width)), across = Math.ceil(Math.sqrt(count));
  const [w, h] = [width * scale, height * scale];
  canvas.width = across * (w + GAP) - GAP;
  canvas.height = Math.ceil(count / across) * (h + GAP) - GAP;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  for (let k = 0; k < count; k++) {
    const from = [(k % columns) * width, Math.floor(k / columns) * height, width, height];
    context.drawImage(sheet, ...from, (k % across) * (w + GAP), Math.floor(k / across) * (h + GAP), w, h);
  }
}

/** A canvas with a caption: its name, and a place for more. */
function figure(name) {
  const whole = document.createElement("figure"), canvas = document.createElement("canvas");
  const caption = document.createElement("figcaption"), more = document.createElement("span");
  canvas.setAttribute("role", "img");
  caption.append(name, more);
  whole.append(canvas, caption);
  byId("grids").append(whole);
  return { whole, canvas, more };
}

/** What the form asks for; null while a seed is not a number. */
function asked() {
  const [seed, second] = ["seed", "second"].map((id) => {
    const word = byId(id).value.trim();
    const isRight = /^[0-9]+$/.test(word) && BigInt(word) <= MAX_SEED;
    byId(id).setAttribute("aria-invalid", String(!isRight));
    return isRight ? BigInt(word) : null;
  });
  if (seed === null || second === null) return null;
  const label = byId("class").value === "" ? null : Number(byId("class").value);
  const [blend, count, guidance] = [Number(byId("blend").value) / 100, Number(byId("count").value), Number(byId("guidance").value)];
  return { seed, second, blend, count, label, guidance, prompt: byId("prompt").value };
}

/** Fill the fields and hide those that no model takes. */
function prepare(page) {
  byId("class").add(new Option("each in turn", ""));
  page.classes.forEach((name, k) => byId("class").add(new Option(name, k)));
  byId("of_class").hidden = !page.classes.length;
  byId("prompt").value = page.prompt ?? "";
  byId("of_prompt").hidden = page.prompt === null;
  const range = page.models.map((model) => model.guidance).find(Boolean);
  byId("of_guidance").hidden = !range;
  if (range) [byId("guidance").min, byId("guidance").max, byId("guidance").value] = [...range, range[0]];
  for (const option of [...byId("count").options]) if (Number(option.value) > page.max_images) option.remove();
}

/** The words of an image's alternative text. */
function described(page, want) {
  const seed = want.blend ? `${100 * want.blend} % from seed ${want.seed} to ${want.second}` : `seed ${want.seed}`;
  const label = want.label === null ? "" : `, class ${page.classes[want.label]}`;
  return seed + label + (page.prompt === null ? "" : `, ${want.prompt || "no prompt"}`);
}

async function main() {
  const page = await (await ask("models.json")).json();
  if (!page.draw && missing()) throw new Error(missing());
  const backend = page.draw ? openServer(page) : await openBrowser(page, say, progress);
  byId("loaded").hidden = true;
  byId("runtime").textContent = backend.note;
  prepare(page);
  const models = page.models.map((model) => ({ ...model, ...figure(`${model.name}, ${steps(model.steps)}`) }));
  let teacher = null;
  if (page.teacher) {
    teacher = figure(`teacher ${page.teacher.name}, ${steps(page.teacher.steps)}, seed 0, drawn beforehand`);
    teacher.sheet = await createImageBitmap(await (await ask("teacher.png")).blob());
  }
  const showTeacher = (want) => {
    show(teacher.canvas, { sheet: teacher.sheet, columns: 4 }, page.shape, Math.min(want.count, 16));
    const isSame = want.seed === 0n && !want.blend && want.label === null && want.prompt === (page.prompt ?? "");
    teacher.whole.classList.toggle("other", !isSame);
    teacher.canvas.setAttribute("aria-label", `Images by the teacher ${page.teacher.name}, seed 0${isSame ? "" : ", not what is asked for now"}`);
  };

  let want = null, busy = false;
  self.vdiff = { drawn: 0, images: {}, milliseconds: {} };
  const drawAll = async () => {
    let notes = [];
    while (want) {
      const now = want;
      want = null;
      if (teacher) showTeacher(now);
      for (const model of models) {
        const drawn = await backend.draw(model, now);
        const each = drawn.milliseconds / now.count;
        model.more.textContent = `: ${each.toFixed(1)} ms per image`;
        show(model.canvas, drawn, page.shape, now.count);
        model.canvas.setAttribute("aria-label", `Images by ${model.name}: ${described(page, now)}`);
        [self.vdiff.images[model.name], self.vdiff.milliseconds[model.name]] = [drawn.values, each];
        notes = drawn.notes;
        if (want) break;
      }
    }
    performance.mark("drawn");
    self.vdiff.drawn++;
    say(["Drawn.", ...notes].join(" "));
  };
  const redraw = async () => {
    want = asked();
    if (!want) return say("A seed is a whole number from 0 to 18446744073709551615.", true);
    if (busy) return undefined;
    busy = true;
    try {
      await drawAll();
    } catch (error) {
      failed(error);
    } finally {
      busy = false;
    }
    return undefined;
  };
  const setSeed = (seed) => {
    byId("seed").value = String(seed);
    redraw();
  };
  byId("controls").addEventListener("input", redraw);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("another").addEventListener("click", () => setSeed(crypto.getRandomValues(new Uint32Array(1))[0]));
  byId("seed").addEventListener("keydown", (event) => {
    const change = { ArrowUp: 1n, ArrowDown: -1n }[event.key], now = asked()?.seed;
    if (!change || now === undefined || now + change < 0n || now + change > MAX_SEED) return;
    event.preventDefault();
    setSeed(now + change);
  });
  byId("save").addEventListener("click", () => save(models.map((model) => model.canvas), `seed-${byId("seed").value}.png`));
  await redraw();
}

/** Download canvases side by side as one PNG. */
function save(canvases, name) {
  const whole = document.createElement("canvas");
  whole.width = canvases.reduce((sum, canvas) => sum + canvas.width + 4 * GAP, -4 * GAP);
  whole.height = Math.max(...canvases.map((canvas) => canvas.height));
  let left = 0;
  for (const canvas of canvases) {
    whole.getContext("2d").drawImage(canvas, left, 0);
    left += canvas.width + 4 * GAP;
  }
  whole.toBlob((blob) => {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
    link.click();
    URL.revokeObjectURL(link.href);
  });
}

function failed(error) {
  const file = location.protocol === "file:" ? " Open this folder by a web server: python -m http.server" : "";
  say(`This page cannot draw: ${error.message.replace(/\.$/, "")}.${file}`, true);
}

main().catch(failed);
